"""The golden rows of a model being saved, answered by the given module and by its graphs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mlflow_safeflavor.artifact import inventory_file
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import AS_IS, ModelSpec
from mlflow_safeflavor.artifact.trust import KINDS
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.graph.engine import GraphEngine
from mlflow_safeflavor.module import placement, tensors
from mlflow_safeflavor.module.dtype_plan import dtype_plan
from mlflow_safeflavor.module.dtypes import dtypes_of, input_dtype
from mlflow_safeflavor.module.engine import ModuleEngine, evaluating
from mlflow_safeflavor.module.fill import realise
from mlflow_safeflavor.module.kept import kept_parameters
from mlflow_safeflavor.module.rebuild import rebuild
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.predict import golden
from mlflow_safeflavor.predict.batching import measure_forward_cost
from mlflow_safeflavor.predict.model import LoadedModel, make_model
from mlflow_safeflavor.predict.options import run_time_options
from mlflow_safeflavor.predict.report import LoadReport
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["answering", "write_parity"]


@contextmanager
def answering(
    source: Source, spec: ModelSpec, described: Mapping[str, Any], cast: bool, layout: Layout
) -> Iterator[LoadedModel]:
    """The model that answers the golden rows: the user's own module, or a cast copy of it."""
    module, hooks = source.module, source.hooks
    device = next((slot.tensor.device for slot in find_slots(module)), torch.device("cpu"))
    # A cast model exists in the artifact alone, and from there it answers; but a graph is never
    # rebuilt, so that a copy of the given module is cast.
    if cast and described["kind"] == "graph":
        module = copy.deepcopy(module)
        dtypes = dtype_plan(module, described, spec.dtype, find_slots(module))
        placement.place(module, device, dtypes)
    elif cast:
        device = torch.device("cpu")
        module, hooks = rebuild(layout, spec, inventory_file.read_inventory(layout), KINDS)
    with (
        evaluating(module),
        _aligned(module, layout),
        kept_parameters(module, lambda: _stored(layout)),
    ):
        dtype = input_dtype(spec.dtype, find_slots(module))
        engine, options = (
            ModuleEngine(module, device, dtype),
            run_time_options(stored=spec.model_config),
        )
        yield make_model(engine, hooks, spec, layout, options, LoadReport())


@contextmanager
def _aligned(module: torch.nn.Module, layout: Layout) -> Iterator[None]:
    """Move tensors, while inside, to the alignment that they have after ``load_model``."""
    # ``from_pretrained`` maps them from anywhere in a file, and answers recorded so could differ
    # from those of every load in their last bits: see ``tensors.ALIGNMENT``. torch refuses to move
    # tensors made in inference mode.
    found = find_slots(module)
    slots = [
        slot
        for slot in found
        if not (tensors.is_aligned(slot.tensor) or slot.tensor.is_inference())
    ]
    before = {id(slot.tensor): (slot.tensor, slot.tensor.data) for slot in slots}
    if slots:
        loaded = _stored(layout)
        for slot in slots:
            slot.tensor.data = loaded[slot.path].data
    try:
        yield
    finally:
        for tensor, data in before.values():
            tensor.data = data


def _stored(layout: Layout) -> dict[str, torch.Tensor]:
    inventory = inventory_file.read_inventory(layout)
    return realise(inventory, tensors.read_tensors(inventory, layout))


def write_parity(
    models: Sequence[LoadedModel], rows: Sequence[Row], spec: ModelSpec, layout: Layout
) -> tuple[list[dict[str, Any]], ModelSpec]:
    """Record the golden rows with each engine, the one that serves by default first.

    Returns:
        The answers of that one, and the spec with the measured ``forward_cost``.
    """
    first = models[0]
    cost = first.scheduler.forward_cost
    if not cost and first.engine.on_cpu:
        # Stored, so that all hosts make the same batches: the last bits of an answer may depend on
        # the rows that share its batch. Answered once before, since a first forward is slower.
        first.answer(rows, first.task.golden(first.task.config))
        cost = measure_forward_cost(
            first.task, first.engine, rows, first.options["max_batch_tokens"]
        )
    answers = []
    for model in models:
        model.scheduler.forward_cost = cost
        if isinstance(model.engine, GraphEngine):
            dtypes: Collection[str] = [model.engine.session.dtype]
        else:
            dtypes = dtypes_of(model.module) if spec.dtype == AS_IS else [spec.dtype]
        answers.append(golden.record(model, rows, dtypes, layout))
    return answers[0], replace(spec, model_config={**spec.model_config, "forward_cost": cost})
