"""Fill: stored tensors, put back into a module that was built again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory, Row, contiguous_stride
from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.module.inventory import format_row
from mlflow_safeflavor.module.slots import UNKNOWN, find_setters, find_slots, shape_of

__all__ = ["NOT_GIVEN_BACK", "fill", "realise"]

# Hint where a constructor makes something else now than when the model was saved.
NOT_GIVEN_BACK = (
    "save the model again; where this comes back, its constructor depends on more than its "
    "arguments: allow_pickle=True or graph='only' does without it"
)


def fill(module: torch.nn.Module, inventory: Inventory, values: Mapping[str, torch.Tensor]) -> None:
    """Assign the stored tensors to the module; each alias group becomes one object again.

    Raises:
        WeightsError: The module has other places for tensors than the inventory lists.
    """
    setter_of = find_setters(module)
    for path, row in inventory.rows.items():
        if row.kind == "attribute" and row.stride is None and (put := setter_of(path)):
            # Left there by a forward before the save: the constructor leaves the place empty.
            put(torch.empty(row.shape, device="meta"))
    slots = {slot.path: slot for slot in find_slots(module)}
    wanted = {path: row.shape for path, row in inventory.rows.items() if row.kind != "hidden"}
    found = {path: shape_of(slot.tensor) for path, slot in slots.items()}
    # A lazy module waits for any shape, and is an ordinary one with its next forward.
    found |= {
        path: wanted[path] for path, shape in found.items() if shape == UNKNOWN and path in wanted
    }
    # Before any tensor is made: a row with a stride of 0 may say 10^12 values, which cost nothing
    # until they are copied (the attack view_of_terabytes).
    for path in sorted(
        path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)
    ):
        raise WeightsError(
            "The rebuilt module has other tensors than the saved one",
            where=path,
            wanted=format_row(inventory.rows.get(path)),
            found=f"{slots[path].kind} {list(shape_of(slots[path].tensor))}"
            if path in slots
            else "no such tensor",
            hint=NOT_GIVEN_BACK,
        )
    tensors = realise(inventory, values)
    # Assigned, not copied: tensors stay mapped from their file, and ties come back whether or not
    # the constructor ties them.
    for path, slot in slots.items():
        slot.put(tensors[path])


def realise(inventory: Inventory, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Path → tensor as its row says. Rows that say the same of the same data get one object."""
    made: dict[object, torch.Tensor] = {}
    tensors = {}
    for path, row in inventory.rows.items():
        # A parameter and a plain tensor of the same values are two objects that share memory.
        key = (row.data, row.shape, row.stride, row.offset, row.parameter)
        if key not in made:
            made[key] = _look_at(values[row.data], row)
        tensors[path] = made[key]
    return tensors


def _look_at(value: torch.Tensor, row: Row) -> torch.Tensor:
    if row.stride is not None or row.shape != tuple(value.shape):
        stride = row.stride or contiguous_stride(row.shape)
        value = torch.as_strided(
            value.reshape(-1), row.shape, stride, value.storage_offset() + row.offset
        )
    return torch.nn.Parameter(value, requires_grad=False) if row.parameter else value
