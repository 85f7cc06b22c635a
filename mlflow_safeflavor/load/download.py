"""The folder of a saved model: its own, or a download that is removed once nothing needs it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.errors import DownloadError
from mlflow_safeflavor.load.fetch import fetch, store_of

__all__ = ["keep", "located"]


@contextmanager
def located(model_uri: str | Path, dst_path: str | Path | None = None) -> Iterator[Path]:
    """A local folder for any URI that MLflow resolves; a download is removed on leaving.

    Args:
        model_uri: A folder, or a URI.
        dst_path: Folder to download to, which stays; files that are there already, with the bytes
            that the manifest lists, are not fetched again.

    Raises:
        MlflowException: There is no such model, or a file of it could not be downloaded.
        DownloadError: The store could not say which files there are.
    """
    if dst_path is None and Path(model_uri).is_dir():
        yield Path(model_uri)
        return

    # To download from a store on this disk is to get its own folder: nothing of it is removed.
    if dst_path is not None or _lies_here(str(model_uri)):
        yield _download(str(model_uri), dst_path)
        return
    # Swept by the next scratch folder, if this process is killed.
    with scratch_folder("download") as scratch:
        yield _download(str(model_uri), scratch)


def _download(model_uri: str, folder: str | Path | None) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        path = (
            download_artifacts(artifact_uri=model_uri)
            if folder is None
            else fetch(model_uri, Path(folder))
        )
    except MlflowException:
        raise
    # MLflow words what happens to a file; when a listing of files breaks off, the error is that of
    # the store's client, such as botocore's.
    except Exception as error:
        raise DownloadError(
            "The model could not be downloaded",
            where=model_uri,
            found=f"{type(error).__name__}: {error}",
            hint="load it again once the store answers, with the credentials that its client wants",
        ) from error
    return Path(path)


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
    return isinstance(store_of(repository), LocalArtifactRepository)


def keep(download: ExitStack, owner: object) -> None:
    """Keep a download until its owner is collected, at the latest until the process ends.

    Args:
        download: Removes the download on leaving. Changed: empty afterwards.
        owner: Any object that reads it; a module lives as long as the process.
    """
    weakref.finalize(owner, download.pop_all().close)
