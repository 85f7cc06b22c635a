"""A module's tensors, moved and cast by alias groups.

Tied weights stay tied, and plain tensor attributes, which ``nn.Module.to`` forgets, move along.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.module.failures import is_out_of_memory
from mlflow_safeflavor.module.fill import fill
from mlflow_safeflavor.module.inventory import take_inventory
from mlflow_safeflavor.module.slots import find_slots

__all__ = ["maps_files", "no_room", "place"]


def place(module: torch.nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast (path → dtype) and move the module's tensors, keeping every alias group together.

    Raises:
        PlacementError: The device has no room for them.
    """
    slots = find_slots(module)
    if not dtypes and all(slot.tensor.device == device for slot in slots):
        return
    inventory, values = take_inventory(slots, dtypes)
    try:
        fill(module, inventory, {name: value.to(device) for name, value in values.items()})
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            # Without the error: its frames hold the tensors that there was room for.
            raise no_room(str(device), inventory, error) from None
        raise


def no_room(where: str, inventory: Inventory, error: BaseException) -> PlacementError:
    """The error of a model that does not fit."""
    return PlacementError(
        "The model does not fit on the device",
        where=where,
        wanted=f"{inventory.nbytes / 1e9:.2f} GB",
        found=error,
        hint="device='cpu', or a smaller serving dtype when saving",
    )


def maps_files(module: torch.nn.Module, inventory: Inventory) -> bool:
    """Whether a tensor of a loaded module may be mapped from its files, or read from them again."""
    # Hidden tensors stay on the CPU; those on meta are offloaded, and read again at each forward.
    hidden = any(row.kind == "hidden" for row in inventory.rows.values())
    return hidden or any(slot.tensor.device.type in ("cpu", "meta") for slot in find_slots(module))
