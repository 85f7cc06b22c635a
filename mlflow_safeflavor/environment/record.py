"""Record the environment: this platform, and the exact closure of pins."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from mlflow_safeflavor.environment.closure import reached_from
from mlflow_safeflavor.environment.installed import Installed, installed_distributions, source_tree
from mlflow_safeflavor.environment.recorded import Environment, platform_facts
from mlflow_safeflavor.environment.wheels import installed_wheels
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = ["record", "with_wheels"]

_logger = logging.getLogger("mlflow.safeflavor")


def record(
    roots: Iterable[str],
    *,
    torch_build: Mapping[str, Any],
    editable_ok: Collection[str] = (),
    strict: bool = True,
    path: Sequence[str] | None = None,
) -> Environment:
    """Record this interpreter and the exact closure of installed distributions that the roots need.

    mlflow-safeflavor itself is vendored in every artifact and so never part of the closure; its
    requirements are followed only where it is a root.

    Args:
        roots: Names or requirement strings, extras included (``"mlflow[extras]"``).
        torch_build: Facts that only torch knows; stored as they are.
        editable_ok: Names that may be editable, VCS, folder or archive installs, since the caller
            pins them.
        strict: False logs contradictions and accepts every kind of install: for pins that the user
            wrote.
        path: Folders to search instead of ``sys.path``.

    Raises:
        EnvironmentMismatchError: A root is not installed, two requirements contradict each other,
            or a distribution of the closure cannot be pinned.
    """
    installed = installed_distributions(path)
    closure, missing, conflicts = reached_from(roots, installed)
    # Metadata that names something the program runs without is common, and pip fetches it anyway.
    if missing:
        _logger.warning(
            "Not installed and so not pinned, although something requires it: %s",
            "; ".join(missing),
        )
    # pip would refuse these pins later, in the container.
    if conflicts and strict:
        _raise_conflicts(conflicts)
    if conflicts:
        found = "; ".join(f"{wanted}, found {version}" for wanted, version in conflicts)
        _logger.warning("Installed versions contradict what is required: %s", found)
    # A pin of an editable or VCS install names a version that no index has, or has otherwise.
    if strict:
        _require_releases(
            [installed[name] for name in closure - set(map(canonicalize_name, editable_ok))]
        )
    pins = {name: installed[name].version for name in closure}
    return Environment(
        **platform_facts(), distributions=pins, torch_build=torch_build, only_module=(), wheels={}
    )


def with_wheels(
    recorded: Environment, folders: Iterable[Path], *, path: Sequence[str] | None = None
) -> Environment:
    """Record the wheel of these folders that a distribution came from, if one did."""
    # An index may have another build under the same name and version.
    there = installed_distributions(path).items()
    installed = {name: one.distribution for name, one in there if name in recorded.distributions}
    wheels: dict[str, dict[str, str]] = {}
    for folder in folders:
        wheels = installed_wheels(folder, installed) | wheels  # the first folder counts
    return replace(recorded, wheels=wheels)


def _raise_conflicts(conflicts: Sequence[tuple[str, str]]) -> None:
    wanted, found = zip(*conflicts, strict=True)
    raise EnvironmentMismatchError(
        "Installed versions contradict what is required, so pip could never install these pins",
        wanted="; ".join(wanted),
        found="; ".join(dict.fromkeys(found)),
        hint="install versions that agree (`pip check` tells), or write all pins yourself with "
        "pip_requirements",
    )


def _require_releases(distributions: Iterable[Installed]) -> None:
    """Refuse installs that no index could deliver to another machine."""
    sources = {
        d.name: (d.version, source)
        for d in distributions
        if (source := _find_source(d.distribution)) is not None
    }
    if not sources:
        return
    name, (version, _) = next(iter(sorted(sources.items())))
    raise EnvironmentMismatchError(
        "Distributions that the model needs were not installed as releases, so no pin could bring "
        "them back",
        where=", ".join(sorted(sources)),
        wanted="releases installed by name and version",
        found="; ".join(f"{n} {v}: {source}" for n, (v, source) in sorted(sources.items())),
        hint=(
            "publish it, or build a wheel (`pip wheel --no-deps -w FOLDER SOURCE`) and install "
            f"that with `pip install {name}=={version} --find-links FOLDER`; or say where others "
            f"get it, as in extra_pip_requirements=['{name} @ "
            "git+https://HOST/REPOSITORY@COMMIT']; or write all pins yourself with "
            "pip_requirements"
        ),
    )


def _find_source(distribution: importlib.metadata.Distribution) -> str | None:
    """Words for the origin of an install that is no release from an index (PEP 610), else None."""
    # conda writes the folder of its build machine into direct_url.json, of releases as of any.
    if (distribution.read_text("INSTALLER") or "").strip() == "conda":
        return None
    text = distribution.read_text("direct_url.json")
    if text is None:
        folder = source_tree(distribution)
        return None if folder is None else f"editable install of the folder {folder}"
    # Such an install came from somewhere else than an index, so it is not taken for a release.
    try:
        facts = dict(json.loads(text))
    except (ValueError, TypeError):
        return "an install whose direct_url.json cannot be read"
    url, vcs, folder = facts.get("url"), facts.get("vcs_info"), facts.get("dir_info")
    if isinstance(vcs, dict):
        return f"VCS install of {vcs.get('vcs')}+{url}@{vcs.get('commit_id')}"
    if isinstance(folder, dict):
        return f"{'editable install' if folder.get('editable') else 'install'} of the folder {url}"
    return f"install of the archive {url}"
