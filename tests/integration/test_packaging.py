"""The wheel holds the package, its licence and its metadata, and nothing else."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MEANT_FOR_THE_WHEEL = ["mlflow_safeflavor", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools leaves build/ and *.egg-info beside setup.cfg.
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in MEANT_FOR_THE_WHEEL:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        target,
        ".",
    ]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    with zipfile.ZipFile(built) as opened:
        yield opened


def test_exact_contents(wheel):
    names = {
        re.sub(r"^mlflow_safeflavor-[^/]+\.dist-info/", "dist-info/", name)
        for name in wheel.namelist()
    }
    package = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "mlflow_safeflavor").rglob("*.py")
    }
    assert names == package | {
        "mlflow_safeflavor/artifact/proven_classes.txt",
        "mlflow_safeflavor/verify/page.html",
        "mlflow_safeflavor/py.typed",
        "dist-info/METADATA",
        "dist-info/RECORD",
        "dist-info/WHEEL",
        "dist-info/entry_points.txt",
        "dist-info/licenses/LICENSE",
        "dist-info/top_level.txt",
    }


def test_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_string(wheel.read(name).decode())
    import mlflow_safeflavor

    assert metadata["Name"] == "mlflow-safeflavor"
    assert metadata["Version"] == mlflow_safeflavor.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    needed = {
        re.split(r"[^\w.-]", line)[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert {"mlflow", "torch", "transformers", "cloudpickle"} <= needed
    assert not {"boto3", "pytest", "accelerate"} & needed
    assert {
        "accelerate",
        "all",
        "clients",
        "demo",
        "dev",
        "docker",
        "image",
        "metrics",
        "openvino",
        "s3",
        "sound",
        "spark",
        "stack",
        "test",
    } == set(metadata.get_all("Provides-Extra", []))


def test_only_the_package_is_importable(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/top_level.txt"))
    assert wheel.read(name).decode().split() == ["mlflow_safeflavor"]
