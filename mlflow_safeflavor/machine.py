"""Cores, memory and accelerators that this process may use, told without torch.

In a container these are its grants: affinity, and the quotas of this process's cgroup and those
around it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

__all__ = [
    "DEVICE_VARIABLE",
    "ROOT",
    "available_cpus",
    "available_memory",
    "cores",
    "cpu_features",
    "default_device",
    "give_back",
    "is_plainly_cpu",
    "quota",
]

# Where ``proc`` and ``sys`` are.
ROOT = Path("/")
# What drivers put into ``/dev``: CUDA, also below WSL, ROCm, Intel's and Ascend's.
_NODES = ("nvidiactl", "nvidia0", "dxg", "kfd", "dri", "davinci0", "accel", "habanalabs")


def available_cpus(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: affinity, cut by the quota; at least 1."""
    granted = quota(root)
    return cores() if granted is None else max(1, min(cores(), math.floor(granted)))


def cores() -> int:
    """Cores that affinity allows this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> str:
    """The CPU's instructions, which decide which kernels run and how weights are packed for them.

    Empty where the system tells none.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def quota(root: Path) -> float | None:
    """The tightest quota of this process's cgroup and those around it, version 2 or 1."""
    return min(
        (found for folder in _cgroups(root) if (found := _quota_of(folder)) is not None),
        default=None,
    )


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process may ever hold: the machine's memory, or the container's share."""
    system = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else 16 << 30
    )
    limits = [
        folder / name
        for folder in _cgroups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    # Without a limit version 2 says "max", version 1 a number that no machine has.
    return min([system, *(int(text) for path in limits if (text := _read(path)).isdecimal())])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroups(root: Path, controller: str = "cpu") -> Iterator[Path]:
    """Folders that may hold this process's quota, outermost last."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mount in _mounts(root, controllers, controller):
            inner = Path(path.lstrip("/"))
            # In a container the path may be the host's, of which only an end is mounted, or
            # nothing: the mount itself, the last of the parents, is then this container's cgroup.
            for part in (inner, *inner.parents):
                yield mount / part


def _mounts(root: Path, controllers: str, controller: str) -> list[Path]:
    top = root / "sys/fs/cgroup"
    # A line without controllers is version 2, which lies in "unified" beside a version 1.
    if controllers == "":
        return [top, top / "unified"]
    return [top / controllers, top / controller] if controller in controllers.split(",") else []


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        # No quota: "max" in version 2, "-1" in version 1.
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


DEVICE_VARIABLE = "MLFLOW_DEFAULT_PREDICTION_DEVICE"


def default_device(device: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """``device``, or what ``DEVICE_VARIABLE`` names where it is "auto"."""
    # mlflow.pytorch reads a device's name there, mlflow.transformers an index, of which -1 is the
    # CPU.
    named = environ.get(DEVICE_VARIABLE, "").strip()
    if not named or not isinstance(device, str) or device != "auto":
        return device
    try:
        index = int(named)
    except ValueError:
        return named
    return "cpu" if index < 0 else index


def is_plainly_cpu(device: object, dev: Path = Path("/dev")) -> bool:
    """Whether a user's ``device`` means the CPU for certain, without asking torch.

    False where torch is imported already, or drivers are in sight: then torch is to be asked.
    """
    device = default_device(device)
    if device != "auto":
        return bool(device == "cpu")
    if "torch" in sys.modules:
        return sys.modules["torch"] is None  # which is how an import is ruled out
    if importlib.util.find_spec("torch") is None:
        return True
    others = entry_points(group="torch.backends")  # which torch imports along
    return (
        sys.platform == "linux" and not others and not any((dev / name).exists() for name in _NODES)
    )


def give_back() -> None:
    """Hand freed memory from glibc back to the system; does nothing with other C libraries."""
    # glibc keeps it for the next malloc: 1 GB after four images of 25 megapixels.
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
