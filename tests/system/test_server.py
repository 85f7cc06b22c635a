"""MLflow's real server with several workers: metrics, lines, bursts, kills and the end."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from artifacts import TEXTS, rewrite

import mlflow_safeflavor

pytest.importorskip("prometheus_client")
pytest_plugins = "saved_models"
pytestmark = [pytest.mark.serve, pytest.mark.slow]

ROWS = {"dataframe_records": [{"text": text} for text in TEXTS]}
# Seconds of work for the tiny model, most of it in small pieces.
MANY = {"dataframe_records": [{"text": f"{i} {TEXTS[i % len(TEXTS)]}"} for i in range(8_000)]}
WORKERS = {"OMP_NUM_THREADS": "1", "MLFLOW_MODELS_WORKERS": "2"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scraped(port):
    """Series → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        series: float(value)
        for series, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }


def until(condition, what, seconds=60.0):
    """The first truth that ``condition`` gives; none while processes come and go."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (OSError, KeyError, http.client.HTTPException, psutil.Error):
            pass
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds} s")


def workers_of(server):
    """Processes that answer; uvicorn's tracker of resources is none."""
    command = psutil.Process(server.process.pid)
    parent = next(
        process
        for process in [command, *command.children(recursive=True)]
        if "mlflow.pyfunc.scoring_server.app:app" in process.cmdline()
    )
    return {
        child.pid: child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())
    }


def post(server, body, **headers):
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/invocations", content, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


JSON = {"Content-Type": "application/json"}


def test_two_workers_count_together_and_one_that_is_killed_is_replaced(serve, saved_with_graph):
    port = free_port()
    env = {
        **WORKERS,
        "MLFLOW_SAFEFLAVOR_METRICS": str(port),
        "MLFLOW_SAFEFLAVOR_LOG_REQUESTS": "true",
    }
    with serve(saved_with_graph, env=env, workers=2) as server:
        until(lambda: scraped(port).get("safeflavor_workers") == 2, "two workers")
        before = json.loads(post(server, ROWS, **JSON)[2])["predictions"]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(server, ROWS, **JSON), range(39)))
        assert {status for status, *_ in answers} == {200}
        assert post(server, b"{", **JSON)[0] == 400
        # Counted once it is over, which is after the client has its answer.
        until(lambda: scraped(port)["safeflavor_request_seconds_count"] == 41, "41 requests")
        found = scraped(port)
        assert found['safeflavor_requests_total{status="200"}'] == 40
        assert found['safeflavor_requests_total{status="400"}'] == 1
        assert found["safeflavor_rows_total"] == 40 * len(TEXTS)
        assert found["safeflavor_batch_pieces_sum"] == 40 * len(TEXTS)
        assert found["safeflavor_tokens_total"] > 40 * len(TEXTS)
        assert found["safeflavor_queue_seconds_count"] == 40
        assert found["safeflavor_golden_rows_identical"] == 1
        assert found['safeflavor_memory_bytes{kind="pss"}'] > 10**7
        [model] = [series for series in found if series.startswith("safeflavor_model{")]
        assert 'task="text-classification"' in model

        # The dashboard asks for nothing that is not there.
        dashboard = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
        names = {re.split("[{ ]", series)[0] for series in found}
        assert set(re.findall(r"safeflavor_\w+", dashboard)) <= names

        workers = workers_of(server)
        assert len(workers) == 2
        # Whoever has the port of the metrics; the other takes it over.
        [having] = [
            pid
            for pid, worker in workers.items()
            if any(
                connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
                for connection in worker.net_connections("inet")
            )
        ]
        os.kill(having, signal.SIGKILL)
        until(lambda: scraped(port)["safeflavor_workers"] >= 1, "metrics after a kill")
        until(
            lambda: len(workers_of(server)) == 2 and having not in workers_of(server),
            "a new worker",
        )
        until(lambda: scraped(port)["safeflavor_workers"] == 2, "two workers again")
        # What the one that was killed had counted still counts.
        assert scraped(port)['safeflavor_requests_total{status="200"}'] == 40
        assert json.loads(post(server, ROWS, **JSON)[2])["predictions"] == before

        def lines_of_log():
            log = server.log.read_text().splitlines()
            return [json.loads(line) for line in log if line[:1] == "{"]

        until(lambda: len(lines_of_log()) == 42, "42 lines")
        lines = lines_of_log()
        assert [line["status"] for line in lines].count(200) == 41
        assert all(line["rows"] == len(TEXTS) for line in lines if line["status"] == 200)
        assert not any(text in json.dumps(lines) for text in TEXTS)


def test_a_burst_is_refused_in_part_and_the_rest_is_answered(serve, saved_with_graph):
    env = {**WORKERS, "MLFLOW_SAFEFLAVOR_MAX_QUEUE": "3", "MLFLOW_SAFEFLAVOR_MAX_BODY": "1000000"}
    with serve(saved_with_graph, env=env) as server:
        wanted = post(server, ROWS, **JSON)[2]

        def until_it_is_let_in():
            while (answer := post(server, MANY, **JSON))[0] == 503:
                time.sleep(0.1)
            return answer

        # A long request first, so that the others meet in line behind it.
        with ThreadPoolExecutor(41) as pool:
            long = pool.submit(until_it_is_let_in)
            time.sleep(0.2)
            answers = list(pool.map(lambda _: post(server, ROWS, **JSON), range(80)))
            assert long.result()[0] == 200
        statuses = [status for status, *_ in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 2  # beside the long one
        for status, headers, text in answers:
            if status == 200:
                assert text == wanted
            else:
                assert int(headers["retry-after"]) >= 1
                assert "max_queue 3" in json.loads(text)["message"]
        # Before the model is asked.
        status, _, text = post(server, b"x" * 3_000_000, **JSON)
        assert (status, json.loads(text)["error_code"]) == (413, "INVALID_PARAMETER_VALUE")
        status, _, text = post(server, ROWS)
        assert (status, "Content-Type" in json.loads(text)["message"]) == (415, True)
        assert post(server, ROWS, **JSON)[0] == 200


def test_what_was_accepted_is_answered_before_the_end(serve, saved_with_graph):
    with serve(saved_with_graph, env=WORKERS, workers=2) as server:
        until(lambda: len(workers_of(server)) == 2, "two workers")
        workers = [*workers_of(server).values()]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(post, server, MANY, **JSON) for _ in range(4)]
            time.sleep(0.5)
            assert not any(request.done() for request in asked), "too few rows for this machine"
            server.process.send_signal(signal.SIGTERM)
            for request in asked:
                status, _, text = request.result()
                assert status == 200
                assert len(json.loads(text)["predictions"]) == len(MANY["dataframe_records"])
        psutil.wait_procs(workers, timeout=30)
        assert not any(worker.is_running() for worker in workers)
        with pytest.raises(ConnectionError):
            post(server, ROWS, **JSON)


@contextmanager
def collector():
    """A collector of OpenTelemetry on a port, and the spans that it was sent."""
    proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    spans = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = zlib.decompress(body, 31)
            sent = proto.ExportTraceServiceRequest.FromString(body)
            for resource in sent.resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1], spans
        finally:
            server.shutdown()


def test_spans_of_a_server_go_to_a_collector_below_the_clients(serve, saved_with_graph):
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with collector() as (port, spans):
        env = {
            "MLFLOW_SAFEFLAVOR_TRACE": "true",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with serve(saved_with_graph, env=env) as server:
            post(server, ROWS, **JSON)
            post(server, ROWS, **JSON, traceparent=f"00-{trace}-{parent}-01")
            until(lambda: len(spans) == 6, "six spans")
    of_client = {span.name: span for span in spans if span.trace_id.hex() == trace}
    prediction = of_client["safeflavor text-classification"]
    assert prediction.parent_span_id.hex() == parent
    for name in ("before the first forward", "forwards"):
        assert of_client[name].parent_span_id == prediction.span_id
    numbers = {attribute.key: attribute.value.string_value for attribute in prediction.attributes}
    assert numbers["rows"] == str(len(TEXTS))
    # Rows are the users': none of them goes anywhere.
    assert not any(text in str(spans) for text in TEXTS)


# The command of an image of our own, which has workers forked after their imports.

IN_AN_IMAGE = """
import sys
from mlflow_safeflavor.load import container
container.MODEL, container.PORT = sys.argv[1], int(sys.argv[2])
container.serve()
"""


@pytest.fixture
def imaged(tmp_path):
    """``imaged(folder)``: the server that an image would be, with two workers, and its port."""
    started = []

    def start(folder, **variables):
        port = free_port()
        environ = {**os.environ, **WORKERS, **variables}
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, "-c", IN_AN_IMAGE, str(folder), str(port)]
            process = subprocess.Popen(
                command, env=environ, stdout=log, stderr=log, start_new_session=True
            )
            started.append(process)
        return started[-1], port

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # its workers outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def forked_of(process):
    """Workers of such a server, by id."""
    return {
        child.pid: child
        for child in psutil.Process(process.pid).children()
        if child.cmdline() == [*process.args]
    }


def rows_of(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/invocations", json.dumps(ROWS), JSON)
        return json.loads(connection.getresponse().read())["predictions"]
    finally:
        connection.close()


def test_workers_of_an_image_are_forked_after_their_imports(imaged, saved_with_graph, tmp_path):
    wanted = mlflow_safeflavor.load_model(saved_with_graph).predict(TEXTS).to_dict(orient="records")
    process, port = imaged(saved_with_graph)
    until(lambda: (tmp_path / "log").read_text().count("startup complete") == 2, "two workers", 120)
    assert "2 workers: 1 threads by OMP_NUM_THREADS" in (tmp_path / "log").read_text()
    workers = until(lambda: len(forked_of(process)) == 2 and forked_of(process), "two workers")
    # A fork has none of the other threads, and their locks for ever; pyarrow's is ready for that.
    names = {task.read_text().strip() for task in Path(f"/proc/{process.pid}").glob("task/*/comm")}
    assert names - {"jemalloc_bg_thd"} == {Path(sys.executable).name}
    assert rows_of(port) == wanted
    killed = next(iter(workers))
    os.kill(killed, signal.SIGKILL)
    until(lambda: {*forked_of(process)} - {*workers}, "a new worker")
    until(lambda: (tmp_path / "log").read_text().count("startup complete") == 3, "a new worker")
    assert [rows_of(port) for _ in range(8)] == [wanted] * 8
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    until(lambda: not any(worker.is_running() for worker in workers.values()), "the end")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_that_does_not_load_ends_the_server_of_an_image(
    imaged, saved_with_graph, tmp_path, workers
):
    copied = tmp_path / "damaged"
    shutil.copytree(saved_with_graph, copied)
    rewrite(copied / "safeflavor" / "model.safetensors", b"damaged")
    process, _ = imaged(copied, MLFLOW_MODELS_WORKERS=workers)
    assert process.wait(60) not in (0, None)
    assert "IntegrityError" in (tmp_path / "log").read_text()
