"""The process's random states: of Python, numpy and, where it was imported, torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

__all__ = ["kept_random_state", "seed_generators"]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch afterwards."""
    torch: Any = sys.modules.get("torch")
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        if torch is not None:
            stack.callback(torch.set_rng_state, torch.get_rng_state())
            # Asking an uninitialised CUDA for its state would start its driver, which no fork
            # survives.
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        yield


def seed_generators(seed: int) -> None:
    """Seed Python, numpy and torch on the CPU; for use inside ``kept_random_state``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes no larger one
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators, too
