"""How many threads this process may keep busy: affinity, the container's quota, and the workers beside it; and memory.

All of it is decided before torch is imported, since torch and its OpenMP read their variables once.
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

__all__ = [
    "Budget",
    "available_cpus",
    "available_memory",
    "find_budget",
    "is_scoring_server",
    "limit_threads",
    "use_threads",
]

SPIN_COUNT = 10_000
"""Turns that an idle OpenMP thread waits busily before it sleeps.

With GNU OpenMP's default a second thread makes everything slower as soon as another process wants its core; without
any waiting, short texts take twice as long on an idle machine. ``benchmarks/threads.py`` shows both, and this between.
"""

_ROOT = Path("/")
_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@dataclass(frozen=True)
class Budget:
    """What was found, and what was chosen.

    Attributes:
        cores: Cores that affinity allows.
        quota: Cores' worth of CPU time that the cgroup grants; None without a limit.
        workers: Server processes that share them.
        threads: Torch's threads in this process.
        source: What decided: "num_threads", "OMP_NUM_THREADS" or "found".
        spin_count: What an idle OpenMP thread waits; None where it was left as it is.
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
            f"{self.cores} cores, {quota}, {self.workers} workers: "
            f"{self.threads} threads{'' if self.source == 'found' else f' by {self.source}'}{spin}"
        )


def available_cpus(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy, whoever else wants them: affinity, cut by the quota; at least 1."""
    cores, quota = _cores(), _quota(root)
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def find_budget(requested: int = 0, *, environ: Mapping[str, str] = os.environ, root: Path = _ROOT) -> Budget:
    """How many threads torch should use in this process; changes nothing.

    Args:
        requested: The run-time option ``num_threads``; 0 for as many as there is room for.
        environ: Variables of this process. ``OMP_NUM_THREADS`` counts, where the user has set it.
        root: Where ``proc`` and ``sys`` are.
    """
    cores, quota, workers = _cores(), _quota(root), _workers(environ, root)
    room = cores if quota is None else min(cores, quota)
    if requested:
        return Budget(cores, quota, workers, requested, "num_threads")
    if by_user := _positive(environ.get("OMP_NUM_THREADS", "")):
        return Budget(cores, quota, workers, by_user, "OMP_NUM_THREADS")
    return Budget(cores, quota, workers, max(1, math.floor(room / workers)), "found")


def limit_threads(requested: int = 0) -> Budget:
    """Make torch, once it is imported, use no more threads than there is room for, and let idle ones sleep soon.

    This sets ``OMP_NUM_THREADS`` and ``GOMP_SPINCOUNT``, so it is for processes that are there for nothing else: see
    ``is_scoring_server``. Variables for waiting that the user has set stay.

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


def is_scoring_server(root: Path = _ROOT) -> bool:
    """Whether this process is MLflow's scoring server or a worker of it, and nobody else's."""
    return any("mlflow.pyfunc.scoring_server" in part for command in _commands(root) for part in command)


_one_at_a_time = threading.Lock()


def use_threads(count: int) -> None:
    """Make torch use so many threads for what the calling thread computes, and nowhere else; 0 changes nothing.

    Torch counts for each thread, but what it is told is also the start for threads to come: that is put back.
    """
    torch = sys.modules.get("torch")
    if not count or torch is None:
        return
    with _one_at_a_time, ThreadPoolExecutor(1) as another:
        before = another.submit(torch.get_num_threads).result()
        torch.get_num_threads()  # else torch begins with the common count at its first work here
        torch.set_num_threads(count)
        another.submit(torch.set_num_threads, before).result()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Quota.


def _quota(root: Path) -> float | None:
    """The tightest quota of this process's cgroup and those around it, version 2 or 1."""
    return min((quota for folder in _cgroups(root) if (quota := _quota_of(folder)) is not None), default=None)


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may ever hold: the machine's memory, or what a container grants of it."""
    system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16 << 30
    limits = [folder / name for folder in _cgroups(root, "memory") for name in ("memory.max", "memory.limit_in_bytes")]
    return min([system, *(int(text) for path in limits if (text := _read(path)).isdecimal())])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroups(root: Path, controller: str = "cpu") -> Iterator[Path]:
    """Folders that may hold this process's quota, outermost last. In a container the path may be the host's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mount in _mounts(root, controllers, controller):
            inner = Path(path.lstrip("/"))
            for part in (inner, *inner.parents):
                yield mount / part


def _mounts(root: Path, controllers: str, controller: str) -> list[Path]:
    top = root / "sys/fs/cgroup"
    if controllers == "":
        return [top, top / "unified"]
    return [top / controllers, top / controller] if controller in controllers.split(",") else []


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


# Workers.

_WORKERS_OPTION = re.compile(r"^(?:--workers|-w)(?:=(\d+))?$")
_SERVERS = ("uvicorn", "gunicorn")


def _workers(environ: Mapping[str, str], root: Path) -> int:
    """Server processes that share this machine or container with this one, itself included.

    The server's command line says so: it is this process's own where there is one worker, else that of
    its parent. Where none is found, the variable that MLflow's container start reads counts.
    """
    for command in _commands(root):
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


def _commands(root: Path) -> Iterator[list[str]]:
    """Command lines of this process and those around it, outermost last."""
    process = "self"
    while process != "0":
        yield _command_line(root, process)
        process = _parent(root, process)


def _command_line(root: Path, process: str) -> list[str]:
    try:
        return (root / "proc" / process / "cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _parent(root: Path, process: str) -> str:
    try:
        # The command's name, in brackets, may hold blanks and brackets itself.
        return (root / "proc" / process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
    except (OSError, IndexError):
        return "0"
