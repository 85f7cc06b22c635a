"""Files of weights, held so that the bytes that were checked are the bytes that are mapped.

Weights are used by mapping their file, so that worker processes share its pages. A write to a
mapped file changes the weights, and cutting it short ends the process at its next read (SIGBUS). So
the mapped file is one of three kinds:

* "memory": a copy of this process, of a small file;
* "copy": a private copy on this host (``host_cache``), which every process of this user maps, under
  the digests that were recorded for it. The copy's own bytes were hashed, and the artifact's as
  well;
* "file": the artifact's file itself, where there is no room for a copy or none is wanted. It is
  looked at before each forward, and a change is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

from mlflow_safeflavor.artifact import host_cache
from mlflow_safeflavor.artifact.digests import FileDigests, digests_of, find_wrong_digests
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError

try:
    from fcntl import ioctl
except ImportError:  # Windows
    ioctl = None  # type: ignore[assignment]

__all__ = ["HeldFile", "boot", "hold", "require_unchanged"]

# Bytes; up to this a copy in each process costs little memory, and less time than a file would.
_SMALL = 16 * 10**6
_SETTLED = 2.0  # seconds; a file changed more recently could change again without a new time stamp
_FICLONE = 0x40049409  # ioctl that lets two files share blocks: btrfs, XFS, …
# Links and pipes are refused, as in ``plain_files``.
_PLAIN = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
_CHUNK = 1 << 30

_logger = logging.getLogger("mlflow.safeflavor")


class HeldFile:
    """A file of weights, open for as long as this object lives.

    Attributes:
        name: Its path on the disk, which another file may have by now.
        path: To map it from; means this very file also after its name is gone.
        kind: "memory", "copy" or "file"; see above.
        where: Its name in messages.
    """

    # The descriptor is mapped, not the name: by then another file may have that.
    def __init__(self, descriptor: int, kind: str, where: str, path: Path, *others: int) -> None:
        by_descriptor = Path(f"/proc/self/fd/{descriptor}")
        self.name, self.path = path.absolute(), by_descriptor if by_descriptor.exists() else path
        self.kind, self.where = kind, where
        self.descriptor, self.facts = descriptor, _facts_of(descriptor)
        for held in (descriptor, *others):
            weakref.finalize(self, os.close, held)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.facts[2]

    @property
    def is_sparse(self) -> bool:
        """Whether less than half of its size is allocated, so that a copy would take more."""
        return os.fstat(self.descriptor).st_blocks * 512 < self.size // 2

    def has_name(self) -> bool:
        """Whether what opens its name opens this very file; a copy in memory has none."""
        try:
            return _facts_of(self.name) == self.facts
        except OSError:
            return False

    def changed(self) -> bool:
        """Whether the file was written to since it was opened."""
        # Only "file" can be: others write neither to this process's memory nor to the cache.
        return self.kind == "file" and _facts_of(self.descriptor) != self.facts

    def copy_to(self, target: int) -> None:
        """Copy all of it to an empty file, sharing blocks where the file system can."""
        try:
            ioctl(target, _FICLONE, self.descriptor)
        except (OSError, TypeError):
            start, size = 0, os.fstat(self.descriptor).st_size
            # sendfile copies at most 2 GB a call, and 0 bytes once the file was cut short.
            while start < size and (
                count := os.sendfile(target, self.descriptor, start, size - start)
            ):
                start += count


def require_unchanged(files: Iterable[HeldFile], *, names: bool = False) -> None:
    """Raise if mapped bytes may differ from those that were compared.

    Args:
        files: Files of weights.
        names: They were opened by their names, which must still be theirs.
    """
    for file in files:
        if file.changed() or (names and not file.has_name()):
            raise IntegrityError(
                "A file of weights was changed since it was compared with what was saved",
                where=file.where,
                wanted="a file that nobody writes to, or room for a private copy of it",
                hint="load the model again; see MLFLOW_SAFEFLAVOR_CACHE in docs/limits.md",
            )


def hold(
    source: Path, where: str, recorded: FileDigests | None, *, rehash: bool
) -> tuple[HeldFile, list[str]]:
    """Open a file of weights, in one of the three ways, and compare its digests.

    Args:
        source: Path in the artifact.
        where: Its name in messages.
        recorded: Digests that it must have; None to hash nothing, and so to share nothing.
        rehash: Hash it also where this host has hashed it before.

    Returns:
        The file, and differences from the recorded digests, one sentence each.

    Raises:
        IntegrityError: It cannot be read, or is no safetensors file.
    """
    try:
        descriptor = os.open(source, os.O_RDONLY | _PLAIN)
    except OSError as error:
        raise IntegrityError(
            "A file of the artifact cannot be read", where=where, found=error, hint=FETCH_AGAIN
        ) from None
    file = HeldFile(descriptor, "file", where, source)
    if file.size <= _SMALL:
        file = _in_memory(file) or file
    elif recorded is not None:
        try:
            with host_cache.entry(_name_of(recorded)) as folder:
                if folder is not None:
                    return _Entry(folder, recorded, rehash).hold(file)
        except OSError as error:
            _logger.info("safeflavor: no private copy of %s: %s", where, error)
    return file, [] if recorded is None else _find_wrong(file, recorded)


def _find_wrong(file: HeldFile, recorded: FileDigests) -> list[str]:
    return list(find_wrong_digests(recorded, digests_of(file.descriptor, file.where), file.where))


def _facts_of(file: int | Path) -> tuple[int, ...]:
    """Facts of a file that change with its content."""
    # The times of status changes (ctime) among them: utime can restore the others, and this none.
    facts = os.stat(file)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _in_memory(file: HeldFile) -> HeldFile | None:
    """A copy in memory that this process alone has; None where the system has no ``memfd``."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("safeflavor-weights", os.MFD_CLOEXEC)
    file.copy_to(descriptor)
    return HeldFile(descriptor, "memory", file.where, file.name)


# --- private copies ------------------------------------------------------------------------------


def _name_of(recorded: FileDigests) -> str:
    """Name of the cache entry: the same for the same content, wherever it was downloaded to."""
    content = json.dumps([recorded.header, dict(recorded.tensors)], sort_keys=True)
    return f"weights-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


class _Entry:
    """The cached copy of one file of weights, and marks of files found equal to it.

    This process holds its lock meanwhile.

    A mark stands for one file as it was: its path, inode, size and times. It is worth nothing after
    a restart, since nothing of a copy need have reached the disk, and for no longer than a week.
    """

    def __init__(self, folder: Path, recorded: FileDigests, rehash: bool) -> None:
        self.folder, self.recorded, self.rehash = folder, recorded, rehash
        self.copy = folder / "model.safetensors"

    def hold(self, source: HeldFile) -> tuple[HeldFile, list[str]]:
        """The copy, made if need be, or the artifact's own file without room; and differences."""
        if self.copy.exists():
            # The artifact is hashed although the copy would do: damage to it must be an error here,
            # and not first on the next host.
            if not self._is_marked(source):
                if problems := _find_wrong(source, self.recorded):
                    return source, problems
                self._mark(source)
            copy = self._open(self.copy, source.where)
            if self._is_marked(copy):
                return copy, []
            with contextlib.suppress(IntegrityError):
                if not _find_wrong(copy, self.recorded):
                    self._mark(copy)
                    return copy, []
            # The disk failed, or the machine did before the copy was on the disk: made anew.
            self.copy.unlink()
        return self._make(source)

    def _make(self, source: HeldFile) -> tuple[HeldFile, list[str]]:
        size, scratch = source.size, self.folder / "new"
        scratch.unlink(missing_ok=True)
        if source.is_sparse or not host_cache.has_room(self.folder, size):
            if self._is_marked(source):
                return source, []
            problems = _find_wrong(source, self.recorded)
            if not problems:
                self._mark(source)
            return source, problems
        # Read-only from the start, for this user too: a mistake of a script changes no weights.
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            source.copy_to(descriptor)
        finally:
            os.close(descriptor)
        # The copy's own bytes are hashed, not the source's: those could change after the copying.
        copy = self._open(scratch, source.where)
        problems = _find_wrong(copy, self.recorded)
        if problems:
            scratch.unlink()
            return copy, problems
        os.replace(scratch, self.copy)
        copy = self._open(self.copy, source.where)  # again: a rename changes ctime, and the mark
        self._mark(copy)
        self._mark(source)
        return copy, []

    def _open(self, path: Path, where: str) -> HeldFile:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return HeldFile(descriptor, "copy", where, path, host_cache.in_use(self.folder))

    def _mark_of(self, file: HeldFile) -> Path:
        identity = (boot(), os.path.realpath(file.path), *file.facts)
        return self.folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.hashed"

    def _is_marked(self, file: HeldFile) -> bool:
        return not self.rehash and host_cache.is_fresh(self._mark_of(file))

    def _mark(self, file: HeldFile) -> None:
        # Time stamps are coarse: two writes within one tick of the kernel look like one.
        settled = file.kind == "copy" or time.time() - file.facts[-1] / 1e9 > _SETTLED
        if settled and not file.changed() and boot():
            with contextlib.suppress(OSError):  # a full disk costs time, nothing else
                self._mark_of(file).touch()


def boot() -> str:
    """Id of this start of the machine; empty where the system tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
