"""Whether this machine may have an accelerator, told without torch, whose import takes longer than all of a load."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["is_plainly_cpu"]

_NODES = ("nvidiactl", "nvidia0", "dxg", "kfd", "dri", "davinci0", "accel", "habanalabs")
"""What drivers put into ``/dev``: CUDA, also below WSL, ROCm, Intel's and Ascend's."""


def is_plainly_cpu(device: object, dev: Path = Path("/dev")) -> bool:
    """Whether a ``device`` as users give it means the CPU, and nobody need ask torch.

    Where torch is imported already, or drivers are in sight, it is asked.
    """
    if device != "auto":
        return device == "cpu"
    if "torch" in sys.modules:
        return sys.modules["torch"] is None  # which is how an import is ruled out
    if importlib.util.find_spec("torch") is None:
        return True
    others = entry_points(group="torch.backends")  # which torch imports along
    return sys.platform == "linux" and not others and not any((dev / name).exists() for name in _NODES)
