"""Rewrites of the exported model that leave out work which no output needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow_safeflavor.graph.rewrites import is_operator

__all__ = ["take_shortcuts"]

# Each element of the result is made of those at its own place, as far as inputs are not broadcast.
_ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "Cast", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow"),
        *("Reciprocal", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Sub"),
        *("Sum", "Tanh", "Where"),
    )
)

# Of a constant; no tensor of a module has such a name.
_FIRST = "/first"


def take_shortcuts(model: Any) -> None:
    """Rewrite a model, so that it gives the same outputs in less time."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    _join_heads(model.graph)
    _select_early(model.graph)
    RemoveUnusedNodesPass()(model)


def _join_heads(graph: Any) -> None:
    """Let Attention take its heads side by side, as products of matrices give and take them.

    (rows, length, heads · size), and not cut and turned to (rows, heads, length, size), which
    copies each argument and the result.
    """
    import onnx_ir as ir

    for node in graph:
        # More inputs or outputs are caches of keys and values, which no forward has.
        if not is_operator(node, "Attention") or len(node.inputs) > 4 or len(node.outputs) > 1:
            continue
        ways = [_way(node, i) for i in range(3)]
        cuts = [_cut(one.inputs[i]) for one, i in ways]
        if None in cuts:
            continue
        (rows, _, queries, _), (_, _, keys, _), (*_, size) = (cut.outputs[0].shape for cut in cuts)
        if (joined := _joined(node.outputs[0], rows, queries, size)) is None:
            continue
        for (one, i), cut in zip(ways, cuts, strict=True):
            one.replace_input_with(i, cut.inputs[0])
            if one is not node:
                one.attributes.add(ir.AttrInt64("num_heads", cut.outputs[0].shape[2]))
                one.outputs[0].shape = cut.inputs[0].shape
        node.attributes.add(ir.AttrInt64("q_num_heads", queries))
        node.attributes.add(ir.AttrInt64("kv_num_heads", keys))
        node.outputs[0].shape = joined.shape
        ir.convenience.replace_all_uses_with(joined, node.outputs[0], replace_graph_outputs=True)


def _way(attention: Any, i: int) -> tuple[Any, int]:
    """The node and input by which heads come to attention, which may be those of rotary angles."""
    rotary = attention.inputs[i].producer()
    if rotary and is_operator(rotary, "RotaryEmbedding") and len(rotary.inputs) == 3:
        return (rotary, 0) if _only_taker(rotary.outputs[0]) else (attention, i)
    return attention, i


def _cut(value: Any) -> Any:
    """The Reshape that cuts heads before they are turned; None for any other value."""
    turn = value.producer()
    cut = turn.inputs[0].producer() if turn and _turns(turn) else None
    if cut is None or not is_operator(cut, "Reshape"):
        return None
    return cut if _joins(cut.inputs[0].shape, cut.outputs[0].shape) else None


def _joined(value: Any, rows: Any, heads: int, size: int) -> Any:
    """What heads are turned and joined to, where nothing else takes them; None for others."""
    taker = _only_taker(value)
    # The exporter cannot tell that a length is a length, and so writes that it is.
    if taker and is_operator(taker, "Reshape"):
        shape = taker.outputs[0].shape
        if shape is None or [*shape][1::2] != [heads, size] or not _equal(shape[0], rows):
            return None
        taker = _only_taker(taker.outputs[0])
    join = _only_taker(taker.outputs[0]) if taker and _turns(taker) else None
    if join is None or not is_operator(join, "Reshape"):
        return None
    return join.outputs[0] if _joins(join.outputs[0].shape, join.inputs[0].shape) else None


def _joins(joined: Any, cut: Any) -> bool:
    """Whether (rows, length, heads · size) is the shape of what (rows, length, heads, size) is."""
    if joined is None or cut is None or (joined.rank(), cut.rank()) != (3, 4):
        return False
    known = all(isinstance(size, int) for size in (joined[2], cut[2], cut[3]))
    # With all other sizes the lengths are equal, too, in whatever words they are told.
    return known and joined[2] == cut[2] * cut[3] and _equal(joined[0], cut[0])


def _equal(one: Any, other: Any) -> bool:
    # A size that nothing is known of equals no other, which those of onnx_ir do.
    return bool(one == other) and (isinstance(one, int) or one.value is not None)


def _turns(node: Any) -> bool:
    perm = node.attributes.get("perm") if is_operator(node, "Transpose") else None
    return perm is not None and [*perm.as_ints()] == [0, 2, 1, 3]


def _only_taker(value: Any) -> Any:
    takers = [node for node, _ in value.uses()]
    return takers[0] if len(takers) == 1 and not value.is_graph_output() else None


def _select_early(graph: Any) -> None:
    """Compute what only the first token needs for that token alone.

    Classifiers look at the first token of the last layer. Its neighbours matter to attention, and
    to nothing behind it: there three quarters of that layer's products are.
    """
    for node in [*graph]:
        # Of an axis that is broadcast the first is the only one: no size need be known.
        if not is_operator(node, "Gather") or _number(node.inputs[1]) != 0:
            continue
        if (shape := node.inputs[0].shape) is None:
            continue
        inside, taken = _before(graph, node, _attribute(node, "axis", 0) % shape.rank())
        # Only products are worth a node more.
        if any(is_operator(one, "MatMul") for one in inside):
            _select(graph, inside, taken)


def _before(
    graph: Any, selecting: Any, axis: int
) -> tuple[dict[Any, int], dict[tuple[Any, int], int]]:
    """The nodes whose output nothing takes but what selects its first place.

    Returns:
        These nodes with that axis of their output, and all inputs of which the first place is
        enough, by node and number, with the axis.
    """
    inside: dict[Any, int] = {}
    taken = {(selecting, 0): axis}
    for node in reversed([*graph]):
        value = node.outputs[0]
        axes = {taken.get((use.node, use.idx)) for use in value.uses()}
        at = axes.pop() if len(axes) == 1 else None
        if at is None or value.is_graph_output() or len(node.outputs) > 1:
            continue
        if own := _same_place(node, at):
            inside[node] = at
            taken.update({(node, i): there for i, there in own.items()})
    return inside, taken


def _select(graph: Any, inside: Mapping[Any, int], taken: Mapping[tuple[Any, int], int]) -> None:
    """Select the first place of what goes into the nodes ``inside``."""
    import onnx_ir as ir

    if _FIRST not in graph.initializers:
        graph.register_initializer(ir.val(_FIRST, const_value=ir.tensor([0], name=_FIRST)))
    first = graph.initializers[_FIRST]
    selected: dict[tuple[Any, int], Any] = {}
    for (node, i), axis in taken.items():
        value = node.inputs[i]
        if value.producer() in inside:
            continue
        if (value, axis) not in selected:
            tape = ir.tape.Tape()
            made = tape.op("Gather", [value, first], {"axis": axis})
            made.type, made.shape = value.type, _narrow(value.shape, axis)
            # Right behind what gives it, or before all where nothing does.
            if value.producer() is None:
                graph.insert_before(graph[0], tape.nodes)
            else:
                graph.insert_after(value.producer(), tape.nodes)
            selected[value, axis] = made
        node.replace_input_with(i, selected[value, axis])
    for node, axis in inside.items():
        node.outputs[0].shape = _narrow(node.outputs[0].shape, axis)


def _same_place(node: Any, axis: int) -> Mapping[int, int]:
    """Number of each input that a place of the output's axis is made of → that axis of the input.

    Empty where a place of the output is made of others, too, or where nobody knows.
    """
    shapes: list[Any] = [value and value.shape for value in (*node.inputs, *node.outputs)]
    if node.domain or None in shapes:
        return {}
    *ranks, rank = [shape.rank() for shape in shapes]
    if node.op_type in _ELEMENTWISE:
        # Aligned at the end; without the axis, or with one place of it, they are broadcast.
        own = {i: axis - rank + ranks[i] for i in range(len(ranks))}
        return {i: at for i, at in own.items() if at >= 0 and shapes[i][at] != 1}
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        return {0: axis} if axis < _attribute(node, "axis", -1) % rank else {}
    if node.op_type == "MatMul":
        return {0: axis} if ranks[1] == 2 and axis < rank - 1 else {}
    return {}


def _narrow(shape: Any, axis: int) -> Any:
    import onnx_ir as ir

    return ir.Shape([1 if i == axis else size for i, size in enumerate(shape)])


def _number(value: Any) -> Any:
    """The number that a value is; None where it is none that is known."""
    known = None if value is None else value.const_value
    return known.numpy().item() if known is not None and len(known.shape) == 0 else None


def _attribute(node: Any, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())
