"""What a replay found is kept for a week, and nothing of one that failed."""

from __future__ import annotations

import os
import time

import pytest

from mlflow_safeflavor.artifact import host_cache
from mlflow_safeflavor.load.outcome import Outcome, kept

FOUND = Outcome(golden_rows=4, answered_now=4, max_difference=1e-7, bit_identical=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(host_cache.VARIABLE, str(tmp_path))
    return tmp_path


def replayed(name="replay-1", found=FOUND):
    """What was kept before a replay that found ``found``."""
    with kept(name) as there:
        before, there.outcome = there.outcome, there.outcome or found
    return before


def test_the_first_outcome_is_kept():
    assert replayed() is None
    assert replayed() == FOUND
    assert replayed(found=Outcome(9)) == FOUND
    assert replayed("replay-2") is None


def test_nothing_is_kept_of_a_replay_that_fails(cache):
    with pytest.raises(ZeroDivisionError), kept("replay-1") as there:
        there.outcome = Outcome(1 // 0)
    assert replayed() is None


@pytest.mark.parametrize("variable", ["off", "relative"])
def test_nothing_is_kept_without_a_cache(variable, monkeypatch):
    monkeypatch.setenv(host_cache.VARIABLE, variable)
    assert replayed() is None
    assert replayed() is None


def test_nothing_is_kept_without_a_name(cache):
    assert replayed(None) is None
    assert replayed(None) is None
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "junk", ["", "{", "{}", "[]", '{"rows": 1}', '{"golden_rows": "4"}', '"4"']
)
def test_junk_counts_as_nothing(cache, junk):
    replayed()
    [file] = cache.glob("replay-1/*")
    file.write_text(junk)
    assert replayed() is None
    assert replayed() == FOUND


@pytest.mark.parametrize("days", [7.1, -1])
def test_it_counts_for_a_week_and_not_from_the_future(cache, days):
    replayed()
    [file] = cache.glob("replay-1/*")
    then = time.time() - days * 86400
    os.utime(file, (then, then))
    assert replayed() is None
    assert replayed() == FOUND


def test_a_disk_that_takes_nothing_costs_time_alone(cache):
    replayed()
    [file] = cache.glob("replay-1/*")
    file.unlink()
    file.mkdir()
    assert replayed() is None
    assert replayed() is None
