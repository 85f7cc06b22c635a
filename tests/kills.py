"""Kills of save_model and log_model at random moments, then one more of each: what is left over?

    python tests/kills.py FOLDER --kills 40 --seed 1 [--machine]

``--machine``: as when a machine dies, the log, its clean process and the tracking server that it
logs to get SIGKILL at once, and the server is started again.

Everything is imported once; each attempt is a fork. Prints one JSON object, and what happened as it
goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)


class Server:
    """MLflow's tracking server over a database that others may read, with its artifacts below."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database = folder, database
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        options = {
            "port": self.port,
            "workers": 1,
            "backend-store-uri": self.database,
            "artifacts-destination": self.folder / "artifacts",
        }
        command += [f"--{name}={value}" for name, value in options.items()]
        temporary = self.folder / "tmp-of-server"  # what it leaves there is MLflow's
        temporary.mkdir(exist_ok=True)
        environ = {
            **os.environ,
            "TMPDIR": str(temporary),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Attempts:
    """Saves of one tiny model below ``folder``, each in a fork of this process.

    Args:
        folder: Where models and the database go.
        machine: Whether a kill hits all processes, a tracking server among them.
    """

    def __init__(self, folder: Path, machine: bool = False) -> None:
        self.folder = folder
        self.temporary = Path(tempfile.gettempdir())
        self.database = f"sqlite:///{folder / 'mlflow.db'}"
        self.server = Server(folder, self.database) if machine else None
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ).eval()
        self.example: dict[str, np.ndarray] = {"input": np.ones((2, 4), "float32")}
        self.noted: set[str] = set()

    def attempt(
        self,
        how: str,
        name: str,
        *,
        graph: str = "no",
        killed_after: float | None = None,
        number: signal.Signals = signal.SIGKILL,
    ) -> int:
        """Run one in a fork; returns its exit status, negative for a signal."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self._run(how, name, graph)
                status = 0
            finally:
                os._exit(status)
        if killed_after is not None:
            time.sleep(killed_after)
            self._kill(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for note in self.temporary.glob("*.log/note.json"):
            with contextlib.suppress(ValueError, KeyError):
                self.noted.add(json.loads(note.read_text())["model_id"])
        return status

    def _kill(self, child: int, number: signal.Signals) -> None:
        if self.server is None:
            os.kill(child, number)
            return
        with contextlib.suppress(psutil.NoSuchProcess):  # it had ended by itself
            there = psutil.Process(child)
            for process in [there, *there.children(recursive=True)]:
                process.send_signal(signal.SIGKILL)
        self.server.kill()
        self.server.start()

    def _run(self, how: str, name: str, graph: str) -> None:
        given: dict[str, Any] = {
            "task": "raw",
            "input_example": self.example,
            "allow_pickle": True,
            "graph": graph,
        }
        if how == "save":
            mlflow_safeflavor.save_model(self.model, self.folder / "store" / name, **given)
        else:
            os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "true"
            mlflow.set_tracking_uri(self.database if self.server is None else self.server.url)
            with mlflow.start_run():
                mlflow_safeflavor.log_model(self.model, name, registered_model_name=name, **given)

    def rehearsing(self) -> list[str]:
        """Clean processes that run for this folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = process.read_text(errors="replace")
                if "rehearsal_program.py" in line and str(self.folder) in line:
                    found.append(line)
        return found

    def left_over(self) -> tuple[dict[str, list[Any]], dict[str, int]]:
        """What should not be there."""
        from mlflow_safeflavor.artifact.layout import Layout
        from mlflow_safeflavor.artifact.manifest import find_broken_files, read_manifest
        from mlflow_safeflavor.artifact.spec import read_spec

        # Past the server: a connection of this process would be shared by its forks.
        mlflow.set_tracking_uri(self.database)
        client = mlflow.MlflowClient()
        deadline = time.monotonic() + 5
        while self.rehearsing() and time.monotonic() < deadline:
            time.sleep(0.05)
        models = client.search_logged_models(["0"], max_results=200)
        pending = {model.model_id for model in models if str(model.status) == "PENDING"}
        ready = {model.model_id for model in models if str(model.status) == "READY"}
        store = [
            path for path in (self.folder / "store").iterdir() if not path.name.startswith(".")
        ]
        layouts = [Layout(path) for path in store]
        versions = client.search_model_versions()
        empty = [
            path for path in self.temporary.iterdir() if path.is_dir() and not any(path.iterdir())
        ]
        return {
            "processes": self.rehearsing(),
            "beside": [
                path.name for path in (self.folder / "store").iterdir() if path.name.startswith(".")
            ],
            "temporary": sorted(
                str(path) for path in self.temporary.rglob("*") if path not in empty
            ),
            "broken": [
                x
                for y in layouts
                for x in find_broken_files(
                    y, read_manifest(y), mlmodel=read_spec(y)[1], digests=True
                )
            ],
            "pending": sorted(pending & self.noted),
            "half registered": [
                v.name for v in versions if str(v.source).rpartition("/")[2] not in ready
            ],
        }, {
            "published": len(store),
            "ready": len(ready),
            "failed": len(models) - len(ready) - len(pending),
            "versions": len(versions),
            "noted": len(self.noted),
            "empty folders of MLflow": len(empty),
            "pending, killed before MLflow called us": len(pending - self.noted),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--longest", type=float, default=8, help="seconds after which at the latest a kill comes"
    )
    parser.add_argument("--machine", action="store_true", help="kill all processes at once")
    options = parser.parse_args()
    attempts = Attempts(options.folder, options.machine)
    draw = random.Random(options.seed)
    (options.folder / "store").mkdir()
    seen = {"beside": 0, "temporary": 0, "pending": 0}
    for i in range(options.kills):
        how, number = ("save", "log")[i % 2], draw.choice(SIGNALS)
        if options.machine:
            how, number = "log", signal.SIGKILL
        after, graph = draw.uniform(0, options.longest), draw.choice(["no", "only", "auto"])
        status = attempts.attempt(
            how, f"killed-{i}", graph=graph, killed_after=after, number=number
        )
        found = attempts.left_over()[0]
        seen = {name: count + bool(found[name]) for name, count in seen.items()}
        assert not found["processes"], found["processes"]
        print(f"{i} {how} {graph} {number.name} after {after:.2f} s: {status}", file=sys.stderr)
    assert [attempts.attempt("save", "last"), attempts.attempt("log", "last")] == [0, 0]
    found, counted = attempts.left_over()
    if attempts.server is not None:
        attempts.server.kill()
    print(
        json.dumps(
            {
                "left over": found,
                "counted": counted,
                "after how many kills": seen,
                "seed": options.seed,
            }
        )
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "tmp").mkdir(parents=True)
    os.environ |= {
        "TMPDIR": str(folder / "tmp"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    import mlflow
    import numpy as np
    import torch

    import mlflow_safeflavor

    mlflow_safeflavor.save_model, mlflow_safeflavor.log_model  # noqa: B018  (imports all it needs, before any fork)
    os.chdir(folder)
    main()
