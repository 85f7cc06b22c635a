"""A model's container: run, asked over HTTP or from inside, read, and removed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests
from system.docker.engine import LABEL, Engine

_ASK_FROM_INSIDE = """
import sys, urllib.request
data = sys.stdin.buffer.read()
url, headers = "http://127.0.0.1:8080" + sys.argv[1], {"Content-Type": "application/json"}
request = urllib.request.Request(url, data or None, headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@dataclass(frozen=True)
class Container:
    """A container that was started; it may have ended since."""

    engine: Engine
    name: str

    def url(self) -> str:
        """Where the host reaches its server."""
        return f"http://{self.engine.docker('port', self.name, '8080/tcp').split()[0]}"

    def is_serving(self) -> bool:
        """Whether /ping is answered with 200."""
        try:
            return requests.get(f"{self.url()}/ping", timeout=10).status_code == 200
        except (requests.RequestException, AssertionError, IndexError):
            return False  # nobody listens, or the container has no port any more

    def is_serving_inside(self) -> bool:
        """The same, asked from inside."""
        try:
            self.engine.docker("exec", self.name, "python", "-c", _ASK_FROM_INSIDE, "/ping")
        except AssertionError:
            return False
        return True

    def invoke(self, body: Any) -> Any:
        """What /invocations answers to a JSON body; any other status than 200 fails the test."""
        answer = requests.post(f"{self.url()}/invocations", json=body, timeout=120)
        assert answer.status_code == 200, (
            f"{answer.status_code}: {answer.text[:2000]}\n{self.log()}"
        )
        return answer.json()

    def invoke_inside(self, body: Any) -> Any:
        """The same, asked from inside."""
        command = (
            "exec",
            "--interactive",
            self.name,
            "python",
            "-c",
            _ASK_FROM_INSIDE,
            "/invocations",
        )
        return json.loads(self.engine.docker(*command, stdin=json.dumps(body)))

    def metrics(self) -> str:
        """What its metrics are, asked from inside until there are some."""
        look = (
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090').read().decode())"
        )
        for _ in range(50):
            with contextlib.suppress(AssertionError):
                found = self.engine.docker("exec", self.name, "python", "-c", look)
                if "safeflavor_request_seconds_count" in found:
                    return found
            time.sleep(0.2)
        raise AssertionError(f"no metrics\n{self.log()}")

    def log(self) -> str:
        """Everything it has printed."""
        return self.engine.docker("logs", self.name)

    def state(self) -> dict[str, Any]:
        """What the engine knows of it: Running, ExitCode, OOMKilled, …"""
        found = self.engine.inspect("container", self.name)
        assert found is not None
        state: dict[str, Any] = found["State"]
        return state

    def wait_until_serving(self, *, inside: bool = False, timeout: float = 180) -> None:
        """Until /ping is answered; fails with the log where that does not come."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.is_serving_inside() if inside else self.is_serving():
                return
            if not self.state()["Running"] and not self._started_again():
                break
            time.sleep(0.3)
        raise AssertionError(f"the container does not serve: {self.state()}\n{self.log()}")

    def wait_until_refused(
        self, word: str | None = None, *, times: int = 1, timeout: float = 180
    ) -> str:
        """Until it has ended, or its log has ``word`` that many times; gives the log.

        /ping must never be answered.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert not self.is_serving(), f"it serves\n{self.log()}"
            said = word is not None and self.log().count(word) >= times
            if said or (not self.state()["Running"] and not self._started_again()):
                assert not self.is_serving(), f"it serves\n{self.log()}"
                return self.log()
            time.sleep(0.3)
        raise AssertionError(
            f"after {timeout} s it has neither ended nor said {word}\n{self.log()}"
        )

    def _started_again(self) -> bool:
        """Start it again where it lost a race of MLflow's; gives whether it did.

        MLflow starts nginx and then puts links in the place of its log files. Where nginx opens one
        in between, it ends, and the container with it. The second time the links are there already.
        """
        log = self.engine.docker("logs", "--since", self.state()["StartedAt"], self.name)
        lost = "/var/log/nginx/" in log and "failed (17: File exists)" in log
        if lost:
            self.engine.docker("start", self.name)
        return lost


@contextlib.contextmanager
def running(
    engine: Engine, image: str, *options: str, env: dict[str, str] | None = None
) -> Iterator[Container]:
    """Run an image in the background, its port on a free one of this machine.

    Removed whatever happens.
    """
    arguments = ["run", "--detach", "--label", LABEL, *options]
    if "none" not in options:
        arguments += ["--publish", "127.0.0.1::8080"]
    for name, value in (env or {}).items():
        arguments += ["--env", f"{name}={value}"]
    container = Container(engine, engine.docker(*arguments, image).split()[-1])
    try:
        yield container
    finally:
        engine.docker("rm", "--force", "--volumes", container.name)
