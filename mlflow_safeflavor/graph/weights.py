"""Places of a module's tensors in the artifact's files of weights, and their bytes, mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError

if TYPE_CHECKING:
    from mlflow_safeflavor.artifact.inventory_file import Inventory
    from mlflow_safeflavor.graph.graph import Weight

__all__ = ["Extent", "find_extents", "map_weights"]


@dataclass(frozen=True)
class Extent:
    """Bytes of a file.

    Attributes:
        file: Its name in the artifact's folder of data.
        start: Of the first byte.
        length: Bytes.
    """

    file: str
    start: int
    length: int


def find_extents(inventory: Inventory, layout: Layout) -> dict[str, Extent]:
    """Path → extent of each tensor that lies contiguously in the files of weights just written."""
    # safetensors: 8 bytes with the length of the header, the header, then the data from 0 on.
    begins: dict[str, tuple[str, int]] = {}
    for file in inventory.files:
        with (layout.data / file).open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, facts in header.items():
            if name != "__metadata__":
                begins[name] = (file, 8 + length + facts["data_offsets"][0])
    found = {}
    for row in inventory.rows.values():
        # A view of other strides is no run of bytes, as an initializer must be.
        if row.stride is None and row.data in begins:
            file, start = begins[row.data]
            size = np.dtype(row.dtype).itemsize if row.dtype != "bfloat16" else 2
            found[row.path] = Extent(file, start + row.offset * size, math.prod(row.shape) * size)
    return found


def map_weights(
    weights: Mapping[str, Weight], files: Collection[str], layout: Layout
) -> dict[str, np.ndarray]:
    """The arrays that a graph takes from files of weights, read-only.

    Args:
        weights: As the graph names them.
        files: Names of the artifact's files of weights, whose content was compared with what was
            saved.
        layout: Says where they are held.

    Raises:
        IntegrityError: A tensor is in no such file, reaches beyond it, or is not of its dtype.
    """
    opened: dict[str, np.ndarray] = {}
    found = {}
    for name, weight in weights.items():
        extent, dtype = weight.extent, np.dtype(weight.dtype)
        # By name among the compared files, never as a path: "../x", "/proc/self/environ" and ONNX
        # Runtime's marker of memory addresses are no such names.
        if extent.file in files and extent.file not in opened:
            path = layout.data / extent.file
            opened[extent.file] = np.memmap(layout.held.get(path, path), mode="r", dtype=np.uint8)
        size = len(opened.get(extent.file, ()))
        if (
            not 0 <= extent.start <= extent.start + extent.length <= size
            or extent.start % dtype.itemsize
        ):
            raise IntegrityError(
                "A tensor of the graph is not in the artifact's files of weights",
                where=f"{layout.name_of(layout.graph)}, initializer {name[:200]!r}",
                wanted=f"bytes of {' | '.join(sorted(files))[:200]}",
                found=f"bytes {extent.start} to {extent.start + extent.length} of "
                f"{extent.file[:200]!r}, which has {size}",
                hint=FETCH_AGAIN,
            )
        part = opened[extent.file][extent.start : extent.start + extent.length]
        # Kernels count the ones to allocate, and then write for each that is not 0.
        if weight.dtype == "bool" and part.max(initial=0) > 1:
            raise IntegrityError(
                "A tensor of the graph holds truth values that are neither 0 nor 1",
                where=f"{layout.name_of(layout.graph)}, initializer {name[:200]!r}",
                hint=FETCH_AGAIN,
            )
        found[name] = part.view(dtype).reshape(weight.shape)
    return found
