"""Subject of a save: a module with its slots, structure and skeleton, each made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mlflow_safeflavor.module.slots import Slot, find_slots

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A module with its slots, valid as long as no tensor of the module is replaced.

    Attributes:
        module: Not changed.
        slots: From ``find_slots``; to be found again after a forward, a fill or a placement.
        structure: Its description by ``structure.describe``; None where it was not asked for.
        skeleton: The module that its constructor makes by that, with marked memory; None where
            there is no constructor.
    """

    module: torch.nn.Module
    slots: Sequence[Slot]
    structure: Mapping[str, Any] | None = None
    skeleton: Subject | None = None

    @classmethod
    def of(cls, module: torch.nn.Module) -> Subject:
        """The subject of a module, found by a walk over all of it."""
        return cls(module, find_slots(module))

    def part(self, name: str) -> Subject:
        """A child of the module, with paths of its own."""
        inside = f"{name}."
        slots = [slot for slot in self.slots if slot.path.startswith(inside)]
        return Subject(
            self.module.get_submodule(name),
            [replace(slot, path=slot.path.removeprefix(inside)) for slot in slots],
        )
