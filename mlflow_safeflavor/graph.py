"""A forward as data, calls of plain operators on tensors, and as one function that runs them.

``graph_file`` reads and writes it, ``faults`` says what must not be in it.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mlflow_safeflavor.allowance import Allowance, TooMuch
from mlflow_safeflavor.artifact import WAY_OUT
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.inventory import dtype_name
from mlflow_safeflavor.operators import SIZES, signature_of

__all__ = [
    "DEVICE",
    "GETITEM",
    "MOST_TEXT",
    "Call",
    "Constant",
    "Graph",
    "GraphModule",
    "Input",
    "Ref",
    "describe_input",
    "lines_of",
    "refs_of",
]

GETITEM = "operator.getitem"
"""Takes one of the results of a call that has several."""
MOST_TEXT = 200
"""Characters of a text that is an argument, or of a note."""


@dataclass(frozen=True)
class Ref:
    """Something that a call uses.

    Attributes:
        kind: ``input``, ``constant`` or ``call``.
        index: Its place in that list.
    """

    kind: str
    index: int


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
class Constant:
    """A tensor of the artifact.

    Attributes:
        tensor: Path in the inventory, or a name in ``graph.safetensors``.
        own: Whether it is in ``graph.safetensors``: the model itself has no such tensor.
        dtype: Like ``float32``.
        shape: Sizes.
    """

    tensor: str
    own: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One operator with its arguments: values, ``Ref`` and lists of them.

    Attributes:
        operator: Full name, like ``aten.linear.default``; see ``operators``.
        args: By position.
        kwargs: By name.
        note: What came out when it was recorded, like ``float32[rows, length, 384]``; for people, checked by nobody.
    """

    operator: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    note: str = ""


class _Device:
    """Stands for the device that the graph runs on, whichever it was recorded on."""

    def __repr__(self) -> str:
        return "device"


DEVICE = _Device()


@dataclass(frozen=True)
class Graph:
    """A forward.

    Attributes:
        inputs: What it takes.
        sizes: Name of a size → the least and the most it may be; None for no bound.
        constants: What it uses of the artifact.
        calls: In the order in which they run; none uses a later one.
        outputs: Name → what is returned under it.
        facts: What is known of it and changes nothing: on how many inputs it was proven, by which torch it was made.
    """

    inputs: tuple[Input, ...]
    sizes: Mapping[str, tuple[int, int | None]]
    constants: tuple[Constant, ...]
    calls: tuple[Call, ...]
    outputs: Mapping[str, Ref]
    facts: Mapping[str, Any]

    def misfit(self, inputs: Mapping[str, torch.Tensor]) -> str | None:
        """What keeps the graph from running on these inputs, in words; None if nothing does."""
        if inputs.keys() != {known.name for known in self.inputs}:
            return f"arguments {sorted(inputs)}, not {sorted(known.name for known in self.inputs)}"
        found: dict[str, int] = {}
        for known in self.inputs:
            tensor = inputs[known.name]
            right = dtype_name(tensor.dtype) == known.dtype and tensor.dim() == len(known.shape)
            for size, wanted in zip(tensor.shape, known.shape, strict=False):
                least, most = (wanted, wanted) if isinstance(wanted, int) else self.sizes[wanted]
                right &= size == (found.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
                right &= least <= size and (most is None or size <= most)
            if not right:
                return f"{known.name} {dtype_name(tensor.dtype)}{list(tensor.shape)}, not {describe_input(known)}"
        return None


def describe_input(known: Input | Constant) -> str:
    """``int64[rows, length]``."""
    return f"{known.dtype}[{', '.join(map(str, known.shape))}]"


def lines_of(graph: Graph) -> Iterator[str]:
    """The graph to be read: one line an input, a constant that is used, a call and an output."""
    words = {
        **{Ref("input", i): known.name for i, known in enumerate(graph.inputs)},
        **{Ref("constant", i): known.tensor for i, known in enumerate(graph.constants)},
        **{Ref("call", i): f"%{i}" for i in range(len(graph.calls))},
    }

    def word(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(word, value))}]"
        return words[value] if isinstance(value, Ref) else str(value)

    for name, (least, most) in graph.sizes.items():
        yield f"size {name}: {least} to {'any' if most is None else most}"
    for known in graph.inputs:
        yield f"input {known.name}: {describe_input(known)}"
    for constant in graph.constants:
        yield f"constant {constant.tensor}: {describe_input(constant)}"
    for i, call in enumerate(graph.calls):
        arguments = [*map(word, call.args), *(f"{name}={word(value)}" for name, value in call.kwargs.items())]
        yield f"%{i} = {call.operator}({', '.join(arguments)}){f'  → {call.note}' if call.note else ''}"
    for name, ref in graph.outputs.items():
        yield f"output {name}: {words[ref]}"


# --- as a function -------------------------------------------------------------------------------


class GraphModule(torch.nn.Module):
    """A graph with its constants, as a module whose forward takes the graph's inputs by name.

    Args:
        graph: Checked, as ``from_json`` returns it.
        constants: As many tensors as ``graph.constants``; only read, never written.
        device: Where it runs; constants are moved there.
    """

    def __init__(self, graph: Graph, constants: Sequence[torch.Tensor], device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.graph = graph
        self.constants = [tensor.to(device) for tensor in constants]
        self._run = _as_function(graph, self.constants, torch.device(device))
        self._most_bytes: int | None = None
        self.eval()

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the graph.

        Raises:
            StructureError: It was not made for such inputs.
        """
        if misfit := self.graph.misfit(inputs):
            raise StructureError(
                "The model was stored as a graph, which does not take this input",
                where="forward",
                wanted=", ".join(f"{known.name} {describe_input(known)}" for known in self.graph.inputs),
                found=misfit,
                way_out='save the model with its module, too: structure="auto"',
            )
        try:
            with nullcontext() if self._most_bytes is None else Allowance(self._most_bytes):
                results = self._run(*(inputs[known.name] for known in self.graph.inputs))
        except TooMuch as error:
            raise StructureError(
                "The graph of the model wants far more memory than its weights take",
                where=f"graph.json, {self._call_of(error)}",
                wanted=f"at most {self._most_bytes:,} bytes at once",
                found=error,
                way_out=WAY_OUT,
            ) from None
        return dict(zip(self.graph.outputs, results, strict=True))

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """While a graph that nobody has run yet is tried: no run may hold far more memory than the weights take."""
        self._most_bytes = 8 * sum(tensor.nbytes for tensor in self.constants) + 2**30
        try:
            yield
        finally:
            self._most_bytes = None

    def _call_of(self, error: BaseException) -> str:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code is self._run.__code__]
        i = lines[0] - _FIRST_LINE
        return f"call {i}, {self.graph.calls[i].operator}"


_FIRST_LINE = 2
"""Of the function below: call 0 is there, and each later call on a line of its own."""


def _as_function(graph: Graph, constants: Sequence[torch.Tensor], device: torch.device) -> Callable[..., Any]:
    """One Python function, so that a call costs no more than the operator; every name in it is ours, by number.

    What is not needed any more is let go at once, as in a module's forward.
    """
    space: dict[str, Any] = {f"c{i}": tensor for i, tensor in enumerate(constants)}
    names = {"input": "x", "constant": "c", "call": "v"}

    def source(value: Any) -> str:
        if isinstance(value, Ref):
            return f"{names[value.kind]}{value.index}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(source, value))}]"
        name = f"k{len(space)}"
        space[name] = device if value is DEVICE else value
        return name

    last = {ref: i for i, call in enumerate(graph.calls) for ref in refs_of(call)}
    kept = set(graph.outputs.values())
    lines = [f"def run({', '.join(f'x{i}' for i in range(len(graph.inputs)))}):"]
    for i, call in enumerate(graph.calls):
        space[f"o{i}"] = _function(call.operator)
        keywords = [f"{name}={source(call.kwargs[name])}" for name in _names_of_torch(call)]
        lines.append(f" v{i} = o{i}({', '.join([*map(source, call.args), *keywords])})")
        done = {source(ref) for ref in refs_of(call) if ref.kind == "call" and last[ref] == i and ref not in kept}
        lines[-1] += f"; del {', '.join(sorted(done))}" if done else ""
    lines.append(f" return [{', '.join(source(ref) for ref in graph.outputs.values())}]")
    exec("\n".join(lines), space)  # noqa: S102  (x, c, v, k and o with numbers of ours; see above)
    run: Callable[..., Any] = space["run"]
    return run


def _function(name: str) -> Callable[..., Any]:
    if name == GETITEM:
        return operator.getitem
    signature = signature_of(name)
    return SIZES[name] if signature is None else signature.call


def _names_of_torch(call: Call) -> Iterator[str]:
    """Names of a call's keyword arguments, as torch's schema spells them and not the file."""
    signature = signature_of(call.operator) if call.kwargs else None
    return (name for name in (signature.arguments if signature else ()) if name in call.kwargs)


def refs_of(call: Call) -> Iterator[Ref]:
    """What a call uses."""

    def walk(value: Any) -> Iterator[Ref]:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)

    yield from walk([*call.args, *call.kwargs.values()])
