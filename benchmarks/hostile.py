"""Hostile requests beside honest callers: how long these wait then, and what memory is left behind.

    python benchmarks/hostile.py [--rounds 5] [--seconds 6] [--tasks fill-mask,…] [--only
    native,serve] [--json FILE]

16 honest callers ask for one small row after the other: for some seconds alone, then beside 4
hostile callers whose requests have to be refused, at least 200 of them, and then beside 4 callers
of requests that are as long as the caps let through; in turn (A B C A B C …). Hostile callers go on
for as long as honest ones are counted. Nothing else should run on the machine. Goals: beside
refused ones 99 of 100 honest requests are answered within twice the time, and memory returns to
within 5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import itertools
import json
import os
import statistics
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
from _common import machine, median_and_spread
from _hostile import ALLOWED, GOOD, REFUSED, Request, save
from _server import Server, stat_of

HONEST, HOSTILE = 16, 4
"""Callers at a time."""
REQUESTS = 200
"""Hostile ones in a run."""


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
    with Server(path) as server:
        # The process that holds the model.
        yield asking(server.port), max(server.group(), key=resident)


def asking(port: int) -> Ask:
    """Asks a scoring server over HTTP; a stack trace in its answer counts as 500."""

    def ask(request: Request) -> int:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        ) as connection:
            connection.request(
                "POST", "/invocations", request.body, {"Content-Type": "application/json"}
            )
            with connection.getresponse() as answer:
                text = answer.read()
        traced = answer.status >= 400 and (b"Traceback" in text or b"stack_trace" in text)
        return 500 if traced else int(answer.status)

    return ask


def resident(process: int) -> int:
    """Bytes of memory of its own: without what is mapped from files."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])
    return 0


def cpu_seconds(process: int) -> float:
    """Of all its threads, so far."""
    fields = stat_of(process)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# A run.


@dataclass
class Seen:
    """One run: seconds of each honest request, all statuses, hostile requests, and CPU seconds."""

    honest: list[float] = field(default_factory=list)
    statuses: dict[str, set[int]] = field(default_factory=dict)
    hostile: int = 0
    cpu: float = 0.0

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.honest, n=100)[98]


def run(
    ask: Ask, good: Request, bad: Mapping[str, Request], seconds: float, least: int = 0
) -> Seen:
    """Honest and hostile callers for some seconds, until enough hostile requests are answered."""
    seen, turns, end = Seen(), itertools.count(), time.monotonic() + seconds
    kinds = list(bad.items())
    stop = threading.Event()

    def be_honest() -> None:
        while not stop.is_set():
            begun = time.perf_counter()
            status = ask(good)
            seen.honest.append(time.perf_counter() - begun)
            seen.statuses.setdefault("honest", set()).add(status)

    def be_hostile() -> None:
        while (turn := next(turns)) < least or time.monotonic() < end:
            name, request = kinds[turn % len(kinds)]
            seen.statuses.setdefault(name, set()).add(ask(request))
            seen.hostile += 1

    with ThreadPoolExecutor(HONEST + HOSTILE) as pool:
        honest = [pool.submit(be_honest) for _ in range(HONEST)]
        try:
            for future in [pool.submit(be_hostile) for _ in range(HOSTILE)] if kinds else ():
                future.result()
            time.sleep(max(0.0, end - time.monotonic()))
        finally:
            stop.set()
        for future in honest:
            future.result()
    return seen


def wrong_statuses(seen: Seen, requests: Mapping[str, Request]) -> dict[str, set[int]]:
    """Statuses that are not what a request should be answered with."""
    wanted = {"honest": 200, **{name: request.status for name, request in requests.items()}}
    return {
        name: found
        for name, found in seen.statuses.items()
        if (found != {wanted[name]} if wanted[name] else 200 in found)
    }


def measure(
    ask: Ask, process: int, task: str, rounds: int, seconds: float, *, http: bool
) -> dict[str, Any]:
    """Alone, beside refused and beside long requests in turn; the first round warms up."""
    refused = {
        name: request for name, request in REFUSED[task].items() if http or request.raw is None
    }
    runs: dict[str, list[Seen]] = {"alone": [], "refused": [], "allowed": []}
    memory = []
    for turn in range(rounds + 1):
        for name, bad, least in (
            ("alone", {}, 0),
            ("refused", refused, REQUESTS),
            ("allowed", ALLOWED[task], 0),
        ):
            before = cpu_seconds(process)
            seen = run(ask, GOOD[task], bad, seconds, least)
            seen.cpu = cpu_seconds(process) - before
            if wrong := wrong_statuses(seen, bad):
                raise SystemExit(f"{task}, {name}: wrong answers: {wrong}")
            if turn:
                runs[name].append(seen)
        gc.collect()
        memory.append(resident(process))
    costs = {}
    for name, request in {**refused, **ALLOWED[task]}.items():
        times = []
        for _ in range(5):
            cpu, begun = cpu_seconds(process), time.perf_counter()
            for _ in range(_TIMES if request.status != 200 else 1):
                ask(request)
            count = _TIMES if request.status != 200 else 1
            times.append(
                ((time.perf_counter() - begun) / count, (cpu_seconds(process) - cpu) / count)
            )
        costs[name] = times
    return {
        "runs": {
            name: {
                "p99": [seen.p99 for seen in several],
                "median": [statistics.median(seen.honest) for seen in several],
                "honest": [len(seen.honest) for seen in several],
                "hostile": [seen.hostile for seen in several],
                "cpu": [seen.cpu for seen in several],
            }
            for name, several in runs.items()
        },
        "resident": memory,
        "one_by_one": costs,
    }


_TIMES = 4
"""Refused requests in a row when each kind is timed alone.

CPU time is told in hundredths of a second.
"""


def shown(title: str, found: Mapping[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}")
    alone = found["runs"]["alone"]
    for name, seen in found["runs"].items():
        print(
            f"  {name:8} honest p99 {median_and_spread(seen['p99'], 1e3, 0)} ms"
            f"{_ratio(seen['p99'], alone['p99'])}, median "
            f"{median_and_spread(seen['median'], 1e3, 0)} ms"
            f"{_ratio(seen['median'], alone['median'])}; {sum(seen['honest'])} honest, "
            f"{sum(seen['hostile'])} hostile, "
            f"CPU {median_and_spread(seen['cpu'], 1, 1)} s a run"
        )
    memory = found["resident"]
    print(f"  resident MB after each round: {', '.join(f'{m / 1e6:.0f}' for m in memory)}", end="")
    print(f"; the last to the first {memory[-1] / memory[0]:.3f}")
    for name, times in found["one_by_one"].items():
        wall, cpu = ([each[i] for each in times] for i in (0, 1))
        print(
            f"  {median_and_spread(wall, 1e3, 1):>22} ms, CPU {median_and_spread(cpu, 1e3, 1):>20} "
            f"ms  {name}"
        )


def _ratio(beside: list[float], alone: list[float]) -> str:
    if beside is alone:
        return ""
    by_round = [b / a for a, b in zip(alone, beside, strict=True)]
    of_medians = statistics.median(beside) / statistics.median(alone)
    return f" ({of_medians:.2f} times; by round {median_and_spread(by_round, 1, 2)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--tasks", default=",".join(GOOD))
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
                        found = measure(
                            ask, process, task, chosen.rounds, chosen.seconds, http=name == "serve"
                        )
                    results[f"{task}, {name}"] = found
                    shown(f"{task}, {name}", found)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
