"""Logging a folder that ``save_model`` wrote, whose upload goes on where another was cut off."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models.model import ModelInfo
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import DownloadError, InputError, SafeFlavorError
from mlflow_safeflavor.load.saved import Saved, read_saved
from mlflow_safeflavor.mlflow_compat import read_mlmodel
from mlflow_safeflavor.save.logged import log

__all__ = ["is_saved", "log_saved"]

# Says which artifact a logged model is of: sizes of files do not tell one from another.
_TAG = "safeflavor.manifest"
# What MLflow knows of a model that is being logged; all else of ``MLmodel`` is the saved one's.
_MLFLOWS = ("artifact_path", "run_id", "model_uuid", "model_id", "utc_time_created")


def is_saved(model: object) -> bool:
    """Whether it is the folder of a model that ``save_model`` wrote."""
    return isinstance(model, (str, Path)) and os.path.isfile(Layout(model).manifest)


def log_saved(folder: Path, flavor_name: str, **arguments: Any) -> ModelInfo:
    """Log a saved model as it is.

    Args:
        folder: Where ``save_model`` wrote it.
        flavor_name: Name of the flavor.
        arguments: Those of ``Model.log``. Of a ``model_id`` only what is missing is uploaded.

    Raises:
        IntegrityError: It is not what was saved.
        InputError: ``model_id`` is not that of an upload from this very folder.
        DownloadError: The upload broke off; says how it goes on.
    """
    saved = read_saved(folder, weights=True)
    # Before MLflow is told: whatever fails inside its call is marked as failed, whole or not.
    begun = arguments.get("model_id")
    uploaded = set() if begun is None else _uploaded(begun, saved)
    flavor: Any = _SavedFlavor(saved, uploaded, flavor_name)
    try:
        # What MLflow would try is a load of the folder, in which weights may be left out.
        return log(flavor, **arguments, validate_serving_input=False)
    except SafeFlavorError:
        raise
    # Whatever MLflow and the store's client raise.
    except Exception as error:
        if flavor.model_id is None:
            raise
        name = arguments.get("registered_model_name")
        registered = f', registered_model_name="{name}"' if name else ""
        raise DownloadError(
            "The upload of the model broke off",
            where=folder,
            found=error.message if isinstance(error, MlflowException) else repr(error),
            hint=f'log_model("{folder}", model_id="{flavor.model_id}"{registered}) uploads what is '
            "missing",
        ) from error


def _uploaded(model_id: str, saved: Saved) -> set[str]:
    """Files of weights that the store of a logged model has already.

    A store shows a file once it is whole, or a part of it, of another size.
    """
    model = MlflowClient().get_logged_model(model_id)
    begun, layout = model.tags.get(_TAG), saved.layout
    if str(model.status) == "READY" or begun != saved.digest:
        raise InputError(
            "This is no upload that can go on",
            where=f"model_id {model_id!r}",
            wanted=f"a model whose upload from {layout.root} broke off",
            found=f"{model.status}, of {'this' if begun == saved.digest else 'another'} model",
            hint="leave model_id out",
        )
    store = get_artifact_repository(model.artifact_location)
    listed = {info.path: info.file_size for info in store.list_artifacts(layout.DATA)}
    return {
        name
        for name, facts in saved.files.items()
        if layout.is_weights(name) and listed.get(name) == facts["size"]
    }


class _SavedFlavor:
    """A flavor as ``Model.log`` calls it, with a model that is saved already."""

    def __init__(self, saved: Saved, uploaded: set[str], name: str) -> None:
        self.__name__ = name
        self.model_id: str | None = None
        self._saved, self._uploaded = saved, uploaded

    def save_model(self, path: str, mlflow_model: Any, **_: object) -> None:
        """Link what is to be uploaded below ``path``, and write ``MLmodel`` there."""
        layout = self._saved.layout
        model_id = getattr(mlflow_model, "model_id", None)  # since MLflow 3
        if model_id is not None:
            MlflowClient().set_logged_model_tags(model_id, {_TAG: self._saved.digest})
        for name in {*self._saved.files, layout.name_of(layout.manifest)} - self._uploaded:
            (Path(path) / name).parent.mkdir(parents=True, exist_ok=True)
            _link(layout.root / name, Path(path) / name)
        for fact, value in vars(read_mlmodel(layout.root)).items():
            if fact not in _MLFLOWS and value is not None:
                setattr(mlflow_model, fact, value)
        mlflow_model.save(str(Path(path) / layout.MLMODEL))
        self.model_id = model_id


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
