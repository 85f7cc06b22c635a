"""Repositories of a model hub at one commit: their list of files, and downloads."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.plain_files import digest_of_file
from mlflow_safeflavor.errors import SafeFlavorError, StructureError

__all__ = ["HubFile", "download", "is_commit", "is_hub_id", "list_files"]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it.

    Args:
        name: Path in the repository.
        blob: The id that git gives to its bytes; of large files, to a pointer to them.
        sha256: Of its bytes; only large files have one.
    """

    name: str
    blob: str | None
    sha256: str | None

    def is_content_of(self, path: Path) -> bool:
        """Whether a file on this disk has the listed digest; True where the hub lists none."""
        from huggingface_hub.utils.sha import git_hash

        if self.sha256 is not None:
            return digest_of_file(path) == self.sha256
        # Small files have no SHA-256 on the hub, but the SHA-1 that git gives them.
        return self.blob is None or git_hash(path.read_bytes()) == self.blob


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can be that of a repository: ``name`` or ``owner/name``."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) is not None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, and not a branch or tag, which move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def list_files(name: str, revision: str) -> tuple[str, list[HubFile]]:
    """Ask the hub for the commit that a revision is now, and its list of files.

    Raises:
        StructureError: The hub cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import HfApi

    with _naming_failures(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = [
            HubFile(file.rfilename, file.blob_id, _sha256(file.lfs)) for file in info.siblings or ()
        ]
    # The commit is recorded and asked for from here on: a branch may move between two questions.
    if not is_commit(info.sha):
        raise StructureError(
            "The hub does not say which commit this is",
            where=f"{name} at {revision}",
            found=info.sha,
        )
    return str(info.sha), files


def _sha256(large: Any) -> str | None:
    # huggingface_hub before 1.0 gives a dict.
    return (
        None
        if large is None
        else str(large["sha256"] if isinstance(large, Mapping) else large.sha256)
    )


def download(
    name: str, commit: str, patterns: Collection[str], *, exact: bool = False, **options: Any
) -> Path:
    """The folder in the hub's cache with files of a commit, downloaded if they are not there.

    Args:
        name: The repository.
        commit: See ``is_commit``.
        patterns: Names of the wanted files, with wildcards.
        exact: They have no wildcards, and ``[`` and ``*`` stand for themselves.
        options: ``token``, ``cache_dir`` and ``local_files_only``, as for
            ``huggingface_hub.snapshot_download``.

    Raises:
        StructureError: The hub cannot be reached or broke off. Files that came whole stay in the
            cache.
    """
    from huggingface_hub import snapshot_download

    # A file of the hub may be called "a[1].json", which as a pattern is another name.
    wanted = [glob.escape(pattern) for pattern in patterns] if exact else list(patterns)
    with _naming_failures(name, commit):
        return Path(snapshot_download(name, revision=commit, allow_patterns=wanted, **options))


@contextmanager
def _naming_failures(name: str, revision: str) -> Iterator[None]:
    try:
        yield
    except SafeFlavorError:
        raise
    # Any: each major release of huggingface_hub has another HTTP library, with exceptions of its
    # own for a broken connection.
    except Exception as error:
        raise StructureError(
            "The hub repository cannot be read",
            where=f"{name} at {revision}",
            found=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
            hint="check the id, the revision and the network, or give a local folder",
        ) from error
