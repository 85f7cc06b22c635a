"""Jobs in processes of their own that need not import everything first: forks of one that has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_SERVES = """
import json, os, signal, sys

for line in sys.stdin:
    if (child := os.fork()) == 0:
        seconds, given = json.loads(line)
        signal.alarm(seconds)  # ends what hangs, also outside of Python
        job(*given)
        sys.stdout.flush()
        os._exit(0)
    print("END", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """A job's exit status, negative for a signal, and what it wrote."""

    status: int
    lines: list[str]
    errors: str


@contextmanager
def forks(code: str, log: Path) -> Iterator[Callable[..., Ended]]:
    """``with forks(code, log) as run: run("a")`` calls ``job("a")`` of the code in a fork.

    What a job changes, breaks or exhausts is its own process; what the code imports is imported
    once. ``log`` is a file for what all of them write to stderr.
    """
    command = [sys.executable, "-W", "ignore", "-c", code + _SERVES]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        assert process.stdin is not None
        asks, answers = process.stdin, process.stdout or iter(())

        def run(*given: str, seconds: int = 120) -> Ended:
            before = log.stat().st_size
            lines: list[str] = []
            asks.write(json.dumps([seconds, given]) + "\n")
            asks.flush()
            for line in answers:
                if line.startswith("END "):
                    return Ended(int(line[4:]), lines, log.read_text()[before:])
                lines.append(line.rstrip("\n"))
            raise AssertionError(log.read_text()[before:])

        yield run
