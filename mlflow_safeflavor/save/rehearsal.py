"""The rehearsal: load a staged artifact in a clean process before it is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.environment.used import Opened, way_to_bring
from mlflow_safeflavor.errors import RehearsalError

__all__ = ["Rehearsal"]

_TIMEOUT = 1800  # seconds; a model of several GB on a slow disk takes minutes
_HINT = (
    "free memory and processors for a second copy of the model; rehearse=False publishes without "
    "this proof"
)

# Variables a process needs to start at all. Nothing else passes: a model that loads only because of
# the author's PYTHONPATH, cache or token would not load anywhere else.
_KEPT = frozenset(
    (
        *("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY"),
    )
)
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "true",
}

_PROGRAM = Path(__file__).with_name("rehearsal_program.py")


class Rehearsal:
    """A clean process for ``staged``, which ends at the latest with this context.

    It shares only the installed packages: its interpreter is isolated (``-I``), its environment
    stripped, its working and home folders are empty, the hub is offline. A connection beyond
    loopback is an error, and so is to read a file that belongs neither to the model nor to a
    distribution: it would not be there in a container.

    Args:
        staged: Folder of the artifact.
    """

    def __init__(self, staged: Path) -> None:
        self._staged, self._left = staged, ExitStack()

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.close()

    def start(self, hidden: Collection[str] = (), *, allow_pickle: bool = False) -> None:
        """Start the process, which imports MLflow while the artifact is still being written.

        Args:
            hidden: Modules that cannot be imported while MLflow is.
            allow_pickle: Whether the process may unpickle.
        """
        folder = self._left.enter_context(scratch_folder("rehearsal"))
        self._answer = folder / "answer.json"
        # A pipe whose end ends the process together with this one: the kernel closes it however
        # this process ends, by SIGKILL as well.
        reads, self._lifeline = os.pipe()
        for descriptor in (reads, self._lifeline):
            self._left.callback(os.close, descriptor)
        command = [sys.executable, "-I", str(_PROGRAM), os.fspath(self._staged)]
        self._process = subprocess.Popen(
            [*command, str(self._answer), " ".join(hidden)],
            cwd=folder,
            env=_environ(str(folder), allow_pickle),
            stdin=reads,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._left.callback(_end, self._process)

    def load(self, engines: Sequence[str] = ("auto",)) -> tuple[Opened, list[str]]:
        """Load the artifact there through pyfunc, which replays the golden rows.

        Args:
            engines: Engines to load it with, one after the other.

        Returns:
            Files by the engine that was the first to open them, and the ``sys.path`` of that
            process.

        Raises:
            RehearsalError: It could not be loaded there, or answered differently.
        """
        os.write(self._lifeline, f"{' '.join(engines)}\n".encode())
        try:
            _, errors = self._process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise RehearsalError(
                "The clean process did not finish loading the model",
                wanted=f"within {_TIMEOUT} s",
                hint=_HINT,
            ) from None
        # The answer counts, not the exit status: code that exits early may exit with 0.
        if not self._answer.exists():
            raise RehearsalError(
                "The clean process died while loading the model",
                found=f"exit status {self._process.returncode}; {errors[-2000:].strip()}",
                hint=_HINT,
            )
        return _require_loaded(json.loads(self._answer.read_text(encoding="utf-8")))


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that was never told to load, or that hangs."""
    with process:  # closes its pipes, and waits
        process.kill()


def _require_loaded(told: Mapping[str, Any]) -> tuple[Opened, list[str]]:
    """What the clean process opened, and its ``sys.path``, if nothing failed there."""
    if problem := told["problem"]:
        # Libraries catch a refusal and fail with words of their own: what was refused says more.
        refused = [
            what for what in dict.fromkeys(told["refused"]) if what not in problem["message"]
        ]
        bring = way_to_bring(problem["missing"] or "")
        raise RehearsalError(
            "A clean process cannot load the model as saved, so nothing was published",
            found="; ".join([f"{problem['kind']}: {problem['message']}", *refused]),
            hint=bring
            if bring
            else "make it load without this process's state: no __main__ classes, no network, no "
            'files of this machine; graph="only" keeps neither the class nor what its constructor '
            "reads",
        )
    return told["opened"], told["path"]


def _environ(scratch: str, allow_pickle: bool) -> dict[str, str]:
    """Variables of the clean process, whose home and temporary folder are the scratch folder."""
    environ = {name: value for name, value in os.environ.items() if name in _KEPT}
    environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = str(allow_pickle).lower()
    environ["MLFLOW_SAFEFLAVOR_CACHE"] = "off"  # no later load comes from a staged folder
    environ |= dict.fromkeys(("HOME", "HF_HOME", "TMPDIR", "TEMP", "TMP"), scratch)
    environ |= {**_OFFLINE, "MLFLOW_TRACKING_URI": f"file:{scratch}/mlruns"}
    if sys.version_info < (3, 12):
        # Else setuptools' distutils is imported in place of Python's own, and pinned for it.
        environ["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
    return environ
