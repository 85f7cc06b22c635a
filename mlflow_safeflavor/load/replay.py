"""The golden rows answered again after a load; ``forward_cost`` measured where it is unknown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mlflow_safeflavor.errors import AnswerError, InputError, ParityError, SafeFlavorError
from mlflow_safeflavor.load.engine_choice import casts
from mlflow_safeflavor.load.outcome import Outcome, kept
from mlflow_safeflavor.predict import batching
from mlflow_safeflavor.predict.golden import read_golden
from mlflow_safeflavor.predict.model import LoadedModel
from mlflow_safeflavor.predict.replay import replay as golden_replay
from mlflow_safeflavor.predict.replay import require_parity

if TYPE_CHECKING:
    import torch

__all__ = ["naming_failures", "replay"]


def replay(
    model: LoadedModel, dtype: str | torch.dtype | None, entry: str | None = None
) -> Outcome:
    """Answer the golden rows again, and refuse a model that answers otherwise.

    Measures ``forward_cost``, too, where none is stored, or only that of the CPU it was saved on.

    Args:
        model: The loaded model.
        dtype: Dtype that it was cast to, as ``load_model`` takes it.
        entry: Where this host keeps the outcome; with one, only the first row is answered again.

    Raises:
        ParityError: Its answers are not the recorded ones.
    """
    recorded = read_golden(model.files, model.engine.name)
    cast = casts(model.spec, dtype)
    with kept(entry) as there:
        asked = replace(recorded, rows=recorded.rows[:1]) if there.outcome else recorded
        result = golden_replay(model, asked, cast or "")
        # A module that was cast on request answers otherwise by intent. OpenVINO in bfloat16 does,
        # too, but within a tolerance of its own.
        if not cast or model.engine.name == "openvino":
            require_parity(result, recorded.where)
        outcome = there.outcome = there.outcome or Outcome.of(result)
    if batching.measures_forward_cost(model.scheduler.forward_cost, model.engine.on_cpu):
        rows = [
            model.task.from_record(row, recorded.inputs(i)) for i, row in enumerate(recorded.rows)
        ]
        model.scheduler.forward_cost = batching.measure_forward_cost(
            model.task, model.engine, rows, model.options["max_batch_tokens"]
        )
    return replace(outcome, answered_now=len(result.rows))


@contextmanager
def naming_failures(where: str) -> Iterator[None]:
    """Raise ``ParityError`` for any failure of task, tokenizer or forward over golden rows."""
    try:
        yield
    except BaseException as error:
        # InputError and AnswerError blame rows or hooks of a user; these rows are the artifact's.
        # PanicException, of tokenizers and other libraries in Rust, is a BaseException.
        named = isinstance(error, SafeFlavorError) and not isinstance(
            error, (InputError, AnswerError)
        )
        if named or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ParityError(
            "The model cannot answer the rows that were recorded with it",
            where=where,
            found=f"{type(error).__name__}: {error}",
            hint="save the model again in this environment",
        ) from error
