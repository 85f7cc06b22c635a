"""A save ended by a signal leaves only what the next one sweeps, which spares running ones."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest

from mlflow_safeflavor.artifact import scratch
from mlflow_safeflavor.artifact.scratch import dead_folders, scratch_folder
from mlflow_safeflavor.artifact.staging import staging
from mlflow_safeflavor.save import logged

HOLDS_ONE = """
import sys, time
from pathlib import Path
from mlflow_safeflavor.artifact.scratch import add_companion, scratch_folder
with scratch_folder("rehearsal", Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("large")
    if len(sys.argv) > 2:
        add_companion(folder, Path(sys.argv[2]))
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, for this test alone."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def another(temporary):
    """``another(*arguments)``: a process that holds a scratch folder; returns it and the folder."""
    started: list[Any] = []

    def start(*arguments):
        command = [sys.executable, "-c", HOLDS_ONE, str(temporary), *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], Path(str(started[-1].stdout.readline()).strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def sweep(folder):
    with scratch_folder("lock", folder):
        pass


def test_what_a_killed_process_left_goes_and_what_a_living_one_uses_stays(
    another, temporary, tmp_path
):
    (tmp_path / "mlflow").mkdir()
    living, kept = another()
    killed, left = another(tmp_path / "mlflow")
    killed.kill()
    killed.wait()
    assert left.exists()
    sweep(temporary)
    assert not left.exists()
    assert not (tmp_path / "mlflow").exists()
    assert (kept / "weights").read_text() == "large"
    living.terminate()
    living.wait()
    sweep(temporary)
    assert list(temporary.iterdir()) == []


def test_a_companion_that_is_no_longer_the_same_folder_stays(another, temporary, tmp_path):
    companion = tmp_path / "mlflow"
    companion.mkdir()
    killed, _ = another(companion)
    killed.kill()
    killed.wait()
    companion.rename(tmp_path / "before")
    companion.mkdir()
    sweep(temporary)
    assert companion.exists()
    assert list(temporary.iterdir()) == []


def test_a_staged_model_is_swept_by_a_save_of_another_beside_it(tmp_path, temporary):
    litter = tmp_path / f".other-{scratch._host()}-abcd1234.staging"
    litter.mkdir()
    (litter / "model.safetensors").write_text("")
    with staging(tmp_path / "model") as stage:
        assert not litter.exists()
        with staging(tmp_path / "beside"):  # of the same process, at the same time
            assert stage.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "model", "tmp"]


@pytest.mark.parametrize(
    "name",
    [
        "a.staging",
        ".m-staging",
        ".m-0123456-abcd1234.staging",
        ".m-01234567-abcd1234.other",
        "tmpabcd1234",
    ],
)
def test_what_only_looks_alike_stays(tmp_path, temporary, name):
    (tmp_path / name).mkdir()
    os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path)
    assert (tmp_path / name).exists()


def test_a_link_and_a_file_of_such_a_name_stay(tmp_path, temporary):
    name = f"m-{scratch._host()}-abcd123{{}}.staging"
    (tmp_path / "mine").mkdir()
    (tmp_path / name.format(1)).symlink_to(tmp_path / "mine")
    (tmp_path / name.format(2)).write_text("mine")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine",
        "tmp",
        name.format(1),
        name.format(2),
    }


def test_on_another_host_or_without_locks_only_age_counts(tmp_path, temporary, monkeypatch):
    folder = tmp_path / ".m-01234567-abcd1234.staging"
    folder.mkdir()
    (folder / "weights").write_text("")
    os.utime(folder, (0, 0))
    assert list(dead_folders(tmp_path)) == []  # a file in it was just written
    os.utime(folder / "weights", (0, 0))
    assert list(dead_folders(tmp_path)) == [folder]
    sweep(tmp_path)
    assert not folder.exists()
    monkeypatch.setattr(scratch, "fcntl", None)
    with scratch_folder("lock", tmp_path) as mine:
        assert list(dead_folders(tmp_path)) == []
        os.utime(mine, (0, 0))
        assert list(dead_folders(tmp_path)) == [mine]


def test_threads_that_make_and_sweep_at_once_lose_nothing(tmp_path, temporary):
    lost = []

    def use():
        for _ in range(100):
            with scratch_folder("lock", tmp_path) as folder:
                (folder / "file").write_text("")
                if not (folder / "file").exists():
                    lost.append(folder)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list(temporary.iterdir()) == []


# Logged models.

pending = pytest.mark.skipif(
    not hasattr(mlflow, "initialize_logged_model"), reason="MLflow 3 has logged models"
)


def abandoned(temporary, uri, model_id):
    """What a killed log_model left."""
    folder = temporary / f"safeflavor-{scratch._host()}-abcd1234.log"
    folder.mkdir()
    note = {"store": hashlib.sha256(uri.encode()).hexdigest(), "model_id": model_id}
    (folder / scratch.NOTE).write_text(json.dumps(note))
    return folder


@pending
def test_a_model_that_a_killed_log_left_pending_is_marked_failed_by_the_next(tracking, temporary):
    model = mlflow.initialize_logged_model("model")
    other = mlflow.initialize_logged_model("other")
    folder = abandoned(temporary, tracking, model.model_id)
    sweep(temporary)
    assert folder.exists()  # a save asks no server
    with logged.noting(logged, {}):
        assert str(mlflow.get_logged_model(model.model_id).status) == "FAILED"
    assert str(mlflow.get_logged_model(other.model_id).status) == "PENDING"
    assert list(temporary.iterdir()) == []


@pending
def test_one_that_was_finished_or_is_gone_or_of_another_store_is_left(tracking, temporary):
    client = mlflow.MlflowClient()
    model = mlflow.initialize_logged_model("model")
    client.finalize_logged_model(model.model_id, "READY")
    for uri, model_id, stays in [
        (tracking, model.model_id, False),
        (tracking, "m-none", False),
        ("http://elsewhere", "m-1", True),
    ]:
        folder = abandoned(temporary, uri, model_id)
        with logged.noting(logged, {}):
            assert folder.exists() == stays
    assert str(mlflow.get_logged_model(model.model_id).status) == "READY"
    os.utime(folder / scratch.NOTE, (0, 0))
    os.utime(folder, (0, 0))
    sweep(temporary)  # nobody asked for a day
    assert list(temporary.iterdir()) == []


@pending
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_logging_that_ends_with_the_process_is_marked_failed_at_once(tracking, temporary, error):
    def save_model(path, mlflow_model):
        raise error

    flavor: Any = ModuleType("flavor")
    flavor.save_model = save_model
    with pytest.raises(error), logged.noting(flavor, {}) as noted:
        mlflow.models.Model.log(None, noted, name="model")
    (model,) = mlflow.search_logged_models(output_format="list")
    assert str(model.status) == "FAILED"
    assert list(temporary.iterdir()) == []


# The whole of it.


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--machine"]], ids=["the process", "the machine"])
def test_kills_at_random_moments_leave_nothing(tmp_path, options):
    kills, seed = int(os.environ.get("SAFEFLAVOR_KILLS", "2")), random.randrange(10**6)
    print("seed", seed)
    command = [sys.executable, Path(__file__).parents[1] / "kills.py", tmp_path / "kills"]
    done = subprocess.run(
        [*map(str, command), "--kills", str(kills), "--seed", str(seed), *options],
        capture_output=True,
        text=True,
    )
    print(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    assert not any(found["left over"].values()), found
    assert found["counted"]["ready"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_clean_process_ends_with_the_one_that_saves(tmp_path, number):
    (tmp_path / "tmp").mkdir()
    code = "import time\ntime.sleep(300)"
    (tmp_path / "probe" / "code").mkdir(parents=True)
    (tmp_path / "probe" / "code" / "probe.py").write_text(code)
    flavor = "flavors:\n  python_function:\n    loader_module: probe\n    code: code\n"
    (tmp_path / "probe" / "MLmodel").write_text(flavor)
    rehearse = """if True:
        import sys
        from pathlib import Path
        from mlflow_safeflavor.save.rehearsal import Rehearsal
        with Rehearsal(Path(sys.argv[1])) as rehearsal:
            rehearsal.start()
            rehearsal.load()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", rehearse, str(tmp_path / "probe")],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    try:
        _wait(lambda: _clean_processes(tmp_path), True)
        time.sleep(0.5)
        process.send_signal(number)
        process.wait()
        _wait(lambda: _clean_processes(tmp_path), False)
    finally:
        process.kill()
        for found in _clean_processes(tmp_path):
            os.kill(found, signal.SIGKILL)


def _clean_processes(folder):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if "rehearsal_program.py" in line and str(folder) in line:
            found.append(int(process.name))
    return found


def _wait(condition, wanted):
    deadline = time.monotonic() + 60
    while bool(condition()) != wanted:
        assert time.monotonic() < deadline, condition()
        time.sleep(0.05)
