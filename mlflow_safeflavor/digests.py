"""SHA-256 of weights, tensor by tensor: hashed side by side, and once for each host, not once for each worker."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlflow_safeflavor.artifact import WAY_OUT, without_duplicates
from mlflow_safeflavor.cpu import available_cpus
from mlflow_safeflavor.errors import IntegrityError

try:
    import fcntl
except ImportError:  # Windows: no lock and no cache, every process hashes for itself
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileDigests", "cached_digests_of", "digests_of"]

_MAX_HEADER = 100 * 10**6  # the same bound as the safetensors library
_WORTH_CACHING = 64 * 10**6  # bytes; below, hashing takes no longer than importing anything does
_SETTLED = 2.0  # seconds; a file changed more recently could change again without a new time stamp


@dataclass(frozen=True)
class FileDigests:
    """Digests that cover every byte of a safetensors file.

    Attributes:
        header: SHA-256 of the length prefix and the header.
        tensors: Tensor name → SHA-256 of its bytes. The ranges of a valid file leave no gap.
    """

    header: str
    tensors: Mapping[str, str]


def digests_of(path: Path) -> FileDigests:
    """Hash a safetensors file.

    Raises:
        IntegrityError: It is cut short, or its header is malformed.
    """
    with path.open("rb") as file:
        header, ranges = _read_header(file, path)
        return FileDigests(header, _hash_ranges(file, ranges))


def _read_header(file: BinaryIO, path: Path) -> tuple[str, dict[str, tuple[int, int]]]:
    """SHA-256 of the header, and tensor name → byte range in the file.

    The library has checked nothing yet, so every number is checked before it is used.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
        raise IntegrityError("A safetensors file is cut short", where=path.name, way_out=WAY_OUT)
    header, start = file.read(length), 8 + length
    ranges = {}
    try:
        for name, entry in json.loads(header, object_pairs_hook=without_duplicates).items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                if type(first) is not int or type(stop) is not int or not 0 <= first <= stop <= size - start:
                    raise ValueError(f"{name!r} reaches from {first!r} to {stop!r}")
                ranges[name] = (start + first, start + stop)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            "A safetensors header is malformed", where=path.name, found=error, way_out=WAY_OUT
        ) from None
    return hashlib.sha256(prefix + header).hexdigest(), ranges


def _hash_ranges(file: BinaryIO, ranges: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """SHA-256 of each range, in as many threads as there are cores: hashlib lets go of the GIL."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:

        def digest(item: tuple[str, tuple[int, int]]) -> tuple[str, str]:
            with view[slice(*item[1])] as part:
                return item[0], hashlib.sha256(part).hexdigest()

        # Largest first, so that no thread is left alone with one at the end.
        order = sorted(ranges.items(), key=lambda item: item[1][0] - item[1][1])
        with ThreadPoolExecutor(available_cpus()) as pool:
            return dict(pool.map(digest, order))


def cached_digests_of(path: Path) -> FileDigests:
    """``digests_of``, remembered for this very file: same inode, size and times of change.

    Of several processes that start at once, one hashes and the others wait for it. What is remembered
    lies in a folder that no other user can write; where there is none, every process hashes for itself.
    """
    folder = _private_folder()
    facts = path.stat()
    if folder is None or facts.st_size < _WORTH_CACHING or time.time() - facts.st_ctime < _SETTLED:
        return digests_of(path)
    identity = (os.path.realpath(path), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    entry = folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.json"
    with _locked(entry.with_suffix(".lock")):
        try:
            return _remembered(json.loads(entry.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            digests = digests_of(path)
            scratch = entry.with_suffix(".new")
            with contextlib.suppress(OSError):  # a full disk costs time, nothing else
                scratch.write_text(json.dumps(asdict(digests)), encoding="utf-8")
                os.replace(scratch, entry)
            return digests


def _remembered(content: Any) -> FileDigests:
    digests = FileDigests(**content)
    texts = [digests.header, *digests.tensors.values()] if isinstance(digests.tensors, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("not digests")
    return digests


def _private_folder() -> Path | None:
    """A folder of this user that nobody else can write; None where none can be made.

    In order: ``XDG_CACHE_HOME``, ``~/.cache``, and for containers with a read-only home the temporary folder.
    """
    if fcntl is None:
        return None
    homes = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    candidates = [Path(home) / "mlflow-safeflavor" for home in homes if os.path.isabs(home)]
    candidates.append(Path(tempfile.gettempdir()) / f"mlflow-safeflavor-{os.getuid()}")
    return next((folder for folder in candidates if _is_private(folder)), None)


def _is_private(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return mine and not facts.st_mode & 0o022 and os.access(folder, os.W_OK)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
