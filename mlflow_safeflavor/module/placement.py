"""Device and dtype of a module.

Everything here moves tensors group by group, so that tied weights stay tied and plain tensor
attributes, which ``nn.Module.to`` forgets, move along.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import AS_IS, DTYPES
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.devices import find_accelerator, resolve_device
from mlflow_safeflavor.module.failures import is_out_of_memory
from mlflow_safeflavor.module.fill import fill
from mlflow_safeflavor.module.inventory import take_inventory
from mlflow_safeflavor.module.slots import Slot, find_meta, find_slots, some

__all__ = [
    "dispatch",
    "dtype_plan",
    "input_dtype",
    "islands_of",
    "maps_files",
    "place",
    "resolve_dtype",
]


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` → ``torch.bfloat16``.

    Raises:
        PlacementError: It is none of the serving dtypes; there is no "auto".
    """
    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise PlacementError(
            "Not a serving dtype", where="dtype", wanted=" | ".join(DTYPES), found=repr(name)
        )
    dtype: torch.dtype = getattr(torch, text)
    return dtype


def input_dtype(name: str | torch.dtype, slots: Sequence[Slot]) -> torch.dtype:
    """What floating point inputs must be.

    The serving dtype, and for "as-is" the widest that any weight has.
    """
    if name != AS_IS:
        return resolve_dtype(name)
    floating = [
        slot.tensor
        for slot in slots
        if slot.tensor.is_floating_point() and slot.tensor.itemsize > 1
    ]
    weights = [tensor for tensor in floating if isinstance(tensor, torch.nn.Parameter)]
    kinds = [tensor.dtype for tensor in weights or floating] or [torch.float32]
    return functools.reduce(torch.promote_types, kinds)


def dtype_plan(
    module: torch.nn.Module,
    structure: Mapping[str, Any],
    name: str | torch.dtype,
    slots: Sequence[Slot],
) -> dict[str, torch.dtype]:
    """Path → dtype, for every tensor that a module of this serving dtype holds in another dtype.

    None for "as-is".

    As ``from_pretrained(dtype=…)`` decides: the islands that the class keeps in float32 are
    parameters and persistent buffers (a router's correction bias); everything else takes the dtype
    that the constructor gives it when ``dtype`` is torch's default: rotary frequencies, for
    instance, are float32 by their own code. Parameters of other modules than transformers', and
    persistent buffers where no constructor can be called, are cast, as ``nn.Module.to`` does.
    Integers and booleans stay.
    """
    if name == AS_IS:
        return {}
    dtype = resolve_dtype(name)
    floating = [slot for slot in slots if slot.tensor.is_floating_point()]
    parameters_differ = any(
        slot.tensor.dtype != dtype for slot in floating if slot.kind == "parameter"
    )
    if not parameters_differ:
        return {}
    islands = islands_of(module, dtype)
    constructed = _constructed_dtypes(structure, dtype)
    plan = {}
    for slot in floating:
        stored = slot.kind == "parameter" or (slot.kind == "buffer" and slot.persistent)
        if stored and islands and islands.search(f".{slot.path}."):
            plan[slot.path] = torch.float32
        elif slot.kind == "parameter" and not hasattr(module, "from_pretrained"):
            plan[slot.path] = dtype
        else:
            plan[slot.path] = constructed.get(slot.path, dtype if stored else slot.tensor.dtype)
    return {slot.path: plan[slot.path] for slot in floating if plan[slot.path] != slot.tensor.dtype}


def _constructed_dtypes(structure: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    if structure["kind"] in ("pickle", "graph"):
        return {}
    described = {
        **structure,
        "config": _with_dtype(structure.get("config"), str(dtype).removeprefix("torch.")),
    }
    seen = []
    for attempt in range(_TRIES):
        with _Watch(dtype) as watch:
            # Whoever gets here has agreed to run the class already: it is being saved, or was just
            # loaded.
            skeleton = build(described, trust={"code"}, dtype=dtype)
        seen.append({slot.path: slot.tensor.dtype for slot in find_slots(skeleton)})
        if not watch.disturbed:
            return seen[-1]
        time.sleep(0.01 * attempt)
    if any(other != seen[0] for other in seen):
        raise PlacementError(
            "Torch's default dtype kept changing while the model was constructed",
            where=structure["class"],
            wanted=str(dtype),
            hint="do not call torch.set_default_dtype, or transformers' from_pretrained in other "
            "threads, meanwhile",
        )
    return seen[0]  # the constructor itself changes it, always in the same way


_TRIES = 10


class _Watch(TorchFunctionMode):
    """Sees other threads change torch's default dtype, as transformers' loader does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.disturbed = dtype, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_default_dtype()
        result = func(*args, **(kwargs or {}))
        # requires_grad_ is called after construction, with the default that was there before.
        if getattr(func, "__name__", "") != "requires_grad_":
            self.disturbed |= before != self.dtype or torch.get_default_dtype() != self.dtype
        return result


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config, as JSON, that says ``dtype`` at every level.

    Submodels obey it more than torch's default.
    """
    if not isinstance(config, Mapping):
        return config
    changed = {key: _with_dtype(value, dtype) for key, value in config.items()}
    return changed | {
        key: dtype for key in ("dtype", "torch_dtype") if key in config and "model_type" in config
    }


def islands_of(module: torch.nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What the class keeps in float32 (T5's ``wo``), to be searched in ``.path.``.

    Transformers 4.57 and 5.
    """
    names: set[str] = set()
    for child in module.modules():
        if dtype == torch.float16:
            names |= set(getattr(child, "_keep_in_fp32_modules", None) or ())
        if dtype in (torch.float16, torch.bfloat16):
            names |= set(getattr(child, "_keep_in_fp32_modules_strict", None) or ())
    if not names:
        return None
    # As in transformers' own loader: whole components of a path before 5, any part of it since, *
    # for anything.
    import transformers

    whole = int(transformers.__version__.partition(".")[0]) < 5
    patterns = [rf"\.{name}\." if whole else name.replace("*", ".*") for name in sorted(names)]
    return re.compile("|".join(patterns))


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
            # its frames hold what there was room for
            raise _no_room(str(device), inventory, error) from None
        raise


def _no_room(where: str, inventory: Inventory, error: BaseException) -> PlacementError:
    return PlacementError(
        "The model does not fit on the device",
        where=where,
        wanted=f"{inventory.nbytes / 1e9:.2f} GB",
        found=error,
        hint="device='cpu', or a smaller serving dtype when saving",
    )


def maps_files(module: torch.nn.Module, inventory: Inventory) -> bool:
    """Whether a tensor of a loaded module may be mapped from its files, or read from them again."""
    hidden = any(row.kind == "hidden" for row in inventory.rows.values())
    return hidden or any(slot.tensor.device.type in ("cpu", "meta") for slot in find_slots(module))


# --- several devices
# -------------------------------------------------------------------------------


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
            raise _no_room("device_map", inventory, error) from None
        raise PlacementError(
            "accelerate cannot spread the model like this",
            where="device_map",
            found=error,
            hint='device_map="auto"',
        ) from error
    # What is on the CPU beside an accelerator is on meta, too, between two forwards; but accelerate
    # keeps its tensors.
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
    """What the nearest part that the map names says of a tensor; None where it names none."""
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
    """No part on disk with a part elsewhere inside it.

    Accelerate would take all of it away first.
    """
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
