"""Tensors of an artifact to disk and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_bytes

from mlflow_safeflavor.arrays import reading
from mlflow_safeflavor.artifact import WAY_OUT, Layout, write_json
from mlflow_safeflavor.digests import FileDigests, digests_of
from mlflow_safeflavor.errors import IntegrityError, StructureError, WeightsError
from mlflow_safeflavor.inventory import STORABLE, Data, Inventory, Row, contiguous_stride, dtype_name, nbytes_of
from mlflow_safeflavor.weights_files import HeldFile, hold

__all__ = [
    "ALIGNMENT",
    "hold_weights",
    "is_aligned",
    "read_constants",
    "read_inventory",
    "read_tensors",
    "write_constants",
    "write_tensors",
]

SHARD_BYTES = 5 * 10**9

ALIGNMENT = 64
"""Bytes; what torch allocates begins at a multiple of them. Where a tensor begins decides on the last bits of what some
kernels compute from it: seen for one row through a Linear, by MKL on an AMD CPU, at no multiple of 16."""


# --- to disk -------------------------------------------------------------------------------------


def write_tensors(inventory: Inventory, values: Mapping[str, torch.Tensor], layout: Layout) -> Inventory:
    """Write ``values`` as safetensors and the inventory as ``tensors.json``.

    One file up to 5 GB, else shards and the usual ``model.safetensors.index.json``.

    Returns:
        The inventory with files and digests.
    """
    shards = _shards(values)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    data, files = dict(inventory.data), {}
    for file, shard in zip(names, shards, strict=True):
        path = layout.data / file
        _write_file({name: values[name] for name in shard}, path)
        digests = digests_of(path)
        files[file] = digests.header
        for name, digest in digests.tensors.items():
            data[name] = replace(data[name], file=file, sha256=digest)
    if len(shards) > 1:
        weight_map = {name: entry.file for name, entry in data.items()}
        index = {"metadata": {"total_size": inventory.nbytes}, "weight_map": weight_map}
        write_json(layout.data / "model.safetensors.index.json", index)
    complete = Inventory(inventory.rows, data, files)
    write_json(layout.tensors, _to_json(complete))
    return complete


_METADATA = "__metadata__"
_TYPES = {"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64"}
_KINDS = {"uint": "U", "int": "I", "float": "F"}


def _type_name(dtype: str) -> str:
    """As safetensors calls it: ``float32`` → ``F32``."""
    return _TYPES.get(dtype) or _KINDS[dtype.rstrip("0123456789")] + dtype.lstrip("abcdefghijklmnopqrstuvwxyz")


def _write_file(values: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write dense tensors as one safetensors file, so that what is mapped from it is aligned without being copied.

    The library's own writer begins the data anywhere and sorts by name, so that a bias of two labels would shift all
    tensors behind it. Here the header is filled up with spaces, as the format allows, and tensors whose size is no
    multiple of ``ALIGNMENT`` come last, those with the largest elements first.
    """
    if _METADATA in values:
        raise StructureError(
            "A tensor has the name that safetensors keeps for itself", where=_METADATA, way_out="rename that attribute"
        )
    order = sorted(values, key=lambda name: (values[name].nbytes % ALIGNMENT != 0, -values[name].itemsize))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    stop = 0
    for name in order:
        value, start = values[name], stop
        stop += value.nbytes
        facts = {"dtype": _type_name(dtype_name(value.dtype)), "shape": list(value.shape)}
        header[name] = {**facts, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if values[name].numel():  # else torch keeps strides that allow no view
                file.write(values[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether it begins where torch itself might have put it; on other devices than the CPU everything does."""
    return tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if is_aligned(tensor) else tensor.clone()


def _shards(values: Mapping[str, torch.Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in values.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


_INVENTORY_VERSION = 1


def _to_json(inventory: Inventory) -> dict[str, Any]:
    return {
        "version": _INVENTORY_VERSION,
        "files": dict(inventory.files),
        "data": {name: asdict(entry) for name, entry in inventory.data.items()},
        "tensors": [asdict(row) for row in inventory.rows.values()],
    }


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
            Row(**{**row, "shape": tuple(row["shape"]), "stride": _tuple(row["stride"])}) for row in content["tensors"]
        ]
        data = {name: Data(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in content["data"].items()}
        inventory = Inventory({row.path: row for row in rows}, data, dict(content["files"]))
        _check_inventory(inventory, len(rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            "The inventory of tensors is malformed",
            where=layout.name_of(layout.tensors),
            found=error,
            way_out=WAY_OUT,
        ) from None
    return inventory


def _tuple(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _check_inventory(inventory: Inventory, row_count: int) -> None:
    """Everything a later step relies on: known dtypes, plain file names, views inside their data."""
    if len(inventory.rows) != row_count:
        raise ValueError("a path stands there twice")
    for name, entry in inventory.data.items():
        if getattr(torch, entry.dtype, None) not in STORABLE or entry.file not in inventory.files:
            raise ValueError(f"data {name!r}: dtype {entry.dtype!r}, file {entry.file!r}")
    for file in inventory.files:
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ValueError(f"file {file!r}")
    for row in inventory.rows.values():
        if not all(type(text) is str for text in (row.path, row.kind)) or type(row.parameter) is not bool:
            raise ValueError(f"tensor {row.path!r}, {row.kind!r}")
        entry = inventory.data[row.data]
        numbers = (*row.shape, *(row.stride or ()), row.offset, *entry.shape)
        if row.dtype != entry.dtype or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"tensor {row.path!r}")
        if row.stride is not None and len(row.stride) != len(row.shape):
            raise ValueError(f"tensor {row.path!r}: stride {row.stride}")
        steps = row.stride or contiguous_stride(row.shape)
        last = row.offset + sum(max(size - 1, 0) * step for size, step in zip(row.shape, steps, strict=True))
        if 0 not in row.shape and (last + 1) * nbytes_of(row.dtype, ()) > nbytes_of(entry.dtype, entry.shape):
            raise ValueError(f"tensor {row.path!r} reaches past the end of {row.data!r}")


def hold_weights(
    inventory: Inventory, layout: Layout, *, hashes: bool = True, rehash: bool = False
) -> tuple[list[HeldFile], list[str]]:
    """Open all files of weights, and compare their digests; from then on the layout says where to map them from.

    Args:
        inventory: Names them, and says what must be in them.
        layout: Changed: ``held``.
        hashes: Compare digests; otherwise files stay where they are, unless they are small.
        rehash: Believe nothing that this host remembers.

    Returns:
        The files, which must live as long as what is mapped from them; and bytes that are not the ones that were
        saved, one sentence each.

    Raises:
        IntegrityError: A file is missing, cut short, or its header is malformed.
    """
    held, wrong = [], []
    for name, header in inventory.files.items():
        path = layout.data / name
        if not path.is_file():
            raise IntegrityError("A file of the artifact is missing", where=layout.name_of(path), way_out=WAY_OUT)
        tensors = {data: entry.sha256 for data, entry in inventory.data.items() if entry.file == name}
        file, problems = hold(
            path, layout.name_of(path), FileDigests(header, tensors) if hashes else None, rehash=rehash
        )
        layout.held[path] = file.path
        held.append(file)
        wrong += problems
    return held, wrong


# --- reading -------------------------------------------------------------------------------------


def read_tensors(inventory: Inventory, layout: Layout) -> dict[str, torch.Tensor]:
    """Data name → tensor on CPU, backed by a private memory map of its file: nothing is copied that is aligned.

    What is mapped is ``layout.held``, where the weights are held.

    Raises:
        IntegrityError: The safetensors library refuses a file.
        WeightsError: The files hold other tensors than the inventory lists.
    """
    values: dict[str, torch.Tensor] = {}
    for file in inventory.files:
        path = layout.data / file
        with reading(layout.name_of(path)), safe_open(layout.held.get(path, path), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in values:
                    raise ValueError(f"{name!r} is in another file, too")
                values[name] = _aligned(opened.get_tensor(name))
    wanted = {name: (entry.dtype, entry.shape) for name, entry in inventory.data.items()}
    found = {name: (dtype_name(value.dtype), tuple(value.shape)) for name, value in values.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise WeightsError(
                "The files do not hold the tensors that were saved",
                where=name,
                wanted=_describe(wanted.get(name)),
                found=_describe(found.get(name)),
                way_out=WAY_OUT,
            )
    return values


def _describe(facts: tuple[str, tuple[int, ...]] | None) -> str:
    return "no such tensor" if facts is None else f"{facts[0]}{list(facts[1])}"


# --- constants of a graph ------------------------------------------------------------------------


def write_constants(constants: Mapping[str, torch.Tensor], layout: Layout) -> None:
    """Write what a graph uses beside the model's own tensors."""
    _write_file(constants, layout.graph_tensors)


def read_constants(layout: Layout) -> dict[str, torch.Tensor]:
    """Read what ``write_constants`` wrote; nothing where it wrote nothing.

    Raises:
        IntegrityError: The file is not readable.
    """
    if not layout.graph_tensors.exists():
        return {}
    with reading(layout.name_of(layout.graph_tensors)):
        return {name: _aligned(value) for name, value in load_bytes(layout.read_bytes(layout.graph_tensors)).items()}
