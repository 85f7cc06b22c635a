"""The rehearsal: load a staged artifact in a clean process before it is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.environment.used import Opened, way_to_bring
from mlflow_safeflavor.errors import RehearsalError

__all__ = ["rehearse"]

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


def rehearse(
    staged: Path,
    engines: Sequence[str] = ("auto",),
    *,
    hidden: Collection[str] = (),
    allow_pickle: bool = False,
) -> tuple[Opened, list[str]]:
    """Load ``staged`` through pyfunc in a process that shares only the installed packages.

    Its interpreter is isolated (``-I``), its environment stripped, its working and home folders are
    empty, the hub is offline. A connection beyond loopback is an error, and so is to read a file
    that belongs neither to the model nor to a distribution: it would not be there in a container.
    Loading replays the golden rows.

    Args:
        staged: Folder of the artifact.
        engines: Engines to load it with, one after the other.
        hidden: Modules that cannot be imported while MLflow is.
        allow_pickle: Whether the process may unpickle.

    Returns:
        Files by the engine that was the first to open them, and the ``sys.path`` of that process.

    Raises:
        RehearsalError: It could not be loaded there, or answered differently.
    """
    with scratch_folder("rehearsal") as folder, _lifeline() as lifeline:
        answer = folder / "answer.json"
        command = [sys.executable, "-I", str(_PROGRAM), os.fspath(staged)]
        command += [" ".join(engines), str(answer), " ".join(hidden)]
        try:
            process = subprocess.run(
                command,
                cwd=folder,
                env=_environ(str(folder), allow_pickle),
                stdin=lifeline,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise RehearsalError(
                "The clean process did not finish loading the model",
                wanted=f"within {_TIMEOUT} s",
                hint=_HINT,
            ) from None
        # The answer counts, not the exit status: code that exits early may exit with 0.
        if not answer.exists():
            raise RehearsalError(
                "The clean process died while loading the model",
                found=f"exit status {process.returncode}; {process.stderr[-2000:].strip()}",
                hint=_HINT,
            )
        told = json.loads(answer.read_text(encoding="utf-8"))
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


@contextmanager
def _lifeline() -> Iterator[int]:
    """A pipe without writes, whose end ends the clean process together with this one."""
    # The kernel closes it however this process ends, by SIGKILL as well.
    reads, writes = os.pipe()
    try:
        yield reads
    finally:
        os.close(reads)
        os.close(writes)
