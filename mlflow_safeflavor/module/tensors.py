"""Tensors of an artifact to disk and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mlflow_safeflavor.artifact.arrays import reading
from mlflow_safeflavor.artifact.digests import digests_of
from mlflow_safeflavor.artifact.inventory_file import Inventory, write_inventory
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import StructureError, WeightsError
from mlflow_safeflavor.module.inventory import dtype_name

__all__ = [
    "ALIGNMENT",
    "is_aligned",
    "read_tensors",
    "write_tensors",
]

SHARD_BYTES = 5 * 10**9

# Bytes; memory that torch allocates begins at a multiple of them. The address of a tensor decides
# on the last bits of some kernels' results: seen for one row through a Linear, by MKL on an AMD
# CPU, at no multiple of 16.
ALIGNMENT = 64


# --- to disk -------------------------------------------------------------------------------------


def write_tensors(
    inventory: Inventory, values: Mapping[str, torch.Tensor], layout: Layout
) -> Inventory:
    """Write ``values`` as safetensors and the inventory as ``tensors.json``.

    One file up to 5 GB, else shards and the usual ``model.safetensors.index.json``.

    Returns:
        The inventory with files and digests.
    """
    shards = _shards(values)
    names = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
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
    write_inventory(complete, layout)
    return complete


_METADATA = "__metadata__"
_TYPES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}
_KINDS = {"uint": "U", "int": "I", "float": "F"}


def _type_name(dtype: str) -> str:
    """Name of a dtype in safetensors: ``float32`` → ``F32``."""
    return _TYPES.get(dtype) or _KINDS[dtype.rstrip("0123456789")] + dtype.lstrip(
        "abcdefghijklmnopqrstuvwxyz"
    )


def _write_file(values: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write dense tensors as one safetensors file, aligned as it is mapped."""
    if _METADATA in values:
        raise StructureError(
            "A tensor has the name that safetensors keeps for itself",
            where=_METADATA,
            hint="rename that attribute",
        )
    # The library's own writer begins the data anywhere and sorts by name, so that a bias of two
    # labels shifts all tensors behind it. Here sizes that are no multiple of the alignment come
    # last, those with the largest elements first.
    order = sorted(
        values, key=lambda name: (values[name].nbytes % ALIGNMENT != 0, -values[name].itemsize)
    )
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    stop = 0
    for name in order:
        value, start = values[name], stop
        stop += value.nbytes
        facts = {"dtype": _type_name(dtype_name(value.dtype)), "shape": list(value.shape)}
        header[name] = {**facts, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # spaces behind the header, as the format allows
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if values[name].numel():  # an empty tensor keeps strides that allow no view of bytes
                file.write(
                    values[name]
                    .detach()
                    .cpu()
                    .contiguous()
                    .reshape(-1)
                    .view(torch.uint8)
                    .numpy()
                    .data
                )


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether it begins at an address that torch itself might choose; on accelerators all do."""
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


# --- reading -------------------------------------------------------------------------------------


def read_tensors(inventory: Inventory, layout: Layout) -> dict[str, torch.Tensor]:
    """Data name → tensor on the CPU, backed by a private memory map of its file.

    Files are mapped where ``layout.held`` has them. Only tensors that are not aligned are copied.

    Raises:
        IntegrityError: The safetensors library refuses a file.
        WeightsError: The files hold other tensors than the inventory lists.
    """
    values: dict[str, torch.Tensor] = {}
    for file in inventory.files:
        path = layout.data / file
        with (
            reading(layout.name_of(path)),
            safe_open(layout.held.get(path, path), framework="pt") as opened,
        ):
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                # A name in two shards: which one is read would depend on their order.
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
                wanted=_format(wanted.get(name)),
                found=_format(found.get(name)),
                hint=FETCH_AGAIN,
            )
    return values


def _format(facts: tuple[str, tuple[int, ...]] | None) -> str:
    return "no such tensor" if facts is None else f"{facts[0]}{list(facts[1])}"
