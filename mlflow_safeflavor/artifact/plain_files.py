"""Plain files of a stranger's folder: no links, pipes or devices, not too many, not too large."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_safeflavor.errors import IntegrityError

__all__ = [
    "FETCH_AGAIN",
    "decode",
    "digest_of_file",
    "digest_of_plain",
    "hint_of",
    "is_junk",
    "list_files",
    "open_plain",
    "read_bytes",
    "read_text",
    "reason_to_refuse",
]

FETCH_AGAIN = (
    "fetch the artifact again, or log the model again; files of a saved model are not meant to be "
    "edited"
)
# Left by NFS, macOS, Windows and git. Python imports none of these, and nothing reads one.
_JUNK = re.compile(
    r"\.nfs[0-9a-fA-F]+|\.DS_Store|\._.+|\.git(keep|ignore|attributes)|Thumbs\.db|desktop\.ini"
)
_MAX_FILES = 50_000
_MAX_DEPTH = 64  # folders; Python's own walks recurse, and end in RecursionError
# A link could lead to any file that this user may read, and a pipe without a writer makes the
# opening wait for ever.
_NO_BLOCKING = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
)


def reason_to_refuse(mode: int) -> str | None:
    """Words for the kind of a file that is not plain; None for a plain one."""
    kinds = {stat.S_ISLNK: "a symbolic link", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe"}
    kinds |= {stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((words for is_kind, words in kinds.items() if is_kind(mode)), None)


def is_junk(name: str) -> bool:
    """Whether a file has the name of what file systems and tools leave beside others."""
    return _JUNK.fullmatch(name.rpartition("/")[2]) is not None


@contextmanager
def open_plain(path: Path) -> Iterator[io.FileIO]:
    """Open a file for reading, unless it is a link, a pipe or a device.

    Raises:
        IntegrityError: There is none, it is something else, or this user may not read it.
    """
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY | _NO_BLOCKING)
    with io.FileIO(descriptor) as file:
        # Asked of what is open: between a look at the name and its opening it could become a pipe.
        if kind := reason_to_refuse(os.fstat(descriptor).st_mode):
            raise _refusal(path, kind)
        yield file


def digest_of_plain(path: Path) -> str:
    """SHA-256 of a plain file's bytes, as hexadecimal digits."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open_plain(path) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file, or of the file that a link names, as hexadecimal digits."""
    return digest_of_plain(Path(os.path.realpath(path)))


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a plain file whole, after its size was looked at.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        IntegrityError: See ``open_plain``; or it is larger.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise IntegrityError(
                "A file of the artifact is larger than any that was ever saved",
                where=path,
                wanted=f"at most {limit} bytes",
                found=f"{size} bytes",
                hint=FETCH_AGAIN,
            )
        return _read_at_most(file, limit)


def read_text(path: Path, limit: int) -> str:
    """Read a plain file of UTF-8; raises as ``read_bytes`` and ``decode``."""
    return decode(read_bytes(path, limit), path)


def decode(content: bytes, path: Path) -> str:
    """Text of a file that was read; raises ``IntegrityError`` where it is no UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(
            "A file of the artifact is no text", where=path, found=str(error), hint=FETCH_AGAIN
        ) from None


def _read_at_most(file: io.FileIO, limit: int) -> bytes:
    # Not file.read(): the file may grow after its size was looked at, and without end.
    parts, left = [], limit
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def list_files(root: Path) -> dict[str, os.stat_result]:
    """Relative name → facts of all files below a folder, of any kind; follows no link.

    Raises:
        IntegrityError: A folder cannot be read, or there are more files or deeper folders than in
            any model.
    """
    found: dict[str, os.stat_result] = {}
    waiting = [("", 0)]
    while waiting:
        folder, depth = waiting.pop()
        with _named(root / folder), os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if not entry.is_dir(follow_symlinks=False):
                    found[name] = entry.stat(follow_symlinks=False)
                # Byte code is left out: running vendored code leaves it behind.
                elif entry.name != "__pycache__":
                    waiting.append((name, depth + 1))
        # In the loop, so that a walk of millions of files ends here and not in a day.
        if depth > _MAX_DEPTH or len(found) + len(waiting) > _MAX_FILES:
            raise IntegrityError(
                "The artifact holds more files or deeper folders than any model",
                where=str(root / folder)[:300],
                wanted=f"at most {_MAX_FILES} files, {_MAX_DEPTH} folders deep",
                hint=FETCH_AGAIN,
            )
    return dict(sorted(found.items()))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise ``IntegrityError`` for errors of the system."""
    try:
        yield
    except FileNotFoundError:
        raise IntegrityError(
            "A file of the artifact is missing", where=path, hint=FETCH_AGAIN
        ) from None
    except PermissionError:
        raise IntegrityError(
            "A file of the artifact may not be read by this user",
            where=path,
            hint="let its owner run `chmod -R a+rX` on the model's folder, or load it as another "
            "user",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EMLINK):
            raise _refusal(path, "a symbolic link") from None
        raise IntegrityError(
            "A file of the artifact cannot be read",
            where=str(path)[:300],
            found=error,
            hint=FETCH_AGAIN,
        ) from None


def _refusal(path: Path, kind: str) -> IntegrityError:
    return IntegrityError(
        "A file of the artifact is no plain file",
        where=path,
        wanted="a plain file",
        found=kind,
        hint=hint_of(kind),
    )


def hint_of(problem: str) -> str:
    """The hint for an artifact whose files are not those that were saved."""
    # Links are no damage: tools that keep each content once make them. A copy without them loads.
    if "a symbolic link" in problem:
        return "copy the model with `cp -rL`, which copies what links point to"
    if "its signature" in problem:
        return (
            "where mlflow.models.set_signature changed it, log the model again with signature=… or "
            "params=…, which are checked and recorded; else fetch the artifact again"
        )
    if any(name in problem for name in ("requirements.txt", "conda.yaml")):
        return (
            "where mlflow.models.update_model_requirements or add_libraries_to_model changed it, "
            "log the model again with extra_pip_requirements=[…], which are pinned and recorded; "
            "else fetch the artifact again"
        )
    return FETCH_AGAIN
