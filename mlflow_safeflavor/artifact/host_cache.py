"""Cache of this user on this host: folders by name, kept from one load to the next.

An optimisation: a failure costs time and nothing else. Of several processes that want the same
entry one makes it, while the others wait for as long as it shows signs of life.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock and no cache
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "VARIABLE",
    "cache_folder",
    "entry",
    "has_room",
    "in_use",
    "is_fresh",
    "is_used",
    "sweep",
]

# Environment variable: another folder, or "off".
VARIABLE = "MLFLOW_SAFEFLAVOR_CACHE"

_MOST_BYTES = 20 * 10**9  # of all entries together
_SPARE_BYTES = 10**9  # left free on the disk
_UNUSED = 30 * 86400.0  # seconds
_FRESH = 7 * 86400.0  # seconds
_LIFELESS = 1.0  # seconds to wait for a lock whose holder shows no sign of life
_PATIENCE = 60.0  # seconds to wait for one that does
_LOCK = ".lock"

_logger = logging.getLogger("mlflow.safeflavor")


def cache_folder() -> Path | None:
    """The folder of all entries, which only this user can write; None if there is none or "off".

    In order: ``MLFLOW_SAFEFLAVOR_CACHE``; ``XDG_CACHE_HOME`` and ``~/.cache``, unless files cannot
    be locked there, as on some network file systems; and the temporary folder, for containers with
    a read-only home.
    """
    chosen = os.environ.get(VARIABLE, "")
    if fcntl is None or chosen.lower() == "off":
        return None
    homes = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    candidates = [Path(home) / "mlflow-safeflavor" for home in homes if os.path.isabs(home)]
    candidates.append(Path(tempfile.gettempdir()) / f"mlflow-safeflavor-{os.getuid()}")
    if chosen:
        candidates = [Path(chosen)] if os.path.isabs(chosen) else []
    return next((folder for folder in candidates if _is_private(folder) and _locks(folder)), None)


def _is_private(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError:
        return False
    # Copies and marks of this folder are believed. In the temporary folder anyone may have made it
    # first, under this very name: a link (so lstat), or a folder that others may write (0o022).
    mine = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return mine and not facts.st_mode & 0o022 and os.access(folder, os.W_OK)


def _locks(folder: Path) -> bool:
    try:
        descriptor = _open_lock(folder / _LOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


@contextmanager
def entry(name: str) -> Iterator[Path | None]:
    """The folder of an entry, empty if it is new, for this process alone while the block lasts.

    None where there is no cache, or where another process holds the entry for more than a second
    without a sign of life. An ``OSError`` inside the block is the caller's to take lightly.
    """
    with contextlib.ExitStack() as stack:
        folder = None
        root = cache_folder()
        if root is not None:
            try:
                if stack.enter_context(_locked(root / f"{name}{_LOCK}")):
                    folder = root / name
                    # Junk, such as of a backup program, must fail no load: it is replaced.
                    if not folder.is_dir() or folder.is_symlink():
                        folder.unlink(missing_ok=True)
                    folder.mkdir(mode=0o700, exist_ok=True)
                    os.utime(folder)  # when it was last used
            except OSError as error:
                _logger.info("safeflavor: nothing is kept on this host: %s", error)
                folder = None
        yield folder


def in_use(folder: Path) -> int:
    """A descriptor that keeps an entry from being swept until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    # Where folders cannot be locked, a sweep cannot lock this one either, and leaves it alone.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def is_fresh(path: Path) -> bool:
    """Whether a file is there and was written within a week; some changes no time stamp shows."""
    try:
        return 0 <= time.time() - path.lstat().st_mtime < _FRESH  # below 0 the clock was set back
    except OSError:
        return False


def is_used(folder: Path) -> bool:
    """Whether a process keeps an entry from being swept; asked inside ``entry`` of the same."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# Locks.


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    descriptor = _lock(path)
    if descriptor is None:
        yield False
        return
    done = threading.Event()

    # To hash and copy gigabytes takes long, and a stopped process holds its lock for ever: only a
    # fresh time of the lock file tells those who wait that the one is not the other.
    def show_life() -> None:
        while not done.wait(_LIFELESS / 4):
            with contextlib.suppress(OSError):
                os.utime(path)

    beating = threading.Thread(target=show_life, name="safeflavor-cache", daemon=True)
    beating.start()
    try:
        yield True
    finally:
        done.set()
        beating.join()
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor with the lock; None if its holder does not let go."""
    descriptor, began = _open_lock(path), time.monotonic()
    seen, since = -1, began
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A sweep may have removed the file between open and lock: a lock on a file without a
            # name excludes nobody, since others make and lock a new one.
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)
            descriptor = _open_lock(path)
            continue
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        now, beat = time.monotonic(), os.fstat(descriptor).st_mtime_ns
        if beat != seen:
            seen, since = beat, now
        if now - since > _LIFELESS or now - began > _PATIENCE:
            os.close(descriptor)
            return None
        time.sleep(0.01)


def _open_lock(path: Path) -> int:
    # A link in its place is refused, and no pipe or device may make the opening wait.
    return os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
    )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


# Room.


def has_room(folder: Path, nbytes: int) -> bool:
    """Sweep unused entries, then say whether an entry may grow by so many bytes."""
    sweep(nbytes)
    root = folder.parent
    disk = os.statvfs(root)
    # f_bavail, not f_bfree: the difference is root's own reserve.
    enough = disk.f_bavail * disk.f_frsize >= nbytes + _SPARE_BYTES
    return enough and sum(map(_size_of, _folders(root))) + nbytes <= _MOST_BYTES


def sweep(room: int = 0) -> None:
    """Remove entries unused for a month, and the least recently used over 20 GB.

    Args:
        room: Bytes that are about to be added.
    """
    root = cache_folder()
    if root is None:
        return
    folders = sorted(_folders(root), key=_last_used)
    total = sum(map(_size_of, folders)) + room
    for folder in folders:
        size = _size_of(folder)
        if (total > _MOST_BYTES or time.time() - _last_used(folder) > _UNUSED) and _remove(folder):
            total -= size


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size_of(folder: Path) -> int:
    try:
        return sum(path.lstat().st_size for path in folder.iterdir())
    except OSError:
        return 0


def _remove(folder: Path) -> bool:
    """Remove an entry unless a process makes, reads or uses it."""
    # Two locks: of the lock file, which its maker holds, and of the folder, which each user does
    # (``in_use``). Neither is waited for: ``has_room`` sweeps while it holds an entry of its own,
    # so two processes could wait for each other.
    lock = folder.with_name(f"{folder.name}{_LOCK}")
    held: list[int] = []
    try:
        held.append(_open_lock(lock))
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        fcntl.flock(held[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
        # Last: from here on others may make the entry anew.
        lock.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        for descriptor in held:
            os.close(descriptor)
