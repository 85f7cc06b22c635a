"""The checks for a GPU, without one.

On a faked device they pass, and bugs planted in placement are caught.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPT = REPOSITORY / "tools" / "gpu_check.py"

needs_compiler = pytest.mark.skipif(
    not any(os.access(Path(folder, "g++"), os.X_OK) for folder in os.get_exec_path()),
    reason="the fake needs g++",
)


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The script, around a worker that does what it is told.


@pytest.fixture
def worker(gpu_check, tmp_path, monkeypatch, capsys):
    """``worker(source, *names)``.

    Exit status, lines and results of a run with a worker of that source.
    """

    def run(source, *names, patience=1.0):
        folder = tmp_path / "tests" / "gpu"
        folder.mkdir(parents=True)
        head = "import json, os, sys, time\ndef tell(**line): print(json.dumps(line), flush=True)\n"
        (folder / "worker.py").write_text(head + textwrap.dedent(source))
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        status = gpu_check.run(
            Path(sys.executable), "fake", list(names), tmp_path / "out", patience
        )
        results = tmp_path / "out" / "gpu.json"
        return (
            status,
            capsys.readouterr().out,
            json.loads(results.read_text()) if results.exists() else None,
        )

    return run


def test_a_check_that_hangs_is_ended_and_the_others_run(worker):
    status, lines, found = worker("""
        names = sys.argv[3:] or ["first", "hangs", "last"]
        tell(facts={"card": "none"}, checks=names)
        for name in names:
            tell(begins=name, limit=1)
            if name == "hangs":
                time.sleep(600)
            tell(check=name, seconds=0.0, verdict="ok", figures={"a": 1})
    """)
    assert status == 1
    verdicts = {result["check"]: result["verdict"] for result in found["results"]}
    assert verdicts == {"first": "ok", "hangs": "FAIL", "last": "ok"}
    assert found["results"][1]["said"] == "took too long"
    assert found["facts"] == {"card": "none"}
    assert lines.splitlines()[1].split()[:2] == ["ok", "first"]


def test_a_check_that_kills_its_process_is_named_and_the_others_run(worker):
    status, _, found = worker("""
        names = sys.argv[3:] or ["kills", "last"]
        tell(facts={}, checks=names)
        for name in names:
            tell(begins=name, limit=10)
            if name == "kills":
                sys.exit("its last words")
            tell(check=name, seconds=0.0, verdict="ok", figures={})
    """)
    assert status == 1
    assert [(result["check"], result["verdict"]) for result in found["results"]] == [
        ("kills", "FAIL"),
        ("last", "ok"),
    ]
    assert found["results"][0]["said"] == "the process died"
    assert "its last words" in found["results"][0]["trace"]


def test_all_checks_together_have_a_limit(worker, gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "TOTAL", 1.5)
    status, _, found = worker("""
        tell(facts={}, checks=["slow", "later"])
        tell(begins="slow", limit=600)
        time.sleep(600)
    """)
    assert status == 1
    assert {result["check"]: result["verdict"] for result in found["results"]} == {
        "slow": "FAIL",
        "later": "FAIL",
    }


def test_a_process_that_does_not_even_start(worker):
    status, lines, found = worker("sys.exit('no torch here')")
    assert status == 1
    assert [result["check"] for result in found["results"]] == ["start"]
    assert "no torch here" in lines


def test_what_needs_a_gpu_is_no_failure(worker):
    status, lines, _ = worker("""
        tell(facts={}, checks=["a"])
        tell(check="a", seconds=0.0, verdict="needs a GPU")
    """)
    assert status == 0
    assert "1 checks, 0 failed" in lines


# What is carried along.


def test_what_is_wanted_is_what_the_package_needs_and_the_machine_lacks(gpu_check):
    names = {line.partition(">")[0] for line in gpu_check.wanted()}
    assert names == {"click", "cloudpickle", "jinja2", "mlflow-skinny", "packaging", "pandas",
        "pyyaml", "requests",
                     "rich", "onnxruntime", "onnxscript"}  # fmt: skip


def _wheel(folder, name, size=10):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VALUE = {name!r}\n" + "#" * size)
        wheel.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )


@pytest.mark.parametrize(("size", "fits"), [(1000, True), (3000, False)])
def test_wheels_that_are_too_large_together_are_refused(
    gpu_check, tmp_path, monkeypatch, capsys, size, fits
):
    ran = []

    def run(command, check):
        ran.append(command)
        for option, name in (("download", "carried"), ("wheel", "mlflow_safeflavor")):
            if option in command:
                _wheel(
                    Path(command[command.index("-w" if option == "wheel" else "-d") + 1]),
                    name,
                    size,
                )

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "MOST", 4000)
    _wheel(tmp_path, "old")
    if fits:
        gpu_check.collect(tmp_path, "3.12")
        assert "2 wheels for Python 3.12" in capsys.readouterr().out
    else:
        with pytest.raises(
            SystemExit, match=r"too much to carry along; largest: carried-1\.0|mlflow_safeflavor"
        ):
            gpu_check.collect(tmp_path, "3.12")
    assert not (tmp_path / "old-1.0-py3-none-any.whl").exists(), (
        "wheels of another collection stayed"
    )
    compiled, downloaded, _ = ran
    assert "3.12" in compiled
    assert "--only-binary" in compiled
    assert "torch" in compiled, "it would be downloaded"
    assert "--no-deps" in downloaded


def test_an_environment_of_what_is_there_and_wheels(gpu_check, tmp_path):
    _wheel(tmp_path / "wheels", "carried")
    python = gpu_check.environment_with(tmp_path / "wheels", tmp_path / "venv")
    code = (
        "import carried, pytest, importlib.metadata as m; print(carried.VALUE, "
        "m.version('carried'), pytest.__file__)"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["carried", "1.0"], done.stderr
    assert done.stdout.split()[2] == pytest.__file__, "what is there stays where it is"
    with pytest.raises(SystemExit, match="no wheels"):
        gpu_check.environment_with(tmp_path, tmp_path / "other")


# With torch, in processes of their own: a device is torch's for good.


def _run(*arguments, timeout=600):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_asked_to_check_for_real_it_refuses_without_a_gpu(tmp_path):
    done = _run(SCRIPT, "run", "--out", tmp_path / "out", "--patience", 5)
    assert done.returncode == 2
    assert "refused" in done.stdout
    assert "sees no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


CAUGHT = {
    "nothing": "",
    "a buffer that the forward reads is on the CPU": "same device",
    "a buffer is on the CPU": "untouched is on cpu",
    "a plain tensor is on the CPU": "places is on cpu",
    "a buffer has another dtype": "untouched is torch.float64 and was saved as torch.float32",
    "a parameter is on meta": "unused.weight is on meta",
    "a value is another": "fine has other values",
    "a tie is gone": "ties",
    "nothing is placed": "same device",
    "no batch is halved": "OverloadedError",
    "files stay mapped": "still open",
}


@needs_compiler
@pytest.mark.slow
def test_planted_bugs_are_caught(tmp_path):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests")}
    environ["MLFLOW_SAFEFLAVOR_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "gpu.planted", str(tmp_path)]
    done = subprocess.run(
        command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said.keys() == CAUGHT.keys()
    assert said.pop("nothing") == ["ok", ""]
    for what, (verdict, words) in said.items():
        assert verdict == "FAIL", f"{what}: not caught"
        assert CAUGHT[what] in words, f"{what}: {words}"


@needs_compiler
@pytest.mark.slow
def test_every_check_passes_on_a_faked_device_or_says_that_it_needs_a_gpu(tmp_path):
    done = _run(SCRIPT, "run", "--fake", "--out", tmp_path, "--patience", 8, timeout=1800)
    assert done.returncode == 0, done.stdout
    found = {
        result["check"]: result["verdict"]
        for result in json.loads((tmp_path / "gpu.json").read_text())["results"]
    }
    assert [name for name, verdict in found.items() if verdict == "needs a GPU"] == ["first_answer"]
    assert len(found) >= 20
