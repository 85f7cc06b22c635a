"""Restoring of the caller's module and of the process's random states."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from typing import Any

import torch

from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.random_state import kept_random_state

__all__ = ["kept_module", "kept_parameters"]


@contextmanager
def kept_module(module: torch.nn.Module) -> Iterator[None]:
    """Restore the module after a forward or a hook, in everything but its parameters.

    That is all attributes of its submodules (tensors, hooks, modes, plain values), the contents of
    lists, dicts, sets, configs and dataclasses there, the values of tensors that are no parameters,
    and which parameters require gradients; and the random states. See ``kept_parameters`` for the
    rest.
    """
    found = _Found()
    found.look_at(module)
    with kept_random_state():
        try:
            yield
        finally:
            found.restore()


@contextmanager
def kept_parameters(
    module: torch.nn.Module, stored: Callable[[], Mapping[str, torch.Tensor]]
) -> Iterator[None]:
    """Restore the values of parameters, too, to which a forward hardly ever writes.

    Args:
        module: Its parameters are not copied; torch counts the writes, other than those through
            ``.data``.
        stored: Called where there were any; the values by path.
    """
    # Tensors of inference mode count no writes, and allow none outside of it.
    versions = {
        path: (one, one._version)
        for path, one in module.named_parameters()
        if not one.is_inference()
    }
    try:
        yield
    finally:
        written = {
            path: one for path, (one, version) in versions.items() if one._version != version
        }
        # Read from the staged file only now: a copy of all weights would double the memory.
        values = stored() if written else {}
        for path, one in written.items():
            _write(one, values[path])


# Exactly these: a class derived from them may do anything when it is copied or cleared.
_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, set, deque))


class _Found:
    """Containers with what they held, and tensors with their values."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # the objects, too, so that no other takes an id
        self._contents: list[tuple[Any, Any]] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gradients: list[tuple[torch.Tensor, bool]] = []

    def look_at(self, first: Any) -> None:
        waiting = [first]
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in (bool, int, float, str, type(None)) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, torch.nn.Parameter):
                self._gradients.append((value, value.requires_grad))
            elif isinstance(value, torch.Tensor):
                if _has_values(value):
                    self._values.append((value, value.detach().clone()))
            elif kind in _CONTAINERS:
                self._contents.append((value, value.copy()))
                waiting.extend(value.values() if isinstance(value, dict) else value)
            elif isinstance(value, tuple):
                waiting.extend(value)
            elif isinstance(value, torch.nn.Module) or _holds_data(value):
                waiting.append(vars(value))

    def restore(self) -> None:
        for container, before in self._contents:
            if not _holds(container, before):
                container.clear()
                container.extend(before) if isinstance(
                    container, (list, deque)
                ) else container.update(before)
        for tensor, value in self._values:
            if not bits_equal(tensor, value):
                _write(tensor, value)
        for parameter, required in self._gradients:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether it is plain memory, and no result of autograd."""
    plain = not torch.nn.parameter.is_lazy(tensor) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not tensor.requires_grad


def _holds_data(value: Any) -> bool:
    """Whether its attributes are data: a dataclass, or a config of transformers."""
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and kind is not type
        and (is_dataclass(kind) or hasattr(kind, "to_dict"))
    )


def _holds(container: Any, before: Any) -> bool:
    """Whether it holds the very same objects, in the same order."""
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), before.items(), strict=True)
        return all(one == other and value is was for (one, value), (other, was) in pairs)
    return all(value is was for value, was in zip(container, before, strict=True))


def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    # An expanded view cannot be written to, not by a forward either: what it looks at is written in
    # its own turn.
    with torch.inference_mode(), suppress(RuntimeError):
        tensor.copy_(value)
