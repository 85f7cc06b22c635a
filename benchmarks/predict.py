"""Predictions side by side.

Ours, mlflow.transformers', a hand-written ONNX Runtime pyfunc, and bare forwards.

    python benchmarks/predict.py [--rounds 5] [--only throughput,single,callers,http,limit]
    [--together] [--json FILE] [--plot FILE]

All candidates run in turn, each in a process of its own on the same cores as who asks (with
--together all in this one); bare forwards in this one. What was seen, and what it means:
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", MLFLOW_DISABLE_TELEMETRY="true"
)
os.environ.update(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# This folder last: MLflow imports a library that has the name of a file here.
sys.path.append(sys.path.pop(0))

# ruff: noqa: E402  (torch reads these variables once, when it is imported)
from mlflow_safeflavor.environment import threads as cpu

cpu.limit_threads()  # before torch: both run with the same threads, and idle ones that sleep soon

import by_hand
import mlflow
import numpy as np
import pandas as pd
from _asker import Asked, Asker, Here, asker
from _common import (
    Spent,
    alternate,
    in_turn,
    machine,
    median_and_spread,
    minilm_classifier,
    ratio,
    roofs,
    save_ours,
    save_peer,
    tokenizer,
)
from rich.console import Console
from rich.table import Table

import mlflow_safeflavor

PEER = "mlflow.transformers"
HAND = "by hand"
console = Console(width=None if sys.stdout.isatty() else 140)


# --- texts ---------------------------------------------------------------------------------------


def texts_of(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Texts of so many tokens each, special ones included: words that are one token."""
    draw = random.Random(seed)
    words = [word for word in tokenizer().get_vocab() if word.isalpha() and word.isascii()]
    return [" ".join(draw.choices(words, k=max(0, length - 2))) for length in lengths]


def natural_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal, median 16 tokens, up to 400."""
    draw = random.Random(seed)
    return [min(400, max(3, round(draw.lognormvariate(2.77, 0.9)))) for _ in range(count)]


def between(count: int, low: int, high: int) -> list[int]:
    draw = random.Random(1)
    return [draw.randint(low, high) for _ in range(count)]


def bodies(texts: Sequence[str]) -> list[bytes]:
    return [json.dumps({"dataframe_records": [{"text": text}]}).encode() for text in texts]


# --- rows of the table ---------------------------------------------------------------------------

Row = dict[str, Any]


def row(
    what: str,
    ours: list[float],
    theirs: list[float],
    unit: str,
    *,
    at_least: float = 0,
    at_most: float = 0,
) -> Row:
    """One comparison; the ratio is that of ours to theirs, in the unit that is shown."""
    middle, low, high = ratio(ours, theirs)
    met = middle >= at_least if at_least else middle <= at_most if at_most else None
    goal = f"≥ {at_least:g}" if at_least else f"≤ {at_most:g}" if at_most else ""
    return {
        "what": what,
        "ours": ours,
        "theirs": theirs,
        "unit": unit,
        "ratio": [middle, low, high],
        "goal": goal,
        "met": met,
    }


def rates(times: list[float], count: int) -> list[float]:
    return [count / seconds for seconds in times]


# --- models --------------------------------------------------------------------------------------


class Models:
    """Saved once by both flavors and by hand, and each asked in a process of its own.

    Args:
        folder: For what is saved.
        running: Ends the processes.
        together: Whether they are asked in this process instead.
    """

    def __init__(self, folder: Path, running: ExitStack, together: bool) -> None:
        def ask(path: Path, **config: Any) -> Asker:
            return Here(path, config) if together else running.enter_context(asker(path, **config))

        module = minilm_classifier()
        self.ours_path = save_ours(module, folder / "ours")
        self.peer_path = save_peer(module, "text-classification", folder / "peer")
        self.hand_path = by_hand.save(module, tokenizer(), folder / "hand")
        self.nothing_path = by_hand.save_nothing(folder / "nothing")
        half = save_ours(module, folder / "half", "bfloat16")
        self.asked = {
            "ours": ask(self.ours_path),
            "half": ask(half),
            "peer": ask(self.peer_path),
            "hand": ask(self.hand_path),
            "openvino": ask(self.ours_path, engine="openvino"),
        }


# --- what is compared ----------------------------------------------------------------------------


def throughput(models: Models, rounds: int) -> Iterator[Row]:
    """A table a request."""
    cases = (
        ("512 texts of natural lengths", natural_lengths(512), 4.6, 1.0),
        ("256 short texts, up to 16 tokens", between(256, 4, 16), 9.5, 0.95),
        ("48 long texts, 180 tokens or more", between(48, 180, 400), 1.4, 0.95),
    )
    for what, lengths, peer, hand in cases:
        done = {
            name: rates(wall, len(lengths))
            for name, wall in _alternate(models.asked, [texts_of(lengths)], rounds, warm=0).items()
        }
        yield row(what, done["ours"], done["peer"], "rows/s", at_least=peer)
        yield row(
            f"{what}, against the one by hand", done["ours"], done["hand"], "rows/s", at_least=hand
        )
        yield row("the same, in OpenVINO", done["openvino"], done["peer"], "rows/s")
        if len(lengths) == 512:
            yield row("the same, by the module in bfloat16", done["half"], done["peer"], "rows/s")


def _alternate(
    asked: Mapping[str, Asker], requests: Sequence[Sequence[str]], rounds: int, *, warm: int
) -> dict[str, list[float]]:
    """Seconds that each model took for these requests, round by round."""

    def ask(one: Asker) -> Spent:
        found = one.ask(requests, warm=warm)
        return Spent(found.wall, found.cpu)

    times = alternate({name: partial(ask, one) for name, one in asked.items()}, rounds)
    return {name: found.wall for name, found in times.items()}


def single(models: Models, rounds: int) -> Iterator[Row]:
    """One row, 40 calls a round, behind 20 that warm up."""
    for tokens, peer in ((12, 3.0), (128, 2.2)):
        requests = [texts_of([tokens])] * 40
        walls = _alternate(models.asked, requests, max(rounds, 9), warm=20)
        ms = {name: [seconds / 40 * 1e3 for seconds in wall] for name, wall in walls.items()}
        what = f"one row of {tokens} tokens"
        yield row(what, ms["ours"], ms["peer"], "ms", at_most=1 / peer)
        yield row(
            f"{what}, against the one by hand", ms["ours"], ms["hand"], "ms", at_most=1 / 0.95
        )
        yield row("the same, in OpenVINO", ms["openvino"], ms["peer"], "ms")


def p99(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=100, method="inclusive")[98] * 1e3


def callers(models: Models, rounds: int) -> Iterator[Row]:
    """One row a request, from many threads of the model's process."""
    requests = [[text] for text in texts_of(natural_lengths(384))]
    found: dict[str, list[Asked]] = {}
    runs = {name: (models.asked[name], 16) for name in ("ours", "peer", "hand")}
    runs["many"] = (models.asked["ours"], 64)
    for turn in range(rounds):
        for name in in_turn(runs, turn):
            one, threads = runs[name]
            found.setdefault(name, []).append(one.ask(requests, threads=threads, warm=threads))
    rate = {name: [len(requests) / run.wall for run in done] for name, done in found.items()}
    slowest = {name: [p99(run.latencies) for run in done] for name, done in found.items()}
    yield row("16 callers in process", rate["ours"], rate["peer"], "requests/s", at_least=4.8)
    yield row(
        "16 callers, against the one by hand",
        rate["ours"],
        rate["hand"],
        "requests/s",
        at_least=1.0,
    )
    yield row(
        "16 callers in process, 99 of 100 within",
        slowest["ours"],
        slowest["peer"],
        "ms",
        at_most=0.5,
    )
    yield row(
        "64 callers, against ours with 16", rate["many"], rate["ours"], "requests/s", at_least=0.9
    )


def limit(models: Models, rounds: int) -> Iterator[Row]:
    """Tokens a second, against bare forwards of the same batches with all rows of mean length.

    These have the same tokens and no padding, and nobody tokenizes, sorts or decodes.
    """
    from mlflow_safeflavor.predict.batching import cut_into_batches

    native = mlflow_safeflavor.load_model(str(models.ours_path))
    ours = mlflow.pyfunc.load_model(str(models.ours_path))
    lengths = natural_lengths(1024)
    data = pd.DataFrame({"text": texts_of(lengths)})
    batches = cut_into_batches(
        lengths, native.options["max_batch_tokens"], native.scheduler.forward_cost
    )
    packed = []
    for batch in batches:
        mean = max(1, round(sum(lengths[i] for i in batch) / len(batch)))
        ids = np.random.default_rng(0).integers(1000, 20000, (len(batch), mean))
        packed.append(
            {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "token_type_ids": np.zeros_like(ids),
            }
        )

    def bare() -> None:
        for inputs in packed:
            native.engine(inputs)

    times = alternate({"ours": lambda: ours.predict(data), "bare": bare}, rounds)
    done = sum(inputs["input_ids"].size for inputs in packed)
    yield row(
        "tokens a second, against bare forwards of perfectly packed batches",
        rates(times["ours"].wall, sum(lengths)), rates(times["bare"].wall, done), "tokens/s",
        at_least=0.9,
    )  # fmt: skip


# --- over HTTP -----------------------------------------------------------------------------------


@contextmanager
def served(path: Path) -> Iterator[int]:
    """`mlflow models serve`, with as many workers as it starts by itself; gives the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "--env-manager",
        "local",
        "-m",
        str(path),
        "-p",
        str(port),
    ]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):  # set for this process by ourselves
        environ.pop(name, None)
    process = subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > until or process.poll() is not None:
                    raise SystemExit(f"No server came up for {path}") from None
                time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, 15)
        process.wait()


HEAD = (
    b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    b"%d\r\n\r\n"
)


async def _ask_over_http(port: int, requests: Sequence[bytes], connections: int) -> float:
    """Requests a second over so many connections that stay open."""
    queue = list(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while queue:
            body = queue.pop()
            writer.write(HEAD % len(body) + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in answer.split(b"\r\n", 1)[0]:
                raise SystemExit(f"The server answered {answer!r}")
            length = next(
                line
                for line in answer.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            await reader.readexactly(int(length.split(b":")[1]))
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(connections)))
    return len(requests) / (time.perf_counter() - begun)


def http(models: Models, rounds: int) -> Iterator[Row]:
    requests = bodies(texts_of(natural_lengths(384)))
    paths = {
        "ours": models.ours_path,
        "peer": models.peer_path,
        "hand": models.hand_path,
        "nothing": models.nothing_path,
    }
    found: dict[tuple[str, int], list[float]] = {
        (name, count): [] for name in paths for count in (1, 16)
    }
    with ExitStack() as running:
        ports = {name: running.enter_context(served(path)) for name, path in paths.items()}
        for turn, count in product(range(rounds + 1), (1, 16)):
            # Behind requests of its own: cores that fell asleep are nobody's fault.
            for name in in_turn(ports, turn):
                asyncio.run(_ask_over_http(ports[name], requests[:24], count))
                asked = requests[: max(96, 24 * count)]
                rate = asyncio.run(_ask_over_http(ports[name], asked, count))
                if turn:
                    found[name, count].append(rate)
    ms = {name: [1e3 / rate for rate in found[name, 1]] for name in paths}
    added = {name: [a - b for a, b in zip(ms[name], ms["nothing"], strict=True)] for name in paths}
    yield row("over HTTP, one caller", ms["ours"], ms["peer"], "ms", at_most=0.4)
    yield row(
        "over HTTP, one caller, against the one by hand",
        ms["ours"],
        ms["hand"],
        "ms",
        at_most=1 / 0.95,
    )
    yield row(
        "over HTTP, one caller, against a model that answers at once",
        ms["ours"],
        ms["nothing"],
        "ms",
    )
    yield row("what ours adds to that, against the one by hand", added["ours"], added["hand"], "ms")
    yield row(
        "over HTTP, 16 connections",
        found["ours", 16],
        found["peer", 16],
        "requests/s",
        at_least=2.5,
    )
    yield row(
        "over HTTP, 16, against the one by hand",
        found["ours", 16],
        found["hand", 16],
        "requests/s",
        at_least=0.95,
    )
    yield row(
        "over HTTP, 16, against one that answers at once",
        found["ours", 16],
        found["nothing", 16],
        "requests/s",
    )


# --- the story -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Models, int], Iterator[Row]]] = {
    "throughput": throughput, "single": single, "callers": callers, "limit": limit, "http": http,
}  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    table = Table("what", "ours", f"{PEER}, or as said", "ratio", "goal")
    for found in rows:
        digits = 1 if found["unit"] == "ms" else 0
        cells = (
            f"{median_and_spread(found[side], digits=digits)} {found['unit']}"
            for side in ("ours", "theirs")
        )
        middle, low, high = found["ratio"]
        verdict = "" if found["met"] is None else " met" if found["met"] else " missed"
        table.add_row(
            found["what"], *cells, f"{middle:.2f} ({low:.2f}–{high:.2f})", found["goal"] + verdict
        )
    console.print(table)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Ratios as bars on a log axis, goals as marks; faster to the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def speed(number: float, unit: str) -> float:
        return 1 / number if unit == "ms" else number

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    for place, found in enumerate(reversed(rows)):
        middle, low, high = (
            sorted(speed(value, found["unit"]) for value in found["ratio"])[1],
            *sorted(speed(value, found["unit"]) for value in found["ratio"][1:]),
        )
        axes.barh(
            place,
            middle - 1,
            left=1,
            color="#3b75af" if found["met"] is not False else "#c44e52",
            height=0.6,
        )
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        if found["goal"]:
            goal = speed(float(found["goal"].split()[1]), found["unit"])
            axes.plot([goal, goal], [place - 0.4, place + 0.4], color="black", linestyle=":")
    axes.set_yticks(range(len(rows)), [found["what"] for found in reversed(rows)])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast (line: middle half of the rounds; dots: goal)")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument(
        "--together", action="store_true", help="all models in one process, which slows each other"
    )
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this file (.svg or .png)")
    arguments = parser.parse_args()
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    most = roofs()
    console.print(
        "products of 2048 x 2048: "
        + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in most.items())
    )
    rows: list[Row] = []
    console.print(str(cpu.find_budget()))
    with TemporaryDirectory() as folder, ExitStack() as running:
        models = Models(Path(folder), running, arguments.together)
        for part in arguments.only.split(","):
            rows += PARTS[part](models, arguments.rounds)
    show(rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"machine": machine(), "roofs": most, "rows": rows}, indent=1, ensure_ascii=False
            )
        )
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
