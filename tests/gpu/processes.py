"""Checks: forks, devices that vanish, and a fresh process up to its first answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import mlflow_safeflavor
from mlflow_safeflavor.errors import SafeFlavorError

from .bench import Bench, check, require
from .models import texts_of


@check(60)
def fork(bench: Bench) -> dict[str, Any]:
    """A process forked off after the device was used.

    A named error there, the CPU if asked, and no harm here.
    """
    path, texts = bench.saved("tiny"), texts_of([5])
    model = mlflow_safeflavor.load_model(path)
    wanted = model.predict(texts)["score"].item()
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(50)
        torch.set_num_threads(1)  # the threads of OpenMP were not forked along
        said = {
            "asked": _said(lambda: model.predict(texts)),
            "loaded": _said(lambda: mlflow_safeflavor.load_model(path)),
        }
        said["cpu"] = _said(lambda: mlflow_safeflavor.load_model(path, device="cpu").predict(texts))
        os.write(writes, json.dumps(said).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    require(told, "the child died without a word")
    said = json.loads(told)
    require("forked" in said["asked"], "a loaded model said:", said["asked"])
    require("forked" in said["loaded"], "loading said:", said["loaded"])
    require(said["cpu"] == "answered", "on the CPU:", said["cpu"])
    require(model.predict(texts)["score"].item() == wanted, "the parent answers otherwise now")
    return said


def _said(run: Any) -> str:
    try:
        run()
        return "answered"
    except SafeFlavorError as error:
        return f"{type(error).__name__}: {error.what}"
    except BaseException as error:
        return f"unnamed {type(error).__name__}: {error}"


_FRESH = """
import json, sys, time
begun = time.perf_counter()
import mlflow_safeflavor
from mlflow_safeflavor.errors import PlacementError
path, text, devices = sys.argv[1], sys.argv[2], sys.argv[3:]
for device in devices:
    try:
        model = mlflow_safeflavor.load_model(path, device=device)
        model.predict([text])
        said = model.report.device
    except PlacementError as error:
        said = f"PlacementError: {error.found}"
    print(json.dumps([device, said, time.perf_counter() - begun]), flush=True)
"""


def _fresh(path: Path, text: str, *devices: str, **environ: str) -> dict[str, tuple[str, float]]:
    command = [sys.executable, "-c", _FRESH, os.fspath(path), text, *devices]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)
    require(done.returncode == 0, done.stderr[-1000:])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {device: (said, round(seconds, 2)) for device, said, seconds in lines}


@check(60)
def vanished(bench: Bench) -> dict[str, Any]:
    """With ``CUDA_VISIBLE_DEVICES=""`` the GPU is a named error, and "auto" is the CPU."""
    (text,) = texts_of([5])
    found = _fresh(bench.saved("tiny"), text, "cuda", "auto", CUDA_VISIBLE_DEVICES="")
    said = found["cuda"][0]
    require(said.startswith("PlacementError"), "asked for the GPU:", said)
    require(
        ("built without CUDA" if bench.accelerator.is_fake else "CUDA_VISIBLE_DEVICES") in said,
        "no reason:",
        said,
    )
    require(found["auto"][0] == "cpu", "auto:", found["auto"])
    return {"said": said, "auto": found["auto"][0]}


@check(60)
def first_answer(bench: Bench) -> dict[str, Any]:
    """From a fresh process to the first answer on the GPU, checked; also without imports."""
    bench.require_gpu()
    path, (text,) = bench.saved("minilm"), texts_of([5], "minilm")
    runs = [_fresh(path, text, "auto")["auto"] for _ in range(3)]
    require(all("cuda" in said for said, _ in runs), runs)
    begun = time.perf_counter()
    mlflow_safeflavor.load_model(path).predict([text])
    warm = time.perf_counter() - begun
    return {
        "fresh process, s": sorted(seconds for _, seconds in runs),
        "in a warm one, s": round(warm, 3),
    }
