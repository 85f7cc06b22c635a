"""``mlflow models serve`` on loopback, and what the kernel tells of its processes (Linux alone)."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "Server", "free_port", "memory_of", "stat_of"]

_PR_SET_CHILD_SUBREAPER = 36
_LISTENS = "0A"  # state of a socket in /proc/net/tcp
_STARTED = re.compile(rb"Started server process \[(\d+)\]")


class Ended(NamedTuple):
    """Exit statuses, negative for a signal, and processes that still run; None: it still does."""

    command: int | None
    server: int | None
    left: list[int]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server; its whole process group is killed when the block ends.

    ``started`` are the workers that ``ready`` has ever found.

    Args:
        model: Folder of the model.
        log: File for what it writes; nothing is kept without.
        workers: Processes that answer.
        environ: Variables beside those of this process.
    """

    def __init__(
        self,
        model: Path,
        log: Path | None = None,
        *,
        workers: int = 1,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["--model-uri", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", str(workers)]
        # MLflow looks for its server's command on PATH.
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        with open(os.devnull if log is None else log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PATH": path, **(environ or {})},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._server, self._read = 0, 0
        self.started: set[int] = set()

    def __enter__(self) -> Server:
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait(self) -> None:
        until = time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.get("/ping", self.port)[0] == 200:
                    return
            time.sleep(0.2)
        raise SystemExit(f"no server: {self.process.poll()}\n{self.said()}")

    def said(self) -> str:
        """The end of its log, without lines of requests."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log else []
        return "\n".join(
            [line for line in lines if "queue_ms" not in line and "POST" not in line][-40:]
        )

    @staticmethod
    def get(path: str, port: int) -> tuple[int, str]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            with connection.getresponse() as answer:
                return answer.status, answer.read().decode()

    @property
    def server(self) -> int:
        """Process id of uvicorn, which MLflow's command starts."""
        if not self._server:
            (self._server,) = _children(self.process.pid)
        return self._server

    def workers(self) -> list[int]:
        """Processes that answer, the oldest first."""
        found = [
            (int(fields[19]), child)
            for child in _children(self.server)
            if b"spawn_main" in _read(f"/proc/{child}/cmdline") and (fields := stat_of(child))
        ]
        return [child for _, child in sorted(found)]

    def ready(self) -> set[int]:
        """Workers that have loaded their model, by the log."""
        assert self.log is not None
        with self.log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        # The last line may be half there.
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        self.started |= {int(match[1]) for match in _STARTED.finditer(text)}
        return self.started & {*self.workers()}

    def kill(self, worker: int) -> set[int]:
        """Kill a worker, and wait until it has ended; returns its clients' ports."""
        # Stopped first, all of its threads: else it could take a connection after they are told.
        os.kill(worker, signal.SIGSTOP)
        _wait_for(lambda: _states(worker) <= {"T", "Z"})
        clients = {*self.clients(worker)}
        os.kill(worker, signal.SIGKILL)
        # Until the last thread has ended its connections are open, and callers may use them.
        _wait_for(lambda: _states(worker) <= {"Z"})
        return clients

    def clients(self, worker: int) -> dict[int, int]:
        """Port of each client that a worker has accepted → bytes that it has not read yet."""
        sockets = set()
        for file in Path(f"/proc/{worker}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(file))
        found = {}
        for line in _read("/proc/net/tcp").decode().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            if f"socket:[{fields[9]}]" in sockets and local == self.port and fields[3] != _LISTENS:
                found[remote] = int(fields[4].rpartition(":")[2], 16)
        return found

    def end(self, seconds: float) -> Ended:
        """Send SIGTERM, as a service manager does, and wait until all have ended."""
        server = self.server
        # Its command ends before the server does, whose parent this process is from then on: else
        # nobody would learn its exit status.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.process.terminate()
        status, until = None, time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None and status is None:
                try:
                    done, how = os.waitpid(server, os.WNOHANG)
                except ChildProcessError:  # its command has waited for it
                    done, how = server, 0
                status = os.waitstatus_to_exitcode(how) if done else None
            if status is not None and not self.group():
                break
            time.sleep(0.05)
        return Ended(self.process.poll(), status, self.group())

    def group(self) -> list[int]:
        """Processes of the group that have not ended."""
        return [
            process
            for process in _processes()
            if stat_of(process)[2:3] == [str(self.process.pid)] and stat_of(process)[:1] != ["Z"]
        ]


def memory_of(process: int) -> dict[str, int]:
    """Bytes: its proportional set size ("Pss"), and what is no file's ("Anonymous")."""
    lines = _read(f"/proc/{process}/smaps_rollup").decode().splitlines()[1:]
    fields = {line.split()[0].rstrip(":"): line.split()[1] for line in lines}
    return {name: 1024 * int(fields.get(name, 0)) for name in ("Pss", "Anonymous")}


def stat_of(process: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` behind the name: state, parent, group, …; none once it ended."""
    return _fields(Path(f"/proc/{process}/stat"))


def _fields(stat: Path) -> list[str]:
    return _read(str(stat)).decode(errors="replace").rpartition(")")[2].split()


def _states(process: int) -> set[str]:
    """Letters of its threads, such as T for stopped; a first thread that has ended is Z."""
    found = set[str]()
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            found |= {*_fields(thread / "stat")[:1]}
    return found


def _wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not done():
        if time.monotonic() > until:
            raise SystemExit("a worker could not be killed")
        time.sleep(0.001)


def _children(parent: int) -> list[int]:
    return [process for process in _processes() if stat_of(process)[1:2] == [str(parent)]]


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(file: str) -> bytes:
    """A file of /proc; empty where its process has ended."""
    with contextlib.suppress(OSError):
        return Path(file).read_bytes()
    return b""
