"""``benchmarks/soak.py``: a short run against a real server, and what counts as wrong or lost."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_safeflavor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:  # its other files have names of libraries
    patch.syspath_prepend(BENCHMARKS)
    _callers, _soaked = map(importlib.import_module, ("_callers", "_soaked"))


@pytest.mark.slow
@pytest.mark.serve
def test_under_faults_every_answer_is_right_and_none_is_lost(tmp_path, tiny_bert, tiny_tokenizer):
    mlflow_safeflavor.save_model(
        tiny_bert(head=None, initializer_range=0.5),
        tmp_path / "model",
        tokenizer=tiny_tokenizer,
        task="feature-extraction",
        input_columns={"text": "text"},
        graph="require",
        rehearse=False,
    )
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--model", str(tmp_path / "model")]
    command += ["--minutes", "0.6", "--load", "0.3", "--json", str(tmp_path / "figures.json")]
    command += ["--plot", str(tmp_path / "plot.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["outcomes"]["wrong"] == figures["outcomes"]["lost"] == 0, done.stdout
    assert [kind for kind, count in figures["met"].items() if not count] == [], done.stdout
    assert figures["kinds"]["good: right"] > 100, done.stdout
    assert figures["memory"]["oldest"]["growth"] < 100e6, done.stdout
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    print(done.stdout)


# What is counted as what.


def asked(outcome, *, began=10.0, ended=11.0, port=4000, kind="good"):
    return _callers.Asked(kind, began, began, ended, outcome, 0, "why", port)


def seen(*requests):
    return _soaked.Seen(
        60, asked=[*requests], kills=[_soaked.Kill(10.5, 10.6, {4000})], accepted={5000}, told=50.0
    )


@pytest.mark.parametrize(
    ("one", "outcome"),
    [
        (asked("silent"), "killed with its worker"),
        (asked("silent", port=4001), "lost"),
        (asked("silent", began=10.7), "lost"),
        (asked("silent", ended=10.4), "lost"),
        (asked("silent", began=49, ended=51, port=5001), "came when the server ended"),
        (asked("silent", began=49, ended=51, port=5000), "lost"),
        (asked("wrong"), "wrong"),
        (asked("right"), "right"),
        (asked("left", kind="hangs up in its body"), "left"),
    ],
)
def test_a_request_without_an_answer_is_lost_unless_its_worker_was_killed(one, outcome):
    run = seen(one)
    assert dict(_soaked.settle(run)) == {(one.kind, outcome): 1}
    assert bool(run.problems) == (outcome in ("wrong", "lost"))


QUESTION = _callers.Question(b"{}", [{"embedding": [0.5, 0.25]}])
RIGHT = b'{"predictions": [{"embedding": [0.5, 0.25]}]}'


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome"),
    [
        (200, {}, RIGHT, "right"),
        (200, {}, RIGHT.replace(b"0.25", b"0.25000000000000006"), "wrong"),
        (200, {b"x-request-id": b"b"}, RIGHT, "wrong"),
        (400, {}, b"{}", "wrong"),
        (500, {}, b"Internal Server Error", "wrong"),
        (503, {b"retry-after": b"1"}, b"", "refused"),
        (503, {b"retry-after": b"0"}, b"", "wrong"),
        (503, {}, b"", "wrong"),
    ],
)
def test_an_answer_is_right_to_the_last_bit_or_it_is_wrong(status, headers, body, outcome):
    answer = _callers._Answer(status, {b"x-request-id": b"a", **headers}, body)
    assert _callers._judged(answer, b"a", QUESTION, ())[0] == outcome


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (400, b'{"message": "no"}', "refused"),
        (400, b'{"stack_trace": "Traceback (most recent call last)"}', "wrong"),
        (200, RIGHT, "wrong"),
        (413, b"", "wrong"),
    ],
)
def test_a_bad_request_has_its_status_and_no_traceback(status, body, outcome):
    answer = _callers._Answer(status, {b"x-request-id": b"a"}, body)
    assert _callers._judged(answer, b"a", None, (400,))[0] == outcome
