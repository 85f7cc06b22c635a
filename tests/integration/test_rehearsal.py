"""Before it is published, a model is loaded in a process that shares nothing with this one."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest
from artifacts import edit_json

import mlflow_safeflavor
from mlflow_safeflavor.artifact.manifest import write_manifest
from mlflow_safeflavor.errors import ParityError, RehearsalError
from mlflow_safeflavor.predict import golden
from mlflow_safeflavor.save import rehearsal, save, write

pytest_plugins = "saved_models"
pytestmark = pytest.mark.slow


@pytest.fixture
def save_tiny(tmp_path, tiny_bert, tiny_tokenizer):
    """Save a tiny classifier at ``tmp_path/store/model`` with its rehearsal."""

    def run(**options):
        mlflow_safeflavor.save_model(
            tiny_bert(),
            tmp_path / "store" / "model",
            tokenizer=tiny_tokenizer,
            graph="no",
            **options,
        )
        return tmp_path / "store" / "model"

    return run


def require_nothing_published(tmp_path):
    assert list((tmp_path / "store").iterdir()) == []


def test_a_good_model_is_published(save_tiny):
    assert mlflow_safeflavor.load_model(str(save_tiny())).report.bit_identical


def test_answers_that_only_this_process_gives_are_not_published(save_tiny, tmp_path, monkeypatch):
    honest = golden.record

    def record(*args, **kwargs):
        answers = honest(*args, **kwargs)
        layout = args[-1]

        def change(content):
            content["answers"][0]["score"] += 0.1

        edit_json(layout.parity, change)
        return answers

    monkeypatch.setattr(golden, "record", record)
    with pytest.raises(RehearsalError, match="nothing was published") as refused:
        save_tiny()
    assert "ParityError" in refused.value.message
    assert "row 0, score" in refused.value.message
    require_nothing_published(tmp_path)


def test_without_a_rehearsal_the_same_is_found_at_load(save_tiny, monkeypatch):
    """What the test above needs to mean anything: nothing else at save would have found it."""
    honest = golden.record

    def record(*args, **kwargs):
        answers = honest(*args, **kwargs)
        edit_json(args[-1].parity, lambda content: content["answers"][0].update(label="mine"))
        return answers

    monkeypatch.setattr(golden, "record", record)
    path = save_tiny(rehearse=False)
    with pytest.raises(ParityError, match="mine"):
        mlflow_safeflavor.load_model(str(path))


def test_a_file_that_is_lost_on_the_way_is_not_published(save_tiny, tmp_path, monkeypatch):
    honest = write_manifest

    def lose(layout, **kwargs):
        honest(layout, **kwargs)
        (layout.tokenizer / "tokenizer.json").unlink()

    monkeypatch.setattr(write, "write_manifest", lose)
    with pytest.raises(RehearsalError) as refused:
        save_tiny()
    assert "IntegrityError" in refused.value.message
    assert "tokenizer/tokenizer.json" in refused.value.message
    require_nothing_published(tmp_path)


# The clean process itself, on an artifact that MLflow's own loader of Python functions opens.

PROBE = """flavors:
  python_function:
    loader_module: probe
    code: code
    python_version: {python}
"""


def write_probe(root, code):
    (root / "code").mkdir(parents=True)
    (root / "MLmodel").write_text(PROBE.format(python=platform.python_version()))
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    model = "type('Model', (), {'predict': print})()"
    (root / "code" / "probe.py").write_text(
        f"def _load_pyfunc(path):\n{indented}    return {model}\n"
    )


@pytest.fixture
def rehearsed(tmp_path):
    """Rehearse an artifact whose loader runs the given code."""

    def run(code):
        root = tmp_path / "probe"
        with rehearsal.Rehearsal(root) as clean:
            clean.start()
            write_probe(root, code)
            clean.load()

    return run


@pytest.mark.parametrize(
    ("code", "tried"),
    [
        (
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 53))",
            "connection to ('192.0.2.1', 53)",
        ),
        (
            "socket.socket(socket.AF_UNIX).connect('/run/theirs.sock')",
            "connection to /run/theirs.sock",
        ),
        ("socket.create_connection(('127.0.0.1', 9))", "looked up 127.0.0.1"),
        ("subprocess.run(['true'])", "started ['true']"),
    ],
    ids=["UDP", "unix", "loopback", "subprocess"],
)
def test_what_a_load_may_not_do_is_refused_and_named(rehearsed, code, tried):
    """All the rest that a guard refuses is in test_guard.py."""
    with pytest.raises(RehearsalError) as refused:
        rehearsed(f"import socket, subprocess\n{code}")
    assert tried in refused.value.message


@pytest.mark.parametrize("code", ["open({0!r}).close()", "open(os.path.relpath({0!r}))"])
def test_a_file_that_only_this_machine_has_is_refused_and_named(rehearsed, tmp_path, code):
    (tmp_path / "words.txt").write_text("mine")
    with pytest.raises(RehearsalError, match=r"read .*/words\.txt, which is no part of the model"):
        rehearsed("import os\n" + code.format(str(tmp_path / "words.txt")))


def test_what_a_library_was_refused_is_named_beside_its_own_words(rehearsed, tmp_path):
    (tmp_path / "words.txt").write_text("mine")
    with pytest.raises(RehearsalError, match=r"ValueError: no words; read .*/words\.txt"):
        rehearsed(
            f"try: open({str(tmp_path / 'words.txt')!r})\nexcept OSError: raise ValueError('no "
            "words') from None"
        )


def test_what_was_refused_and_caught_is_refused_all_the_same(rehearsed, tmp_path):
    """The load of another machine, where there is no such file, would go another way."""
    (tmp_path / "words.txt").write_text("mine")
    with pytest.raises(RehearsalError, match=r"read .*/words\.txt"):
        rehearsed(f"try: open({str(tmp_path / 'words.txt')!r})\nexcept OSError: pass")


def test_files_of_the_model_of_packages_and_of_its_own_are_read(rehearsed, tmp_path):
    info = tmp_path / "editable.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Name: editable")
    rehearsed(
        f"open({str(info / 'PKG-INFO')!r}).close()\n"
        "import certifi, os, tempfile\n"
        "open(os.path.join(os.path.dirname(__file__), 'probe.py')).close()\n"
        "open(os.path.join(os.path.dirname(os.path.dirname(__file__)), 'MLmodel')).close()\n"
        "open(certifi.where()).close()\n"
        "with tempfile.NamedTemporaryFile('w', delete=False) as file: file.write('own')\n"
        "assert open(file.name).read() == 'own'\n"
        "open(os.path.expanduser('~/settings'), 'w').close()\n"
        "open(os.path.expanduser('~/settings')).close()\n"
        f"try: open({str(tmp_path / 'nowhere')!r})\n"
        "except FileNotFoundError: pass\n"
        "open('/etc/passwd').close()"
    )


def test_a_module_that_only_this_process_finds_is_named_with_the_way_to_bring_it(
    rehearsed, monkeypatch, tmp_path
):
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RehearsalError, match="only_here") as refused:
        rehearsed(
            "try: import only_here\nexcept ImportError as error: raise ValueError('no extra') "
            "from error"
        )
    assert f"code_paths=['{tmp_path / 'only_here.py'}']" in str(refused.value.hint)


def test_the_environment_of_this_process_does_not_reach_it(rehearsed, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in (
        "HF_TOKEN",
        "HF_HOME",
        "MLFLOW_SAFEFLAVOR_VERIFY",
        "AWS_SECRET_ACCESS_KEY",
        "SECRET",
    ):
        monkeypatch.setenv(name, "mine")
    monkeypatch.chdir(tmp_path)
    rehearsed(
        "import os, importlib.util\n"
        "assert importlib.util.find_spec('mine') is None, 'sys.path'\n"
        "mine = sorted(name for name, value in os.environ.items() if value == 'mine')\n"
        "assert not mine, mine\n"
        "assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
        "assert os.getcwd() == os.path.realpath(os.environ['HOME']), os.getcwd()\n"
        f"assert os.getcwd() != {str(tmp_path)!r}"
    )


def test_the_test_above_can_fail(rehearsed):
    with pytest.raises(RehearsalError, match="AssertionError: never"):
        rehearsed("assert False, 'never'")


def test_a_process_that_dies_is_no_success(rehearsed):
    with pytest.raises(RehearsalError, match="died") as refused:
        rehearsed("import os, sys\nsys.stderr.write('last words')\nsys.stderr.flush()\nos._exit(7)")
    assert "exit status 7" in refused.value.message
    assert "last words" in refused.value.message


def test_a_process_that_hangs_is_no_success(rehearsed, monkeypatch):
    monkeypatch.setattr(rehearsal, "_TIMEOUT", 1)
    with pytest.raises(RehearsalError, match="within 1 s"):
        rehearsed("import time; time.sleep(60)")


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_leaving_early_is_no_success(rehearsed, code):
    with pytest.raises(RehearsalError):
        rehearsed(code)


# The process is started before there is anything to load, and may never be told to.


def test_mlflow_is_imported_while_the_model_is_still_written(tmp_path):
    with rehearsal.Rehearsal(tmp_path / "probe") as clean:
        clean.start(["pyspark"])
        library = f"{os.sep}mlflow{os.sep}pyfunc{os.sep}"
        maps = Path(f"/proc/{clean._process.pid}/status")
        deadline, idle = time.monotonic() + 60, ""
        # asleep, with all that MLflow brings in memory
        while time.monotonic() < deadline and not ("S (sleeping)" in idle and _has_mlflow(idle)):
            time.sleep(0.1)
            idle = maps.read_text()
        assert _has_mlflow(idle), "waits with nothing imported"
        write_probe(tmp_path / "probe", "import os")
        opened, _ = clean.load(["auto", "module"])
    assert any(library in file for file in opened["auto"]), "its files belong to the first load"
    assert not any(library in file for file in opened["module"])


def _has_mlflow(status):
    """Whether a process has grown beyond a bare interpreter, which has some 10 MB."""
    resident = next((line for line in status.splitlines() if line.startswith("VmRSS")), "VmRSS: 0")
    return int(resident.split()[1]) > 60_000


@pytest.mark.parametrize("graph", ["no", "auto"])
def test_a_save_that_fails_takes_the_process_along(
    tmp_path, tiny_bert, tiny_tokenizer, monkeypatch, graph
):
    started = []
    start = rehearsal.Rehearsal.start

    def noted(self, *args, **given):
        start(self, *args, **given)
        started.append(self)

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(rehearsal.Rehearsal, "start", noted)
    monkeypatch.setattr(save, "write_parity", fail)
    with pytest.raises(OSError, match="No space left"):
        mlflow_safeflavor.save_model(
            tiny_bert(), tmp_path / "store" / "model", tokenizer=tiny_tokenizer, graph=graph
        )
    (clean,) = started
    assert clean._process.returncode is not None
    assert not clean._answer.parent.exists()
    require_nothing_published(tmp_path)


def test_a_process_that_was_never_told_to_load_ends_with_its_parent(tmp_path, clean_process):
    printed = clean_process(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mlflow_safeflavor.save.rehearsal import Rehearsal\n"
        "clean = Rehearsal(Path(sys.argv[1]))\n"
        "clean.start()\n"
        "print('PID', clean._process.pid, flush=True)\n"
        "os._exit(0)",
        str(tmp_path / "probe"),
    ).stdout
    process, deadline = Path("/proc", printed.split("PID ")[1].strip()), time.monotonic() + 60
    while _runs(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(process)


def _runs(process):
    try:
        return "Z (zombie)" not in (process / "status").read_text()
    except OSError:
        return False
