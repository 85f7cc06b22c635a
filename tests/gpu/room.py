"""Checks: how much memory a model takes, and what happens where there is too little."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

import mlflow_safeflavor
from mlflow_safeflavor.errors import OverloadedError, PlacementError

from .bench import Bench, check, largest, require
from .models import texts_of
from .placing import TRUST

_MIB = 1 << 20


def _mapped() -> int:
    """Mappings of files of weights in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("safeflavor-weights" in line or "model.safetensors" in line for line in lines)


def _resident() -> int:
    """Bytes of this process that are nobody else's and no file's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def _descriptors() -> int:
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum("safeflavor" in os.readlink(link) for link in links if os.path.lexists(link))


@check(90)
def peak(bench: Bench) -> dict[str, Any]:
    """A load takes 1.15 times the weights at most, there; here nothing of them stays."""
    size = "tiny" if bench.accelerator.is_fake else "large"
    path = bench.saved(size)
    mlflow_safeflavor.load_model(bench.saved("tiny"))  # what the libraries themselves take, once
    gc.collect()
    before, held, mapped, resident = (
        bench.accelerator.allocated(),
        _descriptors(),
        _mapped(),
        _resident(),
    )
    with bench.accelerator.peak() as most:
        begun = time.perf_counter()
        model = mlflow_safeflavor.load_model(path)
        seconds = time.perf_counter() - begun
    gc.collect()
    weights, taken = model.report.weight_bytes, bench.accelerator.allocated() - before
    # of a tiny model, what one forward takes is no small part
    small = 2 * _MIB if bench.accelerator.is_fake else 0
    require(most[0] <= 1.15 * weights + small, "peak", most[0], "of weights", weights)
    require(taken <= 1.15 * weights + small, "it holds", taken, "for weights", weights)
    require(_mapped() == mapped, "files of weights are still mapped")
    require(_descriptors() == held, "files of weights are still open")
    grown = _resident() - resident
    if not bench.accelerator.is_fake:
        require(grown < 0.5 * weights, "this process grew by", grown, "for weights", weights)
    model.predict(texts_of([5], size))
    del model
    gc.collect()
    require(
        bench.accelerator.allocated() <= before + small, "a model that is gone still has memory"
    )
    return {
        "weights": weights,
        "peak": most[0],
        "held": taken,
        "grown here": grown,
        "seconds": round(seconds, 2),
    }


@check()
def too_large(bench: Bench) -> dict[str, Any]:
    """A model that does not fit is refused by name, nothing of it stays, and with room it loads."""
    path = bench.saved("Greedy")
    gc.collect()
    before = bench.accelerator.allocated()
    with bench.accelerator.room(4 * _MIB):
        try:
            mlflow_safeflavor.load_model(path, trust=TRUST)
            raise AssertionError("16 MiB were put into 4")
        except PlacementError as error:
            found = str(error.what)
    require("does not fit" in found, found)
    gc.collect()
    require(bench.accelerator.allocated() == before, "something of it stayed")
    return {
        "said": found,
        "then": len(mlflow_safeflavor.load_model(path, trust=TRUST).predict(texts_of([4]))),
    }


@check(60)
def out_of_memory(bench: Bench) -> dict[str, Any]:
    """In the middle of a batch: smaller ones are tried.

    A row too large is an error, and the next is answered.
    """
    model = mlflow_safeflavor.load_model(bench.saved("Greedy"), trust=TRUST)
    texts = texts_of([6] * 8)  # one batch
    wanted = np.stack(model.predict(texts)["embedding"].to_list())
    sizes: list[int] = []
    seen = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        with bench.accelerator.room(24 * _MIB):
            found = np.stack(model.predict(texts)["embedding"].to_list())
            require(
                largest(found, wanted) < 1e-5,
                "other answers, or another order, by",
                largest(found, wanted),
            )
            tried = list(sizes)
            require(max(tried) == len(texts), "nothing had to be made smaller:", tried)
            require(min(tried) < len(texts), "nothing smaller was tried:", tried)
            try:
                model.predict(texts_of([64]))
                raise AssertionError("32 MiB were found in 24")
            except OverloadedError as error:
                said = f"{type(error).__name__}: {error.what}"
            again = np.stack(model.predict(texts[:1])["embedding"].to_list())
            require(largest(again, wanted[:1]) < 1e-5, "the next request is answered otherwise")
    finally:
        seen.remove()
    return {"batches tried": tried, "said": said}
