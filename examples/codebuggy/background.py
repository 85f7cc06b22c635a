"""Processes that outlive the command that started them, each with a file that says which it is.

A file ``NAME.pid`` holds the process id and when that process began, so that a number the kernel
has given to somebody else since is never signalled. Every process leads a group of its own; its
workers are stopped with it, also those that a killed leader left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Background", "NotReadyError", "wait_until"]

_ENDING = 20.0
"""Seconds that a process may take to end when it is asked to."""


class NotReadyError(Exception):
    """Something did not start, or does not answer; the message holds the end of its log."""


@dataclass(frozen=True)
class Background:
    """A named process, and the files it has in ``folder``: ``NAME.pid`` and ``NAME.log``."""

    name: str
    folder: Path

    @property
    def log(self) -> Path:
        """Both streams of the process, of every start."""
        return self.folder / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        """There from the start of the process until ``stop`` has seen its end."""
        return self.folder / f"{self.name}.pid"

    def start(
        self,
        command: Sequence[str | Path],
        environ: Mapping[str, str],
        *,
        user: str | None = None,
        death_signal: str | None = None,
    ) -> None:
        """Start the process in a group of its own, and remember it.

        Args:
            command: Program and arguments.
            environ: All of its variables.
            user: Run it as this user; takes root.
            death_signal: Sent to it by the kernel when this process is gone, however that came
                about; by default it stays.

        Raises:
            NotReadyError: It runs already.
        """
        if self.is_running():
            raise NotReadyError(f"{self.name} runs already, as {self.pid_file} says; stop it first")
        words = [*_setpriv(user, death_signal), *map(str, command)]
        # Not Popen, which warns when nobody waits for what it started.
        pid = os.posix_spawnp(
            words[0],
            words,
            dict(environ),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (
                    os.POSIX_SPAWN_OPEN,
                    1,
                    str(self.log),
                    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                    0o600,
                ),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        began = psutil.Process(pid).create_time()
        scratch = self.pid_file.with_suffix(".new")
        scratch.write_text(json.dumps({"pid": pid, "began": began}), encoding="utf-8")
        os.replace(scratch, self.pid_file)

    def is_running(self) -> bool:
        """Whether the process itself is there; workers that it left behind do not count."""
        pid = self._pid()
        with suppress(psutil.NoSuchProcess):
            return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    def kill(self) -> None:
        """End the process and its workers at once, as a machine that fails would.

        Its files stay.
        """
        self._signal(signal.SIGKILL)
        self._wait_for_end(_ENDING)

    def stop(self, *signals: signal.Signals) -> None:
        """End the process and its workers, politely at first; nothing to do where nothing runs.

        Args:
            signals: Tried one after the other before SIGKILL; by default SIGTERM.
        """
        for sign in (*(signals or (signal.SIGTERM,)), signal.SIGKILL):
            self._signal(sign)
            if self._wait_for_end(_ENDING):
                break
        self.pid_file.unlink(missing_ok=True)

    def tail(self, characters: int = 3000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def _pid(self) -> int | None:
        """The process id; None where the kernel has given that number to somebody else since."""
        try:
            content = json.loads(self.pid_file.read_text(encoding="utf-8"))
            pid, began = int(content["pid"]), float(content["began"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with suppress(psutil.NoSuchProcess):
            return pid if abs(psutil.Process(pid).create_time() - began) < 1 else None
        return pid  # gone; its group may still be there, and keeps its number

    def _signal(self, sign: signal.Signals) -> None:
        pid = self._pid()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, sign)

    def _wait_for_end(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (alive := self._group_lives()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not alive

    def _group_lives(self) -> bool:
        """Whether anybody of the group runs.

        Zombies do not: where nobody collects them they stay for ever.
        """
        pid = self._pid()
        if pid is None:
            return False
        lives = any(_is_of_group(process, pid) for process in psutil.process_iter())
        with suppress(ChildProcessError):  # those that are ours, we collect
            while not lives and os.waitpid(-pid, os.WNOHANG)[0]:
                pass
        return lives


def _setpriv(user: str | None, death_signal: str | None) -> list[str]:
    """What goes before a command. One program for both, as a change of user clears the signal."""
    options = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    if death_signal and shutil.which("setpriv"):  # Linux has it, others do without
        options += ["--pdeathsig", death_signal]
    return ["setpriv", *options] if options else []


def _is_of_group(process: psutil.Process, group: int) -> bool:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(ready: Callable[[], bool], what: Background, seconds: float) -> None:
    """Return once ``ready()`` is true; exceptions of its count as false.

    Raises:
        NotReadyError: It never was, or the process ended; with the end of the log.
    """
    deadline, last = time.monotonic() + seconds, "it said no"
    while time.monotonic() < deadline and what.is_running():
        try:
            if ready():
                return
        except Exception as error:
            last = f"{type(error).__name__}: {error}"
        time.sleep(0.1)
    state = f"is not ready after {seconds:.0f} s ({last})" if what.is_running() else "has ended"
    raise NotReadyError(f"{what.name} {state}; the end of {what.log}:\n{what.tail()}")
