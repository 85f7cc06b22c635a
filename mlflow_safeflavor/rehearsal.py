"""The rehearsal: load a staged artifact in a clean process before anybody can see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlflow_safeflavor.errors import RehearsalError

__all__ = ["rehearse"]

_TIMEOUT = 1800  # seconds; a model of several GB on a slow disk takes minutes

# Variables a process needs to start at all. Nothing else passes: a model that loads only because of
# the author's PYTHONPATH, cache or token would not load anywhere else.
_KEPT = frozenset(
    (
        *("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY"),
    )
)
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "true"}

# Runs in the clean process. The audit hook sees every connection, whatever library makes it.
_SCRIPT = """
import json, sys
path, engines, answer = sys.argv[1:]

def no_network(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
        if not (host.startswith("127.") or host in ("::1", "localhost")):
            raise PermissionError(f"loading opened a connection to {host}")

sys.addaudithook(no_network)
try:
    import mlflow.pyfunc
    for engine in engines.split():
        mlflow.pyfunc.load_model(path, model_config={"engine": engine})
    problem = None
except BaseException as error:
    problem = {"kind": type(error).__name__, "message": str(error)}
with open(answer, "w", encoding="utf-8") as file:
    json.dump(problem, file)
"""


def rehearse(staged: Path, engines: Sequence[str] = ("auto",), *, allow_pickle: bool = False) -> None:
    """Load ``staged`` through pyfunc, in a process that shares nothing with this one but the installed packages.

    Once with each of the ``engines``.
    Its interpreter is isolated (``-I``), its environment stripped, its working and home folders are
    empty, the hub is offline, and any connection beyond loopback is an error. Loading replays the golden rows.

    Raises:
        RehearsalError: It could not be loaded there, or answered differently.
    """
    with tempfile.TemporaryDirectory(prefix="safeflavor-rehearsal-") as scratch:
        answer = Path(scratch) / "answer.json"
        environ = {name: value for name, value in os.environ.items() if name in _KEPT}
        environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = str(allow_pickle).lower()
        environ |= {**_OFFLINE, "HOME": scratch, "HF_HOME": scratch, "MLFLOW_TRACKING_URI": f"file:{scratch}/mlruns"}
        command = [sys.executable, "-I", "-c", _SCRIPT, os.fspath(staged), " ".join(engines), os.fspath(answer)]
        try:
            process = subprocess.run(
                command, cwd=scratch, env=environ, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise RehearsalError(
                "The clean process did not finish loading the model", wanted=f"within {_TIMEOUT} s"
            ) from None
        if not answer.exists():
            raise RehearsalError(
                "The clean process died while loading the model",
                found=f"exit status {process.returncode}; {process.stderr[-2000:].strip()}",
            )
        problem = json.loads(answer.read_text(encoding="utf-8"))
    if problem:
        raise RehearsalError(
            "A clean process cannot load the model as saved, so nothing was published",
            found=f"{problem['kind']}: {problem['message']}",
            way_out="make it load without this process's state: no __main__ classes, no local paths, no network",
        )
