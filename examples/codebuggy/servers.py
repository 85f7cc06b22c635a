"""Start servers of this example on free ports, wait until they answer, and always stop them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import requests

HERE = Path(__file__).resolve().parent
# The model holds a pickle: this is MLflow's own way of agreeing to run it.
TRUST = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}


@contextmanager
def mlflow_server(model_uri: str, log: Path, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """``mlflow models serve`` of a model; yields its address."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "--env-manager",
        "local",
        "--model-uri",
        model_uri,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}", "/ping", log, env) as url:
        yield url


@contextmanager
def service(
    arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """``serve.py`` with ``--model-uri`` or ``--endpoint``; yields its address."""
    port = free_port()
    command = [
        sys.executable,
        str(HERE / "serve.py"),
        *arguments,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with running(command, f"http://127.0.0.1:{port}", "/health", log, env) as url:
        yield url


def free_port() -> int:
    """A port of loopback that nobody listens to."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Free ports of loopback, all different, as ports asked for one by one may not be."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    path: str,
    log: Path,
    env: Mapping[str, str] | None,
    seconds: float = 180,
) -> Iterator[str]:
    """A command that serves ``url``, from the moment ``path`` answers 200.

    Raises ``RuntimeError`` if it never does.

    ``env`` is its whole environment, but for where MLflow finds its server and the agreement to run
    the pickle.
    """
    # MLflow looks for its server's command on PATH, where an environment that is not activated is
    # not.
    binaries = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**(os.environ if env is None else env), **TRUST, "PATH": binaries},
            start_new_session=True,
        )
    try:
        wait(process, url + path, log, seconds)
        yield url
    finally:
        stop(process)


def wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    """Return once ``url`` says 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(requests.RequestException):
            if requests.get(url, timeout=5).ok:
                return
        time.sleep(0.2)
    raise RuntimeError(
        f"{url} did not become ready; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}"
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the workers it started: they are one process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
