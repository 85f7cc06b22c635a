"""What the gate, metrics, lines and spans cost a request, and what they cost where they are off.

    python benchmarks/gate.py [--rounds 9] [--requests 2000]

Without a server or a model: an app of ASGI that answers at once is asked in a loop, bare and behind
the gate, with and without who is told; and an empty prediction with and without a span. In turn,
in microseconds a request.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
with tempfile.TemporaryDirectory() as _folder:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _folder  # read when prometheus-client is imported
    import prometheus_client  # noqa: F401
from _common import alternate, machine, median_and_spread

from mlflow_safeflavor.predict.request import Request
from mlflow_safeflavor.predict.tracing import TRACE, traced
from mlflow_safeflavor.server.gate import App, Gate
from mlflow_safeflavor.server.lines import write_line
from mlflow_safeflavor.server.metrics import Metrics

_SCOPE = {
    "type": "http",
    "path": "/invocations",
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")],
}


class _Scheduler:
    def observe(self, observer: object) -> None:
        pass


class _Model:
    """As much of a loaded model as metrics tell of."""

    scheduler = _Scheduler()

    class spec:
        task, dtype = "raw", "float32"

    class engine:
        keeps_bits = True

    class report:
        engine, device, hashed_bytes, seconds = "onnx", "cpu", 1, {"look": 0.1}
        golden_rows, bit_identical, max_difference = 3, True, 0.0


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


async def _requests(app: App, count: int) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        pass

    for _ in range(count):
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive(messages: list[Any] = messages) -> Any:
            return messages.pop() if messages else await never()

        await app(_SCOPE, receive, send)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=2000)
    asked = parser.parse_args()
    print(machine())
    limits: dict[str, Any] = {
        "max_queue": 1024,
        "max_wait": 30.0,
        "max_body": 10**8,
        "timeout": 60.0,
    }
    model: Any = _Model()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        metrics = Metrics(model)

        def quiet_line(request: Request, status: int) -> None:
            out, sys.stdout = sys.stdout, null
            try:
                write_line(request, status)
            finally:
                sys.stdout = out

        def predictions(trace: str) -> Callable[[], None]:
            def run() -> None:
                os.environ[TRACE] = trace
                for _ in range(asked.requests):
                    with traced("raw", "onnx"):
                        pass

            return run

        apps: dict[str, App] = {
            "bare app": _app,
            "behind the gate": Gate(_app, **limits),
            "… with metrics": Gate(_app, **limits, told=[metrics.request]),
            "… with a line": Gate(_app, **limits, told=[quiet_line]),
        }
        with open(os.devnull, "w") as null:
            candidates: dict[str, Callable[[], object]] = {
                name: lambda app=app: asyncio.run(_requests(app, asked.requests))  # type: ignore[misc]
                for name, app in apps.items()
            }
            candidates["an empty prediction"] = predictions("")
            started = time.perf_counter()
            times = alternate(candidates, asked.rounds)
        for name, spent in times.items():
            shown = median_and_spread(spent.wall, 1e6 / asked.requests, 1)
            print(f"{name:24} {shown} µs")
        print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
