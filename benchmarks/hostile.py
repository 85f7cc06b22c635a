"""Hostile requests beside honest callers: how long these wait then, and what memory is left behind.

    python benchmarks/hostile.py [--rounds 5] [--seconds 6] [--tasks fill-mask,…] [--only native,serve] [--json FILE]

16 honest callers ask for one small row after the other, for some seconds alone and for some beside hostile callers
who send 200 requests in all, in turn (A B A B …). Refused ones are meant to cost nothing; those marked "allowed" ask
for as much as the caps let through.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import machine, median_and_spread, minilm_folder, tokenizer

HONEST, HOSTILE = 16, 4
"""Callers at a time."""
REQUESTS = 200
"""Hostile ones in a run."""

_WORDS = "the quick brown fox jumps over 3 lazy dogs "
_LONG = _WORDS * 2300  # 100 kB


@dataclass(frozen=True)
class Request:
    """Rows, params, and the status that a server has to answer with."""

    rows: list[dict[str, Any]]
    params: dict[str, Any] = field(default_factory=dict)
    status: int = 400

    @property
    def body(self) -> bytes:
        """As JSON; half a surrogate pair stays one."""
        return json.dumps({"dataframe_records": self.rows, "params": self.params}).encode()


def _texts(*texts: str, status: int = 400, **params: Any) -> Request:
    return Request([{"text": text} for text in texts], params, status)


_LABELS = [f"label {i}" for i in range(200)]
_EVERY = {
    "a text of 9 MB": _texts("x" * 9_000_000),
    "more rows than the cap": _texts(*["a"] * 100_001),
    "half a surrogate pair": _texts("\ud800"),
}
GOOD: dict[str, Request] = {
    "fill-mask": _texts("the [MASK] sat on the mat", status=200),
    "zero-shot-classification": _texts(_WORDS, candidate_labels=["cat", "dog"], status=200),
    "token-classification": _texts(_WORDS, aggregation_strategy="simple", status=200),
    "question-answering": Request([{"question": "who jumps?", "context": _WORDS}], {}, 200),
}
BAD: dict[str, dict[str, Request]] = {
    "fill-mask": {
        **_EVERY,
        "60 gaps, all tokens": _texts("[MASK] " * 60, top_k=1_000_000),
        "200 rows of 60 gaps": _texts(*["[MASK] " * 60] * 200, top_k=200),
        "10,000 targets": _texts("[MASK]", targets=["cat"] * 10_000),
        "half a surrogate pair in targets": _texts("[MASK]", targets=["\ud800"]),
        "allowed: 60 gaps, 130 tokens": _texts("[MASK] " * 60, top_k=130, status=200),
    },
    "zero-shot-classification": {
        **_EVERY,
        "200 rows, 200 labels": _texts(*["a cat"] * 200, candidate_labels=_LABELS),
        "a template of 10,000 gaps": _texts("a", candidate_labels=_LABELS, hypothesis_template="{}" * 10_000),
        "half a surrogate pair in labels": _texts("a", candidate_labels=["\ud800"]),
        "allowed: 100 kB, 200 labels": _texts(_LONG, candidate_labels=_LABELS, max_length=32, status=200),
    },
    "token-classification": {
        **_EVERY,
        "100 kB, windows that share nearly all": _texts(_LONG, stride=509, aggregation_strategy="simple"),
        "10,000 labels to ignore": _texts("a", ignore_labels=["O"] * 10_000),
        "allowed: 100 kB in windows": _texts(_LONG, stride=64, aggregation_strategy="simple", status=200),
    },
    "question-answering": {
        "a text of 9 MB": Request([{"question": "who?", "context": "x" * 9_000_000}]),
        "half a surrogate pair": Request([{"question": "who?", "context": "\ud800"}]),
        "100 kB, windows that share nearly all": Request([{"question": "who?", "context": _LONG}], {"doc_stride": 378}),
        "all spans": Request([{"question": "who?", "context": _LONG}], {"top_k": 10**6, "max_answer_len": 384}),
        "allowed: 100 kB": Request([{"question": "who?", "context": _LONG}], {"top_k": 100}, 200),
    },
}  # fmt: skip


def save(task: str, folder: Path) -> Path:
    """MiniLM's encoder with a seeded head for the task."""
    import torch
    import transformers

    import mlflow_safeflavor

    classes = {
        "fill-mask": "BertForMaskedLM",
        "zero-shot-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
    }
    torch.manual_seed(0)
    model = getattr(transformers, classes[task]).from_pretrained(minilm_folder(), dtype=torch.float32).eval()
    if task.startswith("zero"):
        model.config.id2label, model.config.label2id = {0: "no", 1: "entailment"}, {"no": 0, "entailment": 1}
    path = folder / task
    mlflow_safeflavor.save_model(model, path, task=task, tokenizer=tokenizer(), rehearse=False, structure="module")
    return path


# Targets: something that is asked, and whose memory and CPU time can be read.

Ask = Callable[[Request], int]


@contextlib.contextmanager
def native(path: Path) -> Iterator[tuple[Ask, int]]:
    """The model in this process."""
    import mlflow_safeflavor
    from mlflow_safeflavor.errors import SafeFlavorError

    model = mlflow_safeflavor.load_model(path)

    def ask(request: Request) -> int:
        try:
            model.predict(request.rows, request.params, progress=False)
        except SafeFlavorError as error:
            return int(error.get_http_status_code())
        return 200

    yield ask, os.getpid()


@contextlib.contextmanager
def served(path: Path) -> Iterator[tuple[Ask, int]]:
    """``mlflow models serve`` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--model-uri", str(path)]
    path_variable = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "PATH": path_variable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(port, process)
        yield asking(port), _largest(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def asking(port: int) -> Ask:
    """Asks a scoring server over HTTP; a stack trace in its answer counts as 500."""

    def ask(request: Request) -> int:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request("POST", "/invocations", request.body, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                text = answer.read()
        traced = answer.status >= 400 and (b"Traceback" in text or b"stack_trace" in text)
        return 500 if traced else int(answer.status)

    return ask


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ping")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def _largest(parent: int) -> int:
    """The process of a group that holds the model."""
    group = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _stat(int(entry.name))[2:3] == [str(parent)]
    ]
    return max(group, key=resident)


def _stat(process: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` behind the name: state, parent, group, …."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def resident(process: int) -> int:
    """Bytes of memory of its own: without what is mapped from files."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])
    return 0


def cpu_seconds(process: int) -> float:
    """Of all its threads, so far."""
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# A run.


@dataclass
class Seen:
    """One run: seconds of each honest request, statuses, and seconds of refused ones that ran alone."""

    honest: list[float] = field(default_factory=list)
    statuses: dict[str, set[int]] = field(default_factory=dict)
    hostile: int = 0

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.honest, n=100)[98]


def run(ask: Ask, task: str, seconds: float, hostile: int, *, honest: int = HONEST, callers: int = HOSTILE) -> Seen:
    """Honest callers for so many seconds, and until so many hostile requests are answered."""
    seen, turns, stop = Seen(), itertools.count(), threading.Event()
    kinds = list(BAD[task].items())

    def be_honest() -> None:
        while not stop.is_set():
            begun = time.perf_counter()
            status = ask(GOOD[task])
            seen.honest.append(time.perf_counter() - begun)
            seen.statuses.setdefault("honest", set()).add(status)

    def be_hostile() -> None:
        while (turn := next(turns)) < hostile:
            name, request = kinds[turn % len(kinds)]
            seen.statuses.setdefault(name, set()).add(ask(request))
            seen.hostile += 1

    with ThreadPoolExecutor(honest + callers) as pool:
        good = [pool.submit(be_honest) for _ in range(honest)]
        begun = time.monotonic()
        bad = [pool.submit(be_hostile) for _ in range(callers)]
        try:
            for future in bad:
                future.result()
            time.sleep(max(0.0, seconds - (time.monotonic() - begun)))
        finally:
            stop.set()
        for future in good:
            future.result()
    return seen


def wrong_statuses(seen: Seen, task: str) -> dict[str, set[int]]:
    """Statuses that are not what a request should be answered with."""
    wanted = {"honest": 200, **{name: request.status for name, request in BAD[task].items()}}
    return {name: found for name, found in seen.statuses.items() if found != {wanted[name]}}


def measure(ask: Ask, process: int, task: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Alone and beside hostile callers in turn; the first round warms up."""
    alone, beside, cpu, memory = [], [], [], []
    for turn in range(rounds + 1):
        quiet = run(ask, task, seconds, 0, callers=1)
        before = cpu_seconds(process)
        loud = run(ask, task, seconds, REQUESTS)
        spent = cpu_seconds(process) - before
        if wrong := wrong_statuses(loud, task):
            raise SystemExit(f"{task}: wrong answers: {wrong}")
        gc.collect()
        if turn:
            alone.append(quiet)
            beside.append(loud)
            cpu.append(spent)
        memory.append(resident(process))
    refused = {}
    for name, request in BAD[task].items():
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            ask(request)
            times.append(time.perf_counter() - begun)
        refused[name] = times
    return {
        "p99_alone": [seen.p99 for seen in alone],
        "p99_beside": [seen.p99 for seen in beside],
        "median_alone": [statistics.median(seen.honest) for seen in alone],
        "median_beside": [statistics.median(seen.honest) for seen in beside],
        "cpu_beside": cpu,
        "resident": memory,
        "one_by_one": refused,
    }


def shown(title: str, found: Mapping[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}")
    for what in ("p99", "median"):
        alone, beside = found[f"{what}_alone"], found[f"{what}_beside"]
        ratios = [b / a for a, b in zip(alone, beside, strict=True)]
        print(
            f"  honest {what}, ms: alone {median_and_spread(alone, 1e3, 1)}, "
            f"beside {median_and_spread(beside, 1e3, 1)}, "
            f"ratio of medians {statistics.median(beside) / statistics.median(alone):.2f}, "
            f"by round {median_and_spread(ratios, 1, 2)}"
        )
    print(f"  CPU seconds beside: {median_and_spread(found['cpu_beside'], 1, 1)}")
    memory = found["resident"]
    print(f"  resident MB after each round: {', '.join(f'{m / 1e6:.0f}' for m in memory)}")
    for name, times in found["one_by_one"].items():
        print(f"  {median_and_spread(times, 1e3, 1):>24} ms  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--tasks", default=",".join(BAD))
    parser.add_argument("--only", default="native,serve")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    print(json.dumps(machine()))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in chosen.tasks.split(","):
            path = save(task, Path(folder))
            for name, target in (("native", native), ("serve", served)):
                if name in chosen.only.split(","):
                    with target(path) as (ask, process):
                        found = measure(ask, process, task, chosen.rounds, chosen.seconds)
                    results[f"{task}, {name}"] = found
                    shown(f"{task}, {name}", found)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
