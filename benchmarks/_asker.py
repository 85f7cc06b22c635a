"""A model in a process of its own, that is asked for rows; with the side that starts it.

    python benchmarks/_asker.py MODEL '{"engine": "openvino"}'

As a model is served: the threads, the memory and the interpreter are its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Asked", "Asker", "Here", "asker"]


class Asked(NamedTuple):
    """What requests took: seconds on the clock, of CPU, and of each request."""

    wall: float
    cpu: float
    latencies: list[float]


class Asker:
    """The side that asks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, requests: Sequence[Sequence[str]], *, threads: int = 1, warm: int = 20) -> Asked:
        """Have tables of texts asked by so many threads, behind a few of them, uncounted."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([[*requests], threads, warm]), file=self._process.stdin, flush=True)
        return Asked(*json.loads(self._process.stdout.readline()))


class Here(Asker):
    """A model in this process, beside others, which share threads, memory and the interpreter."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._predict = _loaded(str(path), config)

    def ask(self, requests: Sequence[Sequence[str]], *, threads: int = 1, warm: int = 20) -> Asked:
        """See ``Asker``."""
        return _answered(self._predict, requests, threads, warm)


@contextmanager
def asker(path: Path, **config: Any) -> Iterator[Asker]:
    """A process with this model, loaded by MLflow."""
    command = [sys.executable, "-W", "ignore", __file__, str(path), json.dumps(config)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        if not process.stdout.readline():
            raise SystemExit(f"The model in {path} does not load")
        yield Asker(process)
        process.stdin.close()


def _loaded(path: str, config: Mapping[str, Any]) -> Callable[[Any], Any]:
    import mlflow

    predict: Callable[[Any], Any] = mlflow.pyfunc.load_model(
        path, model_config=dict(config) or None
    ).predict
    return predict


def _answered(
    predict: Callable[[Any], Any], requests: Sequence[Sequence[str]], threads: int, warm: int
) -> Asked:
    import pandas as pd

    def timed(texts: Sequence[str]) -> float:
        begun = time.perf_counter()
        predict(pd.DataFrame({"text": texts}))
        return time.perf_counter() - begun

    with ThreadPoolExecutor(threads) as pool:
        # One thread is this one: another's turn at the interpreter is not what is asked.
        each = pool.map if threads > 1 else map
        list(each(timed, requests[:warm]))
        cpu, wall = time.process_time(), time.perf_counter()
        latencies = list(each(timed, requests))
        return Asked(time.perf_counter() - wall, time.process_time() - cpu, latencies)


def _answer_all(path: str, config: Mapping[str, Any]) -> None:
    """The side that answers, until nobody asks any more."""
    predict = _loaded(path, config)
    print("loaded", flush=True)
    for line in sys.stdin:
        print(json.dumps([*_answered(predict, *json.loads(line))]), flush=True)


if __name__ == "__main__":
    # This folder last: MLflow imports a library that has the name of a file here.
    sys.path.append(sys.path.pop(0))
    _answer_all(sys.argv[1], json.loads(sys.argv[2]))
