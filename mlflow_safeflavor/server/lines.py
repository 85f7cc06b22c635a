"""A line of the log for each request of a server, as JSON, for programs that collect logs."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone

from mlflow_safeflavor.predict.request import Request

__all__ = ["LOG_REQUESTS", "write_line"]

LOG_REQUESTS = "MLFLOW_SAFEFLAVOR_LOG_REQUESTS"


def write_line(request: Request, status: int) -> None:
    """Write a request that has ended to standard output, without anything of its content."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request": request.name,
        "status": status,
        "rows": request.rows,
        "tokens": request.tokens,
        "forwards": request.forwards,
        "queue_ms": _ms(request.queued_seconds),
        "forward_ms": _ms(request.forward_seconds),
        "total_ms": _ms(time.monotonic() - request.arrived),
    }
    # One write: lines of workers that share the output must not mix.
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
