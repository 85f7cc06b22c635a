"""Rewrites of the exported model for ONNX Runtime's kernels that take other than it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["fit_kernels", "is_operator"]

_LOWEST = np.finfo(np.float32).min


def fit_kernels(model: Any) -> None:
    """Let each kernel compute what torch computes."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    # Fusions leave the angles of rotary positions once a layer, each computed anew.
    CommonSubexpressionEliminationPass()(model)
    _raise_masks(model.graph)
    _broadcast(model.graph)


def _raise_masks(graph: Any) -> None:
    """Replace the lowest float32 in masks of Attention by the next one.

    ONNX Runtime takes the lowest for minus infinity: where a row is all masked it gives 0, and
    torch the mean of the values. The next one is as low beside any score.
    """
    import onnx_ir as ir

    if not any(_is_lowest(value.const_value) for value in graph.initializers.values()):
        return
    lowest, next_to = (
        ir.val(name, const_value=ir.tensor(np.array(number), name=name))
        for name, number in (
            ("/lowest", _LOWEST),
            ("/next_to_lowest", np.nextafter(_LOWEST, np.float32(0))),
        )
    )
    raised: dict[Any, Any] = {}  # one for all layers that share a mask
    for node in graph:
        mask = node.inputs[3] if is_operator(node, "Attention") and len(node.inputs) > 3 else None
        if mask is None or mask.dtype != ir.DataType.FLOAT:
            continue
        if mask not in raised:
            tape = ir.tape.Tape()
            raised[mask] = tape.op("Where", [tape.op("Equal", [mask, lowest]), next_to, mask])
            raised[mask].type, raised[mask].shape = mask.type, mask.shape
            graph.insert_before(node, tape.nodes)
        node.replace_input_with(3, raised[mask])
    if raised:
        graph.register_initializer(lowest)
        graph.register_initializer(next_to)


def _is_lowest(tensor: Any) -> bool:
    return tensor is not None and tensor.size == 1 and bool((tensor.numpy() == _LOWEST).all())


def _broadcast(graph: Any) -> None:
    """Write out what torch broadcasts, and a kernel wants in full.

    RotaryEmbedding refuses one row of angles, as of positions that are counted and not given, and
    Attention a mask that is one for all queries.
    """
    import onnx_ir as ir

    full: dict[tuple[Any, ...], Any] = {}
    for node in graph:
        for i, axis, like, where in _in_full(node):
            value, size = node.inputs[i], like.shape[where]
            # Only an axis of 1 beside one of another, or a free, size.
            if size == 1 or (shape := _shape(value)) is None or shape[axis] != 1:
                continue
            known = (value, axis, like if size == ir.SymbolicDim(None) else size)
            if known not in full:
                tape = ir.tape.Tape()
                sizes = [
                    tape.op("Shape", [value], {"start": 0, "end": axis}),
                    tape.op("Shape", [like], {"start": where, "end": where + 1}),
                    tape.op("Shape", [value], {"start": axis + 1}),
                ]
                full[known] = tape.op("Expand", [value, tape.op("Concat", sizes, {"axis": 0})])
                graph.insert_before(node, tape.nodes)
            node.replace_input_with(i, full[known])


def _in_full(node: Any) -> Iterator[tuple[int, int, Any, int]]:
    """Number of an input, its axis, and the input and axis that it must be as long as."""
    if is_operator(node, "RotaryEmbedding") and len(node.inputs) == 3:
        yield from ((i, 0, node.inputs[0], 0) for i in (1, 2))
    elif is_operator(node, "Attention") and len(node.inputs) > 3 and node.inputs[3] is not None:
        yield 3, -2, node.inputs[0], 2


def _shape(value: Any) -> Any:
    node = value.producer()
    # Fusions leave out the shape of what they make; the angles have that of their cosine's input.
    if value.shape is None and node is not None and node.op_type in ("Cos", "Sin"):
        return node.inputs[0].shape
    return value.shape


def is_operator(node: Any, name: str) -> bool:
    """Whether a node is that operator of the standard."""
    return not node.domain and node.op_type == name
