"""The folder of a saved model: its own, or a download that is removed once nothing needs it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlflow_safeflavor.artifact.scratch import scratch_folder

__all__ = ["keep", "located"]


@contextmanager
def located(model_uri: str | Path, dst_path: str | Path | None = None) -> Iterator[Path]:
    """A local folder for any URI that MLflow resolves; a download is removed on leaving.

    Args:
        model_uri: A folder, or a URI.
        dst_path: Folder to download to, which stays.
    """
    if dst_path is None and Path(model_uri).is_dir():
        yield Path(model_uri)
        return
    from mlflow.artifacts import download_artifacts

    # To download from a store on this disk is to get its own folder: nothing of it is removed.
    if dst_path is not None or _lies_here(str(model_uri)):
        folder = None if dst_path is None else str(dst_path)
        yield Path(download_artifacts(artifact_uri=str(model_uri), dst_path=folder))
        return
    # Swept by the next scratch folder, if this process is killed.
    with scratch_folder("download") as scratch:
        yield Path(download_artifacts(artifact_uri=str(model_uri), dst_path=str(scratch)))


def _lies_here(model_uri: str) -> bool:
    """Whether MLflow, asked for no copy, hands out the folder in which it keeps the model."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    from mlflow_safeflavor.mlflow_compat import copies_runs

    if copies_runs() and model_uri.startswith("runs:"):
        return False
    try:
        repository = get_artifact_repository(model_uri)
    except (MlflowException, ImportError):  # the download fails with a better message
        return False
    # models:/ and runs:/ wrap the repository of the store behind them, in one layer or more.
    while (behind := getattr(repository, "repo", None)) is not None:
        repository = behind
    return isinstance(repository, LocalArtifactRepository)


def keep(download: ExitStack, owner: object) -> None:
    """Keep a download until its owner is collected, at the latest until the process ends.

    Args:
        download: Removes the download on leaving. Changed: empty afterwards.
        owner: Any object that reads it; a module lives as long as the process.
    """
    weakref.finalize(owner, download.pop_all().close)
