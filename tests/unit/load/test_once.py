"""A worker of Spark keeps the models that it was last asked for."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from mlflow_safeflavor.load import once as room
from mlflow_safeflavor.load.once import in_spark_task, once


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(room, "_kept", type(room._kept)())
    monkeypatch.setattr(room, "Layout", lambda root: root)
    monkeypatch.setattr(room, "read_manifest", lambda root: {"sha256": root.name})


def test_the_same_files_and_options_are_loaded_once_wherever_they_lie(tmp_path):
    loads = []

    def asked(place, options):
        return once(lambda: loads.append(place) or object(), tmp_path / place, options)

    first = asked("a/model", "options")
    assert asked("b/model", "options") is first
    assert asked("a/model", "other options") is not first
    assert loads == ["a/model", "a/model"]


def test_the_two_last_asked_for_are_kept(tmp_path):
    def asked(name):
        return once(object, tmp_path / name, "")

    first, second = asked("1"), asked("2")
    assert asked("1") is first
    asked("3")
    assert asked("1") is first
    assert asked("2") is not second


def test_a_load_that_fails_leaves_the_others(tmp_path):
    kept = once(object, tmp_path / "1", "")
    with pytest.raises(ZeroDivisionError):
        once(lambda: 1 / 0, tmp_path / "2", "")
    assert once(object, tmp_path / "1", "") is kept


def test_only_a_process_with_a_task_is_a_worker(monkeypatch):
    monkeypatch.delitem(sys.modules, "pyspark", raising=False)
    assert not in_spark_task()
    for task in (None, object()):
        context = SimpleNamespace(get=lambda task=task: task)
        monkeypatch.setitem(sys.modules, "pyspark", SimpleNamespace(TaskContext=context))
        assert in_spark_task() is (task is not None)
