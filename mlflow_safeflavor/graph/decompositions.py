"""Operators of torch traced as simpler ones, because ONNX or its exporter has none that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["CUTS", "DECOMPOSITIONS"]


def _split(tensor: torch.Tensor, size: int, dim: int = 0) -> Any:
    length = tensor.shape[dim]
    if isinstance(length, int) and isinstance(size, int):
        return NotImplemented  # a fixed size stays one Split
    starts = [i * size for i in range(-(-length // size))]
    return [tensor.narrow(dim, start, min(size, length - start)) for start in starts]


def _fold(
    parts: torch.Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Any:
    if list(kernel) != list(stride) or set(dilation) != {1} or any(padding):
        return NotImplemented  # parts overlap
    down, across = size[0] // kernel[0], size[1] // kernel[1]
    before = len(parts.shape) - 2
    # ([rows,] channels · kernel, tiles) → ([rows,] channels, kernel down, kernel across, down,
    # across) → ([rows,] channels, down, kernel down, across, kernel across)
    tiles = parts.reshape(*parts.shape[:before], -1, *kernel, down, across)
    order = [*range(before + 1), *(before + i for i in (3, 1, 4, 2))]
    whole = tiles.permute(order).reshape(
        *parts.shape[:before], -1, down * kernel[0], across * kernel[1]
    )
    # A rest that holds no whole tile is 0, as in torch.
    return torch.nn.functional.pad(
        whole, (0, size[1] - whole.shape[-1], 0, size[0] - whole.shape[-2])
    )


# Cuts become slices where sizes are free: there onnxscript makes a sequence of parts, at which its
# optimizer fails. Parts side by side are put together by moving axes, without Col2Im, which no
# graph may hold (``operators``).
CUTS = {torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default, torch.ops.aten.col2im.default}

DECOMPOSITIONS = {torch.ops.aten.split.Tensor: _split, torch.ops.aten.col2im.default: _fold}
