"""float32 as it was recorded: no TF32 on a GPU while a model runs.

TF32 keeps 10 bits of a factor where float32 has 23. Torch allows it in convolutions by default, and
in products of matrices if it was told to, so that answers would depend on the rest of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["exact_products"]


_MATMUL, _CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
_NAMED = [
    place
    for place in (_MATMUL, getattr(_CUDNN, "conv", None), getattr(_CUDNN, "rnn", None))
    if place
]
_EXACT: list[tuple[Any, str, Any]] = [
    *((place, "allow_tf32", False) for place in (_MATMUL, _CUDNN)),
    # Names of precisions came with torch 2.9. A flag sets them, too; named by themselves, they make
    # the flag an error.
    *((place, "fp32_precision", "ieee") for place in _NAMED if hasattr(place, "fp32_precision")),
]


class _Settings:
    """Torch's flags for the whole process: changed by the first thread in, back by the last out."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[Any] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = [_read(place, name) for place, name, _ in _EXACT]
                for (place, name, exact), value in zip(_EXACT, self._before, strict=True):
                    # Only where it differs: setting a name of a precision makes the older flag an
                    # error for the user.
                    if value not in (exact, None):
                        setattr(place, name, exact)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (place, name, exact), value in zip(_EXACT, self._before, strict=True):
                    # A value that the user set meanwhile stays.
                    if value not in (exact, None) and _read(place, name) == exact:
                        setattr(place, name, value)


def _read(place: Any, name: str) -> Any:
    """The value; None where precisions are set that no flag can tell, an error of torch's."""
    try:
        return getattr(place, name)
    except RuntimeError:
        return None


_settings = _Settings()


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No TF32 in products and convolutions of float32 on a GPU, for any number of threads."""
    if device.type != "cuda":
        yield
        return
    _settings.enter()
    try:
        yield
    finally:
        _settings.leave()
