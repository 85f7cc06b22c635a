"""Devices that torch sees: choice of one, and the reason why one is missing."""

from __future__ import annotations

import os
from typing import Any

import torch

from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.machine import DEVICE_VARIABLE, default_device

__all__ = ["find_accelerator", "require_usable", "resolve_device"]


def resolve_device(device: str | int | torch.device = "auto") -> torch.device:
    """``"auto"`` → the default of MLflow's variable, else an accelerator, else the CPU.

    An int is an accelerator's index.

    Raises:
        PlacementError: Torch sees no such device, or this process cannot use it.
    """
    kind, asked = find_accelerator(), device
    device = default_device(asked)
    where = "device" if device is asked else DEVICE_VARIABLE
    try:
        if isinstance(device, bool):  # True would be the index 1
            raise TypeError("a bool is no device")
        if isinstance(device, int):
            wanted = torch.device(kind or "cuda", device)
        else:
            wanted = torch.device((kind or "cpu") if device == "auto" else device)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(
            "Not a device",
            where=where,
            wanted="auto, cpu, cuda, cuda:0, mps, 0, …",
            found=f"{device!r} ({error})",
        ) from None
    # torch.device("cuda:7") is made without a look at what there is.
    count = 1 if wanted.type == "cpu" else _device_count(wanted.type)
    if wanted.type == "meta" or (wanted.index or 0) >= count:
        there = f"cpu{f', {kind} × {_device_count(kind)}' if kind else ' only'}"
        reason = _why_no_cuda() if wanted.type == "cuda" and not count else ""
        raise PlacementError(
            "There is no such device here",
            where=where,
            wanted=str(wanted),
            found=f"{there}; {reason}" if reason else there,
            hint="device='auto' takes what there is"
            if where == "device"
            else f"unset {DEVICE_VARIABLE}",
        )
    require_usable(wanted)
    return wanted


def require_usable(device: torch.device) -> None:
    """Refuse an accelerator that was used before this process was forked: its driver is gone.

    Raises:
        PlacementError: This is such a process.
    """
    if device.type == "cpu":
        return
    broken = getattr(getattr(torch, device.type, None), "_is_in_bad_fork", None)
    if broken is not None and broken():
        raise PlacementError(
            "The device cannot be used in a process that was forked after it had been used",
            where=str(device),
            wanted="a process that was started anew",
            hint="start processes with multiprocessing's 'spawn' or 'forkserver' and load the "
            "model in each, fork before anything uses the device, or load with device='cpu'",
        )


def find_accelerator() -> str | None:
    """Kind of the accelerator that torch sees; None without one."""
    # The name of an accelerator that a package registered with torch; "privateuseone" without one.
    # CUDA and ROCm are both "cuda".
    others = torch._C._get_privateuse1_backend_name()
    return next((kind for kind in ("cuda", "xpu", "mps", others) if _device_count(kind)), None)


def _device_count(kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    backend: Any = getattr(torch, kind, None)
    return (
        int(backend.device_count())
        if backend is not None and hasattr(backend, "device_count")
        else 0
    )


def _why_no_cuda() -> str:
    """The reason why torch finds no GPU: its build, a variable, or the driver."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    built = f"torch was built for CUDA {torch.version.cuda}"
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in os.environ:
            return f"{built}, and {name}={os.environ[name]!r} hides GPUs from it"
    return f"{built}, and finds no GPU with a driver that is new enough"
