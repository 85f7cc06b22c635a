"""``verify --endpoint``.

Real servers, a dead one, one that is none, and what the page and the exit status say.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import platform
import re
import socket
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import TEXTS, edit_json, flip, reseal
from click.testing import CliRunner

import mlflow_safeflavor
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import InputError, IntegrityError, SafeFlavorError, TrustError
from mlflow_safeflavor.predict.comparison import compare_answers
from mlflow_safeflavor.predict.parity import ParityReport
from mlflow_safeflavor.verify.page import render

pytest_plugins = "saved_models"

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MLFLOW_SAFEFLAVOR_NUM_THREADS": "1"}
TELL = "MLFLOW_SAFEFLAVOR_TELL_ENVIRONMENT"


@pytest.fixture
def run(monkeypatch):
    """Run ``mlflow-safeflavor verify ARGUMENTS`` in this process, on a terminal of 400 columns."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments):
        done = CliRunner().invoke(main, ["verify", *(str(argument) for argument in arguments)])
        assert "Traceback" not in done.output
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(
            done.exception
        )
        return done

    return invoke


def facts_of(report) -> dict[str, Any]:
    """What the server told about itself."""
    return report.environments["server"]


@contextlib.contextmanager
def answering(answer):
    """URL of a server on a free port that answers each POST with ``answer(body)``.

    Status, content type, content.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, body))
            status, kind, content = answer(body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url: Any = Url(f"http://127.0.0.1:{server.server_address[1]}")
        url.asked = asked
        yield url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Url(str):
    """An address, and what was asked there."""


def scoring(path, change=None):
    """What MLflow's own request handler answers for a model loaded in this process.

    ``change`` works on predictions.
    """
    # whose import warns, which saved_models lets pass only in tests
    from mlflow.pyfunc import scoring_server

    model = mlflow.pyfunc.load_model(str(path))
    schema = model.metadata.get_input_schema()

    def answer(body):
        try:
            done = scoring_server.invocations(body, "application/json", model, schema)
        except mlflow.exceptions.MlflowException as error:
            return (
                error.get_http_status_code(),
                "application/json",
                error.serialize_as_json().encode(),
            )
        content = json.loads(done.response)
        if change is not None:
            change(content["predictions"])
        return done.status, done.mimetype, json.dumps(content).encode()

    return answering(answer)


def facts_in(page):
    """Lines of the page's table of environments.

    Name → (texts, whether they are marked as different).
    """
    reader = Page()
    reader.feed(page)
    assert reader.open == [], "a tag is not closed"
    return {
        cells[0]: (cells[1:], marked)
        for table, cells, marked in reader.lines
        if table == "environments" and cells
    }


class Page(HTMLParser):
    """Tables of a page, its tags, and whether they are balanced."""

    VOID = ("meta", "rect", "line", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.lines, self.table, self.text, self.attributes = (
            [],
            [],
            [],
            None,
            "",
            [],
        )

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = dict(attrs).get("id")
        if tag == "tr":
            self.lines.append((self.table, [], dict(attrs).get("class") == "differs"))
        if tag in ("td", "th"):
            self.lines[-1][1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.lines[-1][1][-1] += data


# Real servers


@pytest.mark.serve
def test_a_server_of_the_same_model_tells_what_it_runs_on(run, serve, saved, tmp_path):
    rows = tmp_path / "rows.csv"
    pd.DataFrame({"review": [*TEXTS, "NA", "007", "the cat " * 9] * 30}).to_csv(rows, index=False)
    page = tmp_path / "parity.html"
    with serve(saved, env={**ONE_THREAD, TELL: "true", "A_SECRET_VARIABLE": "hunter2"}) as server:
        done = run(saved, "--endpoint", server.url, "--rows", rows, "--report", page)
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=f"{server.url}/invocations/")
        nothing_special = server.invoke({"inputs": TEXTS})
    assert done.exit_code == 0, done.output
    assert "verdict: bit-identical" in done.output
    assert "180 rows of yours: 180 bit-identical" in done.output
    assert "does not tell" not in done.output
    assert report.bit_identical
    assert len(report.rows) == len(
        json.loads((saved / "safeflavor" / "parity.json").read_text())["rows"]
    )
    assert len(nothing_special.json()["predictions"]) == len(TEXTS)

    told = facts_of(report)
    recorded = json.loads((saved / "safeflavor" / "environment.json").read_text())
    assert told["environment"]["python"] == platform.python_version()
    assert told["environment"]["distributions"] == recorded["distributions"]
    assert told["environment"]["torch_build"]["version"] == str(torch.__version__)
    assert (
        told["environment"]["torch_build"]["cpu_capability"]
        == torch.backends.cpu.get_cpu_capability()
    )
    assert told["device"] == "cpu"
    assert told["budget"]["threads"] == 1
    assert told["budget"]["source"] == "num_threads"
    assert told["loader_version"] == mlflow_safeflavor.__version__
    text = json.dumps(told)
    for private in (
        "hunter2",
        "A_SECRET_VARIABLE",
        str(saved),
        "/tmp",
        "/home",
        "/root",
        "site-packages",
    ):
        assert private not in text
    assert socket.gethostname() not in text

    facts = facts_in(page.read_text())
    assert facts[""][0] == ["when it was saved", "here", "server"]
    assert facts["python"] == ([platform.python_version()] * 3, False)
    assert facts["threads chosen"][0] == ["", "", "1"]
    assert facts["turns before idle threads sleep"][0] == ["", "", "left as it was"]


@pytest.mark.serve
def test_a_server_of_other_weights_is_found_out_and_tells_nothing_unasked(
    run, serve, saved, tiny_bert, tiny_tokenizer, tmp_path
):
    other, page = tmp_path / "other", tmp_path / "parity.html"
    model = tiny_bert(seed=1, initializer_range=0.5)
    mlflow_safeflavor.save_model(model, other, tokenizer=tiny_tokenizer, rehearse=False, graph="no")
    recorded = json.loads((saved / "safeflavor" / "parity.json").read_text())["answers"]
    with serve(other, env=ONE_THREAD) as server:
        done = run(saved, "--endpoint", server.url, "--report", page)
        frame = {"columns": ["text"], "index": ["safeflavor_environment"], "data": [[TEXTS[0]]]}
        ordinary = server.invoke({"dataframe_split": frame}).json()["predictions"]
        found = server.invoke({"inputs": TEXTS}).json()["predictions"]
    assert done.exit_code == 1, done.output
    assert "verdict: different" in done.output
    fields = [name for name in ("label", "score") if found[0][name] != recorded[0][name]]
    first = (
        f"first difference: row 0, {fields[0]}: {found[0][fields[0]]!r}, recorded "
        f"{recorded[0][fields[0]]!r}"
    )
    assert first in done.output
    assert ordinary == found[:1], "with the variable unset the label of a row means nothing"
    assert "MLFLOW_SAFEFLAVOR_TELL_ENVIRONMENT" in done.output
    assert facts_in(page.read_text())["python"] == ([platform.python_version(), "not told"], False)
    assert 'id="verdict">different<' in page.read_text()


EXAMPLE = {
    "x": np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4),
    "mask": np.array([True, False, True]),
    "scale": np.array(0.1, dtype="float32"),
}


@pytest.fixture
def affine(tmp_path):
    """A module of named arrays of any number of dimensions, 0 too, which only a pickle restores."""

    class Affine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(4, 2)

        def forward(self, x, mask, scale):
            return {"y": self.out(x) * mask[:, None] * scale, "count": mask.sum()}

    path = tmp_path / "affine"
    mlflow_safeflavor.save_model(
        Affine(),
        path,
        task="raw",
        input_example=EXAMPLE,
        allow_pickle=True,
        rehearse=False,
        graph="no",
    )
    return path


@pytest.mark.serve
def test_a_server_of_named_arrays(run, serve, affine, tmp_path):
    rows = tmp_path / "rows.jsonl"
    request = {"x": [[0.1, 2, 3, 4]], "mask": [True], "scale": 0.3}
    rows.write_text(f"{json.dumps(request)}\n{json.dumps({**request, 'scale': 3})}\n")
    environment = {**ONE_THREAD, TELL: "1", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}
    with serve(affine, env=environment) as server:
        done = run(affine, "--endpoint", server.url, "--rows", rows, "--trust", "pickle")
        report = mlflow_safeflavor.verify_model(str(affine), endpoint=server.url)
        untrusted = run(affine, "--endpoint", server.url, "--rows", rows)
    assert done.exit_code == 0, done.output
    assert "2 rows of yours: 2 bit-identical" in done.output
    assert facts_of(report)["environment"]["python"] == platform.python_version()
    assert untrusted.exit_code == 2
    assert "TrustError" in untrusted.stderr


# Servers that are none, or refuse


def test_a_server_that_is_not_there(run, saved):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        done = run(saved, "--endpoint", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 2, done.output
    assert "SafeFlavorError: The server cannot be reached" in done.stderr
    assert "refused" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("status", [200, 404, 501])
def test_a_server_that_is_no_mlflow(run, saved, status):
    with answering(
        lambda body: (status, "text/html", "<html>\x1b[31mWelcome ü</html>".encode())
    ) as url:
        done = run(saved, "--endpoint", url)
    assert done.exit_code == 2, done.output
    assert "This is not an MLflow scoring server" in done.stderr
    assert f"status {status}" in done.stderr
    assert "\x1b" not in done.output
    assert url.asked[0][0] == "/invocations"


NO_ANSWERS = {
    "no JSON": b"{",
    "no predictions": b'{"answers": []}',
    "a list": b"[]",
    "too few": b'{"predictions": []}',
    "a number": b'{"predictions": 3}',
    "deep": b'{"predictions": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("content", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_answers_that_are_none(run, saved, content):
    with answering(lambda body: (200, "application/json", content)) as url:
        done = run(saved, "--endpoint", url)
    assert done.exit_code == 2, done.output
    assert "SafeFlavorError" in done.stderr


def test_a_redirect_is_not_followed(run, saved):
    with answering(lambda body: (302, "text/plain", b"")) as url:
        done = run(saved, "--endpoint", url)
    assert done.exit_code == 2
    assert "status 302" in done.stderr


def test_a_server_that_takes_too_long(run, saved):
    wait = threading.Event()

    def answer(body):
        wait.wait(30)
        return 200, "application/json", b"{}"

    with answering(answer) as url:
        done = run(saved, "--endpoint", url, "--timeout", "0.3")
        wait.set()
    assert done.exit_code == 2, done.output
    assert "no answer in time" in done.stderr


def test_a_server_of_a_model_with_other_columns(run, saved, affine, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    with scoring(affine) as url:
        done = run(saved, "--endpoint", url)
    assert done.exit_code == 2, done.output
    assert "The server refuses the request" in done.stderr
    assert "status 400" in done.stderr


@pytest.mark.parametrize(
    "address", ["", "host:5000", "ftp://host", "http://", "http://host:port", "http://[::1"]
)
def test_an_address_that_is_none(run, saved, address):
    done = run(saved, "--endpoint", address)
    assert done.exit_code == 2, done.output
    assert "InputError: Not the address of a server" in done.stderr


def test_a_password_in_the_address_is_not_shown(run, saved, tmp_path):
    page = tmp_path / "parity.html"
    with scoring(saved) as url:
        done = run(saved, "--endpoint", url.replace("//", "//me:hunter2@"), "--report", page)
    assert done.exit_code == 0, done.output
    assert "hunter2" not in done.output + page.read_text()
    with answering(lambda body: (500, "text/plain", b"")) as url:
        done = run(saved, "--endpoint", url.replace("//", "//me:hunter2@"))
    assert done.exit_code == 2
    assert "hunter2" not in done.output


@pytest.mark.parametrize("name", ["parity.json", "parity.safetensors", "environment.json"])
def test_golden_rows_that_were_changed_prove_nothing(run, copied, name):
    flip(copied / "safeflavor" / name)
    with answering(lambda body: (200, "application/json", b"{}")) as url:
        done = run(copied, "--endpoint", url)
    assert done.exit_code == 2, done.output
    assert (
        "IntegrityError: Files of the artifact are not the ones that were saved\n  where: "
        f"safeflavor/{name}" in (done.stderr)
    )
    assert url.asked == []


@pytest.mark.parametrize("rows", [[1], [{}], ["text"]], ids=repr)
def test_golden_rows_that_are_none(copied, rows):
    edit_json(
        copied / "safeflavor" / "parity.json",
        lambda content: content.update(rows=rows, answers=content["answers"][:1]),
    )
    reseal(copied)
    with pytest.raises(IntegrityError, match="golden rows are not rows of this model"):
        mlflow_safeflavor.verify_model(str(copied), endpoint="http://127.0.0.1:1")


def test_a_folder_without_a_model(run, tmp_path):
    done = run(tmp_path, "--endpoint", "http://127.0.0.1:1")
    assert done.exit_code == 2
    assert "IntegrityError: There is no MLflow model" in done.stderr


# Verdicts


def shifted(by):
    def change(predictions):
        for answer in predictions:
            answer["score"] += by

    return change


def test_within_tolerance(run, saved, tmp_path):
    page = tmp_path / "parity.html"
    with scoring(saved, shifted(1e-6)) as url:
        done = run(saved, "--endpoint", url, "--report", page)
    assert done.exit_code == 0, done.output
    assert "verdict: within tolerance" in done.output
    recorded = json.loads((saved / "safeflavor" / "parity.json").read_text())["answers"]
    assert (
        f"first difference: row 0, score: {recorded[0]['score'] + 1e-6!r}, recorded" in done.output
    )
    assert 'id="verdict">within tolerance<' in page.read_text()
    svg = ET.fromstring(*re.findall(r"<svg.*</svg>", page.read_text(), re.DOTALL))
    bars = [text.text for text in svg.iter("text")]
    # Labels are equal, scores are off by 1e-6 and rounding: a little more for some, a little less
    # for others.
    assert bars[:2] == [str(len(recorded)), "0"]
    assert {"1e-7", "1e-6"} & set(bars)
    assert "other" not in bars
    assert f"{2 * len(recorded)} values." in page.read_text()


def test_beyond_tolerance(run, saved):
    with scoring(saved, shifted(1e-3)) as url:
        assert run(saved, "--endpoint", url).exit_code == 1


def test_one_answer_among_rows_of_ones_own(run, saved, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"text": text} for text in [*TEXTS, "a red [bold]tree"]]))

    def change(predictions):
        if len(predictions) == 4:
            predictions[3]["label"] = "[red]<script>alert(1)</script>\x1b[1m"

    page = tmp_path / "parity.html"
    with scoring(saved, change) as url:
        done = run(saved, "--endpoint", url, "--rows", rows, "--report", page)
    assert done.exit_code == 1, done.output
    assert "4 rows of yours: 3 bit-identical, 1 different" in done.output
    assert (
        "first difference: your row 3, label: '[red]<script>alert(1)</script>\\x1b[1m', here "
        "'LABEL_" in done.output
    )
    content = page.read_text()
    reader = Page()
    reader.feed(content)
    assert "script" not in reader.tags
    assert "<script>alert(1)</script>" in reader.text
    assert "\x1b" not in content
    # Nothing is fetched: no address in any attribute, and the browser is told to refuse.
    assert not [a for a in reader.attributes if a[1] in ("src", "href") or "//" in (a[2] or "")]
    assert "default-src 'none'" in content


# Recorded → found, and what is said of it.
CASES = {
    "equal": ({"a": 0.1}, {"a": 0.1}, "bit-identical", 0.0, None),
    "a NaN": ({"a": float("nan")}, {"a": None}, "bit-identical", 0.0, None),
    "infinity": ({"a": float("inf")}, {"a": float("inf")}, "bit-identical", 0.0, None),
    "the last bit": (
        {"a": 0.1},
        {"a": np.nextafter(0.1, 1).item()},
        "within tolerance",
        2e-17,
        "row 0, a: 0.1",
    ),
    "minus zero": (
        {"a": 0.0},
        {"a": -0.0},
        "within tolerance",
        0.0,
        "row 0, a: -0.0, recorded 0.0",
    ),
    "beyond": (
        {"a": [1.0, 2.0]},
        {"a": [1.0, 2.5]},
        "different",
        0.5,
        "row 0, a[1]: 2.5, recorded 2.0",
    ),
    "the worse one": (
        {"a": [1.0, 2.0]},
        {"a": [1.00001, 3.0]},
        "different",
        1.0,
        "row 0, a[1]: 3.0",
    ),
    "nested": (
        {"a": [[1.0], [2.0]]},
        {"a": [[1.0], [2.5]]},
        "different",
        0.5,
        "row 0, a[1][0]: 2.5",
    ),
    "ragged": (
        {"a": [[1.0], [2.0, 3.0]]},
        {"a": [[1.0], [2.0, 4.0]]},
        "different",
        1.0,
        "row 0, a[1][1]: 4.0",
    ),
    "a NaN for a number": (
        {"a": 1.0},
        {"a": float("nan")},
        "different",
        np.inf,
        "row 0, a: nan, recorded 1.0",
    ),
    "a whole number": ({"a": 100_000}, {"a": 100_001}, "different", 1.0, "row 0, a: 100001"),
    "a huge number": ({"a": 2**70}, {"a": 2**70}, "bit-identical", 0.0, None),
    "a truth value": ({"a": True}, {"a": 1}, "different", np.inf, "row 0, a: 1, recorded True"),
    "a text": ({"a": "x"}, {"a": "y"}, "different", np.inf, "row 0, a: 'y', recorded 'x'"),
    "a number as text": (
        {"a": 1.0},
        {"a": "1.0"},
        "different",
        np.inf,
        "row 0, a: '1.0', recorded 1.0",
    ),
    "another length": (
        {"a": [1.0]},
        {"a": [1.0, 1.0]},
        "different",
        np.inf,
        "row 0, a: [1.0, 1.0], recorded",
    ),
    "a field too few": (
        {"a": 1.0, "b": 1},
        {"a": 1.0},
        "different",
        np.inf,
        "row 0: {'a': 1.0}, recorded",
    ),
    "empty": ({"a": []}, {"a": []}, "bit-identical", 0.0, None),
}


@pytest.mark.parametrize(
    ("old", "new", "verdict", "most", "first"), CASES.values(), ids=CASES.keys()
)
def test_comparing(old, new, verdict, most, first):
    (row,) = compare_answers([old], [new], 1e-4, 1e-4, golden=True)
    assert row.verdict == verdict
    assert row.max_difference == pytest.approx(most, rel=0.5)
    assert (row.first or "").startswith(first or "\0" if first else "")
    assert (row.first is None) == (first is None)
    assert (row.problem is None) == (verdict != "different")


# Rows of the user's


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_texts_stay_texts_in_every_kind_of_file(run, saved, tmp_path, ending):
    texts = ["007", "NA", "", "2020-01-01", "1e5", "the cat, “sat”\nü"]
    frame = pd.DataFrame({"text": texts})
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=ending == "jsonl")
    with scoring(saved) as url:
        done = run(saved, "--endpoint", url, "--rows", path)
    assert done.exit_code == 0, done.output
    assert "6 rows of yours: 6 bit-identical" in done.output
    assert [row[0] for row in json.loads(url.asked[1][1])["dataframe_split"]["data"]] == texts


def test_many_rows_go_in_several_requests_in_order(saved):
    frame = pd.DataFrame(
        {"text": [f"{'the cat ' * (i % 7)}{i}" for i in range(250)]}, index=range(250, 0, -1)
    )
    with scoring(saved) as url:
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=url, rows=frame)
    sent = [len(json.loads(body)["dataframe_split"]["data"]) for _, body in url.asked]
    golden = sent[0]
    assert sent == [golden, 100, 100, 50, 1]
    assert [row.row for row in report.rows] == [*range(golden), *range(250)]
    assert report.bit_identical


BAD_ROWS = {
    "an ending nobody knows": ("rows.txt", "text\na\n", "wanted: .csv | .json"),
    "no JSON": ("rows.json", "{", "Rows cannot be read from this file"),
    "no Parquet": ("rows.parquet", "PAR1", "Rows cannot be read from this file"),
    "no rows": ("rows.csv", "text\n", "There are no rows"),
    "nothing": ("rows.csv", "", "Rows cannot be read from this file"),
    "a column too many": ("rows.csv", "text,more\na,b\n", "columns 'text' and 'more'"),
    "no text": ("rows.json", '[{"text": null}]', "row 0, column 'text'"),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_rows_that_are_none(run, saved, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with scoring(saved) as url:
        done = run(saved, "--endpoint", url, "--rows", tmp_path / name)
    assert done.exit_code == 2, done.output
    assert "InputError" in done.stderr
    assert said in done.stderr


def test_rows_without_a_server(run, saved, tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n")
    done = run(saved, "--rows", tmp_path / "rows.csv")
    assert done.exit_code == 2
    assert "InputError: There is nothing to compare your rows with" in done.stderr


def test_a_page_that_cannot_be_written(run, saved, tmp_path):
    with scoring(saved) as url:
        done = run(saved, "--endpoint", url, "--report", tmp_path / "no folder" / "parity.html")
    assert done.exit_code == 2
    assert "InputError: The page cannot be written" in done.stderr


# Hooks of the user's own


def double(rows, tokenizer):
    return {"x": torch.tensor([[float(row["size"])] for row in rows])}


def name_it(outputs, rows):
    return [
        {
            "name": row["name"],
            "value": value.item(),
            "big": bool(value > 2),
            "whole": round(value.item()),
        }
        for row, value in zip(rows, outputs["y"], strict=True)
    ]


class Times(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([1.1]))

    def forward(self, x):
        return {"y": x * self.factor}


@pytest.fixture
def times(tmp_path):
    path = tmp_path / "times"
    example = pd.DataFrame({"name": ["a", "b"], "size": [1.5, 4.0]})
    mlflow_safeflavor.save_model(
        Times(),
        path,
        task="custom",
        preprocess=double,
        postprocess=name_it,
        input_example=example,
        allow_pickle=True,
        rehearse=False,
        graph="no",
    )
    return path


def test_hooks_of_ones_own_and_what_the_server_tells(monkeypatch, times):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    monkeypatch.setenv(TELL, "true")
    # whole numbers, which MLflow makes doubles of
    rows = pd.DataFrame({"name": ["x", "y", "z"], "size": [1, 2, 3]})
    with scoring(times) as url:
        report = mlflow_safeflavor.verify_model(
            str(times), endpoint=url, rows=rows, trust={"code", "pickle"}
        )
        with pytest.raises(TrustError):
            mlflow_safeflavor.verify_model(str(times), endpoint=url, rows=rows)
    assert report.bit_identical
    assert len(report.rows) == 5
    assert facts_of(report)["environment"]["system"] == platform.system()


@pytest.mark.parametrize("value", ["", "false", "0", "yes"])
def test_nothing_is_told_unless_it_is_said_so(monkeypatch, saved, value):
    monkeypatch.setenv(TELL, value)
    with scoring(saved) as url:
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=url)
    assert report.environments["server"] is None
    assert report.ok


def test_what_looks_like_the_request_is_answered_as_rows(monkeypatch, saved, affine):
    monkeypatch.setenv(TELL, "true")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    model = mlflow.pyfunc.load_model(str(saved))
    label = "safeflavor_environment"
    assert len(model.predict(pd.DataFrame({"text": [label]}))) == 1
    assert list(
        model.predict(pd.DataFrame({"text": ["a", "b"]}, index=[label, label])).columns
    ) == ["label", "score"]
    assert list(model.predict(pd.DataFrame({"text": ["a"]}, index=[label]))) == [label]
    arrays = mlflow.pyfunc.load_model(str(affine)).predict(EXAMPLE)
    assert sorted(arrays) == ["count", "y"]


# The page


def test_differences_of_environments_are_marked_and_told_facts_escaped(saved, tmp_path):
    here = mlflow_safeflavor.verify_model(str(saved))
    told = json.loads(json.dumps(here.environments["saved"]))
    told["environment"]["python"] = "<b>3.99</b>"
    told["environment"]["distributions"]["torch"] = "0.1"
    del told["environment"]["distributions"]["numpy"]
    told["environment"]["torch_build"] = "a stranger may tell anything"
    told["budget"] = [1]
    here = replace(here, environments={**here.environments, "server": told})
    content = render(here, model="<i>", endpoint="http://h/?<u>")
    facts = facts_in(content)
    assert facts["python"] == (
        [platform.python_version(), platform.python_version(), "<b>3.99</b>"],
        True,
    )
    assert facts["pin torch"][1]
    assert facts["pin numpy"][0][2] == "not installed"
    assert facts["pin numpy"][1]
    assert facts["system"] == ([platform.system()] * 3, False)
    assert "pin pandas" not in facts, "what is the same is folded away"
    assert "<b>" not in content
    assert "<u>" not in content
    assert "<i>" not in content


def test_the_plot_has_no_bar_for_every_power_there_is():
    found = [{"a": value} for value in (1.0, 1 + 1e-5, 3.0, 1e300, "x")]
    tiny = compare_answers([{"a": 0.0}], [{"a": 1e-300}], 1e-4, 1e-4, golden=True)
    rows = [*tiny, *compare_answers([{"a": 1.0}] * 5, found, 1e-4, 1e-4, golden=True, start=1)]
    content = render(ParityReport(tuple(rows), 1e-4, 1e-4), model="m")
    svg = ET.fromstring(*re.findall(r"<svg.*</svg>", content, re.DOTALL))
    texts = [text.text for text in svg.iter("text")][:-1]
    bars = dict(zip(texts[1::2], texts[::2], strict=True))
    assert {label: count for label, count in bars.items() if count != "0"} == {
        "0": "1",
        "≤ 1e-12": "1",
        "1e-5": "1",
        "1e0": "1",
        "≥ 1e6": "1",
        "other": "1",
    }
    assert len(bars) == 21


def test_a_page_of_a_model_loaded_here(run, saved, tmp_path):
    page = tmp_path / "parity.html"
    done = run(saved, "--report", page)
    assert done.exit_code == 0, done.output
    assert facts_in(page.read_text())[""][0] == ["when it was saved", "here"]
    assert 'id="verdict">bit-identical<' in page.read_text()


def test_errors_of_the_api(saved):
    with pytest.raises(InputError, match="nothing to compare"):
        mlflow_safeflavor.verify_model(str(saved), rows=pd.DataFrame({"text": ["a"]}))
    with pytest.raises(SafeFlavorError, match="cannot be reached"):
        mlflow_safeflavor.verify_model(str(saved), endpoint="http://127.0.0.1:1")
