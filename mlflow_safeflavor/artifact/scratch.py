"""Scratch folders, removed by their process, or if it was killed by the next that makes one there.

A signal ends Python without unwinding, so leftovers of a killed process have to be found by
another. A folder is locked (``flock`` on the folder itself, which the kernel gives up with the
process) as long as it is in use. Locks are not seen from every other host of a shared file system,
so its name tells the host, and elsewhere only age counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, so that there only age counts
    fcntl = None  # type: ignore[assignment]

__all__ = ["NOTE", "add_companion", "dead_folders", "scratch_folder"]

# Seconds without a write, after which a folder is swept whose lock cannot be asked for.
_OLD = 86_400.0

_COMPANION = "companion.json"
# A scratch folder with a file of this name is left to its reader (``save.logged``) until it is old.
NOTE = "note.json"


@cache
def _host() -> str:
    """Name of the running kernel, which keeps the locks; containers share it."""
    # The boot's own id: no lock survives a restart, though the folder does.
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        kernel = f"{platform.node()} {uuid.getnode()}"
    return hashlib.sha256(kernel.encode()).hexdigest()[:8]


_NAME = re.compile(
    r".+-(?P<host>[0-9a-f]{8})-[a-z0-9_]{8}"
    r"\.(?P<kind>download|staging|rehearsal|lock|tokenizer|log)"
)


@contextmanager
def scratch_folder(
    kind: str, parent: Path | None = None, *, stem: str = "safeflavor"
) -> Iterator[Path]:
    """Sweep leftovers of killed processes, and make a folder, removed on leaving unless renamed.

    Args:
        kind: The end of its name, one of those in ``_NAME``.
        parent: Where to make it; by default the folder for temporary files, which is swept in any
            case.
        stem: The start of its name.
    """
    temporary = Path(tempfile.gettempdir())
    parent = temporary if parent is None else parent
    for swept in dict.fromkeys((parent, temporary)):
        _sweep(swept)
    folder, lock = _make(parent, f"{stem[:200]}-{_host()}-", f".{kind}")
    process = os.getpid()
    try:
        yield folder
    finally:
        # A child that was forked meanwhile unwinds here as well, and the folder is its parent's.
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def add_companion(folder: Path, companion: Path) -> None:
    """Have ``companion``, a folder that MLflow made for us, swept along with a scratch folder."""
    facts = companion.stat()
    content = {"path": os.path.abspath(companion), "device": facts.st_dev, "inode": facts.st_ino}
    written = folder / "companion.new"
    written.write_text(json.dumps(content), encoding="utf-8")
    os.replace(written, folder / _COMPANION)  # a kill in the middle leaves no half of a path


def dead_folders(parent: Path, kind: str | None = None) -> Iterator[Path]:
    """This user's scratch folders whose process has ended, each locked until the next is yielded.

    Args:
        parent: Where to look.
        kind: Only these; by default all.
    """
    try:
        found = [
            (path, match) for path in parent.iterdir() if (match := _NAME.fullmatch(path.name))
        ]
    except OSError:
        return
    for path, match in found:
        if kind in (None, match["kind"]):
            with suppress(OSError), _locked(path) as locks:
                if (locks and match["host"] == _host()) or _is_old(path):
                    yield path


def _sweep(parent: Path) -> None:
    for folder in dead_folders(parent):
        is_old = _is_old(folder)
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((folder / _COMPANION).read_text(encoding="utf-8"))
            companion = Path(content["path"])
            facts = companion.lstat()
            # Only the very folder that was noted: by now another may have its name.
            if (facts.st_dev, facts.st_ino) == (content["device"], content["inode"]):
                shutil.rmtree(companion, ignore_errors=True)
        if is_old or not (folder / NOTE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _make(parent: Path, prefix: str, suffix: str) -> tuple[Path, int | None]:
    """A new folder, and the descriptor of its lock; None where the file system has no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        try:
            lock = _lock(folder)
        # Between making and locking a sweep may lock the folder and remove it: made once more.
        except OSError:
            continue
        if lock is None or _is(folder, lock):
            return folder, lock
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; None where there are none.

    Raises:
        OSError: Another process holds it, or there is no such folder.
    """
    if fcntl is None:
        return None
    # The folder itself, not a file in it, which would be gone while the rest is being removed.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder of this user; False without locks; raises as ``_lock``."""
    lock = _lock(folder)
    try:
        # Its maker may have removed it since the name was listed, and another user may have made
        # one of that name: nothing of theirs is removed.
        if lock is not None and not _is(folder, lock):
            raise FileNotFoundError(folder)
        if hasattr(os, "geteuid") and folder.lstat().st_uid != os.geteuid():
            raise PermissionError(folder)
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _is(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except OSError:
        return False


def _is_old(folder: Path) -> bool:
    """Whether nothing of it was written for a day; raises ``OSError`` if a file vanishes."""
    return all(time.time() - path.lstat().st_mtime > _OLD for path in (folder, *folder.rglob("*")))
