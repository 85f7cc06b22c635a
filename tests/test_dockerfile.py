"""The folder that `docker build` takes, without an engine; what comes of it is tested in tests/docker."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import zipfile

import mlflow
import pytest
from artifacts import edit_json, rewrite
from click.testing import CliRunner

import mlflow_safeflavor
from mlflow_safeflavor import container, docker, generate_dockerfile
from mlflow_safeflavor.artifact import Layout
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import EnvironmentMismatchError, InputError, IntegrityError, TrustError
from mlflow_safeflavor.load import read_spec
from mlflow_safeflavor.lock import lock, read_lines

pytest_plugins = "saved_models"


@pytest.fixture
def wheels(tmp_path):
    """A folder of wheels that hold nothing but metadata, one of them with a local label."""
    folder = tmp_path / "wheel house"
    folder.mkdir()
    for name, version, requires in [
        ("torch", "2.4.0+cpu", "small"), ("torch", "2.5.0+cpu", "small"), ("torch", "2.6.0", "nvidia-thing"),
        ("small", "1.0", None), ("nvidia_thing", "12.0", None), ("mlflow", mlflow.__version__, None),
    ]:  # fmt: skip
        info = f"{name}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def model(copied, wheels, monkeypatch):
    """A saved model with two pins, which that folder has."""
    monkeypatch.setenv("UV_NO_INDEX", "1")
    rewrite(Layout(copied).requirements, f"--find-links {wheels.as_uri()}\nsmall==1.0\ntorch==2.4.0+cpu\n")
    return copied


def test_what_is_written(model, tmp_path):
    path = generate_dockerfile(str(model), tmp_path / "image")
    folder = path.parent
    assert sorted(entry.name for entry in folder.iterdir()) == ["Dockerfile", "environment", "model"]
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
    assert text.index("pip --python") < text.index("COPY model"), "weights lie above the environment"
    assert text.index("container.check()") > text.index("COPY model")
    assert "PICKLE" not in text


def test_the_copied_model_is_the_model(model, tmp_path):
    (model / "code" / "__pycache__").mkdir(exist_ok=True)
    folder = generate_dockerfile(str(model), tmp_path / "image").parent / "model"
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert there == {
        path.relative_to(model) for path in model.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert all((folder / path).read_bytes() == (model / path).read_bytes() for path in there)
    assert {(folder / path).stat().st_mode & 0o777 for path in there} == {0o644}, "readable for the image's user"


def test_choices_reach_the_dockerfile(model, tmp_path):
    options = {"user": "server", "base_image": "registry.example/python:3.11", "hashes": False}
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
    rewrite(Layout(model).requirements, "\n".join([f"--find-links {wheels.as_uri()}", *lines]) + "\n")
    with pytest.raises(EnvironmentMismatchError, match="accelerators") as caught:
        generate_dockerfile(str(model), tmp_path / "image")
    assert named in str(caught.value)
    assert not (tmp_path / "image").exists()


def test_cuda_in_an_image_for_cuda_stays(model, wheels, tmp_path):
    rewrite(Layout(model).requirements, f"--find-links {wheels.as_uri()}\ntorch==2.6.0\n")
    path = generate_dockerfile(str(model), tmp_path / "image", target="cuda")
    assert "nvidia-thing==12.0" in (path.parent / "environment" / "requirements.txt").read_text()


@pytest.mark.parametrize("options", [{"target": "tpu"}, {"user": "root"}, {"user": "a b"}, {"user": "x; rm -rf /"}])
def test_wrong_options(model, tmp_path, options):
    with pytest.raises(InputError):
        generate_dockerfile(str(model), tmp_path / "image", **options)


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "Dockerfile").write_text("mine")
    with pytest.raises(IntegrityError, match="something at the target path"):
        generate_dockerfile(str(model), tmp_path / "image")
    assert (tmp_path / "image" / "Dockerfile").read_text() == "mine"


def test_a_pickle_needs_agreement(model, tmp_path, monkeypatch):
    spec, guarded = read_spec(Layout(model))
    monkeypatch.setattr(docker, "read_spec", lambda _: (dataclasses.replace(spec, runs=("pickle",)), guarded))
    with pytest.raises(TrustError):
        generate_dockerfile(str(model), tmp_path / "image")
    text = generate_dockerfile(str(model), tmp_path / "image", trust={"pickle"}).read_text()
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true" in text


def test_hashes_in_the_model_itself(tmp_path, wheels, monkeypatch, tiny_bert, tiny_tokenizer):
    """As `mlflow models build-docker` installs them: one hash makes pip want one for everything."""
    monkeypatch.setenv("UV_NO_INDEX", "1")
    path = tmp_path / "model"
    lines = [f"--find-links {wheels.as_uri()}", "small==1.0"]
    mlflow_safeflavor.save_model(
        tiny_bert(), path, tokenizer=tiny_tokenizer, pip_requirements=lines, hashes=True, rehearse=False
    )
    text = Layout(path).requirements.read_text()
    assert text.startswith(lines[0])
    assert [line.split()[0] for line in text.splitlines() if "==" in line] == [
        f"mlflow=={mlflow.__version__}", "small==1.0"
    ]  # fmt: skip
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["-r", str(path / "requirements.txt")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (wheels / "small-1.0-py3-none-any.whl").write_bytes((wheels / "nvidia_thing-12.0-py3-none-any.whl").read_bytes())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert mlflow.pyfunc.get_model_dependencies(str(path), format="pip").endswith("requirements.txt")


def test_a_pin_that_nobody_has(wheels, monkeypatch):
    monkeypatch.setenv("UV_NO_INDEX", "1")
    with pytest.raises(EnvironmentMismatchError, match="cannot be locked") as caught:
        lock([f"--find-links {wheels}", "small==3.0"], python="3.11.0")
    assert "small==3.0" in str(caught.value.found)


def test_no_uv(model, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(EnvironmentMismatchError, match="not installed"):
        generate_dockerfile(str(model), tmp_path / "image")


def test_uv_looks_where_pip_is_configured_to(wheels, monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nno-index = true\nfind-links = {wheels.as_uri()}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    assert lock(["small==1.0"], python="3.11.0")[0].startswith("small==1.0")


def test_constraints_are_named_by_where_they_are(tmp_path, wheels, monkeypatch):
    monkeypatch.setenv("UV_NO_INDEX", "1")
    (tmp_path / "constraints.txt").write_text("small<1\n")
    (tmp_path / "requirements.txt").write_text(f"--find-links {wheels.as_uri()}\nsmall==1.0\n-c constraints.txt\n")
    with pytest.raises(EnvironmentMismatchError, match="cannot be locked"):
        lock(read_lines(tmp_path / "requirements.txt"), python="3.11.0")


def test_constraints_come_along(model, wheels, tmp_path):
    (model / "constraints.txt").write_text("small<2\n")
    rewrite(Layout(model).requirements, f"--find-links {wheels.as_uri()}\nsmall==1.0\n-c constraints.txt\n")
    folder = generate_dockerfile(str(model), tmp_path / "image", hashes=False).parent / "environment"
    assert (folder / "requirements.txt").read_text().splitlines()[-1] == "-c constraints.txt"
    assert (folder / "constraints.txt").read_text() == "small<2\n"


def test_the_command(model, tmp_path):
    done = CliRunner().invoke(main, ["dockerfile", str(model), "-o", str(tmp_path / "image")])
    assert done.exit_code == 0, done.output
    assert f"docker build -t NAME {tmp_path / 'image'}" in done.stdout
    assert CliRunner().invoke(main, ["dockerfile", str(model), "-o", str(tmp_path / "image")]).exit_code == 2


def test_a_damaged_record_is_refused(model, tmp_path):
    edit_json(Layout(model).environment, lambda content: content.clear())
    with pytest.raises(IntegrityError):
        generate_dockerfile(str(model), tmp_path / "image")


@pytest.mark.parametrize(("environ", "workers"), [({}, 3), ({"MLFLOW_MODELS_WORKERS": "2"}, 2)])
def test_the_server_is_mlflows(monkeypatch, environ, workers):
    started = []
    monkeypatch.delenv("MLFLOW_MODELS_WORKERS", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(container, "available_cpus", lambda: 3)
    container.serve()
    ((program, command, variables),) = started
    assert program == command[0] == "sh"
    assert command[1] == "-c"
    assert shlex.split(command[2]) == [
        *("exec", "uvicorn", "--host", "0.0.0.0", "--port", "8080", "--workers", str(workers)),
        "mlflow.pyfunc.scoring_server.app:app",
    ]
    assert "file:///opt/ml/model" in variables.values()
