"""Tensors of a graph: constants inside the file, and weights of the artifact."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow_safeflavor.artifact.inventory_file import ITEM_SIZES
from mlflow_safeflavor.graph.graph import Weight
from mlflow_safeflavor.graph.onnx_file import Malformed
from mlflow_safeflavor.graph.weights import Extent

__all__ = ["check_constant", "dtype_of", "size_of", "weights_of"]

_MOST_DIMENSIONS, _MOST_ELEMENTS = 32, 1 << 48

# Element types by the standard's number.
_DTYPES = {
    1: "float32",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    2: "uint8",
    3: "int8",
}


def dtype_of(number: Any, where: str) -> str:
    """An element type by its number. Raises ``Malformed``."""
    if number not in _DTYPES:
        raise Malformed(f"{where}: element type {number}")
    return _DTYPES[number]


def weights_of(tensors: list[dict[str, Any]]) -> Iterator[tuple[str, Weight]]:
    """The weights among checked initializers, with their names. Raises ``Malformed``."""
    for tensor in tensors:
        where = f"initializer {tensor.get('name', '')[:60]!r}"
        if tensor.get("data_location", 0) or tensor["external_data"]:
            if tensor.get("data_location") != 1 or "raw_data" in tensor:
                raise Malformed(f"{where}: is neither inside nor outside")
            dtype, shape = dtype_of(tensor.get("data_type"), where), _shape(tensor, where)
            # The file is compared with the artifact's own weights where it is mapped.
            extent = _extent(tensor["external_data"], where)
            if extent.length != math.prod(shape) * ITEM_SIZES[dtype]:
                raise Malformed(f"{where}: {extent.length} bytes for {dtype}{list(shape)}")
            if dtype == "bfloat16":
                raise Malformed(f"{where}: {dtype}, which numpy has not")
            yield tensor.get("name", ""), Weight(dtype, shape, extent)
        else:
            check_constant(tensor, where)


def _extent(pairs: Sequence[Mapping[str, str]], where: str) -> Extent:
    facts = {pair.get("key", ""): pair.get("value", "") for pair in pairs}
    # A key that comes twice is read as the first by some and as the last by others.
    if len(facts) != len(pairs) or facts.keys() != {"location", "offset", "length"}:
        raise Malformed(f"{where}: external data without location, offset and length, or with more")
    if not all(
        # int() takes digits of all scripts, signs and underscores; the standard's parser does not.
        re.fullmatch(r"[0-9]{1,18}", facts[name], re.ASCII)
        for name in ("offset", "length")
    ):
        raise Malformed(f"{where}: an offset or a length that is no number")
    return Extent(facts["location"], int(facts["offset"]), int(facts["length"]))


def check_constant(tensor: Mapping[str, Any], where: str) -> None:
    """Refuse a constant inside the file that is not as long as it says."""
    dtype, content = dtype_of(tensor.get("data_type"), where), tensor.get("raw_data", b"")
    wanted = math.prod(_shape(tensor, where)) * ITEM_SIZES[dtype]
    if tensor.get("data_location") or tensor["external_data"] or len(content) != wanted:
        raise Malformed(f"{where}: {len(content)} bytes, not {wanted}")
    # Kernels (NonZero) may count the ones to allocate, and then write for each that is not 0.
    if dtype == "bool" and content.translate(None, b"\0\1"):
        raise Malformed(f"{where}: truth values that are neither 0 nor 1")


def size_of(tensor: Mapping[str, Any]) -> int:
    """Bytes of a checked tensor."""
    return int(math.prod(tensor["dims"])) * ITEM_SIZES[_DTYPES[tensor["data_type"]]]


def _shape(tensor: Mapping[str, Any], where: str) -> tuple[int, ...]:
    shape = tuple(tensor["dims"])
    if len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise Malformed(f"{where}: a negative size, or {len(shape)} dimensions")
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:  # 0 times 2**62 times 2**62 is 0
        raise Malformed(f"{where}: sizes {list(shape)}")
    return shape
