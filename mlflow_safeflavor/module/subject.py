"""A module that is saved, and what was found out about it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mlflow_safeflavor.module.slots import Slot, find_slots

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A module with its tensors, so that nobody has to look for them again.

    Valid as long as no tensor of the module is replaced: whoever runs a forward, fills or places a
    module looks again.

    Attributes:
        module: Only looked at.
        slots: As ``find_slots`` gives them.
        structure: How it is built again, see ``structure.describe``; None where nobody has asked.
        skeleton: The module that its constructor makes by that, with marked memory; None where
            there is no constructor.
    """

    module: torch.nn.Module
    slots: Sequence[Slot]
    structure: Mapping[str, Any] | None = None
    skeleton: Subject | None = None

    @classmethod
    def of(cls, module: torch.nn.Module) -> Subject:
        """Look at a module, which walks over all of it."""
        return cls(module, find_slots(module))

    def part(self, name: str) -> Subject:
        """A child of the module, with paths of its own."""
        inside = f"{name}."
        slots = [slot for slot in self.slots if slot.path.startswith(inside)]
        return Subject(
            self.module.get_submodule(name),
            [replace(slot, path=slot.path.removeprefix(inside)) for slot in slots],
        )
