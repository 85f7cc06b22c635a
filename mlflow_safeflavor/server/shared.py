"""A folder of the workers of one server alone."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from mlflow_safeflavor import machine
from mlflow_safeflavor.environment.threads import server_process
from mlflow_safeflavor.errors import InputError

__all__ = ["shared_folder"]

_STEM = "mlflow-safeflavor-server"
_NAME = re.compile(rf"{_STEM}-(?P<user>\d+)-(?P<process>\d+)-(?P<began>\d+)")


def shared_folder() -> Path:
    """Make it, or find it; folders of servers of this user that have ended are removed.

    Raises:
        InputError: Somebody else has made it.
    """
    process = server_process() or str(os.getpid())
    parent = Path(tempfile.gettempdir())
    _sweep(parent)
    # With the time of the start: the ids of processes come again.
    folder = parent / f"{_STEM}-{os.getuid()}-{process}-{_began(process)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    # What lies there is read: in the temporary folder anyone may have made it first.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise InputError(
            "The folder for metrics is not this user's alone",
            where=folder,
            wanted="a folder of this user, which others cannot write",
            hint="remove it, or set TMPDIR to another folder",
        )
    return folder


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_STEM}-{os.getuid()}-*"):
        match = _NAME.fullmatch(folder.name)
        if match and match["began"] != _began(match["process"]) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _began(process: str) -> str:
    """When a process was started, in ticks since the machine was; "" for one that has ended."""
    try:
        text = Path(machine.ROOT, "proc", process, "stat").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
