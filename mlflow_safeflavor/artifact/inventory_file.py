"""``tensors.json``: the inventory of a module's tensors, and its files of weights held.

* A ``Row`` describes the tensor of one slot of a module: kind, dtype, shape, and the data it views;
* a ``Data`` entry is one run of values in a safetensors file, with its SHA-256.

Rows that view the same data are one alias group: tied weights, declared or not, views of one
buffer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from mlflow_safeflavor.artifact.digests import FileDigests
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.weights_files import HeldFile, hold
from mlflow_safeflavor.errors import IntegrityError

__all__ = [
    "ITEM_SIZES",
    "Data",
    "Inventory",
    "Row",
    "contiguous_stride",
    "hold_weights",
    "nbytes_of",
    "read_inventory",
    "write_inventory",
]

# Bytes of an element, by torch's name of the dtype: all that safetensors can store.
ITEM_SIZES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
}


@dataclass(frozen=True)
class Row:
    """The tensor that must be in one slot.

    Attributes:
        path, kind, persistent: As in ``Slot``.
        dtype: Like ``float32``.
        shape: Sizes.
        data: Name of the ``Data`` that it views; equal names are one alias group.
        stride: In elements, for a tensor that is not contiguous; else None.
        offset: In elements from the start of the data.
        parameter: Whether the tensor is an ``nn.Parameter``.
        requires_grad: As it was when saved; a loaded model never requires gradients.
    """

    path: str
    kind: str
    persistent: bool
    dtype: str
    shape: tuple[int, ...]
    data: str
    stride: tuple[int, ...] | None = None
    offset: int = 0
    parameter: bool = False
    requires_grad: bool = False


@dataclass(frozen=True)
class Data:
    """One run of values in a file.

    Attributes:
        dtype: Like ``float32``.
        shape: Sizes in the file.
        file: Name of the safetensors file, beside ``tensors.json``.
        sha256: Of the values as stored, little endian.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Inventory:
    """All tensors of a module.

    Attributes:
        rows: Path → row.
        data: Name → data.
        files: File name → SHA-256 of its header. Header and data together are every byte of the
            file.
    """

    rows: Mapping[str, Row]
    data: Mapping[str, Data]
    files: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all data."""
        return sum(nbytes_of(entry.dtype, entry.shape) for entry in self.data.values())


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    count = 1
    for size in shape:
        count *= size
    return count * ITEM_SIZES[dtype]


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Stride of a contiguous tensor of this shape, in elements."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


_INVENTORY_VERSION = 1


def write_inventory(inventory: Inventory, layout: Layout) -> None:
    """Write ``tensors.json``."""
    content = {
        "version": _INVENTORY_VERSION,
        "files": dict(inventory.files),
        "data": {name: asdict(entry) for name, entry in inventory.data.items()},
        "tensors": [asdict(row) for row in inventory.rows.values()],
    }
    write_json(layout.tensors, content)


def read_inventory(layout: Layout) -> Inventory:
    """Read ``tensors.json``.

    Raises:
        IntegrityError: It is missing or malformed.
    """
    content = layout.read_json(layout.tensors)
    try:
        if content["version"] != _INVENTORY_VERSION:
            raise ValueError(f"version {content['version']!r}")
        rows = [
            # Unknown keys are a TypeError, and so malformed, as are missing ones.
            Row(**{**row, "shape": tuple(row["shape"]), "stride": _tuple(row["stride"])})
            for row in content["tensors"]
        ]
        data = {
            name: Data(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in content["data"].items()
        }
        inventory = Inventory({row.path: row for row in rows}, data, dict(content["files"]))
        _check_inventory(inventory, len(rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            "The inventory of tensors is malformed",
            where=layout.name_of(layout.tensors),
            found=error,
            hint=FETCH_AGAIN,
        ) from None
    return inventory


def _tuple(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _check_inventory(inventory: Inventory, row_count: int) -> None:
    """Check what later steps rely on: known dtypes, plain file names, views inside their data."""
    if len(inventory.rows) != row_count:
        raise ValueError("a path stands there twice")
    for name, entry in inventory.data.items():
        if entry.dtype not in ITEM_SIZES or entry.file not in inventory.files:
            raise ValueError(f"data {name!r}: dtype {entry.dtype!r}, file {entry.file!r}")
    # Joined to the artifact's folder below: "../other" or "/etc/…" would be hashed and mapped.
    for file in inventory.files:
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ValueError(f"file {file!r}")
    for row in inventory.rows.values():
        if (
            not all(type(text) is str for text in (row.path, row.kind))
            or type(row.parameter) is not bool
        ):
            raise ValueError(f"tensor {row.path!r}, {row.kind!r}")
        entry = inventory.data[row.data]
        # None negative, or a view could begin before its data; and none beyond 64 bits, which torch
        # would refuse with an error of its own.
        numbers = (*row.shape, *(row.stride or ()), row.offset, *entry.shape)
        if row.dtype != entry.dtype or any(
            type(n) is not int or not 0 <= n < 2**63 for n in numbers
        ):
            raise ValueError(f"tensor {row.path!r}")
        if row.stride is not None and len(row.stride) != len(row.shape):
            raise ValueError(f"tensor {row.path!r}: stride {row.stride}")
        # as_strided trusts its arguments: a view past the end of a mapped file reads other memory
        # of this process, or ends it.
        steps = row.stride or contiguous_stride(row.shape)
        last = row.offset + sum(
            max(size - 1, 0) * step for size, step in zip(row.shape, steps, strict=True)
        )
        if 0 not in row.shape and (last + 1) * nbytes_of(row.dtype, ()) > nbytes_of(
            entry.dtype, entry.shape
        ):
            raise ValueError(f"tensor {row.path!r} reaches past the end of {row.data!r}")


def hold_weights(
    inventory: Inventory, layout: Layout, *, hashes: bool = True, rehash: bool = False
) -> tuple[list[HeldFile], list[str]]:
    """Open all files of weights and compare their digests; the layout then says where to map them.

    Args:
        inventory: Their names and digests.
        layout: Changed: ``held``.
        hashes: Compare digests; otherwise files stay where they are, unless they are small.
        rehash: Hash also files that this host has hashed before.

    Returns:
        The files, which must live as long as tensors mapped from them; and differences from the
        recorded digests, one sentence each.

    Raises:
        IntegrityError: A file is missing, cut short, or its header is malformed.
    """
    held, wrong = [], []
    for name, header in inventory.files.items():
        path = layout.data / name
        if not path.is_file():
            raise IntegrityError(
                "A file of the artifact is missing", where=layout.name_of(path), hint=FETCH_AGAIN
            )
        tensors = {
            data: entry.sha256 for data, entry in inventory.data.items() if entry.file == name
        }
        file, problems = hold(
            path,
            layout.name_of(path),
            FileDigests(header, tensors) if hashes else None,
            rehash=rehash,
        )
        # Mapped from there, not from the artifact: see ``weights_files``.
        layout.held[path] = file.path
        held.append(file)
        wrong += problems
    return held, wrong
