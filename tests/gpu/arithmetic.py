"""Checks: how near answers are to the CPU's, and which bits hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import mlflow_safeflavor
from mlflow_safeflavor.artifact.arrays import array_of
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.predict.golden import TOLERANCES, read_golden

from .bench import Bench, check, largest, require
from .models import texts_of
from .placing import DTYPES, TRUST


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """What the process is told, as users tell it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
        require(
            (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed),
            "a setting of the process was changed",
        )
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _bare(model: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """The module called by hand, under whatever the process allows."""
    with torch.inference_mode():
        found = model.module(
            **{name: tensor.to(model.engine.device) for name, tensor in inputs.items()}
        )
    found = found if isinstance(found, torch.Tensor) else found.logits
    array: np.ndarray = found.float().cpu().numpy()
    return array


@check(90)
def tolerances(bench: Bench) -> dict[str, Any]:
    """Golden rows of the CPU on the device: the largest difference for each dtype, TF32 off and on.

    The engine's must be the same bits with TF32 on; the bare module's say what would be without its
    scope.
    """
    found: dict[str, Any] = {}
    for name in ("tiny", "minilm", "Convolution"):
        for dtype in DTYPES:
            if bench.accelerator.is_fake and (name == "minilm" or dtype == "float16"):
                continue
            path = bench.saved(name, dtype)
            with _tf32(True):
                model = mlflow_safeflavor.load_model(path, trust=TRUST)
            here = mlflow_safeflavor.load_model(path, device="cpu", trust=TRUST)
            golden = read_golden(Layout(path), "module")
            figures = {"golden": model.report.max_difference, "allowed": golden.atol}
            inputs = _inputs(name, dtype)
            arrays = {key: array_of(tensor) for key, tensor in inputs.items()}
            wanted = {}
            for allowed in (False, True):
                with _tf32(allowed):
                    engine = model.engine(arrays)
                    bare = _bare(model, inputs)
                wanted[allowed] = engine
                on_cpu = here.engine(arrays)
                which = "TF32 on" if allowed else "TF32 off"
                figures[f"engine, {which}"] = max(
                    largest(engine[key], on_cpu[key]) for key in engine
                )
                figures[f"bare, {which}"] = largest(bare, next(iter(on_cpu.values())))
            for key, value in wanted[False].items():
                require(
                    np.array_equal(value, wanted[True][key]),
                    name,
                    dtype,
                    "depends on what the process allows",
                )
            require(
                figures["engine, TF32 on"] <= 4 * TOLERANCES[dtype]["atol"],
                name,
                dtype,
                "is beyond:",
                figures,
            )
            found[f"{name} {dtype}"] = figures
    return found


def _inputs(name: str, dtype: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "Convolution":
        return {"x": torch.rand((4, 8, 16, 16), generator=generator).to(getattr(torch, dtype))}
    ids = torch.randint(5, 900, (8, 64), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


@check(60)
def batch_mates(bench: Bench) -> dict[str, Any]:
    """How far answers depend on what shares their batch; with ``deterministic`` not at all."""
    size = "tiny" if bench.accelerator.is_fake else "minilm"
    texts, found = texts_of([3, 4, 9, 16, 33, 64, 64, 120], size), {}
    for dtype in DTYPES[:2]:
        path = bench.saved(size, dtype)
        model = mlflow_safeflavor.load_model(path)
        mates = model.predict(texts)["score"].to_numpy()
        alone = np.array([model.predict([text])["score"].item() for text in texts])
        require(
            largest(model.predict(texts)["score"], mates) == 0, dtype, "differs from run to run"
        )
        found[f"{dtype}, with mates"] = largest(mates, alone)
        require(
            found[f"{dtype}, with mates"] <= TOLERANCES[dtype]["atol"],
            dtype,
            "alone or not differ by",
            found,
        )
        strict = mlflow_safeflavor.load_model(path, model_config={"deterministic": True})
        bits = [strict.predict([text])["score"].item() for text in texts]
        require(
            strict.predict(texts)["score"].tolist() == bits,
            dtype,
            "deterministic, and yet mates matter",
        )
        require(
            strict.predict(texts[::-1])["score"].tolist() == bits[::-1],
            dtype,
            "deterministic, and order matters",
        )
    return found


@check()
def forward_cost(bench: Bench) -> dict[str, Any]:
    """The cost of a forward beside its tokens is measured there: the stored one is the CPU's."""
    path = bench.saved("tiny" if bench.accelerator.is_fake else "minilm")
    model = mlflow_safeflavor.load_model(path)
    require(model.scheduler.forward_cost >= 1, "it was not measured")
    stored = mlflow_safeflavor.load_model(path, device="cpu").scheduler.forward_cost
    return {"here": model.scheduler.forward_cost, "stored, of the CPU": stored}
