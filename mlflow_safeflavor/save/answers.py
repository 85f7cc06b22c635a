"""The golden rows of a model being saved, answered by the given module and by its graphs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import AS_IS, ModelSpec
from mlflow_safeflavor.artifact.trust import KINDS
from mlflow_safeflavor.graph.engine import GraphEngine
from mlflow_safeflavor.module import tensors
from mlflow_safeflavor.module.dtypes import dtypes_of, input_dtype
from mlflow_safeflavor.module.engine import ModuleEngine, evaluating
from mlflow_safeflavor.module.fill import realise
from mlflow_safeflavor.module.kept import kept_parameters
from mlflow_safeflavor.module.placement import place
from mlflow_safeflavor.module.rebuild import rebuild
from mlflow_safeflavor.module.slots import Slot, find_slots
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.predict import golden
from mlflow_safeflavor.predict.batching import measure_forward_cost, measures_forward_cost
from mlflow_safeflavor.predict.model import LoadedModel, make_scheduler
from mlflow_safeflavor.predict.options import asked_options, run_time_options
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["answering", "write_parity"]


@contextmanager
def answering(
    subject: Subject,
    inventory: Inventory,
    casts: Mapping[str, torch.dtype],
    task: Task,
    spec: ModelSpec,
    layout: Layout,
) -> Iterator[LoadedModel]:
    """The model that answers the golden rows: the user's own module, or a cast copy of it."""
    module, slots = subject.module, subject.slots
    device = next((slot.tensor.device for slot in slots), torch.device("cpu"))
    # A cast model exists in the artifact alone, and from there it answers; but a graph is never
    # rebuilt, so that a copy of the given module is cast.
    if casts and spec.structure == "graph":
        module = copy.deepcopy(module)
        place(module, device, casts)
    elif casts:
        device = torch.device("cpu")
        module, _ = rebuild(layout, spec, inventory, KINDS)
    if casts:  # another module, with tensors of its own
        slots = find_slots(module)
    with (
        evaluating(module),
        _aligned(slots, inventory, layout),
        kept_parameters(module, lambda: _stored(inventory, layout)),
    ):
        engine = ModuleEngine(module, device, input_dtype(spec.dtype, slots))
        options = run_time_options(asked_options(None), spec.model_config)
        scheduler = make_scheduler(task, engine, options)
        yield LoadedModel(spec, task, engine, layout, scheduler, options)


@contextmanager
def _aligned(slots: Sequence[Slot], inventory: Inventory, layout: Layout) -> Iterator[None]:
    """Move tensors, while inside, to the alignment that they have after ``load_model``."""
    # ``from_pretrained`` maps them from anywhere in a file, and answers recorded so could differ
    # from those of every load in their last bits: see ``tensors.ALIGNMENT``. torch refuses to move
    # tensors made in inference mode.
    astray = [
        slot
        for slot in slots
        if not (tensors.is_aligned(slot.tensor) or slot.tensor.is_inference())
    ]
    before = {id(slot.tensor): (slot.tensor, slot.tensor.data) for slot in astray}
    if astray:
        loaded = _stored(inventory, layout)
        for slot in astray:
            slot.tensor.data = loaded[slot.path].data
    try:
        yield
    finally:
        for tensor, data in before.values():
            tensor.data = data


def _stored(inventory: Inventory, layout: Layout) -> dict[str, torch.Tensor]:
    return realise(inventory, tensors.read_tensors(inventory, layout))


def write_parity(
    models: Sequence[LoadedModel], rows: Sequence[Row], spec: ModelSpec, layout: Layout
) -> tuple[list[dict[str, Any]], ModelSpec]:
    """Record the golden rows with each engine, the one that serves by default first.

    Returns:
        The answers of that one, and the spec with the measured ``forward_cost`` and the task's
        config, which has what the task measured.
    """
    first = models[0]
    cost = first.scheduler.forward_cost
    if measures_forward_cost(cost, first.engine.on_cpu, saves=True):
        # Answered once before, since a first forward is slower.
        golden.answers_of(first, rows)
        cost = measure_forward_cost(
            first.task, first.engine, rows, first.options["max_batch_tokens"]
        )
    answers = []
    for model in models:
        model.scheduler.forward_cost = cost
        if isinstance(model.engine, GraphEngine):
            dtypes: Collection[str] = [model.engine.session.dtype]
        else:
            dtypes = dtypes_of(find_slots(model.module)) if spec.dtype == AS_IS else [spec.dtype]
        answers.append(golden.record(model, rows, dtypes, layout))
    spec = replace(spec, task_config=first.task.config)
    return answers[0], replace(spec, model_config={**spec.model_config, "forward_cost": cost})
