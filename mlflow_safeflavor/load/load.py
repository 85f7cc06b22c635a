"""The load story: locate, look, and only then build, fill, compare, place and replay."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.spec import AS_IS, ModelSpec
from mlflow_safeflavor.environment.differences import naming_versions, require_same
from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.load.download import keep, located
from mlflow_safeflavor.load.engine_choice import (
    choose_engine,
    needed_environment,
    require_trusted_engine,
)
from mlflow_safeflavor.load.options import LoadOptions
from mlflow_safeflavor.load.reload import reloadable
from mlflow_safeflavor.load.saved import Saved, read_saved, require_none
from mlflow_safeflavor.predict.options import asked_options, run_time_options
from mlflow_safeflavor.predict.report import LoadReport

# torch, and all that imports it, is imported inside the functions below: a graph is served without
# it, and the environment check comes first, so that a wrong environment is named before it fails to
# import, and so that variables that torch reads only once can still be set.
if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.artifact.inventory_file import Inventory
    from mlflow_safeflavor.artifact.weights_files import HeldFile
    from mlflow_safeflavor.predict.model import LoadedModel
    from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["keep_if_needed", "load_folder", "load_model"]


@checked
def load_model(
    model_uri: str | Path,
    dst_path: str | Path | None = None,
    *,
    device: str | int | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    verify: str = "full",
    environment: str = "warn",
    trust: Collection[str] = (),
    model_config: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a model that ``save_model`` or ``log_model`` wrote, or raise an error that says why not.

    Args:
        model_uri: A folder, or any URI that MLflow resolves (``models:/name@champion``,
            ``runs:/…``).
        dst_path: Folder to download to, which stays, and where a download that broke off goes on;
            by default a download is removed once the model is loaded.
        device: "auto", "cpu", "cuda:0", an index of an accelerator, or a ``torch.device``.
        dtype: Cast to this dtype after everything was compared; None keeps the saved one.
        device_map: Spread over several devices instead of one: "auto", "balanced", "sequential", or
            a dict of submodule name → device, index or "disk". Needs accelerate.
        verify: "full" hashes every byte, of large files once a week on this host; "rehash" each
            time. "structure" compares names, sizes and all tensors' facts. All these replay the
            golden rows; "off" only compares the tensors' facts.
        environment: "error", "warn" or "ignore" when this environment is not the recorded one.
        trust: Kinds of the artifact's own code that may run: "code", "pickle".
        model_config: Run-time options other than those above, e.g. ``{"deterministic": True}``; by
            default those stored with the model.

    Returns:
        The model, on its device, in eval mode, without gradients, warmed up.

    Raises:
        SafeFlavorError: One of its kinds, each naming what was wanted and what was found.
    """
    options = LoadOptions(
        device=device,
        dtype=dtype,
        device_map=device_map,
        verify=verify,
        environment=environment,
        trust=frozenset(trust),
        model_config=dict(model_config or {}),
    )
    with ExitStack() as download:
        model = load_folder(download.enter_context(located(model_uri, dst_path)), options)
        keep_if_needed(download, model)
    return model


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Pause Python's garbage collector during a load."""
    # Imports make hundreds of thousands of objects that stay; going through them again and again
    # was seen to take a sixth of the time with torch, and 100 of 580 ms without. For the whole
    # process: there is no such switch for a thread.
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_collecting()
def load_folder(root: Path, options: LoadOptions) -> LoadedModel:
    """Load an artifact from a local folder; native loading, pyfunc and rehearsals all come here."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "look"):
        saved = read_saved(root, weights=False, digests=options.hashes, trust=options.trust)
        asked = options.chosen or asked_options(options.model_config)
        chosen = options.chosen or run_time_options(asked, saved.spec.model_config)
        require_trusted_engine(chosen["engine"], asked, options.trust)
        recorded = needed_environment(saved, chosen, **options.place)
        differences = require_same(recorded, policy=options.environment)
    # From here on a failure may come from other versions of a library: its hint names them.
    with naming_versions(recorded):
        name = choose_engine(saved, chosen, **options.place)
        # Before gigabytes are hashed for nothing.
        _require_dtype(saved.inventory, saved.spec)
        # Hashing lets go of the interpreter, which imports meanwhile.
        with ThreadPoolExecutor(1) as beside:
            hashing = beside.submit(_weights_of, saved, options.hashes, options.rehashes)
            with _timed(seconds, "import"):
                _import(name)
                from mlflow_safeflavor.load.engines import bind, open_engine
                from mlflow_safeflavor.load.outcome import Outcome, entry_of
                from mlflow_safeflavor.load.replay import naming_failures, replay

            with _timed(seconds, "digest"):
                weights = hashing.result()
        with _timed(seconds, "rebuild"):
            engine, hooks = open_engine(
                name,
                saved,
                weights,
                **options.place,
                chosen=chosen,
                trust=options.trust,
                policy=options.environment,
                shares=not options.rehashes,
                replays=options.replays,
            )
        with naming_failures(saved.layout.name_of(saved.layout.recorded(name)[0])):
            model = bind(engine, hooks, saved, chosen)
            with _timed(seconds, "replay"):
                asks = {**chosen, "dtype": options.dtype}
                entry = entry_of(saved, name, asks, differences) if options.believes else None
                outcome = replay(model, options.dtype, entry) if options.replays else Outcome()
    report = replace(
        _report(saved, weights, options.hashes),
        **asdict(outcome),
        environment=tuple(map(str, differences)),
        device=_where(engine, options.device_map),
        engine=name,
        seconds=seconds,
    )
    return reloadable(replace(model, report=report), saved.digest, load_folder, options)


def _where(engine: Engine, device_map: object) -> str:
    """Device of an engine in words; a graph's is the CPU."""
    where = str(getattr(engine, "device", "cpu"))
    return f"{where}, by device_map" if device_map else where


def _report(saved: Saved, weights: Sequence[HeldFile], hashes: bool) -> LoadReport:
    """What was looked at, in numbers; the story adds what became of it."""
    return LoadReport(
        files=len(saved.files),
        hashed_bytes=saved.hashed_bytes + sum(file.size for file in weights) if hashes else 0,
        weights=", ".join(sorted({file.kind for file in weights})),
        tensors=len(saved.inventory.rows),
        alias_groups=len(saved.inventory.data),
        weight_bytes=saved.inventory.nbytes,
        tolerated=saved.tolerated,
    )


def _import(engine: str) -> None:
    """Import the libraries of an engine, which takes seconds and is timed as such."""
    if engine == "module":
        import mlflow_safeflavor.module.tensors  # noqa: F401  (and with it torch)
    else:
        from mlflow_safeflavor.graph.engine import runtime_of

        runtime_of(engine)


def _weights_of(saved: Saved, hashes: bool, rehash: bool) -> list[HeldFile]:
    """The files of weights, hashed, and held so that the hashed bytes are the ones in use."""
    from mlflow_safeflavor.artifact.inventory_file import hold_weights

    weights, wrong = hold_weights(saved.inventory, saved.layout, hashes=hashes, rehash=rehash)
    require_none(wrong, "Weights are not the ones that were saved")
    return weights


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Record how long the block takes."""
    start = time.perf_counter()
    yield  # a step that raises has no time: there is no report then
    seconds[step] = time.perf_counter() - start


def _require_dtype(inventory: Inventory, spec: ModelSpec) -> None:
    """Refuse a serving dtype that no parameter has."""
    # That one has, not all: classes of transformers keep islands in float32.
    rows = [
        row for row in inventory.rows.values() if row.kind == "parameter" and "float" in row.dtype
    ]
    if rows and spec.dtype != AS_IS and all(row.dtype != spec.dtype for row in rows):
        raise WeightsError(
            "The weights are not of the dtype that MLmodel says",
            where=rows[0].path,
            wanted=spec.dtype,
            found=rows[0].dtype,
            hint=FETCH_AGAIN,
        )


def keep_if_needed(download: ExitStack, model: LoadedModel) -> None:
    """Keep a download that a loaded model may still read; see ``download.keep``."""
    # Code imports more of itself at any time, and modules outlive models: kept as long as the
    # process. A mapped file is looked at before each forward, and removing it is a change.
    if model.spec.runs:
        keep(download, sys.modules[__name__])
    elif "file" in model.report.weights.split(", "):
        keep(download, model)
