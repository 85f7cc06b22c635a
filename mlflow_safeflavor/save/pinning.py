"""Pins of a model being saved: needs of its parts, and distributions that its rehearsal used."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.utils import canonicalize_name

from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.environment.closure import closure_of
from mlflow_safeflavor.environment.files import environment_files, missing_lines
from mlflow_safeflavor.environment.hashes import lock_file
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.environment.requirements import DEFAULT_ROOTS, GRAPH_ROOTS, server_roots
from mlflow_safeflavor.environment.used import Use
from mlflow_safeflavor.errors import EnvironmentMismatchError
from mlflow_safeflavor.module import user_code
from mlflow_safeflavor.tasks.inputs.processor import requirements_of

__all__ = ["Pinning", "needs_of", "optional_modules"]

_logger = logging.getLogger("mlflow.safeflavor")


class Pinning:
    """Writes environment.json and the files that pip, conda and uv install from.

    Args:
        layout: The staged artifact.
        needs: From ``needs_of``; where there are a graph and a module, pins that only the module
            needs are kept apart.
        hashes: Whether each pin gets the hashes of its files.
        wanted: The user's arguments: ``torch_index``, ``pip_requirements``,
            ``extra_pip_requirements`` and ``conda_env``, see
            ``environment.files.environment_files``.
    """

    def __init__(
        self, layout: Layout, needs: Mapping[str, Sequence[str]], *, hashes: bool, **wanted: Any
    ) -> None:
        self._layout, self._needs, self._hashes, self._wanted = layout, needs, hashes, wanted
        self._recorded: Environment | None = None

    def write(self, used: Mapping[str, Use] | None = None) -> Environment:
        """Write the files for the needs of the model's parts and for used distributions.

        Raises:
            EnvironmentMismatchError: See ``environment.files.environment_files``.
        """
        used = used or {}
        graph = [
            *self._needs.get("graph", ()),
            # Opened before the module was loaded: see ``find_used``.
            *(name for name, use in used.items() if use.engine != "module"),
        ]
        roots = [*self._needs.get("module", ()), *(graph if "graph" in self._needs else ()), *used]
        recorded = environment_files(
            self._layout.root,
            list(dict.fromkeys(roots)),
            graph_roots=graph if self._needs.keys() == {"graph", "module"} else None,
            # Compared at load where torch is imported; a CPU with other kernels rounds otherwise.
            torch_build={
                "version": torch.__version__,
                "cuda": torch.version.cuda,
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
            **self._wanted,
        )
        write_json(self._layout.environment, recorded.to_json())
        self._recorded = recorded
        return recorded

    def finish(self, used: Mapping[str, Use] | None) -> bool:
        """Pin the distributions that a rehearsal used, then look up hashes where they are wanted.

        Args:
            used: None where there was no rehearsal.

        Returns:
            Whether files were written.

        Raises:
            EnvironmentMismatchError: See ``add`` and ``hashes.lock``.
        """
        written = used is not None and self.add(used)
        if used is None:
            _logger.info(
                "safeflavor: not rehearsed, so the pins are those of the model's classes, hooks "
                "and processor; what else its code imports or reads is not among them unless "
                "extra_pip_requirements says so"
            )
        # Last, and once: it asks an index for every pin.
        if self._hashes:
            lock_file(self._layout, self._recorded or self.write())
        return written or self._hashes

    def add(self, used: Mapping[str, Use]) -> bool:
        """Pin used distributions that are not pinned yet; returns whether files were written.

        Where the user wrote all lines they stay, and a warning gives those that are missing.

        Raises:
            EnvironmentMismatchError: It ran other versions than this process has, or see ``write``.
        """
        recorded = self._recorded or self.write()
        # Pins name versions of this process, and the clean one has no PYTHONPATH.
        _require_versions(recorded, used)
        if any(self._wanted[name] is not None for name in ("pip_requirements", "conda_env")):
            _warn_of_missing(self._layout.root, used)
            return False
        # A pin that only the module had is news, too, once the graph used it.
        news = {
            name: use
            for name, use in used.items()
            if name not in recorded.distributions
            or (use.engine != "module" and name in recorded.only_module)
        }
        if not news:
            return False
        self.write(used)
        facts = (f"{name} {use.version} (for {use.reader})" for name, use in sorted(news.items()))
        _logger.info(
            "safeflavor: pinned because the rehearsal used it, and what it requires: %s",
            ", ".join(facts),
        )
        return True


def needs_of(
    source: Source, engines: Collection[str], code_paths: Sequence[str | Path] | None
) -> dict[str, list[str]]:
    """Distributions that serving needs directly, with the module ("module") and a graph ("graph").

    The rehearsal finds what these need in turn.

    Args:
        source: The model being saved.
        engines: Names of its engines.
        code_paths: Code that comes with the model, and is not pinned.
    """
    hooks = source.hooks
    tokenizes = source.task == "custom" and source.tokenizer is not None
    with_model = {Path(path).stem for path in code_paths or ()}
    processors = [] if source.processor is None else requirements_of(source.processor)
    needs = {}
    if "module" in engines:
        own = user_code.distributions_of(source.module, hooks, except_for=with_model)
        needs["module"] = [*DEFAULT_ROOTS, *own, *processors]
    if "onnx" in engines:
        # Not torch, seldom transformers. What unpickles hooks may find tensors in them, and imports
        # torch.
        parts = {
            "transformers": tokenizes or source.processor is not None,
            "torch": any(user_code.importable_name(hook) is None for hook in hooks.values()),
            "openvino": "openvino" in engines,
        }
        own = user_code.distributions_of(torch.nn.Module(), hooks, except_for=with_model)
        named = [name for name, needed in parts.items() if needed]
        needs["graph"] = [*GRAPH_ROOTS, *server_roots(), *named, *own, *processors]
    return needs


def optional_modules(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Modules that MLflow imports where they are installed, and a model with such needs does not.

    Args:
        needs: From ``needs_of``.
    """
    # Hidden from the rehearsal while MLflow is imported: libraries import pyarrow or scipy where
    # they are installed, and would seem to need them. MLflow itself imports pyspark, half a
    # gigabyte, to have its types.
    if "graph" not in needs:
        return ["pyspark"]
    unneeded = closure_of(["mlflow"]) - closure_of(needs["graph"])
    owners = importlib.metadata.packages_distributions().items()
    return sorted(
        {module for module, names in owners if {*map(canonicalize_name, names)} <= unneeded}
        | {"pyspark"}
    )


def _require_versions(recorded: Environment, used: Mapping[str, Use]) -> None:
    others = {
        name: use
        for name, use in used.items()
        if recorded.distributions.get(name, use.version) != use.version
    }
    if others:
        raise EnvironmentMismatchError(
            "A clean process of this Python runs other versions than this process, which is what "
            "the pins would name",
            where=", ".join(others),
            wanted=", ".join(f"{name} {recorded.distributions[name]}" for name in others),
            found=", ".join(f"{name} {use.version}" for name, use in others.items()),
            hint="start Python without PYTHONPATH and changes of sys.path, or install the wanted "
            "versions: `pip install "
            f"{' '.join(f'{name}=={recorded.distributions[name]}' for name in others)}`",
        )


def _warn_of_missing(folder: Path, used: Mapping[str, Use]) -> None:
    lines = missing_lines(folder, {name: use.version for name, use in used.items()})
    if lines:
        _logger.warning(
            "safeflavor: the rehearsal used what the given requirements do not bring, so that the "
            "model may not load where they are installed, or answer otherwise. To add: %s",
            ", ".join(f"{line} (for {used[line.partition('==')[0]].reader})" for line in lines),
        )
