"""Leftovers of a forward in a module: rope caches, kept attention weights, counters.

They belong to the texts that were answered last, so they are not saved: the module is saved as its
constructor makes it, with the weights of the one that was handed over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from mlflow_safeflavor.module.attributes import Difference, find_differences
from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.module.subject import Subject

__all__ = ["covered", "fresh", "written_by_forward"]

# Runs a module on the CPU, on inputs as it will get them.
Forward = Callable[[torch.nn.Module], None]


def written_by_forward(
    given: Subject, make: Callable[[], torch.nn.Module], forward: Forward
) -> set[str]:
    """Paths of plain attributes and unlisted tensors that a forward changes.

    Args:
        given: Copied, and not run itself.
        make: Calls its constructor.
        forward: Run twice. Where it fails, nothing counts as written.
    """
    # A forward may write only what is not there yet, or only undo what another one wrote; so one
    # is run on a module as its constructor makes it, with the weights of the given one, and one on
    # a copy of that.
    new, unused = make(), make()
    weights = {slot.path: slot.tensor.detach().cpu() for slot in given.slots if slot.persistent}
    _put(new, {path: tensor.clone() for path, tensor in weights.items()})
    # Memory that the two constructors left unwritten would differ without a forward.
    _put(
        unused,
        {
            slot.path: slot.tensor.detach().clone()
            for slot in find_slots(new)
            if not slot.persistent
        },
    )
    written = set(_written(new, unused, forward))
    # RWKV scales its weights and notes that it did: such a note goes with the weights, and neither
    # is made anew.
    kept = all(
        bits_equal(slot.tensor, weights[slot.path])
        for slot in find_slots(new)
        if slot.path in weights
    )
    return written | _written_again(given, forward) if kept else set()


def _written_again(given: Subject, forward: Forward) -> set[str]:
    try:
        used, unused = _copy(given), _copy(given)
    except Exception:  # a lock, an open file: what cannot be copied
        return set()
    return set(_written(used, unused, forward))


def _written(module: torch.nn.Module, unused: torch.nn.Module, forward: Forward) -> Iterator[str]:
    try:
        with torch.inference_mode():
            forward(module)
    except Exception:  # told where the golden rows are answered, not here
        return
    for difference in find_differences(Subject.of(module), Subject.of(unused)):
        yield difference.path


def _copy(given: Subject) -> torch.nn.Module:
    """A copy of a module that shares its weights."""
    # deepcopy takes what is in the memo for copied: weights are not, so that a large model fits.
    memo = {
        id(slot.tensor): slot.tensor if slot.persistent else slot.tensor.detach().clone()
        for slot in given.slots
    }
    return copy.deepcopy(given.module, memo).eval()


def covered(differences: Sequence[Difference], written: Collection[str]) -> list[str]:
    """Paths of the differences that a forward writes, whole or in part."""
    return [
        difference.path
        for difference in differences
        if any(_within(difference.path, path) or _within(path, difference.path) for path in written)
    ]


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith((f"{outer}.", f"{outer}["))


def fresh(given: Subject, built: torch.nn.Module, left: Collection[str]) -> torch.nn.Module:
    """``built`` with all tensors of ``given``, shared, but those that a forward left there."""
    slots = given.slots
    _put(
        built,
        {slot.path: slot.tensor for slot in slots if slot.persistent or slot.path not in left},
    )
    device = next((slot.tensor.device for slot in slots), torch.device("cpu"))
    _put(
        built,
        {slot.path: slot.tensor.to(device) for slot in find_slots(built) if slot.path in left},
    )
    return built


def _put(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for slot in find_slots(module):
        if slot.path in tensors:
            parameter = isinstance(slot.tensor, torch.nn.Parameter)
            tensor = tensors[slot.path]
            slot.put(
                torch.nn.Parameter(tensor, requires_grad=False)
                if parameter and not isinstance(tensor, torch.nn.Parameter)
                else tensor
            )
