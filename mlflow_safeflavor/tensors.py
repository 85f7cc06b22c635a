"""Tensors to disk and back: the only module that touches safetensors."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from mlflow_safeflavor.artifact import WAY_OUT, Layout, read_json, write_json
from mlflow_safeflavor.cpu import available_cpus
from mlflow_safeflavor.errors import IntegrityError, WeightsError
from mlflow_safeflavor.inventory import STORABLE, Data, Inventory, Row, contiguous_stride, dtype_name, nbytes_of

__all__ = [
    "find_wrong_digests",
    "read_arrays",
    "read_inventory",
    "read_tensors",
    "write_arrays",
    "write_tensors",
]

SHARD_BYTES = 5 * 10**9
_MAX_HEADER = 100 * 10**6  # the same bound as the safetensors library


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
        save_file({name: values[name].cpu() for name in shard}, path, metadata={"format": "pt"})
        files[file], ranges = _read_header(path)
        for name, (digest, _) in _digest_ranges(path, {name: ranges[name] for name in shard}).items():
            entry = data[name]
            data[name] = Data(entry.dtype, entry.shape, file, digest)
    if len(shards) > 1:
        weight_map = {name: entry.file for name, entry in data.items()}
        index = {"metadata": {"total_size": inventory.nbytes}, "weight_map": weight_map}
        write_json(layout.data / "model.safetensors.index.json", index)
    complete = Inventory(inventory.rows, data, files)
    write_json(layout.tensors, _to_json(complete))
    return complete


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
    content = read_json(layout.tensors)
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
        entry = inventory.data[row.data]
        numbers = (*row.shape, *(row.stride or ()), row.offset, *entry.shape)
        if row.dtype != entry.dtype or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"tensor {row.path!r}")
        if row.stride is not None and len(row.stride) != len(row.shape):
            raise ValueError(f"tensor {row.path!r}: stride {row.stride}")
        steps = row.stride or contiguous_stride(row.shape)
        last = row.offset + sum(max(size - 1, 0) * step for size, step in zip(row.shape, steps, strict=True))
        if 0 not in row.shape and (last + 1) * nbytes_of(row.dtype, ()) > nbytes_of(entry.dtype, entry.shape):
            raise ValueError(f"tensor {row.path!r} reaches past the end of {row.data!r}")


# --- digests -------------------------------------------------------------------------------------


def _read_header(path: Path) -> tuple[str, dict[str, tuple[int, int]]]:
    """SHA-256 of a safetensors header, and tensor name → byte range in the file.

    The library has checked nothing yet, so every length is checked before it is used.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, path.stat().st_size - 8):
            raise IntegrityError("A safetensors file is cut short", where=path.name, way_out=WAY_OUT)
        header = file.read(length)
    start = 8 + length
    try:
        entries = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        ranges = {name: (start + int(first), start + int(stop)) for name, (first, stop) in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            "A safetensors header is malformed", where=path.name, found=error, way_out=WAY_OUT
        ) from None
    return hashlib.sha256(prefix + header).hexdigest(), ranges


def _digest_ranges(path: Path, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[str, int]]:
    """Name → SHA-256 and size of each byte range, hashed side by side: hashlib lets go of the GIL."""
    if not any(stop > first for first, stop in ranges.values()):
        return {name: (hashlib.sha256().hexdigest(), 0) for name in ranges}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)

        def digest(item: tuple[str, tuple[int, int]]) -> tuple[str, tuple[str, int]]:
            name, (first, stop) = item
            with view[first:stop] as part:
                return name, (hashlib.sha256(part).hexdigest(), stop - first)

        # Largest first, so that no thread is left alone with one at the end.
        order = sorted(ranges.items(), key=lambda item: item[1][0] - item[1][1])
        with view, ThreadPoolExecutor(available_cpus()) as pool:
            return dict(pool.map(digest, order))


def find_wrong_digests(inventory: Inventory, layout: Layout) -> Iterator[str]:
    """Bytes of the weights that are not the ones that were saved, one sentence each.

    Headers and tensors are hashed once each; as the ranges of a valid file leave no gap, every byte
    of it is covered.

    Raises:
        IntegrityError: A file is missing, cut short, or its header is malformed.
    """
    for file, header_digest in inventory.files.items():
        path = layout.data / file
        if not path.is_file():
            raise IntegrityError("A file of the artifact is missing", where=layout.name_of(path), way_out=WAY_OUT)
        found_header, ranges = _read_header(path)
        if found_header != header_digest:
            yield f"{layout.name_of(path)}: its header is not the one that was saved"
            continue
        wanted = {name: entry.sha256 for name, entry in inventory.data.items() if entry.file == file}
        for name, (found, _) in _digest_ranges(path, {name: ranges[name] for name in wanted}).items():
            if found != wanted[name]:
                yield f"{layout.name_of(path)}, tensor {name}: has SHA-256 {found[:12]}…, wanted {wanted[name][:12]}…"


# --- reading -------------------------------------------------------------------------------------


def read_tensors(inventory: Inventory, layout: Layout) -> dict[str, torch.Tensor]:
    """Data name → tensor on CPU, backed by a private memory map of its file: nothing is copied.

    Raises:
        IntegrityError: The safetensors library refuses a file.
        WeightsError: The files hold other tensors than the inventory lists.
    """
    values: dict[str, torch.Tensor] = {}
    for file in inventory.files:
        path = layout.data / file
        try:
            with safe_open(path, framework="pt") as opened:
                values.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise IntegrityError(
                "A safetensors file cannot be read", where=layout.name_of(path), found=error, way_out=WAY_OUT
            ) from None
    wanted = {name: f"{entry.dtype}{list(entry.shape)}" for name, entry in inventory.data.items()}
    found = {name: f"{dtype_name(value.dtype)}{list(value.shape)}" for name, value in values.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise WeightsError(
                "The files do not hold the tensors that were saved",
                where=name,
                wanted=wanted.get(name, "no such tensor"),
                found=found.get(name, "no such tensor"),
                way_out=WAY_OUT,
            )
    return values


# --- plain arrays --------------------------------------------------------------------------------


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write named arrays, as golden rows have them, as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_numpy(dict(arrays), path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what ``write_arrays`` wrote.

    Raises:
        IntegrityError: The file is missing or not readable.
    """
    try:
        return dict(load_numpy(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            "A safetensors file cannot be read", where=path.name, found=error, way_out=WAY_OUT
        ) from None
