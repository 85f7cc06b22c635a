"""The folder that `docker build` takes, without an engine.

What comes of it is tested in tests/system/docker.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from typing import Any
from urllib.parse import quote

import mlflow
import pytest
from artifacts import edit_json, edit_mlmodel, reseal, rewrite
from click.testing import CliRunner
from mlflow.pyfunc import scoring_server

import mlflow_safeflavor
from mlflow_safeflavor import generate_dockerfile
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import digest_of_file
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.environment.differences import find_differences
from mlflow_safeflavor.environment.hashes import lock
from mlflow_safeflavor.environment.pins import read_pins
from mlflow_safeflavor.environment.record import with_wheels
from mlflow_safeflavor.errors import (
    EnvironmentMismatchError,
    InputError,
    IntegrityError,
    TrustError,
)
from mlflow_safeflavor.load import container

pytest_plugins = "saved_models"


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """The only index there is.

    An empty one in a folder, whatever pip and uv are configured to on this machine.
    """
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_DEFAULT_INDEX", folder.as_uri())
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return folder


def make_wheel(folder, name, version, requires=None, content=""):
    """A wheel of one module."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": content,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: "
        "py3-none-any\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(
            f"{info}/RECORD",
            "".join(f"{file},{record_hash(text)}\n" for file, text in files.items()),
        )
    return path


def record_hash(text):
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
    return f"sha256={digest},{len(text)}"


@pytest.fixture
def wheels(tmp_path):
    """A folder of wheels that hold next to nothing, one of them with a local label."""
    folder = tmp_path / "wheel house"
    for name, version, requires in [
        ("torch", "2.4.0+cpu", "small"), ("torch", "2.5.0+cpu", "small"),
        ("torch", "2.6.0", "nvidia-thing"),
        ("small", "1.0", None), ("nvidia_thing", "12.0", None),
        ("mlflow", mlflow.__version__, None),
    ]:  # fmt: skip
        make_wheel(folder, name, version, requires)
    return folder


def with_requirements(root, *lines):
    """Another requirements.txt, and the manifest made anew."""
    rewrite(Layout(root).requirements, "".join(f"{line}\n" for line in lines))
    reseal(root)
    return root


@pytest.fixture
def model(copied, wheels):
    """A saved model with two pins, which that folder has."""
    return with_requirements(
        copied, f"--find-links {wheels.as_uri()}", "small==1.0", "torch==2.4.0+cpu"
    )


def test_what_is_written(model, tmp_path):
    path = generate_dockerfile(str(model), tmp_path / "image")
    folder = path.parent
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "Dockerfile",
        "environment",
        "model",
    ]
    lines = (folder / "environment" / "requirements.txt").read_text().splitlines()
    assert lines[0] == "--find-links /build/wheels"
    assert [line.split()[0] for line in lines if "==" in line] == ["small==1.0", "torch==2.4.0+cpu"]
    assert sum("--hash=sha256:" in line for line in lines) == 2
    wheels = {wheel.name for wheel in (folder / "environment" / "wheels").iterdir()}
    assert wheels == {"small-1.0-py3-none-any.whl", "torch-2.4.0+cpu-py3-none-any.whl"}
    text = path.read_text()
    python = Layout(model).python_env.read_text().splitlines()[0].split(": ")[1]
    for line in (
        f"ARG PYTHON_IMAGE=python:{python}-slim",
        "USER mlflow",
        "EXPOSE 8080",
        "HEALTHCHECK",
        "--require-hashes",
    ):
        assert line in text
    assert text.index("pip --python") < text.index("COPY model"), (
        "weights lie above the environment"
    )
    assert text.index("container.check()") > text.index("COPY model")
    assert "PICKLE" not in text


def test_the_copied_model_is_the_model(model, tmp_path):
    (model / "code" / "__pycache__").mkdir(exist_ok=True)
    folder = generate_dockerfile(str(model), tmp_path / "image").parent / "model"
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert there == {
        path.relative_to(model)
        for path in model.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert all((folder / path).read_bytes() == (model / path).read_bytes() for path in there)
    assert {(folder / path).stat().st_mode & 0o777 for path in there} == {0o644}, (
        "readable for the image's user"
    )


def test_choices_reach_the_dockerfile(model, tmp_path):
    options: dict[str, Any] = {
        "user": "server",
        "base_image": "registry.example/python:3.11",
        "hashes": False,
    }
    text = generate_dockerfile(str(model), tmp_path / "image", **options).read_text()
    assert "USER server" in text
    assert "ARG PYTHON_IMAGE=registry.example/python:3.11\n" in text
    assert "--require-hashes" not in text
    assert "--no-deps" not in text, "what the user wrote may name less than everything"


@pytest.mark.parametrize(("lines", "named"), [
    (["torch==2.4.0+cu121"], "2.4.0+cu121"),
    (["torch==2.4.0+rocm6.1"], "rocm"),
    (["nvidia-thing==12.0", "torch==2.6.0"], "nvidia-thing"),
    (["torch==2.4.0", "triton==3.0"], "triton"),
    (["torch==2.6.0"], "nvidia-thing"),  # only resolving it shows
])  # fmt: skip
def test_cuda_in_an_image_for_cpus_is_refused(model, wheels, tmp_path, lines, named):
    with_requirements(model, f"--find-links {wheels.as_uri()}", *lines)
    with pytest.raises(EnvironmentMismatchError, match="accelerators") as caught:
        generate_dockerfile(str(model), tmp_path / "image")
    assert named in str(caught.value)
    assert not (tmp_path / "image").exists()


def test_cuda_in_an_image_for_cuda_stays(model, wheels, tmp_path):
    with_requirements(model, f"--find-links {wheels.as_uri()}", "torch==2.6.0")
    path = generate_dockerfile(str(model), tmp_path / "image", target="cuda")
    assert "nvidia-thing==12.0" in (path.parent / "environment" / "requirements.txt").read_text()
    text = path.read_text()
    assert "docker run --rm --gpus all" in text
    # While it is built there is no GPU, so the device is asked for only after the model was
    # checked.
    assert (
        text.index("container.check()")
        < text.index("ENV MLFLOW_SAFEFLAVOR_DEVICE=cuda")
        < text.index("USER mlflow")
    )


def test_an_image_for_cpus_asks_for_no_gpu(model, tmp_path):
    text = generate_dockerfile(str(model), tmp_path / "image").read_text()
    assert "--gpus" not in text
    assert "SAFEFLAVOR_DEVICE" not in text


def test_a_torch_that_knows_no_gpu_in_an_image_for_cuda_is_refused(model, wheels, tmp_path):
    with_requirements(model, f"--find-links {wheels.as_uri()}", "torch==2.6.0+cpu")
    with pytest.raises(EnvironmentMismatchError, match="knows no GPU") as caught:
        generate_dockerfile(str(model), tmp_path / "image", target="cuda")
    assert caught.value.found == "torch==2.6.0+cpu"
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("options",
    [{"target": "tpu"}, {"user": "root"}, {"user": "a b"}, {"user": "x; rm -rf /"},
    {"base_image": "python\nRUN id"}])  # fmt: skip
def test_wrong_options(model, tmp_path, options):
    with pytest.raises(InputError):
        generate_dockerfile(str(model), tmp_path / "image", **options)


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "Dockerfile").write_text("mine")
    with pytest.raises(IntegrityError, match="target path exists already"):
        generate_dockerfile(str(model), tmp_path / "image")
    assert (tmp_path / "image" / "Dockerfile").read_text() == "mine"


def test_a_pickle_needs_agreement(model, tmp_path):
    edit_mlmodel(model, lambda content: content["flavors"]["safeflavor"].update(runs=["pickle"]))
    reseal(model)
    with pytest.raises(TrustError):
        generate_dockerfile(str(model), tmp_path / "image")
    text = generate_dockerfile(str(model), tmp_path / "image", trust={"pickle"}).read_text()
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true" in text


def test_hashes_in_the_model_itself(tmp_path, wheels, tiny_bert, tiny_tokenizer):
    """As `mlflow models build-docker` installs them: one hash makes pip want one for everything."""
    path = tmp_path / "model"
    lines = [f"--find-links {wheels.as_uri()}", "small==1.0"]
    mlflow_safeflavor.save_model(
        tiny_bert(),
        path,
        tokenizer=tiny_tokenizer,
        pip_requirements=lines,
        hashes=True,
        rehearse=False,
        graph="no",
    )
    text = Layout(path).requirements.read_text()
    assert text.startswith(lines[0])
    assert [line.split()[0] for line in text.splitlines() if "==" in line] == [
        f"mlflow=={mlflow.__version__}", "small==1.0"
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
    ]
    command += ["-r", str(path / "requirements.txt")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (wheels / "small-1.0-py3-none-any.whl").write_bytes(
        (wheels / "nvidia_thing-12.0-py3-none-any.whl").read_bytes()
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert mlflow.pyfunc.get_model_dependencies(str(path), format="pip").endswith(
        "requirements.txt"
    )


def pins_of(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in lines))
    return read_pins(Layout(folder))


def test_a_pin_that_nobody_has(wheels, tmp_path):
    pins = pins_of(tmp_path / "m", f"--find-links {wheels.as_uri()}", "small==3.0")
    with pytest.raises(EnvironmentMismatchError, match="cannot be locked") as caught:
        lock(pins, python="3.11.0")
    assert "small==3.0" in str(caught.value.found)


def test_no_uv(model, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(EnvironmentMismatchError, match="not installed"):
        generate_dockerfile(str(model), tmp_path / "image")


def test_uv_looks_where_pip_is_configured_to(wheels, monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nfind-links = {wheels.as_uri()}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    (pin,) = lock(pins_of(tmp_path / "m", "small==1.0"), python="3.11.0").pins
    assert str(pin).startswith("small==1.0 \\\n    --hash=sha256:")


@pytest.fixture
def private(tmp_path, monkeypatch):
    """An index that pip has beside the default one, with wheels of its own."""
    folder = tmp_path / "private"
    path = make_wheel(folder / "small", "small", "1.0", content="private = True")
    (folder / "small" / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nextra-index-url = {folder.as_uri()}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    return path


def test_a_private_name_comes_from_the_private_index_alone(private, shadow, tmp_path):
    (pin,) = lock(pins_of(tmp_path / "m", "small==1.0"), python="3.11.0").pins
    assert list(pin.hashes) == [digest_of_file(private)]


def test_a_version_that_the_first_index_lacks_is_not_looked_for_elsewhere_unasked(
    private, index, tmp_path, monkeypatch
):
    path = make_wheel(index / "small", "small", "2.0")
    (index / "small" / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    pins = pins_of(tmp_path / "m", "small==2.0")
    with pytest.raises(EnvironmentMismatchError, match="UV_INDEX_STRATEGY=unsafe-best-match"):
        lock(pins, python="3.11.0")
    monkeypatch.setenv("UV_INDEX_STRATEGY", "unsafe-best-match")  # which is the hint
    (pin,) = lock(pins, python="3.11.0").pins
    assert list(pin.hashes) == [f"{digest_of_file(path)}"]


def test_constraints_count(tmp_path, wheels):
    (tmp_path / "constraints.txt").write_text("small<1\n")
    pins = pins_of(tmp_path, f"--find-links {wheels.as_uri()}", "small==1.0", "-c constraints.txt")
    with pytest.raises(EnvironmentMismatchError, match="cannot be locked"):
        lock(pins, python="3.11.0")


def test_constraints_come_along(model, wheels, tmp_path):
    (model / "constraints.txt").write_text("small<2\n")
    with_requirements(model, f"--find-links {wheels.as_uri()}", "small==1.0", "-c constraints.txt")
    folder = (
        generate_dockerfile(str(model), tmp_path / "image", hashes=False).parent / "environment"
    )
    assert (folder / "requirements.txt").read_text().splitlines()[-1] == "-c constraints.txt"
    assert (folder / "constraints.txt").read_text() == "small<2\n"


# A wheel of the model's folder, and others of the same version


@pytest.fixture
def shadow(index):
    """What an index has under the same name and version as the folder."""
    path = make_wheel(index / "small", "small", "1.0", "nvidia-thing", content="import os")
    (index / "small" / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    return path


def test_an_index_never_replaces_a_wheel_of_the_folder(model, wheels, shadow, tmp_path):
    folder = generate_dockerfile(str(model), tmp_path / "image").parent / "environment"
    text = (folder / "requirements.txt").read_text()
    assert digest_of_file(wheels / "small-1.0-py3-none-any.whl") in text
    assert digest_of_file(shadow) not in text
    assert "nvidia-thing" not in text


@pytest.fixture
def installed(model, wheels, site):
    """The model, saved where `small` came from the folder's wheel."""
    info = site.install("small")
    with zipfile.ZipFile(wheels / "small-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(site.folder)
    (info / "RECORD").write_text(
        (info / "RECORD").read_text() + f"{info.name}/INSTALLER,sha256=x,3\n../bin/s,,\n"
    )
    recorded = with_wheels(site.record("small"), [wheels], path=site.path)
    assert recorded.wheel_digests == {
        "small": digest_of_file(wheels / "small-1.0-py3-none-any.whl")
    }

    def note(content):
        content["distributions"]["small"], content["wheels"] = "1.0", recorded.to_json()["wheels"]

    edit_json(Layout(model).environment, note)
    reseal(model)
    return model


def test_what_was_installed_decides(installed, wheels, tmp_path):
    wanted = digest_of_file(wheels / "small-1.0-py3-none-any.whl")
    make_wheel(wheels, "small", "1.0", content="another build")
    for i, hashes in enumerate([True, False]):
        with pytest.raises(EnvironmentMismatchError, match="is not there any more") as caught:
            generate_dockerfile(str(installed), tmp_path / f"image-{i}", hashes=hashes)
        assert wanted in str(caught.value)


def test_the_hint_of_a_wheel_that_has_moved(installed, wheels, shadow, tmp_path, monkeypatch):
    wheels.rename(tmp_path / "moved")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "moved"))
    folder = generate_dockerfile(
        str(with_requirements(installed, "small==1.0")), tmp_path / "image"
    ).parent
    assert (
        digest_of_file(tmp_path / "moved" / "small-1.0-py3-none-any.whl")
        in (folder / "environment" / "requirements.txt").read_text()
    )
    assert (folder / "environment" / "wheels" / "small-1.0-py3-none-any.whl").exists()


def test_without_hashes_pip_is_given_the_very_file(installed, wheels, shadow, tmp_path):
    folder = (
        generate_dockerfile(str(installed), tmp_path / "image", hashes=False).parent / "environment"
    )
    (line,) = [
        line
        for line in (folder / "requirements.txt").read_text().splitlines()
        if line.startswith("small")
    ]
    wheel = "small-1.0-py3-none-any.whl"
    assert line == f"small @ file:///build/wheels/{wheel}#sha256={digest_of_file(wheels / wheel)}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--no-index",
    ]
    line = line.replace("/build/wheels", quote(str(folder / "wheels")))
    assert subprocess.run([*command, line], check=False).returncode == 0
    (folder / "wheels" / wheel).write_bytes(shadow.read_bytes())
    done = subprocess.run([*command, line], capture_output=True, text=True, check=False)
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_another_build_of_the_same_version_is_a_difference(installed, wheels, site):
    recorded = dataclasses.replace(
        site.record("small"),
        wheels=with_wheels(site.record("small"), [wheels], path=site.path).wheels,
    )
    assert find_differences(recorded, path=site.path) == []
    record = site.folder / "small-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("small.py,sha256=", "small.py,sha256=0"))
    (difference,) = find_differences(recorded, path=site.path)
    assert str(difference) == (
        "small: wanted the build of small-1.0-py3-none-any.whl, found another build of 1.0"
    )


def test_a_model_with_hashes_needs_no_uv(model, wheels, tmp_path, monkeypatch):
    digest = digest_of_file(wheels / "small-1.0-py3-none-any.whl")
    with_requirements(
        model, f"--find-links {wheels.as_uri()}", "small==1.0 \\", f"    --hash=sha256:{digest}"
    )
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    folder = generate_dockerfile(str(model), tmp_path / "image").parent / "environment"
    assert (
        f"small==1.0 \\\n    --hash=sha256:{digest}\n" in (folder / "requirements.txt").read_text()
    )
    assert [path.name for path in (folder / "wheels").iterdir()] == ["small-1.0-py3-none-any.whl"]


def test_the_command(model, tmp_path):
    done = CliRunner().invoke(main, ["dockerfile", str(model), "-o", str(tmp_path / "image")])
    assert done.exit_code == 0, done.output
    assert f"docker build -t NAME {tmp_path / 'image'}" in done.stdout
    assert (
        CliRunner()
        .invoke(main, ["dockerfile", str(model), "-o", str(tmp_path / "image")])
        .exit_code
        == 2
    )


def test_a_damaged_record_is_refused(model, tmp_path):
    edit_json(Layout(model).environment, lambda content: content.clear())
    reseal(model)
    with pytest.raises(IntegrityError):
        generate_dockerfile(str(model), tmp_path / "image")


@pytest.fixture
def started(monkeypatch):
    """What ``serve`` starts, in order, on a machine of three cores; nothing of it is done."""
    started = []
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("MLFLOW_MODELS_WORKERS", None)
    monkeypatch.setattr(os, "chdir", started.append)
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(container, "_fork_workers", lambda: started.append("forks"))
    monkeypatch.setattr(container, "_serve_from_here", started.append)
    monkeypatch.setattr(container, "available_cpus", lambda: 3)
    return started


@pytest.mark.parametrize(("environ", "workers"), [({}, 3), ({"MLFLOW_MODELS_WORKERS": "2"}, 2)])
def test_the_server_is_mlflows(started, environ, workers):
    os.environ |= environ
    container.serve()
    assert started == [
        "/opt/ml",  # only root writes there: uvicorn imports from where it is started
        "forks",
        [
            *("--host", "0.0.0.0", "--port", "8080", "--workers", str(workers)),
            "mlflow.pyfunc.scoring_server.app:app",
        ],
    ]
    assert os.environ["MLFLOW_MODELS_WORKERS"] == str(workers)
    assert "file:///opt/ml/model" in os.environ.values()


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1.5"])
def test_a_number_of_workers_that_is_none_is_said(started, workers):
    os.environ["MLFLOW_MODELS_WORKERS"] = workers
    with pytest.raises(SystemExit, match="MLFLOW_MODELS_WORKERS") as caught:
        container.serve()
    assert f"found: {workers}" in str(caught.value)
    assert not started


def test_the_server_of_an_early_mlflow_takes_the_place_of_this_process(started, monkeypatch):
    command = "gunicorn ${GUNICORN_CMD_ARGS} -- mlflow.pyfunc.scoring_server.wsgi:app"
    monkeypatch.setattr(scoring_server, "get_cmd", lambda **given: (command, {"a": "b"}))
    container.serve()
    assert started[1:] == [("sh", ["sh", "-c", f"exec {command}"], {"a": "b"})]


class Driver:
    """What the library of NVIDIA's driver says.

    An error of ``cuInit``, or how many GPUs there are.
    """

    def __init__(self, code=0, count=1):
        self.code, self.count = code, count

    def cuInit(self, flags):
        return self.code

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count
        return 0


@pytest.fixture
def workers(started, monkeypatch):
    """``workers(driver, **environ)``: how many a container has on a host with that driver."""

    def count(driver, **environ):
        def load(name):
            assert name == "libcuda.so.1"
            if driver is None:
                raise OSError(f"{name}: cannot open shared object file")
            return driver

        monkeypatch.setattr(ctypes, "CDLL", load)
        os.environ.pop("MLFLOW_MODELS_WORKERS", None)
        os.environ |= environ
        container.serve()
        return started[-1][started[-1].index("--workers") + 1]

    return count


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (None, "no NVIDIA driver in this container (libcuda.so.1)"),
        (Driver(code=100), "error 100: it sees no GPU"),
        (Driver(code=803), "error 803"),
        (Driver(count=0), "shows no GPU"),
    ],
    ids=["none", "no device", "other error", "hidden"],
)
def test_a_container_for_a_gpu_says_what_it_is_missing(workers, driver, found):
    with pytest.raises(SystemExit) as caught:
        workers(driver, MLFLOW_SAFEFLAVOR_DEVICE="cuda")
    assert found in str(caught.value)
    assert "docker run --gpus all" in str(caught.value)
    assert workers(driver, MLFLOW_SAFEFLAVOR_DEVICE="cpu") == "3", "the hint"


def test_on_a_gpu_one_worker_has_the_weights(workers, started):
    assert workers(Driver(), MLFLOW_SAFEFLAVOR_DEVICE="cuda") == "1"
    two = workers(Driver(), MLFLOW_SAFEFLAVOR_DEVICE="cuda", MLFLOW_MODELS_WORKERS="2")
    assert two == "2"
    assert "forks" not in started, "the driver that was asked would not survive"
