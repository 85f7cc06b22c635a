"""Metrics for Prometheus, of all workers of a server, on a port of their own.

Each worker counts in files of a folder that all workers share; whichever has the port adds them up.
When it ends, the next one takes the port.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor import machine
from mlflow_safeflavor.errors import EnvironmentMismatchError, InputError
from mlflow_safeflavor.predict.request import Request

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["METRICS", "Metrics", "address_of", "count_in"]

METRICS = "MLFLOW_SAFEFLAVOR_METRICS"
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus-client when it is imported
_AGAIN = 1.0  # seconds between two tries to get the port

_logger = logging.getLogger("mlflow.safeflavor")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PIECES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def count_in(folder: Path) -> None:
    """Have prometheus-client count in a folder of this server's workers alone."""
    # It looks once, when it is imported, which code of a model may do.
    os.environ[_FOLDER] = str(folder)


class Metrics:
    """What one worker counts.

    Args:
        model: The loaded model.

    Raises:
        EnvironmentMismatchError: prometheus-client is not installed.
    """

    def __init__(self, model: LoadedModel) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise EnvironmentMismatchError(
                "Metrics need prometheus-client, which is not installed here",
                where=METRICS,
                wanted="prometheus-client",
                found="not installed",
                hint='save the model with extra_pip_requirements=["prometheus-client"], or '
                "unset MLFLOW_SAFEFLAVOR_METRICS",
            ) from None
        self._prometheus, self._folder = prometheus, Path(os.environ[_FOLDER])
        counter, histogram = self._counter, self._histogram
        self._requests = counter("requests", "Requests by the status of their answer", "status")
        self._rows = counter("rows", "Rows that were asked")
        self._tokens = counter("tokens", "Tokens of forwards, without padding")
        self._padding = counter("padding_tokens", "Padding of forwards, in tokens")
        self._pieces = histogram("batch_pieces", "Pieces of a forward", _PIECES)
        self._request_seconds = histogram("request_seconds", "From arrival to answer")
        self._queue_seconds = histogram("queue_seconds", "From arrival to the first forward")
        self._forward_seconds = histogram("forward_seconds", "Time of a forward")
        self._tell_load(model)
        model.scheduler.observe(self._forward)

    # In no registry: what is served is collected from the files of all workers.

    def _counter(self, name: str, words: str, *labels: str) -> Any:
        return self._prometheus.Counter(f"safeflavor_{name}", words, labels, registry=None)

    def _histogram(self, name: str, words: str, buckets: Sequence[float] = _SECONDS) -> Any:
        return self._prometheus.Histogram(
            f"safeflavor_{name}", words, buckets=buckets, registry=None
        )

    def _tell(
        self, name: str, words: str, value: float, mode: Any = "livemax", **labels: str
    ) -> None:
        """A number that stays as it is for as long as this worker lives."""
        gauge = self._prometheus.Gauge(
            f"safeflavor_{name}", words, list(labels), registry=None, multiprocess_mode=mode
        )
        (gauge.labels(**labels) if labels else gauge).set(value)

    def _tell_load(self, model: LoadedModel) -> None:
        report = model.report
        self._tell(
            "model",
            "The model, in words",
            1,
            task=model.spec.task,
            dtype=model.spec.dtype,
            engine=report.engine,
            device=report.device,
            verified="bytes" if report.hashed_bytes else "structure",
            same_bits_in_any_batch=str(bool(model.engine.keeps_bits)).lower(),
        )
        for step, seconds in report.seconds.items():
            self._tell("load_seconds", "Time of a step of the load", seconds, step=step)
        self._tell("golden_rows", "Recorded rows that were answered again", report.golden_rows)
        # Of all workers: one that answers otherwise is the one to know of.
        identical = "Whether with the same bits"
        self._tell("golden_rows_identical", identical, report.bit_identical, mode="livemin")
        self._tell(
            "golden_rows_difference", "Largest difference of an output", report.max_difference
        )
        self._tell("workers", "Workers that live", 1, mode="livesum")

    def request(self, request: Request, status: int) -> None:
        """Count a request that has ended."""
        self._requests.labels(str(status)).inc()
        self._request_seconds.observe(time.monotonic() - request.arrived)
        self._rows.inc(request.rows)
        if request.began is not None:
            self._queue_seconds.observe(request.queued_seconds)

    def _forward(self, costs: Sequence[int], seconds: float) -> None:
        self._forward_seconds.observe(seconds)
        self._pieces.observe(len(costs))
        self._tokens.inc(sum(costs))
        self._padding.inc(len(costs) * max(costs) - sum(costs))

    def serve(self, host: str, port: int) -> None:
        """Serve the metrics of all workers from a thread, once the port is free."""
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        # In this order: files of gauges of workers that have ended go before they are read.
        registry.register(_Workers(self._folder))
        MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]

        def take_over() -> None:
            while True:
                try:
                    start_http_server(port, host, registry)
                    return
                except OSError as error:
                    # Another worker has it. All else stays as it is, however often it is tried.
                    if error.errno != errno.EADDRINUSE:
                        _logger.error("safeflavor: no metrics at %s:%s: %s", host, port, error)
                        return
                    time.sleep(_AGAIN)

        threading.Thread(target=take_over, name="safeflavor-metrics", daemon=True).start()


class _Workers:
    """Memory of the living workers; gauges of those that ended are removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        """Called by prometheus-client at each scrape."""
        from prometheus_client.core import GaugeMetricFamily
        from prometheus_client.multiprocess import mark_process_dead

        memory = {"rss": 0, "pss": 0}
        for process in {file.stem.rpartition("_")[2] for file in self._folder.glob("*.db")}:
            if not Path(machine.ROOT, "proc", process).exists():
                mark_process_dead(int(process), str(self._folder))  # type: ignore[no-untyped-call]
                continue
            for kind, size in _memory_of(process).items():
                memory[kind] += size
        family = GaugeMetricFamily(
            "safeflavor_memory_bytes",
            "Memory of the workers; pss counts a page that several share once",
            labels=["kind"],
        )
        for kind, size in memory.items():
            family.add_metric([kind], size)
        yield family


def _memory_of(process: str) -> dict[str, int]:
    """Resident and proportional set size of a process, in bytes."""
    try:
        text = Path(machine.ROOT, "proc", process, "smaps_rollup").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return {}
    fields = (line.split() for line in text.splitlines()[1:])
    return {
        parts[0][:-1].lower(): int(parts[1]) * 1024
        for parts in fields
        if parts[0] in ("Rss:", "Pss:")
    }


def address_of(text: str) -> tuple[str, int]:
    """Host and port of ``PORT``, which is this machine's alone, or ``HOST:PORT``.

    Raises:
        InputError: It is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(
            "Not a place for metrics",
            where=METRICS,
            wanted="PORT or HOST:PORT, such as 9090 or 0.0.0.0:9090",
            found=repr(text),
        )
    return host.strip("[]") or "127.0.0.1", int(port)
