"""Device and dtype of a module: the one place with device code.

Everything here moves tensors group by group, so that tied weights stay tied and plain tensor
attributes, which ``nn.Module.to`` forgets, move along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlflow_safeflavor import structure as structures
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.inventory import Slot, fill, find_slots, take_inventory
from mlflow_safeflavor.spec import DTYPES

__all__ = ["dtype_plan", "place", "resolve_device", "resolve_dtype"]


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` → ``torch.bfloat16``.

    Raises:
        PlacementError: It is none of the serving dtypes; there is no "auto".
    """
    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise PlacementError("Not a serving dtype", where="dtype", wanted=" | ".join(DTYPES), found=repr(name))
    dtype: torch.dtype = getattr(torch, text)
    return dtype


def resolve_device(device: str | int | torch.device = "auto") -> torch.device:
    """``"auto"`` → an accelerator where torch sees one, else the CPU; an int is an accelerator's index.

    Raises:
        PlacementError: Torch sees no such device.
    """
    kind = _accelerator()
    if device == "auto":
        return torch.device(kind or "cpu")
    try:
        if isinstance(device, bool):
            raise TypeError("a bool is no device")
        wanted = torch.device(kind or "cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            "Not a device", where="device", wanted="auto, cpu, cuda, cuda:0, mps, 0, …", found=f"{device!r} ({error})"
        ) from None
    count = 1 if wanted.type == "cpu" else _device_count(wanted.type)
    if wanted.type == "meta" or (wanted.index or 0) >= count:
        raise PlacementError(
            "There is no such device here",
            where="device",
            wanted=str(wanted),
            found=f"cpu{f', {kind} × {_device_count(kind)}' if kind else ' only'}",
            way_out="device='auto' takes what there is",
        )
    return wanted


def _accelerator() -> str | None:
    for kind in ("cuda", "xpu", "mps"):
        if _device_count(kind):
            return kind
    return None


def _device_count(kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    backend = getattr(torch, kind, None)
    return int(backend.device_count()) if backend is not None and hasattr(backend, "device_count") else 0


def dtype_plan(
    module: torch.nn.Module, structure: Mapping[str, Any], dtype: torch.dtype, slots: Sequence[Slot]
) -> dict[str, torch.dtype]:
    """Path → dtype, for every tensor that a module of this serving dtype holds in another dtype.

    Parameters take ``dtype``, except for the islands that the class keeps in float32. Buffers and
    plain attributes take the dtype that the constructor gives them when ``dtype`` is torch's default:
    rotary frequencies, for instance, are float32 by their own code. Where no constructor can be
    called, persistent buffers are cast, as ``nn.Module.to`` does. Integers and booleans stay.
    """
    floating = [slot for slot in slots if slot.tensor.is_floating_point()]
    parameters_differ = any(slot.tensor.dtype != dtype for slot in floating if slot.kind == "parameter")
    if not parameters_differ:
        return {}
    islands = _islands(module, dtype)
    constructed = _constructed_dtypes(structure, dtype)
    plan = {}
    for slot in floating:
        if slot.kind == "parameter":
            plan[slot.path] = torch.float32 if islands and islands.search(f".{slot.path}.") else dtype
        else:
            as_nn_does = dtype if slot.kind == "buffer" and slot.persistent else slot.tensor.dtype
            plan[slot.path] = constructed.get(slot.path, as_nn_does)
    return {slot.path: plan[slot.path] for slot in floating if plan[slot.path] != slot.tensor.dtype}


def _constructed_dtypes(structure: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    if structure["kind"] == "pickle":
        return {}
    # Whoever gets here has agreed to run the class already: it is being saved, or was just loaded.
    skeleton = structures.build(structure, trust={"code"}, dtype=dtype)
    return {slot.path: slot.tensor.dtype for slot in find_slots(skeleton)}


def _islands(module: torch.nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names of submodules that the class keeps in float32 (T5's ``wo``); transformers 4.57 and 5."""
    names: set[str] = set()
    for child in module.modules():
        if dtype == torch.float16:
            names |= set(getattr(child, "_keep_in_fp32_modules", None) or ())
        if dtype in (torch.float16, torch.bfloat16):
            names |= set(getattr(child, "_keep_in_fp32_modules_strict", None) or ())
    # Names are whole components of a path, as in transformers' own loader.
    return re.compile("|".join(rf"\.{re.escape(name)}\." for name in sorted(names))) if names else None


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
    except torch.OutOfMemoryError as error:
        raise PlacementError(
            "The model does not fit on the device",
            where=str(device),
            wanted=f"{inventory.nbytes / 1e9:.2f} GB",
            found=error,
            way_out="device='cpu', or a smaller serving dtype when saving",
        ) from error
