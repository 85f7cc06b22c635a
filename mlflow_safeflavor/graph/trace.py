"""A module's forward, traced: a graph of aten operators, and which of its sizes are free."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mlflow_safeflavor.graph.decompositions import CUTS, DECOMPOSITIONS
from mlflow_safeflavor.graph.proof import TEXT, Refusal
from mlflow_safeflavor.module.engine import named_tensors

__all__ = ["Forward", "Inputs", "Sizes", "first_line", "quiet", "sizes_of", "traced"]

Inputs = Mapping[str, torch.Tensor]
# Input → its sizes; a text for one that may be any, equal texts for equal sizes.
Sizes = Mapping[str, tuple["int | str", ...]]


class Forward(torch.nn.Module):
    """The forward as engines call it: named tensors in, named tensors out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run it."""
        return named_tensors(self.module(**inputs))


def traced(
    module: torch.nn.Module, example: Inputs, free: Mapping[str, set[int]]
) -> torch.export.ExportedProgram:
    """The forward as a graph of aten operators, with free sizes.

    Args:
        module: As it is served: in eval mode, gradients off.
        example: Inputs to trace with.
        free: Input → its dimensions that may have any size.

    Raises:
        Refusal: It cannot be traced, or changes buffers or inputs.
    """
    auto, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dims = {
        name: {i: auto if i in free[name] else static for i in range(tensor.dim())}
        for name, tensor in example.items()
    }
    try:
        with torch.no_grad(), quiet(), _bounded_sizes(), _free_lengths(module):
            program = torch.export.export(
                Forward(module), (dict(example),), dynamic_shapes=(dims,), strict=False
            )
            called = {node.target for node in program.graph.nodes}
            if any(_is_mutable(target) for target in called) or called & CUTS:
                # It names the buffers and inputs that are written to, and makes splits of chunks.
                program = program.run_decompositions(DECOMPOSITIONS)
    except Exception as error:  # so has the tracer
        raise Refusal(f"torch.export: {first_line(error)}") from error
    changed = program.graph_signature
    if changed.buffers_to_mutate or changed.user_inputs_to_mutate:
        raise Refusal("the forward changes its buffers or inputs")
    return program


@contextmanager
def _free_lengths(module: torch.nn.Module) -> Iterator[None]:
    """Let ``len(tensor)`` in the code of a module and its parts be a size that stays free."""
    homes = {cls.__module__ for part in module.modules() for cls in type(part).__mro__}
    # Those of torch are written for free sizes; a ``len`` of somebody's own is left alone.
    spaces = [
        vars(sys.modules[home])
        for home in homes & sys.modules.keys()
        if not home.startswith("torch.")
    ]
    ours = [space for space in spaces if "len" not in space]
    for space in ours:
        space["len"] = _length
    try:
        yield
    finally:
        for space in ours:
            del space["len"]


def _length(of: Any) -> Any:
    # Python makes a number of whatever ``__len__`` returns, and so the tracer fixes the size.
    return of.shape[0] if isinstance(of, torch.Tensor) and of.dim() else len(of)


# Of one size, from those of the inputs; audio models with seven convolutions need some twenty.
_MOST_OPERATIONS = 64


@contextmanager
def _bounded_sizes() -> Iterator[None]:
    """Raise ``Refusal`` where the expressions of free sizes become too long."""

    # The tracer would compare them for minutes, or for ever. Windows of images double them with
    # each layer (Swin); with one size of images there are none.
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


def first_line(error: BaseException) -> str:
    """Why it failed, in one line: of the error at the bottom, which exporter and tracer wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:400]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's log and warnings, which are about packages that it could use."""
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


def sizes_of(
    program: torch.export.ExportedProgram, example: Inputs, examples: Sequence[Inputs]
) -> Sizes:
    """Sizes of the inputs: a number for a fixed one, equal names for equal free ones.

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
    # Some inputs have other rows than the batch: texts that all its images are compared with.
    batch = {seen[name, 0] for name, tensor in example.items() if tensor.dim()}
    batch = {counts for counts in batch if len(set(counts)) > 1} or batch
    # By the examples, since the tracer has two symbols for sizes that broadcasting would allow to
    # differ: a mask of one row beside ids of many.
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
            text = i > 0 and (
                (name in TEXT and tensor.dim() == 2) or (differs and seen[name, i] in texts)
            )
            key = (
                "rows"
                if i == 0 and seen[name, 0] in batch
                else "length"
                if text
                else seen[name, i]
                if differs
                else (i, seen[name, i])
            )
            sizes.append(names.setdefault(key, key if isinstance(key, str) else f"{name}_{i}"))
        found[name] = tuple(sizes)
    return found
