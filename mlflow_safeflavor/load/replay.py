"""The golden rows answered again after a load, and what a forward costs where nobody has measured it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import AnswerError, InputError, ParityError, SafeFlavorError
from mlflow_safeflavor.load.engine_choice import casts
from mlflow_safeflavor.load.saved import Saved
from mlflow_safeflavor.predict import batching, golden
from mlflow_safeflavor.predict.model import LoadedModel, make_model
from mlflow_safeflavor.predict.parity import ParityReport
from mlflow_safeflavor.predict.replay import replay as golden_replay
from mlflow_safeflavor.predict.replay import require_parity
from mlflow_safeflavor.predict.report import LoadReport
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.inputs.vocabulary import require_rows

if TYPE_CHECKING:
    import torch

__all__ = ["bind", "naming_failures", "replay"]


def bind(
    engine: Engine,
    hooks: Mapping[str, Callable[..., Any]],
    saved: Saved,
    chosen: Mapping[str, Any],
    report: LoadReport,
) -> LoadedModel:
    """An engine with all that was saved beside it, as one model; refused where its tokenizer has too many tokens."""
    model = make_model(engine, hooks, saved.spec, saved.layout, chosen, report)
    require_rows(saved.spec.task_config, model.task.encoder, saved.inventory)
    return model


def replay(model: LoadedModel, saved: Saved, dtype: str | torch.dtype | None) -> ParityReport:
    """Answer the golden rows again, and refuse a model that answers otherwise.

    Args:
        model: What answers. Its ``forward_cost`` is measured where nobody has.
        saved: Where the rows were recorded.
        dtype: What the model was cast to, as ``load_model`` takes it.

    Raises:
        ParityError: Its answers are not the recorded ones.
    """
    cast = casts(model.spec, dtype)
    result = golden_replay(model, saved.layout, cast or "")
    if not cast or model.engine.name == "openvino":
        # A module that was cast on request is meant to answer otherwise.
        require_parity(result, saved.layout, model.engine.name)
    _measure_forward_cost(model, saved.layout)
    return result


def _measure_forward_cost(model: LoadedModel, layout: Layout) -> None:
    """Measure what a forward costs where nobody has, or only on another kind of device: the CPU it was saved on."""
    if model.scheduler.forward_cost and model.engine.on_cpu:
        return
    recorded = golden.read_golden(layout, model.engine.name)
    rows = [model.task.from_record(row, recorded.inputs(i)) for i, row in enumerate(recorded.rows)]
    model.scheduler.forward_cost = batching.measure_forward_cost(
        model.task, model.engine, rows, model.options["max_batch_tokens"]
    )


@contextmanager
def naming_failures(where: str) -> Iterator[None]:
    """Whatever tasks, tokenizers and forwards raise over a record that is not what was saved, under a name of ours."""
    try:
        yield
    except BaseException as error:
        # Rows are at fault only when users hand them over. tokenizers panics with what is no Exception.
        named = isinstance(error, SafeFlavorError) and not isinstance(error, (InputError, AnswerError))
        if named or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ParityError(
            "The model cannot answer the rows that were recorded with it",
            where=where,
            found=f"{type(error).__name__}: {error}",
            way_out="save the model again in this environment",
        ) from error
