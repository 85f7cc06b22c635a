"""Bugs of placement, planted one at a time: what the checks say of each, as JSON on the last line.

python -m gpu.planted FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.module import placement
from mlflow_safeflavor.predict import forwards

from . import placing, room  # noqa: F401  (they list themselves)
from .accelerator import fake
from .bench import CHECKS, Bench
from .models import Saved
from .worker import run_check


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _afterwards(spoil: Callable[[torch.nn.Module], None]) -> Any:
    """``placement.place`` as it is, and then something wrong with the module."""
    place = placement.place

    def spoiled(module: torch.nn.Module, *args: Any) -> None:
        place(module, *args)
        if hasattr(module, "counted"):
            spoil(module)

    return _replaced(placement, "place", spoiled)


def _put(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.nn.Module], None]:
    """All of these leave the golden rows' answers as they are, so that loading finds nothing."""
    return lambda module: setattr(module, name, change(getattr(module, name)))


def _renew(layer: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = change(layer.get_parameter("weight"))
    layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))


def _to_meta(module: torch.nn.Module) -> None:
    _renew(module.get_submodule("unused"), lambda weight: weight.to("meta"))


def _untie(module: torch.nn.Module) -> None:
    _renew(module.get_submodule("tied"), torch.Tensor.clone)


PLANTS: dict[str, tuple[str, Any]] = {
    "nothing": ("tensors", lambda: _afterwards(lambda module: None)),
    "a buffer that the forward reads is on the CPU": (
        "tensors",
        lambda: _afterwards(_put("counted", torch.Tensor.cpu)),
    ),
    "a buffer is on the CPU": ("tensors", lambda: _afterwards(_put("untouched", torch.Tensor.cpu))),
    "a plain tensor is on the CPU": (
        "tensors",
        lambda: _afterwards(_put("places", torch.Tensor.cpu)),
    ),
    "a buffer has another dtype": (
        "tensors",
        lambda: _afterwards(_put("untouched", torch.Tensor.double)),
    ),
    "a parameter is on meta": ("tensors", lambda: _afterwards(_to_meta)),
    "a value is another": (
        "tensors",
        lambda: _afterwards(_put("fine", lambda tensor: tensor + 1e-9)),
    ),
    "a tie is gone": ("tensors", lambda: _afterwards(_untie)),
    "nothing is placed": ("tensors", lambda: _replaced(placement, "place", lambda *args: None)),
    "no batch is halved": (
        "out_of_memory",
        lambda: _replaced(forwards, "is_out_of_memory", lambda error: False),
    ),
    "files stay mapped": ("peak", lambda: _replaced(placement, "maps_files", lambda *args: True)),
}


def main(folder: str) -> None:
    """Print what was said of each."""
    warnings.simplefilter("ignore")
    out = os.dup(1)
    os.dup2(2, 1)
    bench, said = Bench(fake(), Saved(Path(folder)), Path(tempfile.mkdtemp(dir=folder))), {}
    for what, (check, plant) in PLANTS.items():
        with plant():
            result = run_check(CHECKS[check], bench)
        said[what] = [result["verdict"], result.get("said", "")]
    os.write(out, json.dumps(said).encode())


if __name__ == "__main__":
    main(sys.argv[1])
