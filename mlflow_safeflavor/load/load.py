"""The load story: locate, look, and only then build, fill, compare, place and replay."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.spec import AS_IS, ModelSpec
from mlflow_safeflavor.environment.differences import naming_versions, require_same
from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.load.download import keep, located
from mlflow_safeflavor.load.engine_choice import casts, choose_engine, needs_no_module
from mlflow_safeflavor.load.options import LoadOptions
from mlflow_safeflavor.load.reload import reloadable
from mlflow_safeflavor.load.saved import Saved, read_saved, require_none
from mlflow_safeflavor.predict.options import run_time_options
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
        dst_path: Folder to download to, which stays; by default a download is removed once the
            model is loaded.
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


def load_folder(root: Path, options: LoadOptions) -> LoadedModel:
    """Load an artifact from a local folder; native loading, pyfunc and rehearsals all come here."""
    report = LoadReport()
    with report.timed("look"):
        saved = read_saved(
            Layout(root, keeps=True), weights=False, digests=options.hashes, trust=options.trust
        )
        spec, layout = saved.spec, saved.layout
        chosen = run_time_options(options.model_config, stored=spec.model_config)
        # A graph is served in an environment that has neither torch nor transformers: their absence
        # is no difference then.
        no_module = needs_no_module(spec, layout, chosen, options)
        recorded = saved.environment.for_graph() if no_module else saved.environment
        differences = require_same(recorded, policy=options.environment)
    # From here on a failure may come from other versions of a library: its hint names them.
    with naming_versions(recorded):
        with report.timed("import"), _without_collecting():
            name = choose_engine(spec, layout, chosen, options)
            _import(name)
        from mlflow_safeflavor.load.engines import bind
        from mlflow_safeflavor.load.replay import measure_forward_cost, naming_failures, replay

        with report.timed("digest"):
            weights = _weights_of(saved, hashes=options.hashes, rehash=options.verify == "rehash")
        with report.timed("rebuild"), _without_collecting():
            engine, hooks, where = _open(name, saved, weights, chosen, options)
        with naming_failures(layout.name_of(layout.recorded(name)[0])):
            model = bind(engine, hooks, saved, chosen, report)
            with report.timed("replay"):
                replayed = replay(model, saved, options.dtype) if options.replays else None
                if replayed is not None:
                    measure_forward_cost(model, layout)
    report.files, report.environment = len(saved.files), tuple(map(str, differences))
    report.tolerated = saved.tolerated
    report.engine, report.device = name, where
    report.weights = ", ".join(sorted({file.kind for file in weights}))
    report.hashed_bytes = (
        saved.hashed_bytes + sum(file.size for file in weights) if options.hashes else 0
    )
    report.tensors, report.alias_groups = len(saved.inventory.rows), len(saved.inventory.data)
    report.weight_bytes = saved.inventory.nbytes
    if replayed is not None:
        report.golden_rows = len(replayed.rows)
        report.max_difference, report.bit_identical = (
            replayed.max_difference,
            replayed.bit_identical,
        )
    return reloadable(model, load_folder, options)


def _import(engine: str) -> None:
    """Import the libraries of an engine, which takes seconds and is timed as such."""
    if engine == "module":
        import mlflow_safeflavor.module.tensors  # noqa: F401  (and with it torch)
    else:
        from mlflow_safeflavor.graph.engine import runtime_of

        runtime_of(engine)


def _weights_of(saved: Saved, *, hashes: bool, rehash: bool) -> list[HeldFile]:
    """The files of weights, hashed, and held so that the hashed bytes are the ones in use."""
    from mlflow_safeflavor.artifact.inventory_file import hold_weights

    # Before gigabytes are hashed for nothing.
    _require_dtype(saved.inventory, saved.spec)
    weights, wrong = hold_weights(saved.inventory, saved.layout, hashes=hashes, rehash=rehash)
    require_none(wrong, "Weights are not the ones that were saved")
    return weights


def _open(
    name: str,
    saved: Saved,
    weights: list[HeldFile],
    chosen: Mapping[str, Any],
    options: LoadOptions,
) -> tuple[Engine, dict[str, Callable[..., Any]], str]:
    """The engine, the user's hooks, and words for the device that it runs on."""
    from mlflow_safeflavor.load import engines

    if name == "module":
        module, hooks = engines.open_module(
            saved,
            weights,
            device=options.device,
            dtype=options.dtype,
            device_map=options.device_map,
            compiles=chosen["compile"],
            trust=options.trust,
        )
        return (
            module,
            hooks,
            str(module.device) if options.device_map is None else f"{module.device}, by device_map",
        )
    beside = None
    if saved.spec.structure != "graph":
        beside = engines.beside(
            saved,
            weights,
            dtype=options.dtype,
            chosen=chosen,
            trust=options.trust,
            policy=options.environment,
            replays=options.replays,
        )
    graph = engines.open_graph(
        name,
        saved,
        weights,
        dtype=casts(saved.spec, options.dtype),
        threads=chosen["num_threads"],
        shares=options.verify != "rehash",
        beside=beside,
    )
    return graph, engines.hooks_of(saved, options.trust), "cpu"


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Pause Python's garbage collector while torch and transformers are imported."""
    # They make hundreds of thousands of objects that stay; going through them again and again was
    # seen to take a sixth of the time. For the whole process: there is no such switch for a thread.
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
