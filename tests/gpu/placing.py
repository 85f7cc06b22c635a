"""Checks: the device is taken, and every tensor on it is the artifact's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch

import mlflow_safeflavor
from mlflow_safeflavor.artifact.inventory_file import read_inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.module.fill import realise
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.module.tensors import read_tensors
from mlflow_safeflavor.predict.golden import TOLERANCES

from .bench import Bench, check, largest, require
from .models import classifier, texts_of, tokenizer

DTYPES = ("float32", "bfloat16", "float16")
TRUST = frozenset({"code"})


def require_placed(module: torch.nn.Module, path: Path, device: torch.device) -> int:
    """Every parameter, buffer and plain tensor is on the device, and is the artifact's to the bit.

    Returns how many.
    """
    layout = Layout(path)
    inventory = read_inventory(layout)
    wanted = realise(inventory, read_tensors(inventory, layout))
    found = {slot.path: slot.tensor for slot in find_slots(module)}
    require(
        found.keys() == wanted.keys(), "tensors that are new or gone:", found.keys() ^ wanted.keys()
    )
    for name, tensor in found.items():
        require(not tensor.is_meta, name, "is on meta")
        require(tensor.device == device, name, "is on", tensor.device)
        require(
            tensor.dtype == wanted[name].dtype,
            name,
            "is",
            tensor.dtype,
            "and was saved as",
            wanted[name].dtype,
        )
        require(torch.equal(tensor.cpu(), wanted[name]), name, "has other values")
    groups = {id(tensor): name for name, tensor in found.items()}
    require(
        len(groups) == len({id(tensor) for tensor in wanted.values()}),
        "ties are not what they were",
    )
    return len(found)


@check(60)
def auto(bench: Bench) -> dict[str, Any]:
    """``device="auto"`` takes the accelerator, natively and by pyfunc, for module and graph."""
    path = bench.saved("tiny", graph=True)
    native = mlflow_safeflavor.load_model(path)
    served = mlflow.pyfunc.load_model(str(path))
    inner = served._model_impl.model
    require_placed(native.module, path, bench.device)
    for model in (native, inner):
        device = getattr(model.engine, "device", torch.device("cpu"))
        require(device.type == bench.device.type, "the engine is on", device)
        require(bench.device.type in model.report.device, "the report says", model.report.device)
        require(model.report.golden_rows, "no golden row was replayed")
    texts = texts_of([4, 30])
    difference = largest(served.predict({"text": texts})["score"], native.predict(texts)["score"])
    require(difference < 1e-4, "pyfunc and the module differ by", difference)
    return {
        "native": native.report.engine,
        "pyfunc": inner.report.engine,
        "device": native.report.device,
    }


@check(60)
def tensors(bench: Bench) -> dict[str, Any]:
    """Every tensor on the device and equal to the artifact's, in each dtype.

    Buffers and plain tensors, too.
    """
    found = {}
    for dtype in DTYPES:
        for name in ("tiny", "Odd"):
            path = bench.saved(name, dtype)
            model = mlflow_safeflavor.load_model(path, device=str(bench.device), trust=TRUST)
            found[f"{name} {dtype}"] = require_placed(model.module, path, bench.device)
    return found


@check()
def cast(bench: Bench) -> dict[str, Any]:
    """``load_model(dtype=…)`` casts on the way to the device, and leaves nothing behind."""
    found = {}
    for dtype in DTYPES[1:]:
        model = mlflow_safeflavor.load_model(bench.saved("tiny"), dtype=dtype)
        slots = find_slots(model.module)
        require(all(slot.tensor.device == bench.device for slot in slots), "a tensor is elsewhere")
        floats = {str(slot.tensor.dtype) for slot in slots if slot.tensor.is_floating_point()}
        require(floats == {f"torch.{dtype}"}, "dtypes are", floats)
        found[dtype] = len(model.predict(texts_of([5, 9])))
    return found


@check(60)
def saved_from_there(bench: Bench) -> dict[str, Any]:
    """A module saved on the device gives the same artifact, and stays where it is."""
    module = classifier().to(bench.device)
    mlflow_safeflavor.save_model(
        module, bench.work / "model", tokenizer=tokenizer(), rehearse=not bench.accelerator.is_fake
    )
    require(
        all(slot.tensor.device == bench.device for slot in find_slots(module)),
        "the module was moved",
    )
    here = mlflow_safeflavor.load_model(bench.work / "model", device="cpu")
    there = mlflow_safeflavor.load_model(bench.work / "model")
    texts = texts_of([3, 17, 40])
    difference = largest(here.predict(texts)["score"], there.predict(texts)["score"])
    require(difference < 1e-4, "CPU and device differ by", difference)
    return {
        "tensors": require_placed(there.module, bench.work / "model", bench.device),
        "difference": difference,
    }


@check(60)
def device_map(bench: Bench) -> dict[str, Any]:
    """Spread by accelerate over the device, the CPU and the disk: the answers of one device."""
    path, texts, device = bench.saved("tiny"), texts_of([4, 21, 60]), str(bench.device)
    wanted = mlflow_safeflavor.load_model(path, device="cpu").predict(texts)["score"]
    maps: dict[str, Any] = {
        "auto": "auto",
        "one device": {"": device},
        "CPU and device": {
            "bert.embeddings": "cpu",
            "bert.encoder": device,
            "bert.pooler": device,
            "classifier": "cpu",
        },
        "device and disk": {
            "bert.embeddings": device,
            "bert.encoder": "disk",
            "bert.pooler": device,
            "classifier": device,
        },
        "all three": {
            "bert.embeddings": "cpu",
            "bert.encoder": "disk",
            "bert.pooler": "cpu",
            "classifier": device,
        },
    }
    found: dict[str, Any] = {}
    for name, given in maps.items():
        model = mlflow_safeflavor.load_model(path, device_map=given)
        for _ in range(2):
            found[name] = largest(model.predict(texts)["score"], wanted)
            require(found[name] < 1e-4, name, "differs by", found[name])
        kinds = {slot.tensor.device.type for slot in find_slots(model.module)}
        # what lies elsewhere comes to the device for each forward, and is on meta between
        if isinstance(given, dict):
            wanted_kinds = {bench.device.type} | ({"meta"} if len(given) > 1 else set())
            require(kinds == wanted_kinds, name, "is on", kinds)
    x = {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)}
    prompt = texts_of([5])
    for name, asked, answer, given in (
        ("Odd", x, "output_0", {"": device, "first": "cpu"}),
        ("Odd", x, "output_0", {"": device, "tied": "disk"}),
        # tied to what is there
        ("writer", prompt, "generated_text", {"transformer": device, "lm_head": "disk"}),
        ("writer", prompt, "generated_text", {"transformer": "disk", "lm_head": device}),
    ):
        here = mlflow_safeflavor.load_model(bench.saved(name), device="cpu", trust=TRUST).predict(
            asked
        )[answer]
        there = mlflow_safeflavor.load_model(
            bench.saved(name), device_map=given, trust=TRUST
        ).predict(asked)[answer]
        same = list(here) == list(there) if name == "writer" else largest(there, here) < 1e-4
        require(same, name, given, "answers otherwise")
        found[f"{name}, {given}"] = "as on the CPU"
    return found


@check()
def two_models(bench: Bench) -> dict[str, Any]:
    """Two on one device, asked in turns from threads: each answers as alone."""
    from concurrent.futures import ThreadPoolExecutor

    models = [mlflow_safeflavor.load_model(bench.saved("tiny", dtype)) for dtype in DTYPES[:2]]
    texts = texts_of(list(range(3, 43)))
    alone = [model.predict(texts)["score"].to_numpy() for model in models]
    with ThreadPoolExecutor(4) as pool:
        both = list(
            pool.map(lambda i: (i % 2, models[i % 2].predict(texts)["score"].to_numpy()), range(8))
        )
    found = {
        dtype: max(largest(got, alone[i]) for which, got in both if which == i)
        for i, dtype in enumerate(DTYPES[:2])
    }
    for dtype, difference in found.items():  # two requests may have shared batches
        require(difference <= TOLERANCES[dtype]["atol"], dtype, "differs by", difference)
    return {"requests": len(both), **found}


@check()
def no_such_device(bench: Bench) -> dict[str, Any]:
    """An index beyond the last is refused by name."""
    try:
        mlflow_safeflavor.load_model(bench.saved("tiny"), device=f"{bench.device.type}:99")
    except PlacementError as error:
        require(bench.device.type in str(error.found), "what there is is not named:", error.found)
        return {"found": str(error.found)}
    raise AssertionError("device 99 was taken")


@check()
def generation(bench: Bench) -> dict[str, Any]:
    """A model that writes.

    The CPU's tokens in float32, where no near tie decides, also sampled with a seed.
    """
    path, prompts = bench.saved("writer"), texts_of([6, 12])
    here, there = (mlflow_safeflavor.load_model(path, device=device) for device in ("cpu", "auto"))
    found: dict[str, Any] = {"golden": there.report.max_difference}
    for name, params in {"greedy": {}, "sampled": {"do_sample": True, "seed": 7}}.items():
        params = {"max_new_tokens": 8, **params}
        first, second = (
            model.predict(prompts, params)["generated_text"].tolist() for model in (here, there)
        )
        require(
            there.predict(prompts, params)["generated_text"].tolist() == second,
            name,
            "differs from run to run",
        )
        found[name] = (
            f"{sum(a == b for a, b in zip(first, second, strict=True))} of {len(prompts)} as on "
            "the CPU"
        )
    return found
