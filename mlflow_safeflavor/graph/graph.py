"""A checked forward: its inputs, its outputs, and the nodes between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_safeflavor.graph.weights import Extent

__all__ = ["Graph", "Input", "Weight", "format_input", "lines_of"]


@dataclass(frozen=True)
class Input:
    """An argument of the forward.

    Attributes:
        name: As the task gives it.
        dtype: Like ``int64``.
        shape: Sizes; a text for one that may be any: equal texts are equal sizes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor of the artifact that the graph takes.

    Attributes:
        dtype: Like ``float32``.
        shape: Sizes.
        extent: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True)
class Graph:
    """A checked forward.

    Attributes:
        content: The model as ONNX Runtime gets it.
        inputs: What it takes.
        outputs: What it gives, in its order.
        weights: By name.
        nodes: Operator, inputs and outputs of each, in the order in which they run.
        lookups: Input whose values are rows of a table → how many rows the shortest such table has.
        reused: Bytes of weights and constants, for each use but the first: what fusions may copy.
    """

    content: bytes
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    nodes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    lookups: Mapping[str, int]
    reused: int

    def misfit(self, inputs: Mapping[str, Any]) -> str | None:
        """The first mismatch of arrays with the graph's inputs, in words; None if there is none."""
        if inputs.keys() != {known.name for known in self.inputs}:
            return f"arguments {sorted(inputs)}, not {sorted(known.name for known in self.inputs)}"
        sizes: dict[
            str, int
        ] = {}  # name of a free size → its length in the first input that has it
        for known in self.inputs:
            array = inputs[known.name]
            shape = tuple(array.shape)
            right = array.dtype == known.dtype and len(shape) == len(known.shape)
            for size, wanted in zip(shape, known.shape, strict=False):
                right &= size == (
                    sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
                )
            if not right:
                return f"{known.name} {array.dtype}{list(shape)}, not {format_input(known)}"
        return None

    def require_rows(self, inputs: Mapping[str, Any]) -> None:
        """Refuse an index beyond the rows of a table.

        Raises:
            IndexError: As torch does.
        """
        # ONNX's Gather takes negative indices, from the end: torch refuses what this would answer.
        for name, rows in self.lookups.items():
            indices = inputs[name]
            # As unsigned, a negative number is larger than any table.
            if indices.view(f"u{indices.itemsize}").max(initial=0) >= rows:
                least, most = int(indices.min()), int(indices.max())
                raise IndexError(
                    f"{name} has {least if least < 0 else most}, which is no row of a table of "
                    f"{rows}"
                )


def format_input(known: Input) -> str:
    """``int64[rows, length]``."""
    return f"{known.dtype}[{', '.join(map(str, known.shape))}]"


def lines_of(graph: Graph) -> Iterator[str]:
    """The graph to be read: one line an input, a weight, a node and an output."""
    for known in graph.inputs:
        yield f"input {known.name}: {format_input(known)}"
    for name, weight in graph.weights.items():
        yield f"weight {name}: {weight.dtype}{list(weight.shape)}"
    for operator, inputs, outputs in graph.nodes:
        yield f"{', '.join(outputs)} = {operator}({', '.join(name or '-' for name in inputs)})"
