"""A module spread over several devices, through accelerate's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.module.devices import find_accelerator, resolve_device
from mlflow_safeflavor.module.failures import is_out_of_memory
from mlflow_safeflavor.module.placement import no_room, place
from mlflow_safeflavor.module.slots import find_meta, find_slots, some

__all__ = ["dispatch"]


def dispatch(
    module: torch.nn.Module,
    device_map: str | Mapping[str, Any],
    inventory: Inventory,
    layout: Layout,
) -> torch.device:
    """Spread a filled and compared module over devices, through accelerate's hooks.

    Tensors that are offloaded to disk stay where they are: in the safetensors files that are held,
    from which accelerate reads them whenever their module runs.

    Args:
        module: In memory, on the CPU.
        device_map: "auto", "balanced", "sequential", or submodule name → device, index or "disk".
        inventory: Says which file holds which tensor.
        layout: Where the safetensors files are.

    Returns:
        Where inputs go.

    Raises:
        PlacementError: accelerate is not installed, a device or submodule does not exist, or the
            map leaves tensors without a place.
    """
    try:
        import accelerate
    except ImportError:
        raise PlacementError(
            "device_map needs accelerate", hint="pip install 'mlflow-safeflavor[accelerate]'"
        ) from None
    devices = _device_map(module, device_map, accelerate)
    real = [device for device in devices.values() if isinstance(device, torch.device)]
    if len(set(devices.values())) == 1 and real:
        place(module, real[0], {})
        return real[0]
    main = next((device for device in real if device.type != "cpu"), torch.device("cpu"))
    index = _offload_index(inventory, layout)
    try:
        accelerate.dispatch_model(
            module,
            device_map={name: _as_accelerate(device) for name, device in devices.items()},
            main_device=_as_accelerate(main),
            offload_index=index if "disk" in devices.values() else None,
        )
    except (ValueError, RuntimeError, KeyError, MemoryError) as error:
        if is_out_of_memory(error):
            raise no_room("device_map", inventory, error) from None
        raise PlacementError(
            "accelerate cannot spread the model like this",
            where="device_map",
            found=error,
            hint='device_map="auto"',
        ) from error
    # Parts on the CPU beside an accelerator are on meta, too, between two forwards; but accelerate
    # keeps their tensors.
    offloaded = [
        path for path in find_meta(find_slots(module)) if _place_of(path, devices) == "disk"
    ]
    if lost := [path for path in offloaded if path not in index]:
        raise PlacementError(
            "Tensors that lie inside other tensors, or not in order, cannot be offloaded to disk",
            where=some(lost),
            wanted="a tensor that a file holds by itself",
            hint="map their modules to a device",
        )
    _move_attributes(module, devices, main)
    return main


def _move_attributes(
    module: torch.nn.Module, devices: Mapping[str, torch.device | str], main: torch.device
) -> None:
    """Move plain tensors, unknown to accelerate, to the device where their part of it computes."""
    for slot in find_slots(module):
        if slot.kind == "attribute":
            place_of_it = _place_of(slot.path, devices)
            computes = isinstance(place_of_it, torch.device) and place_of_it.type != "cpu"
            slot.put(slot.tensor.to(place_of_it if computes else main))


def _place_of(path: str, devices: Mapping[str, torch.device | str]) -> torch.device | str | None:
    """The device of the innermost part around a tensor that the map names; None without one."""
    inside = [name for name in devices if not name or f"{path}.".startswith(f"{name}.")]
    return devices[max(inside, key=len)] if inside else None


def _automatic_map(module: torch.nn.Module, strategy: str, accelerate: Any) -> dict[str, Any]:
    if strategy not in ("auto", "balanced", "sequential"):
        raise PlacementError(
            "Unknown device map",
            where="device_map",
            wanted="auto | balanced | sequential | a dict",
            found=strategy,
        )
    if find_accelerator() is None:
        return {"": "cpu"}
    whole = list(getattr(module, "_no_split_modules", None) or ())
    balanced = strategy != "sequential"
    memory = (
        accelerate.utils.get_balanced_memory(module, no_split_module_classes=whole)
        if balanced
        else None
    )
    return dict(
        accelerate.infer_auto_device_map(module, max_memory=memory, no_split_module_classes=whole)
    )


def _device_map(
    module: torch.nn.Module, given: str | Mapping[str, Any], accelerate: Any
) -> dict[str, torch.device | str]:
    device_map = (
        _automatic_map(module, given, accelerate)
        if isinstance(given, str)
        else _unnested(module, given)
    )
    names = dict(module.named_modules())
    if isinstance(given, str):  # accelerate's own maps name tensors, too
        names |= dict(module.named_parameters()) | dict(module.named_buffers())
    if unknown := sorted(set(device_map) - set(names)):
        raise PlacementError(
            "The device map names something the model does not have",
            where=f"device_map, {unknown[0]!r}",
            wanted="submodules such as "
            f"{', '.join(repr(name) for name, _ in module.named_children())}, or ''",
        )
    homeless = [
        slot.path
        for slot in find_slots(module)
        if slot.kind != "attribute"
        and not any(name == "" or f"{slot.path}.".startswith(f"{name}.") for name in device_map)
    ]
    if homeless:
        raise PlacementError(
            "The device map leaves tensors without a place",
            where=some(homeless),
            wanted="a device for every submodule",
            found=f"{len(homeless)} tensors without one",
        )
    return {
        name: "disk" if device == "disk" else resolve_device(device)
        for name, device in device_map.items()
    }


def _unnested(module: torch.nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The map without parts on disk that have parts elsewhere inside them."""
    # accelerate would offload the whole of such a part first.
    device_map = dict(given)
    modules = dict(module.named_modules())
    for name in modules:  # outermost first
        inside = [
            other
            for other in device_map
            if other != name and (not name or other.startswith(f"{name}."))
        ]
        if device_map.get(name) == "disk" and any(device_map[other] != "disk" for other in inside):
            del device_map[name]
            for child, _ in modules[name].named_children():
                device_map.setdefault(f"{name}.{child}" if name else child, "disk")
    return device_map


def _as_accelerate(device: torch.device | str) -> str | int:
    if isinstance(device, str):
        return device
    return device.index or 0 if device.type == "cuda" else str(device)


def _offload_index(inventory: Inventory, layout: Layout) -> dict[str, dict[str, str]]:
    index = {}
    for path, row in inventory.rows.items():
        data = inventory.data[row.data]
        if row.stride is None and row.shape == data.shape:
            file = layout.data / data.file
            index[path] = {
                "safetensors_file": str(layout.held.get(file, file)),
                "weight_name": row.data,
                "dtype": row.dtype,
            }
    return index
