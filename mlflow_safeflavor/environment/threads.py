"""Threads that this process may keep busy: affinity, the container's quota, and other workers.

Decided before torch is imported, since torch and its OpenMP read their variables once.
"""

from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_safeflavor import machine

__all__ = [
    "Budget",
    "find_budget",
    "is_scoring_server",
    "limit_threads",
    "server_process",
    "use_threads",
]

# Turns that an idle OpenMP thread waits busily before it sleeps. With GNU OpenMP's default a second
# thread makes everything slower as soon as another process wants its core; without any waiting,
# short texts take twice as long on an idle machine. ``benchmarks/threads.py`` shows both, and this.
SPIN_COUNT = 10_000

_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@dataclass(frozen=True)
class Budget:
    """Cores and workers that were found, and the number of threads that was chosen.

    Attributes:
        cores: Cores that affinity allows.
        quota: Cores' worth of CPU time that the cgroup grants; None without a limit.
        workers: Server processes that share them.
        threads: Torch's threads in this process.
        source: Origin of the choice: "num_threads", "OMP_NUM_THREADS" or "found".
        spin_count: Turns that an idle OpenMP thread waits; None where it was left as it is.
    """

    cores: int
    quota: float | None
    workers: int
    threads: int
    source: str
    spin_count: int | None = None

    def __str__(self) -> str:
        quota = "no quota" if self.quota is None else f"a quota of {self.quota:g}"
        spin = "" if self.spin_count is None else f", spinning {self.spin_count} turns"
        return (
            f"{self.cores} cores, {quota}, {self.workers} workers: {self.threads} "
            f"threads{'' if self.source == 'found' else f' by {self.source}'}{spin}"
        )


def find_budget(
    requested: int = 0, *, environ: Mapping[str, str] = os.environ, root: Path = machine.ROOT
) -> Budget:
    """Count the threads that torch should use in this process; changes nothing.

    Args:
        requested: The run-time option ``num_threads``; 0 for as many as there is room for.
        environ: Variables of this process. ``OMP_NUM_THREADS`` counts, where the user has set it.
        root: Where ``proc`` and ``sys`` are.
    """
    cores, quota, workers = machine.cores(), machine.quota(root), _workers(environ, root)
    room = cores if quota is None else min(cores, quota)
    if requested:
        return Budget(cores, quota, workers, requested, "num_threads")
    if by_user := _positive(environ.get("OMP_NUM_THREADS", "")):
        return Budget(cores, quota, workers, by_user, "OMP_NUM_THREADS")
    return Budget(cores, quota, workers, max(1, math.floor(room / workers)), "found")


def limit_threads(requested: int = 0) -> Budget:
    """Limit the threads that torch will start once imported, and let idle ones sleep soon.

    This sets ``OMP_NUM_THREADS`` and ``GOMP_SPINCOUNT``, so it is for processes that are there for
    nothing else: see ``is_scoring_server``. Variables for waiting that the user has set stay.

    Args:
        requested: See ``find_budget``.
    """
    budget = find_budget(requested)
    os.environ["OMP_NUM_THREADS"] = str(budget.threads)
    # Else tokenizers starts a thread a core of its own, beside torch's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if budget.threads == 1 or any(name in os.environ for name in _SPIN_VARIABLES):
        return budget
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return replace(budget, spin_count=SPIN_COUNT)


# In a command line of MLflow's server, and in that of an image of our own (``load/image.py``).
_MARKS = ("mlflow.pyfunc.scoring_server", "container.serve()")


def is_scoring_server(root: Path = machine.ROOT) -> bool:
    """Whether this process is MLflow's scoring server or a worker of it."""
    # By the command line of it or an ancestor: workers of uvicorn are started by multiprocessing,
    # and their own names no server.
    return server_process(root) is not None


def server_process(root: Path = machine.ROOT) -> str | None:
    """Id of the process that all workers of this scoring server descend from; None in others."""
    found = [
        process
        for process, command in _processes(root)
        if any(mark in part for part in command for mark in _MARKS)
    ]
    return found[-1] if found else None


_one_at_a_time = threading.Lock()


def use_threads(count: int) -> None:
    """Have torch use so many threads in the calling thread alone; 0 changes nothing."""
    torch = sys.modules.get("torch")
    if not count or torch is None:
        return
    # Torch counts for each thread, but set_num_threads also sets the count that new threads begin
    # with. A new thread reads that before, and puts it back after.
    with _one_at_a_time, ThreadPoolExecutor(1) as another:
        before = another.submit(torch.get_num_threads).result()
        # Else torch would set the common count anew at the first work of this thread.
        torch.get_num_threads()
        torch.set_num_threads(count)
        another.submit(torch.set_num_threads, before).result()


_WORKERS_OPTION = re.compile(r"^(?:--workers|-w)(?:=(\d+))?$")
_SERVERS = ("uvicorn", "gunicorn")


def _workers(environ: Mapping[str, str], root: Path) -> int:
    """Server processes that share this machine or container with this one, itself included.

    Told by the server's command line, which is this process's own where there is one worker, else
    its parent's; without one, by the variable that the start of a container reads.
    """
    for _, command in _processes(root):
        if any(os.path.basename(part) in _SERVERS for part in command[:3]):
            return _workers_option(command) or _positive(environ.get("WEB_CONCURRENCY", "")) or 1
    return _positive(environ.get("MLFLOW_MODELS_WORKERS", "")) or 1


def _workers_option(command: Sequence[str]) -> int | None:
    for part, following in zip(command, [*command[1:], ""], strict=True):
        if match := _WORKERS_OPTION.match(part):
            return _positive(match[1] or following)
    return None


def _positive(text: str) -> int | None:
    return int(text) if text.isdigit() and int(text) else None


def _processes(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Ids and command lines of this process and those around it, outermost last."""
    process = str(os.getpid()) if root == machine.ROOT else "self"
    while process != "0":
        yield process, _command_line(root, process)
        process = _parent(root, process)


def _command_line(root: Path, process: str) -> list[str]:
    try:
        return (root / "proc" / process / "cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _parent(root: Path, process: str) -> str:
    try:
        # The command's name, in brackets, may hold blanks and brackets itself.
        return (
            (root / "proc" / process / "stat")
            .read_text(errors="replace")
            .rpartition(")")[2]
            .split()[1]
        )
    except (OSError, IndexError):
        return "0"
