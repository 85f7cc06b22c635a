"""Checkpoints of GGUF, ONNX and TorchScript: what is said about them, and done."""

from __future__ import annotations

import shutil

import pytest
import torch
from hints.hint_rows import follows

from mlflow_safeflavor import from_pretrained, load_model, save_model
from mlflow_safeflavor.checkpoints import hub
from mlflow_safeflavor.checkpoints.folder import folder_of
from mlflow_safeflavor.checkpoints.prefetch import prefetch
from mlflow_safeflavor.errors import StructureError


@pytest.fixture
def checkpoint(tiny_bert, tiny_tokenizer, tmp_path):
    """A folder that all three functions take."""
    folder = tmp_path / "checkpoint"
    tiny_bert().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def takers(tmp_path):
    """What takes a checkpoint."""
    return {
        "save_model": lambda path: save_model(path, tmp_path / "saved", rehearse=False),
        "from_pretrained": from_pretrained,
        "prefetch": lambda path: prefetch(path, tmp_path / "fetched"),
    }


def refusals(takers, path):
    """The one error that all of them end in."""
    errors = []
    for take in takers.values():
        with pytest.raises(StructureError) as refused:
            take(path)
        errors.append(refused.value)
    assert len({str(error) for error in errors}) == 1
    return errors[0]


@follows(
    "checkpoints/other_formats",
    "A GGUF file holds weights that were packed for llama.cpp",
    "take the checkpoint that it was converted from, which its model card calls base_model",
)
@follows(
    "checkpoints/other_formats",
    "An ONNX file holds a graph, and no module that could be rebuilt and compared",
    "save the module or checkpoint that it was exported from: its graph is recorded and proven "
    "then; the file alone is for mlflow.onnx",
)
def test_files_of_other_runtimes(checkpoint, takers, tmp_path):
    for name, what in (("q4.gguf", "GGUF"), ("model.onnx", "ONNX"), ("onnx/m.onnx", "ONNX")):
        folder = shutil.copytree(checkpoint, tmp_path / name.replace("/", "-"))
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"GGUF")
        error = refusals(takers, folder)
        assert what in error.what
        assert error.found == (folder / name).name
        assert what in refusals(takers, folder / name).what
    for take in takers.values():
        take(checkpoint)


def test_beside_weights_of_torch_they_are_left_alone(checkpoint, takers):
    for name in ("q4.gguf", "model.onnx"):
        (checkpoint / name).write_bytes(b"GGUF")
    for take in takers.values():
        take(checkpoint)


@pytest.mark.parametrize("name", ["q4.gguf", "onnx/model.onnx"])
def test_repositories_with_nothing_else(monkeypatch, tmp_path, name):
    """``from_pretrained`` asks for no such file, so it asks which there are once nothing came."""
    files = [hub.HubFile(name, None, None), hub.HubFile("config.json", None, None)]
    monkeypatch.setattr(hub, "download", lambda *args, **options: tmp_path)
    monkeypatch.setattr(hub, "list_files", lambda *args: ("0" * 40, files))
    with pytest.raises(StructureError) as refused:
        folder_of("a/model", "0" * 40, {})
    assert (refused.value.found, refused.value.where) == (name, "a/model")
    assert folder_of("a/model", "0" * 40, {"local_files_only": True}) == tmp_path
    with pytest.raises(StructureError) as refused:
        prefetch("a/model", tmp_path / "fetched", revision="0" * 40)
    assert refused.value.found == name


@follows(
    "checkpoints/other_formats",
    "TorchScript keeps no class that could be called again",
    "make the module, and copy the weights into it: module.load_state_dict(torch.jit.load(…, "
    "map_location='cpu').state_dict())",
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript(takers, tmp_path):
    given = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()).eval()
    file = tmp_path / "scripted" / "model.pt"
    file.parent.mkdir()
    torch.jit.save(torch.jit.script(given), file)
    assert refusals(takers, file.parent).found == "model.pt"
    error = refusals(takers, file)
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()).eval()
    exec(error.hint.partition(": ")[2], {"module": module, "torch": torch})
    rows = torch.ones(3, 4)
    path = tmp_path / "model"
    save_model(module, path, task="raw", input_example={"input": rows.numpy()}, rehearse=False)
    [answers] = load_model(path).predict({"input": rows.numpy()}).values()
    assert torch.equal(torch.tensor(answers), given(rows))
    torch.save(given.state_dict(), file)
    for take in takers.values():  # a state dict is another matter
        with pytest.raises(StructureError, match=r"(?!TorchScript)"):
            take(file.parent)
