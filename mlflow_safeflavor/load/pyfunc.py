"""The model as ``mlflow.pyfunc`` and MLflow's scoring server hold it: rows in, rows out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.trust import agreed_to_here
from mlflow_safeflavor.environment import threads
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import AnswerError
from mlflow_safeflavor.load.about_process import (
    ENVIRONMENT_LABEL,
    asks_environment,
    process_facts,
)
from mlflow_safeflavor.load.load import load_folder
from mlflow_safeflavor.load.once import in_spark_task, once
from mlflow_safeflavor.load.options import LoadOptions
from mlflow_safeflavor.predict.options import (
    asked_options,
    run_time_options,
    tells_environment,
)
from mlflow_safeflavor.server.attach import attach, prepare
from mlflow_safeflavor.tasks.inputs.tables import unfold_columns

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["PyfuncModel", "facts_of", "load_pyfunc"]

# Below MLflow's own logger, which serving sets up to print: one line in the server's or container's
# log.
_logger = logging.getLogger("mlflow.safeflavor")


class PyfuncModel:
    """A loaded model behind ``mlflow.pyfunc``; ``predict`` may be called from many threads.

    Args:
        model: The loaded model.
        facts: Answer to the request that asks for the environment; None where that is a request
            like any other.
    """

    def __init__(self, model: LoadedModel, facts: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.facts = facts

    def get_raw_model(self) -> LoadedModel:
        """The loaded model, as the native ``load_model`` returns it; what MLflow's flavors do."""
        return self.model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """One row out for each row in; see ``LoadedModel.predict``."""
        if self.facts is not None and asks_environment(model_input):
            return {ENVIRONMENT_LABEL: dict(self.facts)}
        try:
            return self.model.predict(self._data(model_input), params, progress=False)
        except AnswerError:
            self._log_failure()
            raise

    def predict_stream(
        self, model_input: Any, params: Mapping[str, Any] | None = None
    ) -> Iterator[Any]:
        """The answer to one row in parts; see ``LoadedModel.predict_stream``."""
        try:
            yield from self.model.predict_stream(self._data(model_input), params)
        except AnswerError:
            self._log_failure()
            raise

    def _data(self, model_input: Any) -> Any:
        return unfold_columns(model_input) if self.model.task.folds else model_input

    def _log_failure(self) -> None:
        # Its cause may hold rows or paths: it goes to the log, where the server's owner looks, and
        # not over HTTP.
        _logger.exception("safeflavor: %s failed", self.model.spec.task)


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """Load a model for ``mlflow.pyfunc.load_model`` and the scoring server."""
    # MLflow has put the stored options below the caller's.
    options = run_time_options(asked_options(model_config))
    # Trust: MLflow has put the artifact's code/ on the path before this runs, so loading through it
    # is the agreement to that code. For pickles MLflow has a variable, which counts only where
    # somebody set it: MLflow's own default is to allow them.
    pickles = os.environ.get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "").lower() in ("true", "1")
    prepare()
    budget = None
    # Any other process belongs to its user: only MLflow's server is there for nothing but models.
    # Once torch is imported it has read these variables.
    if "torch" not in sys.modules and threads.is_scoring_server():
        budget = threads.limit_threads(options["num_threads"])
    asked = LoadOptions(
        device=options["device"],
        dtype=options["dtype"] or None,
        verify=options["verify"],
        environment=options["environment"],
        trust=frozenset({"code", "pickle"} if pickles else {"code"}) | agreed_to_here(),
        chosen=options,
    )

    def load() -> LoadedModel:
        model = load_folder(Path(path), asked)
        said = "; ".join(str(fact) for fact in (model.spec.task, budget, model.report) if fact)
        _logger.info("safeflavor: %s", said)
        return model

    model = once(load, Path(path), repr(asked)) if in_spark_task() else load()
    attach(model)
    return PyfuncModel(model, facts_of(model, budget) if tells_environment() else None)


def facts_of(model: LoadedModel, budget: threads.Budget | None = None) -> dict[str, Any]:
    """Facts about the process that a loaded model runs in; see ``process_facts``."""
    pins = Environment.read(model.files).distributions
    return process_facts(pins, device=model.report.device, budget=budget)
