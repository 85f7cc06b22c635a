"""SHA-256 of weights: of the header and of each tensor, hashed side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlflow_safeflavor.artifact.json_files import parse_json
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.machine import available_cpus

__all__ = ["FileDigests", "digests_of", "find_wrong_digests"]

_MAX_HEADER = 100 * 10**6  # bytes; the same bound as the safetensors library
_CHUNK = 1 << 20  # bytes that a thread reads at a time


@dataclass(frozen=True)
class FileDigests:
    """Digests that cover every byte of a safetensors file.

    Attributes:
        header: SHA-256 of the length prefix and the header.
        tensors: Tensor name → SHA-256 of its bytes. The ranges of a valid file leave no gap.
    """

    header: str
    tensors: Mapping[str, str]


def digests_of(file: Path | int, where: str | None = None) -> FileDigests:
    """Hash a safetensors file.

    Args:
        file: Its path, or a descriptor, whose position does not count.
        where: Its name in messages; that of the file by default.

    Raises:
        IntegrityError: It is cut short, or its header is malformed.
    """
    name = where or Path(str(file)).name
    with open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as opened:
        header, ranges = _read_header(opened.fileno(), name)
        return FileDigests(header, _hash_ranges(opened.fileno(), ranges, name))


def find_wrong_digests(recorded: FileDigests, found: FileDigests, where: str) -> Iterator[str]:
    """Differences between recorded and found digests of a file, one sentence each."""
    if found.header != recorded.header:
        yield f"{where}: its header is not the one that was saved"
    for name, digest in recorded.tensors.items():
        if found.tensors.get(name) != digest:
            yield f"{where}, tensor {name}: its values are not the ones that were saved"


def _read_header(descriptor: int, where: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """SHA-256 of the header, and tensor name → byte range in the file."""
    # The safetensors library has checked nothing yet: every number here is a stranger's. A length
    # beyond the file would be allocated before it is read.
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
        raise IntegrityError("A safetensors file is cut short", where=where, hint=FETCH_AGAIN)
    header, start = os.pread(descriptor, length, 8), 8 + length
    ranges = {}
    try:
        for name, entry in parse_json(header).items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                # type, not isinstance: true and false are numbers in Python.
                if (
                    type(first) is not int
                    or type(stop) is not int
                    or not 0 <= first <= stop <= size - start
                ):
                    raise ValueError(f"{name!r} reaches from {first!r} to {stop!r}")
                ranges[name] = (start + first, start + stop)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            "A safetensors header is malformed", where=where, found=error, hint=FETCH_AGAIN
        ) from None
    return hashlib.sha256(prefix + header).hexdigest(), ranges


def _hash_ranges(
    descriptor: int, ranges: Mapping[str, tuple[int, int]], where: str
) -> dict[str, str]:
    """SHA-256 of each range, in as many threads as there are cores."""

    # Threads suffice: hashlib and preadv let go of the GIL. preadv leaves the descriptor's position
    # alone, which all threads share. And it reads instead of mapping: where a mapped file is cut
    # short meanwhile, the next access ends the process (SIGBUS).
    def digest(item: tuple[str, tuple[int, int]]) -> tuple[str, str]:
        name, (start, stop) = item
        found, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, stop - start)))
        while start < stop:
            count = os.preadv(descriptor, [buffer[: stop - start]], start)
            if not count:
                raise IntegrityError(
                    "A safetensors file is cut short", where=where, hint=FETCH_AGAIN
                )
            found.update(buffer[:count])
            start += count
        return name, found.hexdigest()

    # Largest first, so that no thread is left alone with one at the end.
    order = sorted(ranges.items(), key=lambda item: item[1][0] - item[1][1])
    with ThreadPoolExecutor(available_cpus()) as pool:
        return dict(pool.map(digest, order))
