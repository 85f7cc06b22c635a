"""A module's forward as ``graph.onnx``: traced with free sizes, with the artifact's own weights.

Weights are not stored again. An initializer that is a tensor of the module is external data: bytes
of ``model.safetensors``. What the exporter would fold or transpose stays a node, so that there is
one copy of it. Only small constants of the graph's own are inside the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlflow_safeflavor.graph import rewrites, shortcuts
from mlflow_safeflavor.graph.proof import Refusal
from mlflow_safeflavor.graph.trace import (
    Forward,
    Inputs,
    Sizes,
    first_line,
    quiet,
    sizes_of,
    traced,
)
from mlflow_safeflavor.graph.weights import Extent
from mlflow_safeflavor.module.slots import Slot

__all__ = ["OPSET", "Exported", "export"]

# The first opset with Attention as one operator, whose kernel is the fastest that ONNX Runtime has
# for it on a CPU.
OPSET = 23

# Bytes of a constant that the exporter may compute: tables of positions, never a weight.
_MOST_FOLDED = 1 << 16

# Bytes of all constants inside the file.
_MOST_OWN = 64 << 20


class Exported:
    """A forward as an ONNX model.

    Args:
        model: As the exporter made it, simplified.
        example: What it was traced with.
        sizes: Of its inputs.
        outputs: Names, in its order.
        extents: Of the module's tensors in files of weights, by path.
        slots: These tensors.
    """

    def __init__(
        self,
        model: Any,
        example: Inputs,
        sizes: Sizes,
        outputs: Sequence[str],
        extents: Mapping[str, Extent],
        slots: Sequence[Slot],
    ) -> None:
        self.sizes = sizes
        self._proto = _written(
            model, list(example), sizes, outputs, _weights(model.graph, extents, slots)
        )

    def content(self, fixed: Mapping[str, int]) -> bytes:
        """The serialised model; the same bytes for the same forward.

        Args:
            fixed: Free size → the only one that it may have after all.
        """
        for value in self._proto.graph.input:
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param in fixed:
                    dimension.dim_value = fixed[dimension.dim_param]
        content: bytes = self._proto.SerializeToString(deterministic=True)
        return content


def export(
    module: torch.nn.Module,
    slots: Sequence[Slot],
    extents: Mapping[str, Extent],
    examples: Sequence[Inputs],
    example: Inputs,
    free: Mapping[str, set[int]],
) -> Exported:
    """Trace a module's forward and translate it.

    Args:
        module: As it is served: in eval mode, gradients off.
        slots: Its tensors.
        extents: Where those are in files of weights, by path.
        examples: Inputs of its forward; sizes that are equal in all of them are one.
        example: What to trace with; free sizes must be 2 or more, as the tracer takes 1 for a
            constant.
        free: Input → its dimensions that may have any size.

    Raises:
        Refusal: The forward cannot be traced, or has no translation.
    """
    program = traced(module, example, free)
    sizes = sizes_of(program, example, examples)
    with quiet():
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )
            model = made.model  # type: ignore[union-attr]  # None without dynamo
            _simplify(model, slots)
        except Exception as error:  # the exporter has no end of ways to fail
            raise Refusal(f"torch.onnx: {first_line(error)}") from error
    with torch.no_grad():
        outputs = list(Forward(module)(dict(example)))
    return Exported(model, example, sizes, outputs, extents, slots)


def _simplify(model: Any, slots: Sequence[Slot]) -> None:
    """Fold constants, but none computed from weights, and fuse nodes to single operators."""
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    weights = {_memory(slot.tensor) for slot in slots if slot.tensor.is_floating_point()}

    # A folded transpose or cast of a weight would be stored in the file once more.
    def should_fold(node: Any) -> bool | None:
        known = [
            value.const_value
            for value in node.inputs
            if value is not None and value.const_value is not None
        ]
        tensors = [
            raw for value in known if isinstance(raw := getattr(value, "raw", None), torch.Tensor)
        ]
        return False if any(_memory(tensor) in weights for tensor in tensors) else None

    optimizer.optimize_ir(model, output_size_limit=_MOST_FOLDED, should_fold=should_fold)
    onnx_fusions.fuse(model)
    rewrites.fit_kernels(model)
    shortcuts.take_shortcuts(model)


def _weights(
    graph: Any, extents: Mapping[str, Extent], slots: Sequence[Slot]
) -> dict[Any, tuple[str, Extent]]:
    """Initializers that are tensors of the module: under their paths, with their extents."""
    # By memory: the exporter keeps the module's own tensors as initializers, under other names.
    paths = {_memory(slot.tensor): slot.path for slot in reversed(slots) if slot.tensor.numel()}
    found = {}
    for value in graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        path = paths.get(_memory(raw)) if isinstance(raw, torch.Tensor) else None
        if path is not None and path in extents:
            found[value] = (path, extents[path])
    return found


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _written(
    model: Any,
    inputs: Sequence[str],
    sizes: Sizes,
    outputs: Sequence[str],
    weights: Mapping[Any, tuple[str, Extent]],
) -> Any:
    """The model as protobuf under our names, without notes for people or for the exporter."""
    import onnx_ir as ir

    graph = model.graph
    if len(graph.outputs) != len(outputs) or len(graph.inputs) != len(inputs):
        raise Refusal("the traced forward gives other outputs, or takes other inputs")
    _make_outputs_own(graph)
    _free_names(graph, weights)
    for value, (path, extent) in weights.items():
        value.const_value = ir.ExternalTensor(
            extent.file, extent.start, extent.length, value.const_value.dtype,
            shape=value.const_value.shape, name=path, base_dir="",
        )  # fmt: skip
        value.name = path
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name, value.shape = f"input.{name}", ir.Shape(sizes[name])
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = f"output.{name}"
        value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.doc_string = None
        value.metadata_props.clear()
    # All that the check at load refuses: trailing arguments without a name, texts, metadata.
    for node in graph:
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
        node.doc_string = node.name = None
        node.metadata_props.clear()
        node.overload = ""
    for part in (model, graph):
        part.doc_string = None
        part.metadata_props.clear()
    graph.name, model.producer_name, model.producer_version = "forward", "mlflow-safeflavor", None
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    own = sum(
        len(tensor.raw_data) for tensor in proto.graph.initializer if not tensor.external_data
    )
    if own > _MOST_OWN:
        raise Refusal(f"{own} bytes of constants that are no tensors of the module")
    return proto


def _free_names(graph: Any, weights: Mapping[Any, tuple[str, Extent]]) -> None:
    """Take the paths of tensors from all other values: a module may call a parameter "add"."""
    paths = {path for path, _ in weights.values()}
    made = (value for node in graph for value in node.outputs)
    for value in [*made, *graph.initializers.values()]:
        if value not in weights and value.name in paths:
            value.name = f"/{value.name}"


def _make_outputs_own(graph: Any) -> None:
    """Give each output a node of its own, where it is an input, a weight or another output."""
    import onnx_ir as ir

    taken = {*graph.inputs, *graph.initializers.values()}
    for i, value in enumerate(graph.outputs):
        if value in taken:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        taken.add(graph.outputs[i])
