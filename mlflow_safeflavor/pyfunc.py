"""What MLflow's serving holds: rows in, rows out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor import cpu
from mlflow_safeflavor.load import LoadOptions, load_folder
from mlflow_safeflavor.options import run_time_options
from mlflow_safeflavor.rows import unfold_columns

if TYPE_CHECKING:
    from mlflow_safeflavor.model import LoadedModel

__all__ = ["PyfuncModel", "load_pyfunc"]

# Below MLflow's own logger, which serving sets up to print: one line in the server's or container's log.
_logger = logging.getLogger("mlflow.safeflavor")


class PyfuncModel:
    """A loaded model behind ``mlflow.pyfunc``; ``predict`` may be called from many threads."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """One row out for each row in; see ``LoadedModel.predict``."""
        from mlflow_safeflavor.tasks.text import TextTask

        # Only where a list can be no value of a cell: other tasks may take one.
        data = unfold_columns(model_input) if isinstance(self.model.task, TextTask) else model_input
        return self.model.predict(data, params)


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """What ``mlflow.pyfunc.load_model`` and the scoring server call.

    Under pyfunc the artifact's ``code/`` is already importable: MLflow has put it on the path, so
    loading through it is the agreement to run that code. For pickles MLflow has a variable of its own,
    which counts only where somebody set it: MLflow's default is to allow them.
    """
    options = run_time_options(model_config)
    pickles = os.environ.get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "").lower() in ("true", "1")
    budget = cpu.limit_threads(options["num_threads"])
    model = load_folder(
        Path(path),
        LoadOptions(
            device=options["device"],
            dtype=options["dtype"] or None,
            verify=options["verify"],
            environment=options["environment"],
            max_batch_tokens=options["max_batch_tokens"],
            trust=frozenset({"code", "pickle"} if pickles else {"code"}),
        ),
    )
    _logger.info("safeflavor: %s; %s; %s", model.spec.task, budget, model.report)
    return PyfuncModel(model)
