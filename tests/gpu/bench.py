"""What a check gets, what it may say, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .accelerator import Accelerator
from .models import Saved

__all__ = ["CHECKS", "Bench", "Check", "NeedsGPU", "check", "largest", "require"]

Figures = Mapping[str, Any]


class NeedsGPU(Exception):
    """Nothing but a GPU can tell."""


@dataclass(frozen=True)
class Bench:
    """A device and models for it.

    Attributes:
        accelerator: Where to.
        saved: Artifacts, made on the CPU.
        work: An empty folder of this check's own.
    """

    accelerator: Accelerator
    saved: Saved
    work: Path

    @property
    def device(self) -> torch.device:
        """Of the accelerator."""
        return self.accelerator.device

    def require_gpu(self) -> None:
        """Only a real one will do."""
        if self.accelerator.is_fake:
            raise NeedsGPU


@dataclass(frozen=True)
class Check:
    """A check, its name, and the seconds that it may take on a machine with a GPU."""

    name: str
    run: Callable[[Bench], Figures]
    limit: float


CHECKS: dict[str, Check] = {}


def check(limit: float = 30) -> Callable[[Callable[[Bench], Figures]], Callable[[Bench], Figures]]:
    """Put a function on the list, under its own name.

    It returns figures, or raises what is wrong.
    """

    def listed(run: Callable[[Bench], Figures]) -> Callable[[Bench], Figures]:
        CHECKS[run.__name__] = Check(run.__name__, run, limit)
        return run

    return listed


def require(holds: object, *words: object) -> None:
    """An assertion that no option of Python takes out."""
    if not holds:
        raise AssertionError(" ".join(str(word) for word in words))


def largest(found: Any, wanted: Any) -> float:
    """Largest absolute difference of two arrays or two tensors on the CPU."""
    difference: np.ndarray = np.abs(
        np.asarray(found, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)
    )
    return float(difference.max(initial=0.0))
