"""Logging through MLflow, with notes by which the next log ends the rest of a killed one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mlflow_safeflavor import mlflow_compat
from mlflow_safeflavor.artifact.scratch import NOTE, add_companion, dead_folders, scratch_folder
from mlflow_safeflavor.artifact.trust import agreed_to

__all__ = ["NotedFlavor", "log", "noting"]


def log(
    flavor: ModuleType, name: str | None, artifact_path: str | None = None, **arguments: Any
) -> ModelInfo:
    """Log with a flavor's ``save_model``, which gets ``arguments``."""
    named = mlflow_compat.log_name(name, artifact_path)
    # Since MLflow 3 these are texts about a logged model; here they are defaults of the model's
    # params.
    own = {"params": arguments.pop("params")} if "params" in arguments else {}
    agreed = ("pickle",) if arguments.get("allow_pickle") else ()
    with noting(flavor, own) as noted, agreed_to(agreed):
        info: ModelInfo = Model.log(**named, flavor=noted, **arguments)
        return info


class NotedFlavor:
    """A flavor as ``Model.log`` calls it, which notes MLflow's folder and model before it saves.

    Args:
        flavor: Module with ``save_model``.
        notes: Scratch folder for the notes.
        own: Arguments of the flavor that ``Model.log`` would take for its own.
    """

    def __init__(self, flavor: ModuleType, notes: Path, own: Mapping[str, Any]) -> None:
        self.__name__ = flavor.__name__
        self.model_id: str | None = None
        self._flavor, self._notes, self._own = flavor, notes, own

    def save_model(self, path: str, mlflow_model: Any, **arguments: Any) -> None:
        """Save at ``path``, which MLflow uploads, then removes with the folder around it."""
        folder = Path(path).parent
        # Empty, so MLflow made it for this alone. Were it not, a sweep would remove others' files.
        if not any(folder.iterdir()):
            add_companion(self._notes, folder)
        self.model_id = getattr(mlflow_model, "model_id", None)  # since MLflow 3
        if self.model_id is not None:
            note = {"store": _store(), "model_id": self.model_id}
            (self._notes / NOTE).write_text(json.dumps(note), encoding="utf-8")
        self._flavor.save_model(path=path, mlflow_model=mlflow_model, **self._own, **arguments)


@contextmanager
def noting(flavor: ModuleType, own: Mapping[str, Any]) -> Iterator[NotedFlavor]:
    """Mark models that killed processes left ``PENDING`` as failed; then the flavor to log with."""
    with scratch_folder("log") as notes:
        _fail_abandoned()
        noted = NotedFlavor(flavor, notes, own)
        searched = {*sys.path}
        try:
            yield noted
        # MLflow itself marks a model whose logging an Exception ends, but not for those that end
        # the process, such as KeyboardInterrupt.
        except BaseException as error:
            if noted.model_id is not None and not isinstance(error, Exception):
                with suppress(Exception):
                    _fail(noted.model_id)
            raise
        finally:
            # MLflow tries the example, with the code of a folder that is gone then. Each such entry
            # makes each later log slower, as MLflow looks there for the distributions of the pins.
            sys.path[:] = [path for path in sys.path if path in searched or os.path.exists(path)]


def _fail_abandoned() -> None:
    for folder in dead_folders(Path(tempfile.gettempdir()), "log"):
        try:
            note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
            store, model_id = note["store"], note["model_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if store == _store() and _fail(model_id):
            shutil.rmtree(folder, ignore_errors=True)


def _fail(model_id: str) -> bool:
    """Mark a logged model as failed if it is pending; returns whether its note is done with."""
    client = mlflow.MlflowClient()
    try:
        if str(client.get_logged_model(model_id).status) == "PENDING":
            client.finalize_logged_model(model_id, "FAILED")
    # A model that is gone needs no mark; a server that is down may be asked by the next log.
    except MlflowException as error:
        return bool(error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))
    return True


def _store() -> str:
    """Name of the tracking store, as a digest: its URI may hold a password."""
    return hashlib.sha256(mlflow.get_tracking_uri().encode()).hexdigest()
