"""A served model under load and faults: is every answer right, and is none lost?

    python benchmarks/soak.py [--minutes 30] [--workers 2] [--seed N] [--load 0.6] [--model FOLDER]
    [--json FILE] [--plot FILE.svg]

``mlflow models serve`` is asked at a share of what it can answer, at random moments, while workers
are killed, callers hang up, are slow, send what is no request, and come in bursts; all drawn by a
seed. Each answer is compared with the native model's for the same rows, bit for bit. At the end the
server is told to end while requests are with it. Exit status 1 if anything is wrong or was lost.
What is counted is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# This folder last: MLflow imports libraries that have the names of files here.
sys.path.append(sys.path.pop(0))

from _callers import BURST, FAULTS, Question, answer_commands
from _server import Server, free_port, memory_of
from _soaked import KILL, Kill, Memory, Seen, figures, plot, show

MAX_BODY = 1_000_000
LIMITS = {
    "MLFLOW_SAFEFLAVOR_MAX_BODY": str(MAX_BODY),
    "MLFLOW_SAFEFLAVOR_MAX_QUEUE": "64",
    "MLFLOW_SAFEFLAVOR_MAX_WAIT": "2",
    "MLFLOW_SAFEFLAVOR_LOG_REQUESTS": "true",
}
"""What the server is started with."""
DECK = 60.0
"""Seconds in which each fault comes: a kill and a burst once, each bad request three times."""
CALLERS = 16
"""Callers at a time, for the capacity."""


# --- what is asked -------------------------------------------------------------------------------


def save_minilm(folder: Path) -> Path:
    """The real all-MiniLM-L6-v2, whose answers have 384 numbers each."""
    import torch
    import transformers
    from _common import minilm_folder, tokenizer

    import mlflow_safeflavor

    model = transformers.BertModel.from_pretrained(minilm_folder(), dtype=torch.float32).eval()
    mlflow_safeflavor.save_model(
        model,
        folder,
        tokenizer=tokenizer(),
        task="feature-extraction",
        input_columns={"text": "text"},  # with a name, others are refused
        graph="require",
        rehearse=False,
    )
    return folder


def ask_native(model: Path, seed: int, count: int = 200) -> list[Question]:
    """Questions of one to eight rows, and what the native model answers them.

    Raises:
        SystemExit: An answer's last bits depend on what else is in its batch.
    """
    import mlflow_safeflavor

    native = mlflow_safeflavor.load_model(model)
    if not native.engine.keeps_bits:
        raise SystemExit("the model answers with other last bits in other batches: graph='require'")
    draw, questions = random.Random(seed), []
    for _ in range(count):
        # Lengths as natural texts have them, and one row more often than many.
        rows = [
            {"text": " ".join(draw.choices(_WORDS, k=max(1, min(200, round(length)))))}
            for length in (draw.lognormvariate(2.3, 0.8) for _ in range(draw.choice(_ROWS)))
        ]
        answers = native.predict(rows, progress=False).to_dict(orient="records")
        # As JSON has it, which keeps all digits of a float.
        questions.append(_question(rows, json.loads(json.dumps(answers))))
    return questions


def _question(rows: list[Any], predictions: list[Any]) -> Question:
    return Question(json.dumps({"dataframe_records": rows}).encode(), predictions)


def merged(questions: Sequence[Question]) -> Question:
    """All rows in one request; their answers stay the same."""
    rows = [row for one in questions for row in json.loads(one.body)["dataframe_records"]]
    return _question(rows, [row for one in questions for row in one.predictions])


_WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "green")
_ROWS = (1, 1, 1, 1, 2, 3, 5, 8)


def drawn_faults(seed: int, seconds: float) -> list[tuple[float, str]]:
    """Seconds from the start, and the fault, in order; each fault at least once."""
    draw, faults = random.Random(seed), []
    decks = max(1, round(seconds / DECK))
    for i in range(decks):
        deck = [KILL, BURST, *FAULTS * 3]
        draw.shuffle(deck)
        # The end is quiet: a killed worker is back before the server is told to end.
        step = (seconds - min(10, seconds / 10)) / decks / len(deck)
        faults += [
            ((i * len(deck) + j + draw.random()) * step, kind) for j, kind in enumerate(deck)
        ]
    return faults


# --- a run ---------------------------------------------------------------------------------------


@contextmanager
def calling(port: int, questions: Sequence[Question], seed: int) -> Iterator[Connection]:
    """Callers in a process of their own; see ``answer_commands``."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=answer_commands, args=(there, port, questions, MAX_BODY, seed), daemon=True
    )
    process.start()
    there.close()  # so that its end is seen here
    try:
        yield here
    finally:
        process.terminate()
        process.join()


def run(
    model: Path, questions: Sequence[Question], *, seconds: float, workers: int, seed: int,
    load: float, folder: Path,
) -> Seen:  # fmt: skip
    """Start a server, measure its capacity, ask it under faults, and end it."""
    seen, metrics = Seen(seconds), free_port()
    environ = {**LIMITS, "MLFLOW_SAFEFLAVOR_METRICS": str(metrics), "TMPDIR": str(folder)}
    faults = drawn_faults(seed, seconds)
    kills = [after for after, kind in faults if kind == KILL]
    with (
        Server(model, folder / "server.log", workers=workers, environ=environ) as server,
        calling(server.port, questions, seed) as callers,
    ):
        wait_until_ready(server, workers)
        measured = max(4.0, min(15.0, seconds / 10))
        callers.send(("wait_for_each", measured, CALLERS))
        seen.asked += callers.recv()
        seen.capacity = sum(one.outcome == "right" for one in seen.asked) / measured
        seen.rate, seen.start = load * seen.capacity, time.monotonic() + 1
        seen.bursts = [seen.start + after for after, kind in faults if kind == BURST]
        rest = [(after, kind) for after, kind in faults if kind != KILL]
        callers.send(("wait_for_none", seen.start, seconds, seen.rate, seen.capacity, rest))
        moments = [seen.start + after for after in kills]
        Watch(server, metrics, moments, seen, seed).until(lambda: callers.poll(0.1))
        seen.asked += callers.recv()
        wait_until_ready(server, workers)
        if (found := scrape(metrics)["safeflavor_workers"]) != workers:
            seen.problems.append(f"metrics tell of {found:g} workers, and there are {workers}")
        end_while_asked(server, callers, questions, seen)
        find_torn_lines(folder / "server.log", seen)
    return seen


def wait_until_ready(server: Server, workers: int) -> None:
    """Wait until all workers have loaded the model."""
    until = time.monotonic() + 180
    while len(server.ready()) < workers:
        if (status := server.process.poll()) is not None or time.monotonic() > until:
            raise SystemExit(f"not all workers started ({status}):\n{server.said()}")
        time.sleep(0.2)


class Watch:
    """Kills workers when it is time, and reads memory and metrics.

    Args:
        server: The server, all of whose workers are ready.
        metrics: Port of its metrics.
        kills: Moments of kills.
        seen: What is found.
        seed: Of which worker is killed.
    """

    def __init__(
        self, server: Server, metrics: int, kills: Sequence[float], seen: Seen, seed: int
    ) -> None:
        self._server, self._metrics, self._seen = server, metrics, seen
        self._kills, self._draw = [*kills], random.Random(seed)
        self._known = server.workers()
        # One is never killed: its memory tells what a long life adds.
        self._oldest, self._count = self._known[0], len(self._known)
        self._killed: set[int] = set()
        self._requests = 0.0

    def until(self, done: Callable[[], bool]) -> None:
        """Watch until the callers are done, which is asked ten times a second."""
        works: list[tuple[float, Callable[[float], None]]] = [
            (0, self._look),
            (max(0.5, self._seen.seconds / 600), self._read_memory),
            (5, self._read_metrics),
        ]
        due = [self._seen.start] * len(works)
        while not done():
            for i, (every, work) in enumerate(works):
                if (now := time.monotonic()) >= due[i]:
                    due[i] = now + every
                    work(now)

    def _look(self, now: float) -> None:
        workers = self._server.workers()
        # Uvicorn itself ends one that has not begun to answer it in five seconds.
        if gone := ({*self._known} & self._server.started) - {*workers} - self._killed:
            self._seen.problems.append(f"workers ended by themselves: {sorted(gone)}")
        self._known = workers
        # Of those that answer: no request is with one that still loads.
        victims = sorted(self._server.ready() - {self._oldest, *self._killed})
        if self._kills and now >= self._kills[0] and victims:
            victim = self._draw.choice(victims)
            with suppress(OSError):  # it has just ended by itself, which is found at the next look
                ports = self._server.kill(victim)
                self._kills.pop(0)
                self._killed.add(victim)
                self._seen.kills.append(Kill(now, time.monotonic(), ports))

    def _read_memory(self, now: float) -> None:
        whole = len(self._server.ready()) == self._count
        sizes = {worker: memory_of(worker) for worker in self._server.workers()}
        pss = sum(size["Pss"] for size in sizes.values())
        oldest = sizes.get(self._oldest, {}).get("Anonymous", 0)
        self._seen.memory.append(Memory(now, pss, oldest, whole))

    def _read_metrics(self, now: float) -> None:
        try:
            requests = scrape(self._metrics)["safeflavor_requests_total"]
        except (OSError, LookupError, ValueError) as error:
            # Who had the port was killed, and another takes it within a second.
            if not any(now - kill.after < 5 for kill in self._seen.kills):
                self._seen.problems.append(f"no metrics: {error!r}")
            return
        if requests < self._requests:
            self._seen.problems.append(
                f"{self._requests:g} requests were counted, now {requests:g}"
            )
        self._requests = requests


def scrape(port: int) -> dict[str, float]:
    """Metrics by name, added up over their labels.

    Raises:
        LookupError: The server is asked, and answers no metrics.
    """
    status, text = Server.get("/metrics", port)
    if status != 200:
        raise LookupError(f"status {status}: {text[:500]}")
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.partition("{")[0].split()[0], line.rpartition(" ")[2]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def end_while_asked(
    server: Server, callers: Connection, questions: Sequence[Question], seen: Seen
) -> None:
    """Send SIGTERM while requests of some seconds are with the workers."""
    draw, count = random.Random(0), max(1, round(seen.capacity))
    callers.send(("at_once", [merged(draw.choices(questions, k=count))]))
    callers.recv()
    (probe,) = callers.recv()
    # Many rows in a request take less time than many requests, and how much less is the model's.
    count = max(1, round(count * _LAST_SECONDS / _LAST / (probe.ended - probe.began)))
    callers.send(("at_once", [merged(draw.choices(questions, k=count)) for _ in range(_LAST)]))
    callers.recv()  # all are sent
    time.sleep(0.3)
    for worker in server.workers():
        # What a worker has read is a request that it was given; the rest may find a closed door.
        seen.accepted |= {port for port, unread in server.clients(worker).items() if not unread}
    seen.told = time.monotonic()
    ended = server.end(90)
    last = callers.recv()
    seen.asked += [probe, *last]
    if not any(one.port in seen.accepted and one.ended > seen.told + 0.5 for one in last):
        seen.problems.append("no request was with a worker when the server was told to end")
    # MLflow's command has no handler of SIGTERM; the server that it started has.
    if ended.command not in (-signal.SIGTERM, 0) or ended.server != 0 or ended.left:
        seen.problems.append(f"after SIGTERM: {ended}")


_LAST, _LAST_SECONDS = 16, 6.0
"""Requests at the end, and how long one worker takes for all of them."""


def find_torn_lines(log: Path, seen: Seen) -> None:
    """Lines of requests must be whole, whichever of the workers wrote them."""
    torn = tracebacks = 0
    with log.open(errors="replace") as lines:
        for line in lines:
            tracebacks += line.startswith("Traceback")
            if '"queue_ms"' in line or line.startswith('{"time"'):
                try:
                    json.loads(line)
                except ValueError:
                    torn += 1
    if torn:
        seen.problems.append(f"{torn} lines of the log are torn")
    if tracebacks:
        seen.problems.append(f"{tracebacks} tracebacks in the log")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=2, help="2 or more")
    parser.add_argument("--seed", type=int, default=0, help="of questions, faults and moments")
    parser.add_argument("--load", type=float, default=0.6, help="share of the capacity")
    parser.add_argument("--model", type=Path, help="a saved model of texts; MiniLM without")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    parser.add_argument("--plot", type=Path, help="draw it into this file (.svg or .png)")
    chosen = parser.parse_args()
    if chosen.workers < 2:
        parser.error("one worker is not replaced when it is killed")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = chosen.model or save_minilm(folder / "minilm")
        questions = ask_native(model, chosen.seed)
        seen = run(
            model, questions, seconds=60 * chosen.minutes, workers=chosen.workers,
            seed=chosen.seed, load=chosen.load, folder=folder,
        )  # fmt: skip
    told = figures(seen)
    show(told)
    if chosen.json:
        chosen.json.write_text(json.dumps(told, indent=1))
    if chosen.plot:
        plot(seen, told, chosen.plot)
    return 1 if told["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
