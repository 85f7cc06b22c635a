"""A download is gone afterwards, for each reader, and stays where something may still read it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from click.testing import CliRunner
from mlflow.entities import FileInfo
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

import mlflow_safeflavor
from mlflow_safeflavor.artifact import weights_files
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import DownloadError, IntegrityError, SafeFlavorError
from mlflow_safeflavor.load.download import located

pytest_plugins = "saved_models"


class Elsewhere(ArtifactRepository):
    """Serves ``elsewhere:/path`` from this disk, as a store does that is not on it.

    File by file.
    """

    def __init__(self, artifact_uri: str, *given: object, **options: object) -> None:
        super().__init__(artifact_uri)
        self.behind = LocalArtifactRepository(artifact_uri.removeprefix("elsewhere:"))

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        return list(self.behind.list_artifacts(path))

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self.behind._download_file(remote_file_path, local_path)

    def log_artifact(self, *_: object) -> None:
        raise NotImplementedError

    log_artifacts = log_artifact


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, for this test alone; ``elsewhere:`` is known."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    known = artifact_repository_registry._artifact_repository_registry._registry
    monkeypatch.setitem(known, "elsewhere", Elsewhere)
    return folder


def test_a_loaded_model_leaves_nothing_of_its_download(temporary, saved):
    model = mlflow_safeflavor.load_model(f"elsewhere:{saved}")
    assert list(temporary.iterdir()) == []
    wanted = mlflow_safeflavor.load_model(saved).predict(["a cat"])
    assert str(model.predict(["a cat"])) == str(wanted)
    assert model.tokenizer("a cat")["input_ids"]


def test_nor_does_one_that_is_refused(temporary, saved, tmp_path):
    with pytest.raises(SafeFlavorError):
        mlflow_safeflavor.load_model(f"elsewhere:{saved}", model_config={"engine": "onnx"})
    with pytest.raises(Exception, match="nothing"):
        mlflow_safeflavor.load_model(f"elsewhere:{tmp_path}/nothing/there")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("asked", [False, True])
def test_a_listing_that_breaks_off(temporary, saved, tmp_path, monkeypatch, asked):
    def cut(self, path=None):
        raise ClosedError("closed by the store")

    monkeypatch.setattr(Elsewhere, "list_artifacts", cut)
    with pytest.raises(DownloadError, match="ClosedError: closed by the store") as caught:
        mlflow_safeflavor.load_model(f"elsewhere:{saved}", str(tmp_path) if asked else None)
    assert caught.value.where == f"elsewhere:{saved}"
    assert list(temporary.iterdir()) == []


class ClosedError(Exception):
    """Of a store's client, as botocore's: none of MLflow's and none of the system's."""


def test_a_folder_that_was_asked_for_stays(temporary, saved, tmp_path):
    mlflow_safeflavor.load_model(f"elsewhere:{saved}", tmp_path / "kept")
    assert (tmp_path / "kept" / saved.name / "MLmodel").exists()
    assert list(temporary.iterdir()) == []


def test_verify_inspect_and_dockerfile_leave_nothing(temporary, saved, tmp_path):
    uri = f"elsewhere:{saved}"
    assert mlflow_safeflavor.verify_model(uri).ok
    assert CliRunner().invoke(main, ["inspect", uri]).exit_code == 0
    mlflow_safeflavor.generate_dockerfile(uri, tmp_path / "image", hashes=False)
    assert (tmp_path / "image" / "model" / "MLmodel").exists()
    assert list(temporary.iterdir()) == []


def test_what_is_mapped_from_its_files_keeps_the_download_until_it_is_gone(
    temporary, saved, monkeypatch
):
    monkeypatch.setattr(weights_files, "_SMALL", -1)
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_CACHE", "off")
    model = mlflow_safeflavor.load_model(f"elsewhere:{saved}")
    assert model.report.weights == "file"
    assert len(list(temporary.iterdir())) == 1
    model.predict(["a cat"])  # which looks at the file
    del model
    gc.collect()
    assert list(temporary.iterdir()) == []


IMPORTS_LATE = """
import sys
from pathlib import Path
import tempfile; tempfile.tempdir = sys.argv[2]
import mlflow_safeflavor, test_download
from mlflow.store.artifact import artifact_repository_registry as registry
registry._artifact_repository_registry.register("elsewhere", test_download.Elsewhere)
import torch
model = mlflow_safeflavor.load_model(f"elsewhere:{sys.argv[1]}", trust={"code"})
import os
if os.fork() == 0:
    sys.exit()  # takes nothing from its parent
os.wait()
print(model.module(torch.ones(1, 2)).tolist(), len(list(Path(sys.argv[2]).iterdir())))
"""


def test_code_can_be_imported_late_and_its_download_goes_with_the_process(
    temporary, tmp_path, user_code
):
    source = (
        "import torch\nclass Late(torch.nn.Module):\n    def __init__(self):\n        "
        "super().__init__()\n"
    )
    source += "        self.bias = torch.nn.Parameter(torch.ones(2))\n"
    source += "    def forward(self, x):\n        from late_part import add\n"
    source += "        return add(x, self.bias)\n"
    _, part = user_code("late_part", "def add(a, b):\n    return a + b\n")
    module, whole = user_code("late_whole", source)
    saved = tmp_path / "late"
    mlflow_safeflavor.save_model(
        module.Late().eval(), saved, task="raw", rehearse=False,
        input_example={"x": torch.ones(1, 2).numpy()},
        code_paths=[str(whole), str(part)], graph="no",
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS_LATE, str(saved), str(temporary)],
        env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == "[[2.0, 2.0]] 1", done.stderr[-3000:]
    assert list(temporary.iterdir()) == []


HOLDS_ONE = """
import sys, time
from pathlib import Path
from mlflow_safeflavor.artifact.scratch import scratch_folder
with scratch_folder("download", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_downloaded_is_swept(temporary):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE, str(temporary)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert len(list(temporary.iterdir())) == 1
    with scratch_folder("lock"):
        pass
    assert list(temporary.iterdir()) == []


def test_a_model_of_this_disk_is_read_where_it_lies(temporary, saved, tracking):
    with mlflow.start_run():
        info = mlflow_safeflavor.log_model(
            torch.nn.Linear(2, 2), name="m", task="raw", rehearse=False, allow_pickle=True,
            input_example={"input": torch.ones(1, 2).numpy()}, graph="no",
        )  # fmt: skip
    with located(f"models:/{info.model_id}") as folder:
        assert not folder.is_relative_to(temporary)
        assert (folder / "MLmodel").exists()
    assert (folder / "MLmodel").exists()
    with located(f"runs:/{info.run_id}/m") as copied:  # which MLflow copies
        assert (copied / "MLmodel").exists()
    left = [path.name for path in temporary.iterdir() if path != folder]
    assert left == [], left


# Downloads that are killed.

KILLED = """
import os, signal, sys
from pathlib import Path
import test_download
from mlflow.store.artifact import artifact_repository_registry as registry
from mlflow_safeflavor.load.download import located
uri, folder, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Killing(test_download.Elsewhere):
    begun = 0

    def _download_file(self, remote_file_path, local_path):
        Killing.begun += 1
        if Killing.begun == moment:
            content = (Path(self.behind.artifact_dir) / remote_file_path).read_bytes()
            Path(local_path).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super()._download_file(remote_file_path, local_path)

registry._artifact_repository_registry.register("elsewhere", Killing)
with located(uri, folder):
    pass
"""


@pytest.fixture
def bytes_of(temporary, monkeypatch):
    """Sizes of the files that were downloaded, by name."""
    sizes: dict[str, int] = {}
    get = Elsewhere._download_file

    def counted(self, remote_file_path, local_path):
        get(self, remote_file_path, local_path)
        sizes[remote_file_path] = Path(local_path).stat().st_size

    monkeypatch.setattr(Elsewhere, "_download_file", counted)
    return sizes


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_download_that_was_killed_goes_on_and_gives_the_same_bits(
    temporary, saved, tmp_path, bytes_of, part
):
    whole = [path.stat().st_size for path in saved.rglob("*") if path.is_file()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, _helpers()))}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, f"elsewhere:{saved}", tmp_path / "to"]
    done = subprocess.run(
        [*map(str, command), str(int(len(whole) * part))],
        env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    model = mlflow_safeflavor.load_model(f"elsewhere:{saved}", tmp_path / "to")
    assert model.report.bit_identical
    assert 0 < sum(bytes_of.values()) < sum(whole)
    # MLflow gets up to 20 files at once, and all that were under way are lost.
    assert len(bytes_of) <= len(whole) * (1 - part) + 25, "no more than is missing"
    assert [path.name for path in (tmp_path / "to").iterdir()] == [saved.name], "of the killed one"


def _helpers():
    return [Path(__file__).parent, Path(__file__).parents[1]]


def test_a_file_that_was_damaged_on_disk_is_fetched_again(temporary, saved, tmp_path, bytes_of):
    mlflow_safeflavor.load_model(f"elsewhere:{saved}", tmp_path)
    weights = tmp_path / saved.name / "safeflavor" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    bytes_of.clear()
    assert mlflow_safeflavor.load_model(f"elsewhere:{saved}", tmp_path).report.bit_identical
    names = {Path(name).name for name in bytes_of}
    assert names == {"MLmodel", "manifest.json", "model.safetensors"}


def test_what_is_none_of_the_artifact_is_refused_as_ever(temporary, saved, tmp_path):
    (tmp_path / saved.name / "code").mkdir(parents=True)
    (tmp_path / saved.name / "code" / "torch.py").write_text("")
    with pytest.raises(IntegrityError, match=r"code/torch\.py: was not there"):
        mlflow_safeflavor.load_model(f"elsewhere:{saved}", tmp_path)
