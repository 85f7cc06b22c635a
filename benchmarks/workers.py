"""From a command until all workers of a server have loaded the model: one worker, and several.

    python benchmarks/workers.py [--workers 4] [--rounds 5] [--json FILE]

In turn: ``mlflow models serve`` of mlflow.transformers' model, of ours (MiniLM, engine onnx) and of
one that loads nothing, and the entry point of an image of ours, here without a container. Seconds;
CPU seconds and memory (PSS) of all processes; and how many times the time of one worker it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from _common import machine, median_and_spread, minilm_classifier, ratio, save_ours, save_peer
from _server import free_port, memory_of
from by_hand import save_nothing
from rich.console import Console
from rich.table import Table

# As in the Dockerfile, where folder and port are always the same.
_IMAGE = (
    "import sys; sys.path[0] = sys.argv[1] + '/code'; "
    "from mlflow_safeflavor.load import container; "
    "container.MODEL, container.PORT = sys.argv[1], int(sys.argv[2]); container.serve()"
)
_UP = "startup complete"  # a line of uvicorn for each worker

Start = tuple[float, float, float]


def commands(folder: Path) -> dict[str, list[str]]:
    """Commands by name, but for the port, which comes last."""
    model = minilm_classifier()
    ours = str(save_ours(model, folder / "ours"))
    peer = str(save_peer(model, "text-classification", folder / "peer"))
    nothing = str(save_nothing(folder / "nothing"))
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    return {
        "mlflow.transformers, mlflow models serve": [*serve, "--model-uri", peer, "--port"],
        "ours, mlflow models serve": [*serve, "--model-uri", ours, "--port"],
        "loads nothing, mlflow models serve": [*serve, "--model-uri", nothing, "--port"],
        "ours, its image's entry point": [sys.executable, "-c", _IMAGE, ours],
    }


def start(command: list[str], workers: int) -> Start:
    """Seconds until all workers are up; CPU seconds and MB of all processes then."""
    count = {"MLFLOW_MODELS_WORKERS": str(workers)}
    if "serve" in command:
        command = [*command[:-1], "--workers", str(workers), command[-1]]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environ: Mapping[str, str] = {**os.environ, **count, "PATH": path}
    with tempfile.NamedTemporaryFile("w+") as log:
        begin = time.perf_counter()
        server = psutil.Popen(
            [*command, str(free_port())], env=environ, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while Path(log.name).read_text().count(_UP) < workers:
                if server.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.02)
            took = time.perf_counter() - begin
            processes = [server, *server.children(recursive=True)]
            cpu = sum(sum(process.cpu_times()[:4]) for process in processes)
            memory = sum(memory_of(process.pid)["Pss"] for process in processes) / 1e6
            return took, cpu, memory
        finally:
            for process in [server, *server.children(recursive=True)]:  # or it replaces them
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            server.wait()


def main() -> None:
    """Start each in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        candidates = [
            (name, command, count)
            for name, command in commands(Path(folder)).items()
            for count in (1, asked.workers)
        ]
        found: dict[str, dict[int, list[Start]]] = {name: {} for name, *_ in candidates}
        for turn in range(asked.rounds + 1):  # the first reads from disk, and does not count
            for name, command, count in candidates:
                seen = start(command, count)
                found[name].setdefault(count, []).extend([seen] if turn else [])
    table = Table("", "workers", "s", "of one", "CPU s", "MB")
    for name, by_count in found.items():
        one = [seconds for seconds, *_ in by_count[1]]
        for count, starts in by_count.items():
            seconds, cpu, memory = (list(values) for values in zip(*starts, strict=True))
            times, low, high = ratio(seconds, one)
            table.add_row(
                name,
                str(count),
                median_and_spread(seconds, digits=1),
                f"{times:.2f} ({low:.2f}–{high:.2f})",
                median_and_spread(cpu, digits=1),
                median_and_spread(memory),
            )
    print(machine())
    Console(width=140).print(table)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "starts": found}))


if __name__ == "__main__":
    main()
