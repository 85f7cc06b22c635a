"""A Docker engine to test with.

The one that is there, or one of our own that ends with the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABEL = "mlflow-safeflavor.test"
"""On every container of the tests, so that what a killed run left behind can be found."""

IMAGES = "mlflow-safeflavor-test"
"""Repository of every image that the tests build."""

FOLDER = "dockerd-"
"""How the folder of an engine of our own begins."""


class NoEngineError(Exception):
    """Says in one line why there is no engine."""


@dataclass(frozen=True)
class Engine:
    """A running Docker engine; ``environ`` is what a process needs to reach it."""

    environ: dict[str, str]

    def docker(self, *arguments: str | Path, stdin: str = "", timeout: float = 120) -> str:
        """Run the docker client; gives what it printed, both streams in their order."""
        command = ["docker", *map(str, arguments)]
        done = subprocess.run(
            command,
            env=self.environ,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        if done.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}"
            )
        return done.stdout

    def inspect(self, kind: str, name: str) -> dict[str, Any] | None:
        """What the engine knows of an image or a container.

        None where there is none of that name.
        """
        try:
            found: list[dict[str, Any]] = json.loads(self.docker(kind, "inspect", name))
        except AssertionError as error:
            if "no such" not in str(error).lower():
                raise
            return None
        return found[0]

    def remove_leftovers(self) -> None:
        """Containers and images of the tests.

        Those of this run, and of earlier ones that were killed.
        """
        for container in self.docker(
            "ps", "--all", "--quiet", "--filter", f"label={LABEL}"
        ).split():
            self.docker("rm", "--force", "--volumes", container)
        self.remove_images(IMAGES)

    def remove_images(self, repository: str) -> None:
        """Every image of that name; other names of the same image stay."""
        for name in self.docker(
            "images", "--format", "{{.Repository}}:{{.Tag}}", repository
        ).split():
            # gigabytes, on a disk that others may be writing to
            self.docker("rmi", name, timeout=900)


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """The engine that is there, else one of our own; nothing of the tests is left in it.

    Raises:
        NoEngineError: There is none, and this process cannot start one.
    """
    with contextlib.ExitStack() as stack:
        # One at a time on this machine: all runs share the names of images and the data of our own
        # engine.
        lock = stack.enter_context(
            (Path(tempfile.gettempdir()) / f"{IMAGES}-{os.getuid()}.lock").open("w")
        )
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = (
            Engine({**os.environ})
            if _answers({**os.environ})
            else stack.enter_context(_own_engine())
        )
        engine.remove_leftovers()
        try:
            yield engine
        finally:
            engine.remove_leftovers()


def _answers(environ: dict[str, str]) -> bool:
    if shutil.which("docker") is None:
        return False
    # The client exits with 0 in some versions although no server answers.
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode == 0 and done.stdout.strip() != ""


def _data_root() -> Path:
    """Kept between runs: the base image takes a minute to make."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mlflow-safeflavor-docker"


@contextlib.contextmanager
def _own_engine(timeout: float = 60) -> Iterator[Engine]:
    """Start ``dockerd`` with a socket and data of its own, and end it with its containers."""
    missing = [name for name in ("docker", "dockerd", "setpriv") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise NoEngineError(
            "no Docker engine answers, and none can be started here: "
            + (f"{', '.join(missing)} not installed" if missing else "that takes root")
        )
    _remove_dead_engines()
    # Not below pytest's folder for temporary files: a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        socket, log = f"unix://{folder}/docker.sock", Path(folder) / "log"
        # The signal comes from the kernel, should this process be killed.
        command = [
            "setpriv",
            "--pdeathsig",
            "TERM",
            "dockerd",
            "--host",
            socket,
            "--data-root",
            str(_data_root()),
        ]
        command += ["--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
        with log.open("wb") as output:
            daemon = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        environ = {**os.environ, "DOCKER_HOST": socket}
        environ.pop("DOCKER_CONTEXT", None)
        try:
            _wait_until_up(daemon, environ, log, timeout)
            engine = Engine(environ)
            # What a killed run left of a build has no name; all that lies in this engine is ours.
            engine.docker("system", "prune", "--force", "--volumes", timeout=900)
            yield engine
            engine.docker("builder", "prune", "--all", "--force", timeout=900)
        finally:
            daemon.terminate()
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _remove_dead_engines() -> None:
    """Remove the folders of own engines that were killed, and networks mounted in them.

    Such a network stays on the bridge of all engines of this machine with the address of its
    container. A new engine gives that address to a new container, and neither is reached any more.
    The lock says that none of ours runs.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in reversed(mounted):
            if place.startswith(f"{folder}/"):
                subprocess.run(["umount", "--lazy", place], check=True)
        shutil.rmtree(folder)


def _wait_until_up(
    daemon: subprocess.Popen[bytes], environ: dict[str, str], log: Path, timeout: float
) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and daemon.poll() is None:
        if _answers(environ):
            return
        time.sleep(0.2)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise NoEngineError(
        f"no Docker engine answers, and dockerd does not start here: {''.join(last)[-300:]}"
    )
