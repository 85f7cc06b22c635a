"""Slots: places in a live module that hold a tensor."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

__all__ = [
    "OWN_STATE",
    "UNKNOWN",
    "Slot",
    "find_meta",
    "find_setters",
    "find_slots",
    "hidden_slot",
    "shape_of",
    "some",
]


@dataclass(frozen=True)
class Slot:
    """A place in a live module that holds a tensor.

    Attributes:
        path: ``encoder.layer.0.weight``; inside containers ``cache[0]['key']``.
        kind: ``parameter``, ``buffer`` or ``attribute``; ``hidden`` where only a pickle reaches it.
        persistent: Whether ``state_dict`` lists it.
        tensor: The one there now.
        put: Puts another tensor there.
    """

    path: str
    kind: str
    persistent: bool
    tensor: torch.Tensor
    put: Callable[[torch.Tensor], None]


def find_slots(module: torch.nn.Module) -> list[Slot]:
    """Every place in the module that holds a tensor, in a fixed order.

    Parameters, buffers and plain attributes of every submodule, also inside lists, tuples and
    dicts, and inside modules that such containers hide from ``named_modules``. A module that is
    shared is listed once, under its first path.
    """
    slots: list[Slot] = []
    # Modules and containers, by id: some hold themselves, or each other.
    seen: set[int] = set()
    _walk_module(module, "", slots, seen)
    return slots


# Attributes every ``nn.Module`` has: registries and hooks, walked separately or not at all.
OWN_STATE = frozenset(vars(torch.nn.Module()))

# Types of most attributes, told apart faster than by asking what else they are.
_HOLD_NOTHING = frozenset((bool, int, float, str, type(None)))


def _walk_module(module: torch.nn.Module, prefix: str, slots: list[Slot], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    for kind, registry in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in list(registry.items()):
            if tensor is not None:
                persistent = kind == "parameter" or name not in module._non_persistent_buffers_set
                put = _putter(registry, name)
                slots.append(Slot(_join(prefix, name), kind, persistent, tensor, put))
    attributes = vars(module)
    for name, value in list(attributes.items()):
        if name not in OWN_STATE and type(value) not in _HOLD_NOTHING:
            _walk_value(value, _join(prefix, name), _putter(attributes, name), slots, seen)
    for name, child in list(module._modules.items()):
        if child is not None:
            _walk_module(child, _join(prefix, name), slots, seen)


def _walk_value(
    value: Any, path: str, put: Callable[[Any], None], slots: list[Slot], seen: set[int]
) -> None:
    if isinstance(value, torch.Tensor):
        slots.append(Slot(path, "attribute", False, value, put))
    elif isinstance(value, torch.nn.Module):
        _walk_module(value, path, slots, seen)
    elif isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            _walk_value(item, f"{path}[{key!r}]", _putter(value, key), slots, seen)
    elif isinstance(value, tuple):
        # A tuple cannot be changed: putting an item puts a new tuple in its place.
        items = list(value)

        def put_item(index: int, item: Any) -> None:
            items[index] = item
            put(type(value)(*items) if hasattr(value, "_fields") else type(value)(items))

        for index, item in enumerate(value):
            _walk_value(item, f"{path}[{index}]", partial(put_item, index), slots, seen)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _putter(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: container.__setitem__(key, value)


def hidden_slot(path: str, tensor: torch.Tensor) -> Slot:
    """A slot for a tensor that only a pickle reaches; nothing can be put there."""
    return Slot(path, "hidden", False, tensor, lambda new: None)


def find_setters(module: torch.nn.Module) -> Callable[[str], Callable[[Any], None] | None]:
    """Setters of attributes in which a forward may have left a tensor: None, keys of empty dicts.

    Some models keep results of a forward (``rope_deltas``, ``attention_bias_cache``), so a model
    that was used may hold plain tensors where a new one holds nothing.

    Returns:
        Path → a function that puts a tensor there, or None where no tensor may be.
    """
    attributes: dict[str, Callable[[Any], None]] = {}
    dicts: dict[str, dict[Any, Any]] = {}
    for prefix, child in module.named_modules():
        for name, value in list(vars(child).items()):
            if name in OWN_STATE:
                continue
            if value is None:
                attributes[_join(prefix, name)] = _putter(vars(child), name)
            elif type(value) is dict and not value:
                dicts[_join(prefix, name)] = value

    def setter_of(path: str) -> Callable[[Any], None] | None:
        found = _KEY.fullmatch(path)
        if found and found[1] in dicts:
            # Only a text without quotes or backslashes, or a whole number: see ``_KEY``.
            return _putter(dicts[found[1]], ast.literal_eval(found[2]))
        return attributes.get(path)

    return setter_of


_KEY = re.compile(r"(.+)\[('[^'\\]*'|-?[0-9]+)\]")

# Shape of a parameter that waits for the first forward, as those of ``torch.nn.LazyLinear`` do.
UNKNOWN: tuple[int, ...] = (-1,)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a tensor, or ``UNKNOWN``."""
    return UNKNOWN if torch.nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def find_meta(slots: Sequence[Slot]) -> list[str]:
    """Paths of the tensors that have no memory."""
    return [slot.path for slot in slots if slot.tensor.is_meta]


def some(paths: Sequence[str], most: int = 5) -> str:
    """The first few of many, for a message."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
