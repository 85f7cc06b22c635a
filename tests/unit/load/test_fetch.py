"""A download gets what is missing or other, and no file has its own name before it is whole."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import artifact_repo, artifact_repository_registry
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from tqdm import tqdm

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import write_manifest
from mlflow_safeflavor.load import fetch as room
from mlflow_safeflavor.load.fetch import fetch
from mlflow_safeflavor.predict import progress

ALWAYS = {"MLmodel", "safeflavor/manifest.json"}
CONTENT = {
    "MLmodel": b"flavors: {}",
    "requirements.txt": b"torch==1",
    "code/loader/part.py": b"pass",
    "safeflavor/model-00001.safetensors": b"1" * 9000,
    "safeflavor/model-00002.safetensors": b"2" * 7000,
}
SHARD = "safeflavor/model-00002.safetensors"


class Store(ArtifactRepository):
    """``counted:/path``: a folder of this disk, file by file; it can stop in the middle of one."""

    fetched: list[str]
    cut: str | None
    wrote = staticmethod(lambda path: None)

    def __init__(self, artifact_uri: str, *given: object, **options: object) -> None:
        super().__init__(artifact_uri)
        self.root = Path(artifact_uri.removeprefix("counted:"))

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        return list(LocalArtifactRepository(str(self.root)).list_artifacts(path))

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        name = remote_file_path.removeprefix("model/")
        content = (self.root / remote_file_path).read_bytes()
        half = content[: len(content) // 2]
        with Path(local_path).open("wb") as file:
            file.truncate(len(content))  # as multipart downloads do
            file.write(half)
            file.flush()
            self.wrote(local_path)
            if name == self.cut:
                raise ConnectionError(f"cut in {name}")
            file.write(content[len(half) :])
        self.fetched.append(name)

    def log_artifact(self, *_: object) -> None:
        raise NotImplementedError

    log_artifacts = log_artifact


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a manifest in the store ``counted:``."""
    known = artifact_repository_registry._artifact_repository_registry._registry
    monkeypatch.setitem(known, "counted", Store)
    monkeypatch.setattr(Store, "fetched", [], raising=False)
    monkeypatch.setattr(Store, "cut", None, raising=False)
    root = tmp_path / "store" / "model"
    for name, content in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    write_manifest(Layout(root), mlmodel={"flavors": {}, "signature": None})
    return root


def get(model, folder):
    """Files that were fetched, after what came is compared with what is in the store."""
    Store.fetched.clear()
    there = fetch(f"counted:{model}", folder)
    assert there == folder / "model"
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == {*CONTENT, *ALWAYS}
    assert all((there / name).read_bytes() == (model / name).read_bytes() for name in found)
    assert [path.name for path in folder.iterdir()] == ["model"], "a scratch folder stayed"
    return set(Store.fetched)


def test_all_of_it_and_then_nothing(model, tmp_path):
    assert get(model, tmp_path / "to") == {*CONTENT, *ALWAYS}
    # MLmodel is not in the manifest: a registry adds to it.
    assert get(model, tmp_path / "to") == ALWAYS


def test_what_is_missing_cut_short_or_other_comes_again(model, tmp_path):
    get(model, tmp_path / "to")
    there = tmp_path / "to" / "model"
    (there / "code/loader/part.py").unlink()
    (there / "safeflavor/model-00001.safetensors").write_bytes(b"1" * 4000)
    # Of the right size, as where chunks of a file were fetched.
    (there / SHARD).write_bytes(b"2" * 6999 + b"\0")
    wanted = {"code/loader/part.py", "safeflavor/model-00001.safetensors", SHARD}
    assert get(model, tmp_path / "to") == {*ALWAYS, *wanted}


def test_a_link_is_replaced_and_what_it_names_stays(model, tmp_path):
    get(model, tmp_path / "to")
    shard, mine = tmp_path / "to" / "model" / SHARD, tmp_path / "to" / "mine"
    shard.rename(mine)
    shard.symlink_to(mine)  # one that leads out of the folder is refused by MLflow
    mine.write_bytes(b"other")
    fetch(f"counted:{model}", tmp_path / "to")
    assert not shard.is_symlink()
    assert shard.read_bytes() == CONTENT[SHARD]
    assert mine.read_bytes() == b"other"


def test_no_file_has_its_name_before_it_is_whole(model, tmp_path, monkeypatch):
    seen = []
    final = {tmp_path / "to" / "model" / name: content for name, content in CONTENT.items()}

    def look(path):
        seen.append(path)
        assert not [
            path for path, content in final.items()
            if path.exists() and path.read_bytes() != content
        ]  # fmt: skip

    monkeypatch.setattr(Store, "wrote", staticmethod(look))
    get(model, tmp_path / "to")
    assert len(seen) > len(CONTENT)


def test_a_cut_leaves_whole_files_alone_and_the_next_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "cut", SHARD)
    with pytest.raises(MlflowException, match=f"cut in {SHARD}"):
        fetch(f"counted:{model}", tmp_path / "to")
    there = tmp_path / "to" / "model"
    for path in there.rglob("*.*"):
        assert path.read_bytes() == (model / path.relative_to(there)).read_bytes()
    assert not (there / SHARD).exists()
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["model"]
    monkeypatch.setattr(Store, "cut", None)
    assert get(model, tmp_path / "to") == {*ALWAYS, SHARD}


def test_after_ctrl_c_it_goes_on(model, tmp_path, monkeypatch):
    begun, over, ended = threading.Event(), threading.Event(), threading.Event()

    def halfway(path):
        if Path(path).stat().st_size == len(CONTENT[SHARD]) and not over.is_set():
            begun.set()
            over.wait(60)
            ended.set()

    def interrupted(futures):
        # Where MLflow waits for its threads. A real signal can come just before that wait, which
        # then goes on until a file is there, and is raised wherever Python looks next.
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "wrote", staticmethod(halfway))
    with monkeypatch.context() as patch:
        patch.setattr(artifact_repo, "as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(f"counted:{model}", tmp_path / "to")
    over.set()
    assert ended.wait(60), "MLflow's thread goes on with its file"
    there = tmp_path / "to" / "model"
    assert not (there / SHARD).exists()
    assert SHARD in get(model, tmp_path / "to") < {*CONTENT, *ALWAYS}


@pytest.mark.parametrize("damage", ["{", None], ids=["damaged", "missing"])
def test_without_a_manifest_all_of_it_comes(model, tmp_path, damage):
    get(model, tmp_path / "to")
    manifest = Layout(model).manifest
    manifest.unlink()
    if damage:
        manifest.write_text(damage)
    Store.fetched.clear()
    fetch(f"counted:{model}", tmp_path / "to")
    assert {*CONTENT} <= {*Store.fetched}


def test_another_version_of_the_model_replaces_what_differs(model, tmp_path):
    get(model, tmp_path / "to")
    (model / SHARD).write_bytes(b"3" * 7000)
    write_manifest(Layout(model), mlmodel={"flavors": {}, "signature": None})
    assert get(model, tmp_path / "to") == {*ALWAYS, SHARD}


class Terminal:
    """A file that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.fixture
def slow(monkeypatch):
    """Files come slowly enough to be watched."""
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    monkeypatch.setattr(room, "_LOOK", 0.01)
    monkeypatch.setattr(Store, "wrote", staticmethod(lambda path: time.sleep(0.1)))


def test_a_terminal_is_shown_bytes_and_their_rate(model, tmp_path, slow, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", raising=False)
    get(model, tmp_path / "to")
    assert "B/s" in terminal.text
    assert "/16.0k" in terminal.text
    assert "Downloading artifacts" not in terminal.text, "MLflow's bar, too"
    assert "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR" not in os.environ


def test_a_lock_that_ctrl_c_left_behind_holds_up_nothing(model, tmp_path, slow, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", raising=False)
    with tqdm.get_lock():  # as where tqdm was interrupted between taking it and giving it back
        get(model, tmp_path / "to")


def test_a_log_and_whoever_wants_no_bar_are_shown_none(model, tmp_path, slow, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        get(model, tmp_path / "to")
    assert terminal.text == ""
    assert os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] == "false"
    monkeypatch.delenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")
    get(model, tmp_path / "log")
    assert "B/s" not in capfd.readouterr().err
