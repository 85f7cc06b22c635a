"""Models of trainers, logged while they train."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlflow

from mlflow_safeflavor import mlflow_compat
from mlflow_safeflavor.arguments import checked, require_arguments
from mlflow_safeflavor.checkpoints import sentences
from mlflow_safeflavor.checkpoints.given import library_class
from mlflow_safeflavor.errors import plain
from mlflow_safeflavor.module.random_state import kept_random_state
from mlflow_safeflavor.save.save import log_model, save_model

__all__ = ["autolog"]

_logger = logging.getLogger("mlflow.safeflavor")
# What MLflow takes in the name of a metric.
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


@checked
def autolog(
    *, name: str = "model", every_save: bool = False, disable: bool = False, **kwargs: Any
) -> None:
    """Log the model of each ``transformers.Trainer`` made from now on, at the end of its training.

    Also of the trainers of sentence-transformers, which are made from it. Model and metrics go to
    the active run; where there is none, to one of their own. A model that cannot be logged is a
    line of the log that says why, and the training goes on.

    Args:
        name: Name of the logged model; at a checkpoint ``NAME-STEP``.
        every_save: Also log at each checkpoint of the trainer (``save_steps``).
        disable: Log none of those that are made from now on.
        kwargs: See ``save_model``; tokenizer or processor are by default the trainer's.

    Raises:
        InputError: ``log_model`` does not know an argument.
    """
    from transformers import trainer

    require_arguments(kwargs, save_model, mlflow_compat.log_arguments(save_model))
    # a trainer makes its callbacks of a copy of this list
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks[:] = [cls for cls in callbacks if not hasattr(cls, _MARK)]
    if not disable:
        callbacks.append(_callback(name, every_save, kwargs))


_MARK = "logs_safeflavor_models"


def _callback(name: str, every_save: bool, arguments: Mapping[str, Any]) -> type:
    """A class of callbacks; each trainer makes one of its own."""
    from transformers import TrainerCallback

    class LogModel(TrainerCallback):
        run_id: str | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.run_id = None

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if every_save:
                self.log(f"{name}-{state.global_step}", state, **more)

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.log(name, state, **more)

        def log(
            self, name: str, state: Any, model: Any, processing_class: Any = None, **more: Any
        ) -> None:
            # Of several processes one logs; all hold the same weights.
            if not state.is_world_process_zero:
                return
            try:
                # what comes after must draw the random numbers that it would have drawn
                with kept_random_state(), self.run():
                    given = {**_parts(model, processing_class), **arguments}
                    info = log_model(model, name, **given)
                    mlflow_compat.log_metrics(_metrics(state), state.global_step, info)
            # Hours of training must not end here, whatever a model or a server refuses.
            except Exception as error:
                _logger.warning(
                    "autolog did not log the model %r of step %s, or its metrics: %s",
                    name,
                    state.global_step,
                    plain(error),
                )

        @contextmanager
        def run(self) -> Iterator[None]:
            """The active run, or one of this training."""
            if mlflow.active_run():
                yield
                return
            with mlflow.start_run(run_id=self.run_id) as run:
                self.run_id = run.info.run_id
                yield

    setattr(LogModel, _MARK, True)
    return LogModel


def _parts(model: Any, processing_class: Any) -> dict[str, Any]:
    """A trainer's tokenizer or processor, for a model that does not bring its own."""
    if processing_class is None or sentences.is_object(model):
        return {}
    tokenizer = library_class(processing_class, "transformers", ("PreTrainedTokenizerBase",))
    return {"tokenizer" if tokenizer else "processor": processing_class}


def _metrics(state: Any) -> dict[str, float]:
    """The last value of everything that the trainer logged so far."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
        found |= {_NOT_IN_NAMES.sub("_", key): float(value) for key, value in numbers.items()}
    return {key: value for key, value in found.items() if key != "step"}
