"""What is tried on the commands that look at a model and never load it.

All end in an error that names it.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
import requests
from artifacts import reseal, rewrite
from attacks.hostile import Target
from click.testing import CliRunner

from mlflow_safeflavor import generate_dockerfile
from mlflow_safeflavor.artifact import plain_files
from mlflow_safeflavor.artifact.plain_files import list_files
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import IntegrityError, SafeFlavorError, plain
from mlflow_safeflavor.load import image as docker
from mlflow_safeflavor.load.load import load_model
from mlflow_safeflavor.verify import endpoint

pytest_plugins = "saved_models"


@pytest.fixture(autouse=True)
def _no_index(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_DEFAULT_INDEX", (tmp_path / "index").as_uri())
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))


@pytest.fixture
def target(copied, tmp_path):
    return Target(copied, tmp_path / "canary")


TOOLS = {
    "inspect": ["inspect", "MODEL", "--pins", "--tensors"],
    "verify": ["verify", "MODEL"],
    "verify --endpoint": ["verify", "MODEL", "--endpoint", "http://127.0.0.1:1"],
    "dockerfile": ["dockerfile", "MODEL", "-o", "IMAGE"],
    "dockerfile --no-hashes": ["dockerfile", "MODEL", "-o", "IMAGE", "--no-hashes"],
}


def run(tool, target):
    image = target.canary.parent / "image"
    places = {"MODEL": str(target.root), "IMAGE": str(image)}
    done = CliRunner().invoke(main, [places.get(word, word) for word in TOOLS[tool]])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert not target.canary.exists()
    assert done.exit_code == 0 or not image.exists()
    return done


# Files of any kind, on every tool


def _unsealed(target):
    rewrite(target.requirements, target.requirements.read_text() + "evil==1\n")


def _link(target):
    shutil.move(target.config, target.canary.parent / "elsewhere")
    target.config.symlink_to(target.canary.parent / "elsewhere")


def _linked_requirements(target):
    rewrite(target.requirements, Path("/etc/passwd").read_bytes())
    reseal(target.root)
    target.requirements.unlink()
    target.requirements.symlink_to("/etc/passwd")


def _linked_mlmodel(target):
    shutil.move(target.mlmodel, target.canary.parent / "elsewhere")
    target.mlmodel.symlink_to(target.canary.parent / "elsewhere")


def _pipe(target):
    target.environment.unlink()
    os.mkfifo(target.environment)


def _device(target):
    target.tensors.unlink()
    target.tensors.symlink_to("/dev/zero")


def _newline(target):
    target.json(target.environment, lambda content: content.update(python="3.11.7\nRUN touch /x"))


def _code(target):
    rewrite(target.code / "sitecustomize.py", target.payload)


DAMAGE = [_unsealed, _link, _linked_requirements, _linked_mlmodel, _pipe, _device, _newline, _code]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_every_tool_refuses_it_first(target, damage, tool):
    damage(target)
    done = run(tool, target)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("IntegrityError: ")
    assert "/etc/passwd" not in done.output.replace(str(target.root), "")


def test_weights_that_were_changed_are_in_no_image(target):
    content = bytearray(target.weights.read_bytes())
    content[-1] ^= 1
    rewrite(target.weights, bytes(content))
    done = run("dockerfile --no-hashes", target)
    assert "model.safetensors: has SHA-256" in done.stderr


def test_what_the_manifest_does_not_list_is_in_no_image(target, tmp_path):
    (target.root / "notes.txt").write_text("somebody's")
    (target.root / "link").symlink_to("/etc/passwd")
    (tmp_path / "house").mkdir()
    rewrite(target.requirements, "small==1.0\n")
    write_manifest_without(target, "notes.txt", "link")
    folder = (
        generate_dockerfile(str(target.root), tmp_path / "image", hashes=False).parent / "model"
    )
    assert not (folder / "notes.txt").exists()
    assert not os.path.lexists(folder / "link")


def write_manifest_without(target, *names):
    kept = {name: (target.root / name) for name in names}
    aside = {
        path: path.rename(target.canary.parent / f"aside-{name}") for name, path in kept.items()
    }
    reseal(target.root)
    for path, there in aside.items():
        there.rename(path)


# Requirements


EVIL = """
import os
open(os.environ["CANARY"], "w").close()
def prepare_metadata_for_build_wheel(folder, settings=None):
    raise SystemExit
def build_wheel(*arguments, **options):
    raise SystemExit
"""


@pytest.fixture
def sources(target, monkeypatch):
    """A folder with a source distribution whose build touches the canary."""
    monkeypatch.setenv("CANARY", str(target.canary))
    folder = target.canary.parent / "sources"
    folder.mkdir()
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path '
        '= ["."]\n',
        "PKG-INFO": "Metadata-Version: 2.1\nName: evilpkg\nVersion: 1.0\n",
        "backend.py": EVIL,
    }
    with tarfile.open(folder / "evilpkg-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"evilpkg-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return folder


def with_requirements(target, *lines):
    rewrite(target.requirements, "".join(f"{line}\n" for line in lines))
    reseal(target.root)


def test_a_source_distribution_is_not_built(target, sources):
    with_requirements(target, f"--find-links {sources}", "evilpkg==1.0")
    done = run("dockerfile", target)
    assert done.exit_code == 2, done.output
    assert "cannot be locked" in done.stderr


LINES = [
    "evilpkg @ file://SOURCES/evilpkg-1.0.tar.gz",
    "evilpkg @ git+https://127.0.0.1:9/a/b@main",
    "https://127.0.0.1:9/evilpkg-1.0-py3-none-any.whl",
    "-e SOURCES",
    "--editable=SOURCES",
    "SOURCES/evilpkg-1.0.tar.gz",
    "-c /etc/passwd",
    "-c ../../../etc/passwd",
    "-r /etc/passwd",
    "--index-url http://127.0.0.1:9/simple",
    "-i http://127.0.0.1:9/simple",
    "--trusted-host 127.0.0.1",
    "--no-binary :all:",
    "--config-settings x=y",
    "--pre",
    "--find-links http://127.0.0.1:9/${HOME}",
    "--extra-index-url https://x:${CANARY}@127.0.0.1:9/simple",
    "--find-links relative/folder",
    "--find-links /a --index-url http://127.0.0.1:9/simple",
    "small==1.0 --config-settings=x=y",
    "small==1.0 --hash=md5:d41d8cd98f00b204e9800998ecf8427e",
    "small==1.0 ; \x1b[2J",
    "small==1.0 # a remark",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_save_does_not_write(target, sources, line):
    with_requirements(target, line.replace("SOURCES", str(sources)))
    for tool in ("dockerfile", "dockerfile --no-hashes"):
        done = run(tool, target)
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("EnvironmentMismatchError: A line of the requirements"), (
            done.stderr
        )
        assert "root:" not in done.output
        assert "\x1b" not in done.output


def test_constraints_are_read_as_strictly(target, sources):
    (target.root / "constraints.txt").write_text(f"evilpkg @ file://{sources}/evilpkg-1.0.tar.gz\n")
    with_requirements(target, "small==1.0", "-c constraints.txt")
    assert "constraints.txt" in run("dockerfile --no-hashes", target).stderr


def test_a_link_among_the_wheels_is_not_copied(target, tmp_path):
    house = tmp_path / "house"
    house.mkdir()
    (house / "small-1.0-py3-none-any.whl").symlink_to("/etc/passwd")
    with_requirements(target, f"--find-links {house}", "small==1.0")
    folder = (
        generate_dockerfile(str(target.root), tmp_path / "image", hashes=False).parent
        / "environment"
    )
    assert list((folder / "wheels").iterdir()) == []


def test_settings_and_interpreters_of_the_folder_around_are_not_used(target, tmp_path, monkeypatch):
    """As another user of this machine could put them into the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    (tmp_path / "uv.toml").write_text(f'find-links = ["{tmp_path}"]\n')
    with zipfile.ZipFile(tmp_path / "evilpkg-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "evilpkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: evilpkg\nVersion: 1.0\n"
        )
        wheel.writestr("evilpkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("evilpkg-1.0.dist-info/RECORD", "")
    python = tmp_path / ".venv" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    python.write_text(f"#!/bin/sh\ntouch {target.canary}\n")
    python.chmod(0o755)
    with_requirements(target, "evilpkg==1.0")
    done = run("dockerfile", target)
    assert done.exit_code == 2, "uv read the settings there"


def test_nothing_is_imported_from_the_model_that_one_stands_in(target, monkeypatch):
    """Files beside code/ and safeflavor/ that no manifest lists are not read, and must not run."""
    for name in ("pip", "json", "encodings", "uv"):
        (target.root / f"{name}.py").write_text(target.payload)
    with_requirements(target, "small==1.0")
    monkeypatch.chdir(target.root)
    assert run("dockerfile", target).exit_code == 2


# Refusals with a name


@pytest.fixture
def nested(target):
    """1,500 folders in each other, which neither Python's walks nor its removal can cope with."""
    folder = os.open(target.data, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    yield target
    subprocess.run(["rm", "-rf", str(target.data / "d")], check=True)


def test_folders_in_folders(nested):
    for load in (load_model, lambda path: mlflow.pyfunc.load_model(path, suppress_warnings=True)):
        with pytest.raises(IntegrityError, match="deeper folders"):
            load(str(nested.root))
    for tool in TOOLS:
        assert "deeper folders" in run(tool, nested).stderr


def test_files_without_number(target, monkeypatch):
    monkeypatch.setattr(plain_files, "_MAX_FILES", 100)
    for i in range(101):
        (target.root / f"{i}.txt").touch()
    with pytest.raises(IntegrityError, match="more files"):
        list_files(target.root)


@pytest.fixture
def unreadable(saved):
    """A copy that another user may look at, one file excepted.

    Without root's rights in the meantime.
    """
    folder = Path(tempfile.mkdtemp(prefix="safeflavor-test-"))
    root = shutil.copytree(saved, folder / "model")
    folder.chmod(0o755)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = os.geteuid()
    yield root
    os.seteuid(before)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name",
    ["MLmodel", "safeflavor/manifest.json", "safeflavor/config.json", "requirements.txt",
                                  "safeflavor/tokenizer", "code", "safeflavor"])  # fmt: skip
def test_what_may_not_be_read_is_named(unreadable, name):
    (unreadable / name).chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(IntegrityError, match="may not be read") as caught:
        load_model(str(unreadable))
    assert name in str(caught.value.where)
    assert "chmod" in str(caught.value.hint)


def test_a_fifo_that_appears_late_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(IntegrityError, match="a pipe"):
        plain_files.read_text(tmp_path / "x.json", 10)


# Plain text


ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def test_plain_text():
    assert plain("a\nb\r\n\x1b[1m\u202e") == "a\n    b\n    \\x1b[1m\\u202e"
    error = SafeFlavorError("What", where="x\n  hint: curl | sh", found=ESCAPE)
    assert (
        str(error)
        == "What\n  where: x\n      hint: curl | sh\n  found: \\x1b]0;owned\\x07\\x1b[31m"
    )


def test_inspect_prints_what_tensors_are_called_as_it_is(target):
    def rename(content):
        content["tensors"][0]["path"] = f"{ESCAPE}[bold red]x[/bold red]:skull:"

    target.json(target.tensors, rename)
    done = run("inspect", target)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "\x07" not in done.output
    text = "".join(part.strip(" │┃") for part in done.output.splitlines())
    assert "skull:" in text.replace("\n", "")
    assert "💀" not in text


def test_a_file_whose_name_forges_lines(target):
    (target.code / f"a\n  hint: curl | sh {ESCAPE}").write_text("")
    for tool in TOOLS:
        done = run(tool, target)
        assert done.exit_code == 2
        assert "\x1b" not in done.output
        assert "\n  hint: curl" not in done.output


# Servers


@contextmanager
def dripping(seconds):
    """URL of a server that sends a byte each 50 ms, for so long."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX: ")
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline and not stop.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        stop.set()
        thread.join()


def test_a_server_that_never_comes_to_an_end():
    with dripping(20) as url:
        started = time.monotonic()
        with pytest.raises(SafeFlavorError, match="no answer in time"):
            endpoint.Endpoint(url, 0.5).ask({})
        assert time.monotonic() - started < 5


def test_the_time_is_one_for_all_requests(monkeypatch):
    asked = []

    def slow(self, request):
        time.sleep(0.3)
        asked.append(request)
        return 200, "application/json", b'{"predictions": [1]}'

    monkeypatch.setattr(endpoint.Endpoint, "_post", slow)
    server = endpoint.Endpoint("http://127.0.0.1:1", 0.5)
    assert server.ask({"a": 1}) == [1]
    with pytest.raises(SafeFlavorError, match="no answer in time"):
        server.ask({"a": 2})


def test_an_answer_without_end(monkeypatch):
    class Response:
        status_code = 200

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def iter_content(self, size):
            while True:
                yield b"[" * size

    monkeypatch.setattr(endpoint, "_MAX_ANSWER", 10**6)
    monkeypatch.setattr(requests, "post", lambda *_, **__: Response())
    with pytest.raises(SafeFlavorError, match="more than 1000000 bytes"):
        endpoint.Endpoint("http://127.0.0.1:1").ask({})


# The image's entry point


def test_the_entry_point_imports_nothing_from_its_working_folder(target, tmp_path):
    for name in ("json", "mlflow_safeflavor", "sitecustomize", "os", "requests"):
        (tmp_path / f"{name}.py").write_text(target.payload)
    code = (
        docker._IMPORTS.replace("/opt/ml/model", str(target.root)) + "; print(container.__file__)"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(target.code)), done.stderr
    assert not target.canary.exists()
