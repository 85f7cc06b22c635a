"""Checks: many callers at once, and how fast it is beside the other way of doing it."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlflow.pyfunc
import pandas as pd
import torch

import mlflow_safeflavor
from mlflow_safeflavor.errors import PlacementError

from .bench import Bench, check, largest, require
from .models import classifier, texts_of, tokenizer

CALLERS = 16


def natural_lengths(count: int) -> list[int]:
    """Those of ``benchmarks/predict.py``: log-normal, median 16 tokens, up to 400."""
    draw = random.Random(0)
    return [min(400, max(3, round(draw.lognormvariate(2.77, 0.9)))) for _ in range(count)]


def between(count: int, low: int, high: int) -> list[int]:
    """Those of ``benchmarks/predict.py`` for short and for long texts."""
    draw = random.Random(1)
    return [draw.randint(low, high) for _ in range(count)]


@contextmanager
def _server(model: Any) -> Iterator[str]:
    """MLflow's own scoring server around a loaded pyfunc model, in a thread; gives its address."""
    import uvicorn
    from mlflow.pyfunc import scoring_server

    server = uvicorn.Server(uvicorn.Config(scoring_server.init(model), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        require(time.monotonic() < until and thread.is_alive(), "no server came up")
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/invocations"
    finally:
        server.should_exit = True
        thread.join(20)


def _ask(url: str, text: str) -> float:
    body = json.dumps({"dataframe_records": [{"text": text}]}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        score: float = json.load(answer)["predictions"][0]["score"]
    return score


@check(60)
def callers(bench: Bench) -> dict[str, Any]:
    """A service of 16 callers, in process and over HTTP through MLflow's server.

    Each is answered as alone.
    """
    size, count = ("tiny", 48) if bench.accelerator.is_fake else ("minilm", 384)
    model = mlflow.pyfunc.load_model(str(bench.saved(size)))
    texts = texts_of(natural_lengths(count), size)
    alone = model.predict(pd.DataFrame({"text": texts}))["score"].to_numpy()
    found: dict[str, Any] = {}
    with _server(model) as url, ThreadPoolExecutor(CALLERS) as pool:
        ways: dict[str, Callable[[str], float]] = {
            "in process": lambda text: model.predict(pd.DataFrame({"text": [text]}))[
                "score"
            ].item(),
            "over HTTP": lambda text: _ask(url, text),
        }
        for way, ask in ways.items():
            list(pool.map(ask, texts[:CALLERS]))
            begun = time.perf_counter()
            answers = list(pool.map(ask, texts))
            found[f"{way}, requests/s"] = round(count / (time.perf_counter() - begun), 1)
            difference = largest(answers, alone)
            require(difference < 1e-4, way, "differs from alone by", difference)
            found[f"{way}, difference"] = difference
    return found


@check(120)
def speed(bench: Bench) -> dict[str, Any]:
    """Rows a second beside transformers' pipeline (``mlflow.transformers``) on the same device."""
    from transformers import pipeline

    fake = bench.accelerator.is_fake
    size, share = ("tiny", 64) if fake else ("minilm", 1)
    model = mlflow.pyfunc.load_model(str(bench.saved(size)))
    half = mlflow.pyfunc.load_model(str(bench.saved(size, "bfloat16")))
    other = pipeline(
        "text-classification",
        model=classifier(size),
        tokenizer=tokenizer(size),
        device=bench.device,
    )
    found: dict[str, Any] = {}
    for what, lengths in {
        "1,024 texts of natural lengths": natural_lengths(1024 // share),
        "256 short texts": between(256 // share, 4, 16),
        "64 long texts": between(64 // share, 180, 400),
    }.items():
        texts = texts_of(lengths, size)
        runs: dict[str, Callable[[], object]] = {
            "ours": partial(model.predict, pd.DataFrame({"text": texts})),
            "ours, bfloat16": partial(half.predict, pd.DataFrame({"text": texts})),
            "pipeline, batch of 1": partial(other, texts, batch_size=1),
            "pipeline, batch of 32": partial(other, texts, batch_size=32),
        }
        found[what] = _alternated(runs, len(texts), rounds=1 if fake else 3)
    labels = [answer["label"] for answer in other(texts)]
    require(
        model.predict(pd.DataFrame({"text": texts}))["label"].tolist() == labels,
        "the two answer otherwise",
    )
    return {"rows/s": found}


def _alternated(
    runs: dict[str, Callable[[], object]], rows: int, rounds: int
) -> dict[str, list[float]]:
    """Rows a second, median, least and most; in turns, and the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:
                times[name].append(rows / (time.perf_counter() - begun))
    return {
        name: [round(f(found)) for f in (statistics.median, min, max)]
        for name, found in times.items()
    }


@check(120)
def ways_of_running(bench: Bench) -> dict[str, Any]:
    """One forward as it is, compiled, and as a CUDA graph, and copies of its inputs.

    Milliseconds, no verdict.
    """
    size = "tiny" if bench.accelerator.is_fake else "minilm"
    model = mlflow_safeflavor.load_model(bench.saved(size))
    module, wait = model.module, bench.accelerator.wait
    found: dict[str, Any] = {}
    for rows, length in ((1, 16), (32, 16), (8, 64), (1, 400)):
        cpu = {"input_ids": torch.randint(5, 900, (rows, length))}
        there = {name: tensor.to(bench.device) for name, tensor in cpu.items()}
        with torch.inference_mode():
            figures = {"copies": _milliseconds(partial(_copied, cpu, bench.device), wait)}
            figures["as it is"] = _milliseconds(partial(module, **there), wait)
            if not bench.accelerator.is_fake:
                figures["CUDA graph"] = _told(partial(_graph_milliseconds, module, there, wait))
        found[f"{rows} × {length}"] = figures
    if not bench.accelerator.is_fake:
        found["compiled"] = _told(lambda: _compiled_milliseconds(module, bench.device, wait))
    return found


def _told(measure: Callable[[], Any]) -> Any:
    """The figure, or why there is none: neither a compiler nor a graph is promised."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _copied(tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors.values()]


def _milliseconds(run: Callable[[], object], wait: Callable[[], None], calls: int = 10) -> float:
    times = []
    for _ in range(3):
        run()
        wait()
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        times.append((time.perf_counter() - begun) / calls * 1e3)
    return round(min(times), 3)


def _graph_milliseconds(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], wait: Callable[[], None]
) -> float:
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            module(**inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(**inputs)
    return _milliseconds(graph.replay, wait)


def _compiled_milliseconds(
    module: torch.nn.Module, device: torch.device, wait: Callable[[], None]
) -> dict[str, float]:
    begun = time.perf_counter()
    compiled = torch.compile(module, dynamic=True)
    ids = torch.randint(5, 900, (32, 16), device=device)
    with torch.inference_mode():
        compiled(input_ids=ids)
        wait()
        first = round(time.perf_counter() - begun, 1)
        return {
            "32 × 16": _milliseconds(lambda: compiled(input_ids=ids), wait),
            "seconds before the first": first,
        }


@check()
def onnx(bench: Bench) -> dict[str, Any]:
    """The engine onnx beside a device.

    It stays on the CPU, and the module is there only where it was asked for.
    """
    path = bench.saved("tiny", graph=True)
    texts = texts_of([4, 30, 9])
    chosen = mlflow_safeflavor.load_model(path, model_config={"engine": "onnx"})
    require((chosen.report.engine, chosen.report.device) == ("onnx", "cpu"), "it is", chosen.report)
    plain = mlflow_safeflavor.load_model(path, model_config={"engine": "onnx"}, device="cpu")
    answers = chosen.predict(texts)["score"].to_numpy()
    require(
        largest(answers, plain.predict(texts)["score"]) == 0.0,
        "a device in the machine changes bits",
    )
    where = {parameter.device.type for parameter in chosen.module.parameters()}
    require(where == {"cpu"}, "its module is on", where)
    placed = mlflow_safeflavor.load_model(path)
    require(placed.report.engine == "module", "left to itself it is", placed.report.engine)
    difference = largest(answers, placed.predict(texts)["score"])
    require(difference < 1e-4, "the device differs by", difference)
    try:
        mlflow_safeflavor.load_model(
            path, model_config={"engine": "onnx"}, device=str(bench.device)
        )
    except PlacementError:
        return {"largest difference from the device": difference}
    raise AssertionError("a graph on a device was not refused")
