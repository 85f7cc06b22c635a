"""A saved folder is logged as it is, and an upload that broke off goes on with what is missing."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow.entities import FileInfo
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

import mlflow_safeflavor
from mlflow_safeflavor.errors import DownloadError, InputError, IntegrityError
from mlflow_safeflavor.module import tensors

pytest_plugins = "saved_models"
pytestmark = pytest.mark.skipif(
    not hasattr(mlflow, "initialize_logged_model"), reason="MLflow 3 has logged models"
)


class Fragile(ArtifactRepository):
    """``fragile:/path``: a store on this disk, which breaks off at a file."""

    uploaded: list[str]
    breaks_at: str | None

    def __init__(self, artifact_uri: str, *given: object, **options: object) -> None:
        super().__init__(artifact_uri)
        self.behind = LocalArtifactRepository(artifact_uri.removeprefix("fragile:"))

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        return list(self.behind.list_artifacts(path))

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self.behind._download_file(remote_file_path, local_path)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        self.behind.log_artifact(local_file, artifact_path)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        for file in sorted(path for path in Path(local_dir).rglob("*") if path.is_file()):
            if file.name == self.breaks_at:
                raise ConnectionError("closed by the store")
            self.uploaded.append(file.name)
            folder = file.parent.relative_to(local_dir).as_posix()
            self.behind.log_artifact(str(file), None if folder == "." else folder)


@pytest.fixture
def store(tmp_path, monkeypatch, tracking):
    """Names of files that were uploaded; the active experiment is of the store ``fragile:``."""
    known = artifact_repository_registry._artifact_repository_registry._registry
    monkeypatch.setitem(known, "fragile", Fragile)
    monkeypatch.setattr(Fragile, "uploaded", [], raising=False)
    monkeypatch.setattr(Fragile, "breaks_at", None, raising=False)
    mlflow.create_experiment("fragile", artifact_location=f"fragile:{tmp_path}/store")
    mlflow.set_experiment("fragile")
    return Fragile.uploaded


@pytest.fixture
def sharded(tmp_path, monkeypatch, tiny_bert, tiny_tokenizer):
    """``sharded(name, seed=0)``: folder of a saved classifier whose weights are several files."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)

    def save(name: str, seed: int = 0) -> Path:
        mlflow_safeflavor.save_model(
            tiny_bert(seed=seed), tmp_path / name, tokenizer=tiny_tokenizer, rehearse=False,
            model_config={"forward_cost": 512}, graph="no",
        )  # fmt: skip
        return tmp_path / name

    return save


def shards(folder):
    return sorted(path.name for path in folder.glob("safeflavor/model-*.safetensors"))


def broken_off(folder, monkeypatch, at):
    """Id of a model whose upload breaks off at a file."""
    with monkeypatch.context() as patch:
        patch.setattr(Fragile, "breaks_at", at)
        with pytest.raises(DownloadError) as caught:
            mlflow_safeflavor.log_model(folder, "large")
    assert "closed by the store" in caught.value.message
    return last_id(), caught.value


def last_id():
    model = mlflow.last_logged_model()
    assert model is not None
    return model.model_id


def test_a_saved_model_is_logged_as_it_is(store, saved, monkeypatch):
    with mlflow.start_run() as run:
        info = mlflow_safeflavor.log_model(saved, "model", registered_model_name="m")
    model = mlflow_safeflavor.load_model("models:/m/1")
    assert model.report.bit_identical
    assert mlflow.get_logged_model(info.model_id).source_run_id == run.info.run_id
    logged = mlflow.models.get_model_info(info.model_uri)
    of_saved = mlflow.models.get_model_info(str(saved))
    assert logged.signature == of_saved.signature
    assert logged.flavors == of_saved.flavors
    assert logged.model_id == info.model_id
    assert mlflow.pyfunc.load_model(info.model_uri).predict(["a cat"]) is not None


def test_an_upload_that_broke_off_goes_on_with_what_is_missing(store, sharded, monkeypatch):
    folder = sharded("saved")
    *first, last = shards(folder)
    assert len(first) >= 2
    model_id, error = broken_off(folder, monkeypatch, last)
    assert set(first) <= set(store)
    assert str(mlflow.get_logged_model(model_id).status) == "FAILED"
    # A store that does not write all at once may show a half.
    (half,) = Path(folder.parent, "store").rglob(first[0])
    half.write_bytes(half.read_bytes()[:100])
    store.clear()
    call, _, said = error.hint.partition(" uploads")
    assert said == " what is missing"
    assert eval(call, {"log_model": mlflow_safeflavor.log_model}).model_id == model_id
    assert [name for name in store if name.startswith("model-")] == [first[0], last]
    assert str(mlflow.get_logged_model(model_id).status) == "READY"
    assert mlflow_safeflavor.load_model(f"models:/{model_id}").report.bit_identical


def test_it_does_not_go_on_with_another_model(store, sharded, monkeypatch):
    model_id, _ = broken_off(sharded("saved"), monkeypatch, "model.safetensors.index.json")
    other = sharded("other", seed=1)
    assert shards(other) == shards(other.parent / "saved")
    with pytest.raises(InputError, match="another model") as caught:
        mlflow_safeflavor.log_model(other, "large", model_id=model_id)
    assert caught.value.hint == "leave model_id out"
    assert str(mlflow.get_logged_model(model_id).status) == "FAILED"
    info = mlflow_safeflavor.log_model(other, "large")
    assert mlflow_safeflavor.load_model(info.model_uri).report.bit_identical


def test_nor_with_one_that_is_whole_or_was_not_logged_from_a_folder(
    store, sharded, monkeypatch, tiny_bert, tiny_tokenizer
):
    folder = sharded("saved")
    whole = mlflow_safeflavor.log_model(folder, "large").model_id
    with pytest.raises(InputError, match="READY"):
        mlflow_safeflavor.log_model(folder, "large", model_id=whole)
    assert str(mlflow.get_logged_model(whole).status) == "READY"
    monkeypatch.setattr(Fragile, "breaks_at", "tensors.json")
    with pytest.raises(ConnectionError):
        mlflow_safeflavor.log_model(
            tiny_bert(), "object", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
        )
    with pytest.raises(InputError, match="no upload that can go on"):
        mlflow_safeflavor.log_model(folder, "large", model_id=last_id())


def test_what_is_not_as_it_was_saved_is_not_logged(store, sharded):
    folder = sharded("saved")
    (folder / "safeflavor" / shards(folder)[0]).write_bytes(b"")
    with pytest.raises(IntegrityError, match="has 0 bytes"):
        mlflow_safeflavor.log_model(folder, "large")
    assert store == []


def test_options_of_a_save_come_too_late(store, saved):
    with pytest.raises(InputError, match="as it was saved") as caught:
        mlflow_safeflavor.log_model(saved, "large", dtype="float16", graph="no", tags={"a": "b"})
    assert caught.value.where == "dtype, graph"
    assert caught.value.hint == "leave them out, or log the model itself"
    info = mlflow_safeflavor.log_model(saved, "large", tags={"a": "b"})
    assert mlflow.get_logged_model(info.model_id).tags["a"] == "b"
