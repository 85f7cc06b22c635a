"""Plain attributes of two modules, compared: numbers, texts, lists, functions, classes, hooks.

A constructor gives back values that it computes, and none that were set afterwards: a changed
threshold would come back as its default. Tensors are compared by their inventory; here only those
that no ``state_dict`` lists, because a forward may leave some behind.
"""

from __future__ import annotations

import functools
import logging
import random
import reprlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlflow_safeflavor.module.bookkeeping import BOOKKEEPING, is_users_hook, matters
from mlflow_safeflavor.module.equality import NOTHING, bits_equal, equal, is_object, plain_config
from mlflow_safeflavor.module.slots import OWN_STATE, Slot, find_setters
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.module.user_code import name_of

__all__ = ["Difference", "find_differences", "same_attributes"]


@dataclass(frozen=True)
class Difference:
    """One attribute that is not the same in two modules.

    Attributes:
        path: ``head.threshold``; inside containers ``head.sizes[0]``.
        given: What the module handed over holds, in words.
        built: What the rebuilt module holds, in words.
        tensor: Whether a tensor is all that differs. Its inventory says whether that can be put
            back.
    """

    path: str
    given: str
    built: str
    tensor: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.given}, rebuilt {self.built}"


def same_attributes(given: Subject, built: Subject) -> bool:
    """Whether no plain attribute differs."""
    return next(
        (False for difference in find_differences(given, built) if not difference.tensor), True
    )


def find_differences(given: Subject, built: Subject) -> Iterator[Difference]:
    """All differences but those of parameters and persistent buffers.

    Left out are those that change no prediction: devices, training mode and gradients, bookkeeping
    of transformers, accelerate and training, attributes of library classes that no code of theirs
    reads, and caches of ``functools.cached_property``. Values that cannot be compared, such as
    locks, count as equal.
    """
    yield from _slots_differ(given, built)
    yield from _Walk().modules("", given.module, built.module)


def _slots_differ(given: Subject, built: Subject) -> Iterator[Difference]:
    setter_of = find_setters(built.module)
    ours, theirs = (_fleeting(each.slots) for each in (given, built))
    for path in sorted(ours.keys() | theirs.keys()):
        mine, other = (slots[path].tensor if path in slots else None for slots in (ours, theirs))
        if mine is None or other is None or mine.shape != other.shape:
            # A tensor in a place that the constructor leaves empty can be put back by ``fill``.
            returns = (
                mine is not None
                and other is None
                and setter_of(path) is not None
                and mine.is_contiguous()
            )
            yield Difference(path, _shape(mine), _shape(other), tensor=returns)
        elif not _same_values(mine, other):
            yield Difference(path, "a tensor", "one of other values", tensor=True)


def _same_values(given: torch.Tensor, built: torch.Tensor) -> bool:
    """Whether they hold the same values, in the dtype of the given one."""
    if given.is_meta or built.is_meta:  # no values to compare
        return given.shape == built.shape
    return bits_equal(given, built.to(given.dtype))


def _fleeting(slots: Sequence[Slot]) -> dict[str, Slot]:
    # An LSTM lists its own weights once more, as plain tensors.
    lasting = {id(slot.tensor) for slot in slots if slot.persistent}
    return {
        slot.path: slot for slot in slots if not slot.persistent and id(slot.tensor) not in lasting
    }


def _shape(tensor: torch.Tensor | None) -> str:
    return "no tensor" if tensor is None else f"a tensor of shape {list(tensor.shape)}"


# Pairs of values that are compared: an object with more drags a data set along.
_MOST = 1_000_000

_UNCOMPARABLE = (
    *(torch.device, torch.Generator, np.random.Generator, np.random.RandomState, logging.Logger),
    *(types.GeneratorType, types.CodeType, types.FrameType, random.Random),
)


class _Walk:
    """One comparison; remembers which pairs it has seen."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], tuple[Any, Any]] = {}

    def modules(
        self, path: str, given: torch.nn.Module, built: torch.nn.Module
    ) -> Iterator[Difference]:
        if self._known(given, built):
            return
        if _class_of(given) is not _class_of(built) and name_of(_class_of(given)) != name_of(
            _class_of(built)
        ):
            yield Difference(
                path or "the module itself",
                f"a {name_of(type(given))}",
                f"a {name_of(type(built))}",
            )
            return
        # A lazy module: its first forward makes its attributes.
        if hasattr(built, "cls_to_become"):
            return
        for name in sorted(vars(given).keys() | vars(built).keys()):
            if name not in OWN_STATE and matters(type(given), name):
                yield from self._attribute(_join(path, name), name, given, built)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            ours, theirs = (
                list(filter(is_users_hook, getattr(each, kind).values())) for each in (given, built)
            )
            yield from self.values(_join(path, kind), ours, theirs)
        children = (given._modules, built._modules)
        for name in sorted(children[0].keys() | children[1].keys()):
            mine, other = (each.get(name) for each in children)
            if mine is None or other is None:
                if mine is not other:
                    yield _difference(_join(path, name), mine, other)
            else:
                yield from self.modules(_join(path, name), mine, other)

    def _attribute(
        self, path: str, name: str, given: object, built: object
    ) -> Iterator[Difference]:
        mine, other = (vars(each).get(name, NOTHING) for each in (given, built))
        if other is NOTHING or mine is NOTHING:
            # Lightning makes these when they are first asked for.
            if name == "_hparams" and other is NOTHING and not mine:
                return
            # On the instance what the class has anyway changes nothing: accelerate's unwrapping
            # leaves the class's own ``forward`` there.
            default = getattr(type(given), name, NOTHING)
            if isinstance(default, functools.cached_property):
                return
            if (
                name == "vocab_size"
                and other is NOTHING
                and hasattr(given, "resize_token_embeddings")
            ):
                return  # resizing leaves it on every model, whether its class reads it or not
            mine, other = (default if each is NOTHING else _unbound(each) for each in (mine, other))
        yield from self.values(path, mine, other)

    def values(
        self, path: str, given: Any, built: Any, *, inside: bool = False
    ) -> Iterator[Difference]:
        """Compare two values; ``inside`` an object that is no module, tensors, too."""
        if given is built or isinstance(given, _UNCOMPARABLE) or self._known(given, built):
            return
        if isinstance(given, torch.Tensor) or isinstance(built, torch.Tensor):
            both = isinstance(given, torch.Tensor) and isinstance(built, torch.Tensor)
            # In a module the inventory compares them; inside other objects it lists none.
            if inside and not (both and given.dtype == built.dtype and _same_values(given, built)):
                yield _difference(path, given, built)
        elif isinstance(given, torch.nn.Module) and isinstance(built, torch.nn.Module):
            yield from self.modules(path, given, built)
        elif (
            isinstance(given, (list, tuple))
            and isinstance(built, (list, tuple))
            and len(given) == len(built)
        ):
            for index, pair in enumerate(zip(given, built, strict=True)):
                yield from self.values(f"{path}[{index}]", *pair, inside=inside)
        elif isinstance(given, dict) and isinstance(built, dict):
            yield from self._dicts(path, given, built, inside)
        elif isinstance(given, types.FunctionType) and isinstance(built, types.FunctionType):
            yield from self._functions(path, given, built)
        elif isinstance(given, types.MethodType) and isinstance(built, types.MethodType):
            yield from self.values(path, given.__func__, built.__func__, inside=True)
            yield from self.values(path, given.__self__, built.__self__, inside=inside)
        elif isinstance(given, functools.partial) and isinstance(built, functools.partial):
            for name in ("func", "args", "keywords"):
                yield from self.values(
                    f"{path}.{name}", getattr(given, name), getattr(built, name), inside=True
                )
        elif (
            is_object(given)
            and type(given) is not type
            and name_of(type(given)) == name_of(type(built))
        ):
            yield from self._objects(path, given, built)
        elif not equal(given, built):
            yield _difference(path, given, built)

    def _known(self, given: Any, built: Any) -> bool:
        if isinstance(given, (bool, int, float, str, bytes, type(None))):
            return False
        known = (id(given), id(built)) in self.seen or len(self.seen) > _MOST
        # The objects are kept, so that no other gets the id of one that was freed.
        self.seen[id(given), id(built)] = (given, built)
        return known

    def _dicts(
        self, path: str, given: dict[Any, Any], built: dict[Any, Any], inside: bool
    ) -> Iterator[Difference]:
        if (
            not built
            and not inside
            and all(isinstance(value, torch.Tensor) for value in given.values())
        ):
            return  # an empty dict takes tensors back
        for key in [*given, *(key for key in built if key not in given)]:
            mine, other = given.get(key, NOTHING), built.get(key, NOTHING)
            yield from self.values(f"{path}[{key!r}]", mine, other, inside=inside)

    def _functions(
        self, path: str, given: types.FunctionType, built: types.FunctionType
    ) -> Iterator[Difference]:
        inner: Any = built
        while given.__module__.startswith("transformers.") and (
            inner := getattr(inner, "__wrapped__", None)
        ):
            # accelerate's unwrapping takes transformers' own decorators off, too
            if inner is given:
                return
        # Two calls of a constructor make two functions of one code; their defaults and closures
        # (a threshold, a size) may differ.
        code = [
            (f.__module__, f.__qualname__, f.__code__.co_code, f.__code__.co_names)
            for f in (given, built)
        ]
        if code[0] != code[1]:
            yield _difference(path, given, built)
            return
        for name in ("__defaults__", "__kwdefaults__"):
            yield from self.values(
                f"{path}.{name}", getattr(given, name), getattr(built, name), inside=True
            )
        consts = [
            [c for c in f.__code__.co_consts if not isinstance(c, types.CodeType)]
            for f in (given, built)
        ]
        yield from self.values(f"{path}.__code__", *consts, inside=True)
        for name, *cells in zip(
            given.__code__.co_freevars,
            given.__closure__ or (),
            built.__closure__ or (),
            strict=False,
        ):
            try:
                mine, other = (cell.cell_contents for cell in cells)
            except ValueError:  # an empty cell
                continue
            yield from self.values(f"{path}.{name}", mine, other, inside=True)

    def _objects(self, path: str, given: Any, built: Any) -> Iterator[Difference]:
        if hasattr(given, "to_json_string"):  # a config of transformers
            yield from self.values(
                path, *(plain_config(each) for each in (given, built)), inside=True
            )
            return
        try:
            same = "__eq__" in {
                name for base in type(given).__mro__[:-1] for name in vars(base)
            } and bool(given == built)
        except Exception:  # an array, or a class with an idea of its own of what == is
            same = False
        if not same:
            for name in sorted(vars(given).keys() | vars(built).keys()):
                cached = isinstance(getattr(type(given), name, None), functools.cached_property)
                if name not in BOOKKEEPING and not cached:
                    mine, other = (vars(each).get(name, NOTHING) for each in (given, built))
                    yield from self.values(f"{path}.{name}", mine, other, inside=True)


def _unbound(value: Any) -> Any:
    while isinstance(value, types.MethodType):
        value = value.__func__
    return value


def _class_of(module: torch.nn.Module) -> type:
    """The class of a module; of a lazy one, its class after the first forward."""
    return getattr(module, "cls_to_become", None) or type(module)


_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 60


def _difference(path: str, given: Any, built: Any) -> Difference:
    return Difference(path, _words(given), _words(built))


def _words(value: Any) -> str:
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        return _shape(value)
    name = getattr(value, "__qualname__", None)
    return (
        f"{value.__module__}:{name}"
        if name and getattr(value, "__module__", None)
        else _SHORT.repr(value)
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
