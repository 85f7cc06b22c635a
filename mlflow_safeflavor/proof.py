"""The proof that a graph gives the same bits as the module it was recorded from, on inputs of many sizes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mlflow_safeflavor.graph import Graph, GraphModule, Input
from mlflow_safeflavor.inventory import Slot
from mlflow_safeflavor.module_engine import named_tensors
from mlflow_safeflavor.statedict import bits_equal

__all__ = ["TEXT", "Forward", "Inputs", "Refusal", "prove"]

Inputs = Mapping[str, torch.Tensor]


class Refusal(Exception):
    """Why a forward has no graph, in words."""


class Forward(torch.nn.Module):
    """The forward as the engine of the module calls it: named tensors in, named tensors out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run it."""
        return named_tensors(self.module(**inputs))


_ROWS = (1, 2, 7, 32)
_LENGTHS = (1, 2, 3, 17, 64, 200)
_MOST_TOKENS = 2048
"""Of one probe, so that the proof of a large model takes a minute and not an hour; one row may have more."""
_AT_RANDOM = 8
_MOST_PROBES = 200
TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids"))
"""Inputs of shape (rows, length) that go together."""


def prove(
    module: torch.nn.Module,
    graph: Graph,
    own: Mapping[str, torch.Tensor],
    slots: Sequence[Slot],
    example: Inputs,
    limit: int | None,
) -> Graph:
    """Run both on many inputs.

    Args:
        module: What was recorded.
        graph: What it became.
        own: Constants of the graph that are no tensors of the module.
        slots: The module's tensors.
        example: What it was recorded with.
        limit: Most tokens of a text.

    Returns:
        The graph, with the number of inputs on which it gave the module's bits.

    Raises:
        Refusal: At the first other bit, or if the module runs on none of the inputs.
    """
    tensors = {slot.path: slot.tensor for slot in slots}
    constants = [(own if known.own else tensors)[known.tensor].detach() for known in graph.constants]
    device = next((tensor.device for tensor in example.values()), torch.device("cpu"))
    ours, theirs = GraphModule(graph, constants, device), Forward(module)
    proven = 0
    taken: dict[str, set[int]] = {name: set() for name in graph.sizes}
    with torch.inference_mode():
        for inputs in _probes(graph, example, limit):
            try:
                wanted = theirs(dict(inputs))
            except Exception:  # noqa: S112  (the model does not take such sizes, so nobody can be answered wrongly)
                continue
            _require_same(wanted, ours, inputs)
            proven += 1
            for name, size in _sizes_of(graph, inputs).items():
                taken[name].add(size)
    if not proven:
        raise Refusal("no input could be found on which the module runs")
    return replace(_narrowed(graph, taken), facts={"proven": proven})


def _sizes_of(graph: Graph, inputs: Inputs) -> dict[str, int]:
    pairs = (pair for known in graph.inputs for pair in zip(known.shape, inputs[known.name].shape, strict=True))
    return {name: size for name, size in pairs if isinstance(name, str)}


def _narrowed(graph: Graph, taken: Mapping[str, set[int]]) -> Graph:
    """Without the freedom of sizes of which only one was proven: other ones may be what the module refuses."""
    only = {name: min(sizes) for name, sizes in taken.items() if len(sizes) == 1}
    if fixed := only.keys() & {"rows", "length"}:
        raise Refusal(f"the module took no inputs of another number of {min(fixed)} to prove the graph on")
    inputs = [replace(known, shape=tuple(only.get(str(size), size) for size in known.shape)) for known in graph.inputs]
    sizes = {name: bounds for name, bounds in graph.sizes.items() if name not in only}
    return replace(graph, inputs=tuple(inputs), sizes=sizes)


def _require_same(wanted: Inputs, ours: GraphModule, inputs: Inputs) -> None:
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    try:
        found = ours(**inputs)
    except Exception as error:  # operators have their own ways to refuse a shape
        raise Refusal(f"the graph fails on {shapes}: {type(error).__name__}: {error}") from error
    for name, tensor in wanted.items():
        if not bits_equal(tensor, found[name]):
            raise Refusal(f"the graph gives other bits than the module on {shapes}, in {name}")


def _probes(graph: Graph, example: Inputs, limit: int | None) -> Iterator[Inputs]:
    """Inputs of many sizes; the values are those of the example in another order, and masks of all kinds."""
    draw = random.Random()  # noqa: S311  (other sizes each time)
    torch_draw = torch.Generator().manual_seed(draw.getrandbits(32))
    yield example
    sizes = list(_sizes(graph, example, limit, draw))
    for i, chosen in enumerate(sizes):
        yield {known.name: _values(known, chosen, example[known.name], torch_draw, i) for known in graph.inputs}


def _sizes(graph: Graph, example: Inputs, limit: int | None, draw: random.Random) -> Iterator[dict[str, int]]:
    """Every free size its own way: rows, lengths of texts, and others around that of the example."""
    choices: dict[str, list[int]] = {}
    for known in graph.inputs:
        for i, (name, size) in enumerate(zip(known.shape, example[known.name].shape, strict=True)):
            if isinstance(name, str) and name not in choices:
                text = i == 1 and known.name in TEXT
                wanted = _ROWS if i == 0 else _lengths(limit) if text else (1, 2, size, size + 1, 2 * size)
                choices[name] = [number for number in wanted if _within(number, graph.sizes[name])]
    rows = {known.shape[0] for known in graph.inputs if known.shape}
    combined: list[dict[str, int]] = [{}]
    for name, numbers in choices.items():
        combined = [{**one, name: number} for one in combined for number in numbers][:_MOST_PROBES]
    if choices and all(choices.values()):
        combined += [
            {name: draw.randint(min(numbers), max(numbers)) for name, numbers in choices.items()}
            for _ in range(_AT_RANDOM)
        ]
    yield from (one for one in combined if _affordable(one, rows))


def _lengths(limit: int | None) -> list[int]:
    return [length for length in _LENGTHS if limit is None or length < limit] + ([limit] if limit else [])


def _within(number: int, bounds: tuple[int, int | None]) -> bool:
    least, most = bounds
    return least <= number and (most is None or number <= most)


def _affordable(sizes: Mapping[str, int], rows: set[int | str]) -> bool:
    product = 1
    for size in sizes.values():
        product *= size
    return product <= _MOST_TOKENS or all(sizes.get(str(name), 1) == 1 for name in rows)


def _values(known: Input, sizes: Mapping[str, int], like: torch.Tensor, draw: torch.Generator, i: int) -> torch.Tensor:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in known.shape)
    if known.name == "attention_mask" and like.dim() == 2:
        return _MASKS[i % len(_MASKS)](shape, draw).to(like)
    if known.name == "token_type_ids" and i % 2:
        return torch.zeros(shape).to(like)
    chosen = torch.randint(like.numel(), shape, generator=draw).to(like.device)
    values = like.reshape(-1)[chosen]
    if known.name in TEXT and like.dim() == 2 and min(shape[1], like.shape[1]) > 2:
        # Some models look for the token that ends a text, which stands in one place.
        inner = like[:, 1:-1].reshape(-1)
        values = inner[chosen % inner.numel()]
        values[:, 0], values[:, -1] = like[0, 0], like[0, -1]
    return values


def _padded(shape: tuple[int, ...], draw: torch.Generator, *, left: bool, empty: bool = False) -> torch.Tensor:
    real = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=draw)
    real[0] = 0 if empty else shape[1]
    places = torch.arange(shape[1])[None]
    return places >= shape[1] - real if left else places < real


_MASKS: tuple[Callable[[tuple[int, ...], torch.Generator], torch.Tensor], ...] = (
    lambda shape, draw: torch.ones(shape),
    lambda shape, draw: _padded(shape, draw, left=False),
    lambda shape, draw: _padded(shape, draw, left=True),
    lambda shape, draw: _padded(shape, draw, left=False, empty=True),
)
"""Nothing padded, padded on the right, on the left, and with a row of nothing but padding."""
