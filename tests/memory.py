"""A module's memory, found without the package's bookkeeping, and a round trip through files."""

from __future__ import annotations

from pathlib import Path

import torch

from mlflow_safeflavor.artifact import inventory_file
from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.module import tensors
from mlflow_safeflavor.module.fill import fill
from mlflow_safeflavor.module.inventory import find_differences, take_inventory
from mlflow_safeflavor.module.saveable import require_saveable
from mlflow_safeflavor.module.slots import find_slots


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and every byte: NaNs and negative zeros count."""
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b"",
    )


def all_bits(module: torch.nn.Module) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {slot.path: bits(slot.tensor) for slot in find_slots(module)}


def memory(module: torch.nn.Module) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Path → first path whose bytes overlap, distance from there in bytes, and strides.

    Told from addresses alone, so that it can judge the inventory's alias groups. Tensors without
    elements have no memory and are left out; strides of dimensions of size one mean nothing.
    """
    spans = []
    for slot in find_slots(module):
        tensor = slot.tensor
        if tensor.numel():
            last = sum(
                (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            stride = tuple(
                step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
            )
            spans.append((start, start + (last + 1) * tensor.itemsize, slot.path, stride))
    leaders: dict[str, tuple[str, int]] = {}
    group: list[tuple[int, str]] = []
    reach = -1
    order = {path: i for i, (_, _, path, _) in enumerate(spans)}
    for start, stop, path, _ in [*sorted(spans), (2**64, 2**64, "", ())]:
        if start >= reach:
            if group:
                leader, base = min(((p, s) for s, p in group), key=lambda item: order[item[0]])
                leaders.update({p: (leader, s - base) for s, p in group})
            group, reach = [], -1
        group.append((start, path))
        reach = max(reach, stop)
    return {path: (*leaders[path], stride) for _, _, path, stride in spans}


def write(module: torch.nn.Module, folder: Path) -> tuple[Layout, Inventory]:
    """What a save does with tensors."""
    slots = find_slots(module)
    require_saveable(slots)
    layout = Layout(folder)
    layout.data.mkdir(parents=True)
    return layout, tensors.write_tensors(*take_inventory(slots), layout)


def read_into(fresh: torch.nn.Module, layout: Layout) -> Inventory:
    """What a load does with tensors."""
    inventory = inventory_file.read_inventory(layout)
    held, problems = inventory_file.hold_weights(inventory, layout)
    assert problems == [], "bytes differ from their own digests"
    fill(fresh, inventory, tensors.read_tensors(inventory, layout))
    assert held  # until here: tensors are mapped through its descriptors
    return inventory


def round_trip(module: torch.nn.Module, fresh: torch.nn.Module, folder: Path) -> Inventory:
    """Write ``module``, read into ``fresh``; require the same tensors, shared in the same way."""
    bits_before, memory_before = all_bits(module), memory(module)
    layout, written = write(module, folder)
    assert all_bits(module) == bits_before, "writing changed the module"
    inventory = read_into(fresh, layout)
    assert inventory == written, "the inventory read is not the one written"
    assert all_bits(fresh) == bits_before, "values, dtypes or shapes differ"
    assert memory(fresh) == memory_before, (
        "memory is shared in another way, or laid out in another way"
    )
    assert list(find_differences(fresh, inventory)) == []
    assert not [slot.path for slot in find_slots(fresh) if slot.tensor.requires_grad]
    return inventory
