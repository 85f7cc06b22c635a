"""A module's forward as ``graph.onnx``: traced with free sizes, with the artifact's own weights.

Weights are not stored again. An initializer that is a tensor of the module is external data: bytes
of ``model.safetensors``. What the exporter would fold or transpose stays a node, so that there is
one copy of it. Only small constants of the graph's own are inside the file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mlflow_safeflavor.graph import rewrites
from mlflow_safeflavor.graph.decompositions import CUTS, DECOMPOSITIONS
from mlflow_safeflavor.graph.proof import TEXT, Refusal
from mlflow_safeflavor.graph.weights import Place
from mlflow_safeflavor.module.engine import named_tensors
from mlflow_safeflavor.module.slots import Slot

__all__ = ["OPSET", "Exported", "Forward", "Inputs", "export"]

Inputs = Mapping[str, torch.Tensor]
# Input → its sizes; a text for one that may be any, equal texts for equal sizes.
Sizes = Mapping[str, tuple["int | str", ...]]

# The first with Attention as one operator.
#
# Its kernel is the fastest that ONNX Runtime has for it on a CPU.
OPSET = 23

# Bytes of a constant that the exporter may compute: tables of positions, never a weight.
_MOST_FOLDED = 1 << 16

# Bytes of all constants inside the file.
_MOST_OWN = 64 << 20


class Forward(torch.nn.Module):
    """The forward as engines call it: named tensors in, named tensors out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run it."""
        return named_tensors(self.module(**inputs))


class Exported:
    """A forward as an ONNX model.

    Args:
        model: As the exporter made it, simplified.
        example: What it was traced with.
        sizes: Of its inputs.
        outputs: Names, in its order.
        places: Of the module's tensors in files of weights, by path.
        slots: These tensors.
    """

    def __init__(
        self,
        model: Any,
        example: Inputs,
        sizes: Sizes,
        outputs: Sequence[str],
        places: Mapping[str, Place],
        slots: Sequence[Slot],
    ) -> None:
        self.sizes = sizes
        self._proto = _written(
            model, list(example), sizes, outputs, _weights(model.graph, places, slots)
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
    places: Mapping[str, Place],
    examples: Sequence[Inputs],
    example: Inputs,
    free: Mapping[str, set[int]],
) -> Exported:
    """Trace a module's forward and translate it.

    Args:
        module: As it is served: in eval mode, gradients off.
        slots: Its tensors.
        places: Where those are in files of weights, by path.
        examples: Inputs of its forward; sizes that are equal in all of them are one.
        example: What to trace with; free sizes must be 2 or more, as the tracer takes 1 for a
            constant.
        free: Input → its dimensions that may have any size.

    Raises:
        Refusal: The forward cannot be traced, or has no translation.
    """
    program = _trace(module, example, free)
    sizes = _sizes(program, example, examples)
    with _quiet():
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )
            model = made.model  # type: ignore[union-attr]  # None without dynamo
            _simplify(model, slots)
        except Exception as error:  # the exporter has no end of ways to fail
            raise Refusal(f"torch.onnx: {_first_line(error)}") from error
    with torch.no_grad():
        outputs = list(Forward(module)(dict(example)))
    return Exported(model, example, sizes, outputs, places, slots)


def _trace(
    module: torch.nn.Module, example: Inputs, free: Mapping[str, set[int]]
) -> torch.export.ExportedProgram:
    auto, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dims = {
        name: {i: auto if i in free[name] else static for i in range(tensor.dim())}
        for name, tensor in example.items()
    }
    try:
        with torch.no_grad(), _quiet(), _bounded_sizes():
            program = torch.export.export(
                Forward(module), (dict(example),), dynamic_shapes=(dims,), strict=False
            )
            called = {node.target for node in program.graph.nodes}
            if any(_is_mutable(target) for target in called) or called & CUTS:
                # Which tells what is changed, and makes splits of chunks.
                program = program.run_decompositions(DECOMPOSITIONS)
    except Exception as error:  # so has the tracer
        raise Refusal(f"torch.export: {_first_line(error)}") from error
    changed = program.graph_signature
    if changed.buffers_to_mutate or changed.user_inputs_to_mutate:
        raise Refusal("the forward changes its buffers or inputs")
    return program


# Of one size, from those of the inputs; audio models with seven convolutions need some twenty.
_MOST_OPERATIONS = 64


@contextmanager
def _bounded_sizes() -> Iterator[None]:
    """Give up where sizes become too involved.

    The tracer would compare them for minutes, or for ever.

    Windows of images double them with each layer (Swin); with one size of images there are none.
    """

    def look(module: torch.nn.Module, arguments: Any, outputs: Any) -> None:
        for tensor in outputs if isinstance(outputs, tuple | list) else (outputs,):
            for size in tensor.shape if isinstance(tensor, torch.Tensor) else ():
                if not isinstance(size, int) and size.node.expr.count_ops() > _MOST_OPERATIONS:
                    raise Refusal("what becomes of free sizes is too involved")

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporter wraps the reason
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:400]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that nobody asked for."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# --- sizes ---------------------------------------------------------------------------------------


def _sizes(
    program: torch.export.ExportedProgram, example: Inputs, examples: Sequence[Inputs]
) -> Sizes:
    """Which sizes are free, and which of them are one.

    The tracer leaves apart what broadcasting would allow.

    Raises:
        Refusal: A size that differs between the examples is not free.
    """
    kinds = {spec.arg.name: spec.kind.name for spec in program.graph_signature.input_specs}
    taken = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and kinds[node.name] == "USER_INPUT"
    ]
    seen = {
        (name, i): tuple(inputs[name].shape[i] for inputs in examples)
        for name, tensor in example.items()
        for i in range(tensor.dim())
    }
    texts = {
        seen[name, 1] for name, tensor in example.items() if name in TEXT and tensor.dim() == 2
    }
    names: dict[Any, str] = {}
    found: dict[str, tuple[int | str, ...]] = {}
    for (name, tensor), shape in zip(example.items(), taken, strict=True):
        sizes: list[int | str] = []
        for i, size in enumerate(shape):
            differs = len(set(seen[name, i])) > 1
            symbol = None if isinstance(size, int) else size.node.expr
            if symbol is None or not symbol.is_symbol:  # fixed, or bound to others (twice another)
                if differs:
                    raise Refusal(
                        f"the forward takes one size of {name} only, in dimension {i}: {size}"
                    )
                sizes.append(tensor.shape[i])
                continue
            # Boxes of words are as many as the words.
            text = (name in TEXT and tensor.dim() == 2) or (differs and seen[name, i] in texts)
            key = (
                "rows"
                if i == 0
                else "length"
                if text
                else seen[name, i]
                if differs
                else (i, seen[name, i])
            )
            sizes.append(names.setdefault(key, key if isinstance(key, str) else f"{name}_{i}"))
        found[name] = tuple(sizes)
    return found


# --- the model -----------------------------------------------------------------------------------


def _simplify(model: Any, slots: Sequence[Slot]) -> None:
    """Fold constants and fuse what has an operator of its own.

    What is computed from weights is not folded.
    """
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    weights = {_memory(slot.tensor) for slot in slots if slot.tensor.is_floating_point()}

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


def _weights(
    graph: Any, places: Mapping[str, Place], slots: Sequence[Slot]
) -> dict[Any, tuple[str, Place]]:
    """Initializers that are tensors of the module: under their paths, with their places."""
    paths = {_memory(slot.tensor): slot.path for slot in reversed(slots) if slot.tensor.numel()}
    found = {}
    for value in graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        path = paths.get(_memory(raw)) if isinstance(raw, torch.Tensor) else None
        if path is not None and path in places:
            found[value] = (path, places[path])
    return found


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _written(
    model: Any,
    inputs: Sequence[str],
    sizes: Sizes,
    outputs: Sequence[str],
    weights: Mapping[Any, tuple[str, Place]],
) -> Any:
    """The model as protobuf under our names, without what is for people or for the exporter."""
    import onnx_ir as ir

    graph = model.graph
    if len(graph.outputs) != len(outputs) or len(graph.inputs) != len(inputs):
        raise Refusal("the traced forward gives other outputs, or takes other inputs")
    _make_outputs_own(graph)
    for value, (path, place) in weights.items():
        value.const_value = ir.ExternalTensor(
            place.file, place.start, place.length, value.const_value.dtype,
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


def _make_outputs_own(graph: Any) -> None:
    """Let each output be what one node alone gives.

    Names of inputs, weights and other outputs are taken.
    """
    import onnx_ir as ir

    taken = {*graph.inputs, *graph.initializers.values()}
    for i, value in enumerate(graph.outputs):
        if value in taken:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        taken.add(graph.outputs[i])
