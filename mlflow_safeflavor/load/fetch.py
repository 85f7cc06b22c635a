"""Downloads that resume: a file that is there already, as the manifest lists it, is not fetched."""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import read_manifest
from mlflow_safeflavor.artifact.plain_files import digest_of_plain
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.predict.progress import bar_of

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

__all__ = ["fetch", "store_of"]

_LOOK = 0.5  # seconds between two looks at how much was written
_MLFLOWS_BARS = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"


def fetch(model_uri: str, folder: Path) -> Path:
    """Download what a folder lacks of a model, through MLflow's repositories.

    Each file comes under another name first, and gets its own when it is whole: what a cut or a
    kill leaves behind is swept by the next download into that folder.

    Args:
        model_uri: Any URI that MLflow resolves.
        folder: Where to; made if need be.

    Returns:
        The model's folder: ``folder``, or one in it, as MLflow has it.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path

    folder.mkdir(parents=True, exist_ok=True)
    # MLflow's own function has no types.
    root, path = _get_root_uri_and_artifact_path(model_uri)  # type: ignore[no-untyped-call]
    repository = _resuming(get_artifact_repository(root))
    return Path(repository.download_artifacts(artifact_path=path, dst_path=str(folder)))


def store_of(repository: ArtifactRepository) -> ArtifactRepository:
    """The repository of the store, which those of models:/ and runs:/ wrap in a layer or more."""
    while (behind := getattr(repository, "repo", None)) is not None:
        repository = behind
    return repository


def _resuming(repository: Any) -> Any:
    """A repository, with the downloads of its store replaced. Changed: this very object."""
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    # On the objects, not their classes: other downloads of this process stay as they are.
    store: Any = store_of(repository)
    # Unity Catalog's makes another one inside its download, which comes whole each time.
    if type(store)._download_file is not ArtifactRepository._download_file:
        store.download_artifacts = partial(_download, store, store.download_artifacts)
    # Since MLflow 3 runs:/ looks for the logged model when it is asked to download it.
    find = getattr(repository, "_get_logged_model_artifact_repo", None)
    if find is not None:

        def found(*arguments: Any, **named: Any) -> Any:
            model = find(*arguments, **named)
            return model and _resuming(model)

        repository._get_logged_model_artifact_repo = found
    return repository


def _download(
    store: Any, download: Callable[..., str], artifact_path: str | None, dst_path: str, **more: Any
) -> str:
    """``download_artifacts`` of a store, for files that are not there with the right bytes."""
    path, root = artifact_path or "", Path(dst_path, artifact_path or "")
    with scratch_folder("download", Path(dst_path)) as parts:
        files = _listed(store, path, parts)
        whole = {name for name, facts in files.items() if _is_whole(root / name, facts)}
        numbers, get = count(), store._download_file

        def get_missing(remote_file_path: str, local_path: str) -> None:
            if posixpath.relpath(remote_file_path, path or ".") in whole:
                return
            # A store's client may write under yet another name beside it, as boto3 does: that is
            # in the scratch folder as well, and never in the model's.
            part = parts / str(next(numbers))
            get(remote_file_path, str(part))
            os.replace(part, local_path)
            fetched.append(os.stat(local_path).st_size)

        fetched: list[int] = []
        total = sum(facts["size"] for name, facts in files.items() if name not in whole)
        store._download_file = get_missing
        try:
            with _shown(total, lambda: sum(fetched) + _written(parts)):
                return download(artifact_path, dst_path, **more)
        finally:
            store._download_file = get


def _listed(store: Any, path: str, parts: Path) -> Mapping[str, Mapping[str, Any]]:
    """Files of the manifest in the store; none where it has no manifest that can be read."""
    scratch = Layout(parts)
    remote = posixpath.join(path, scratch.name_of(scratch.manifest))
    # Listed, and not tried: what a client raises for a file that is not there is its own.
    if remote not in {info.path for info in store.list_artifacts(posixpath.dirname(remote))}:
        return {}
    scratch.data.mkdir()
    store._download_file(remote_file_path=remote, local_path=str(scratch.manifest))
    # A damaged one, or a newer release's, is the load's to name, which reads MLmodel first.
    with suppress(IntegrityError):
        files: Mapping[str, Mapping[str, Any]] = read_manifest(scratch)["files"]
        return files
    return {}


def _is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file has the size and the SHA-256 of the manifest.

    Multipart downloads give a file its size before its bytes, so that size alone proves nothing.
    """
    with suppress(OSError, IntegrityError):  # there is none, or it is a link or a pipe
        if path.lstat().st_size == facts["size"]:
            return bool(digest_of_plain(path) == facts["sha256"])
    return False


@contextmanager
def _shown(total: int, done: Callable[[], int]) -> Iterator[None]:
    """A bar of bytes and their rate, on a terminal or in a notebook, in place of MLflow's."""
    before = os.environ.get(_MLFLOWS_BARS)
    bar = None
    if total and (before or "").lower() not in ("0", "false"):
        # A loader that went with a model has no tqdm where the model needs none.
        with suppress(ImportError):
            bar = bar_of("download", total, None, unit="B", unit_scale=True)
    if bar is None or bar.disable:
        yield
        return
    over = threading.Event()

    # MLflow's repositories tell nobody how far they are.
    def watch() -> None:
        while not over.wait(_LOOK):
            bar.update(max(min(done(), total) - bar.n, 0))

    watching = threading.Thread(target=watch, name="safeflavor-download", daemon=True)
    watching.start()
    # MLflow's own bar counts files, so that one of gigabytes looks like a halt; it has no other
    # switch than this variable.
    os.environ[_MLFLOWS_BARS] = "false"
    try:
        yield
    finally:
        os.environ.pop(_MLFLOWS_BARS)
        if before is not None:
            os.environ[_MLFLOWS_BARS] = before
        over.set()
        watching.join()
        bar.close()


def _written(folder: Path) -> int:
    """Bytes that lie in files directly in a folder."""
    total = 0
    for path in folder.iterdir():
        with suppress(OSError):  # it has just got its own name
            facts = path.stat()
            if not path.is_dir():
                # What is allocated: the size is there before the bytes where chunks are fetched.
                total += min(facts.st_size, getattr(facts, "st_blocks", facts.st_size) * 512)
    return total
