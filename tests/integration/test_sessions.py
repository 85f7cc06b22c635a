"""Weights of a session: mapped from their files, and packed once for all servers on a host.

The bits are the same in every way.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from integration.test_images import make_model as make_viewer
from integration.test_images import make_processor
from torch import nn

import mlflow_safeflavor
from mlflow_safeflavor.artifact import host_cache, weights_files
from mlflow_safeflavor.artifact.weights_files import HeldFile
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.graph.onnx_engine import Session
from mlflow_safeflavor.module import tensors

TEXTS = ["the cat sat on the mat", "a dog", "red tree under green tree " * 5]


class Mixes(nn.Module):
    """What is packed in several ways: products, a convolution, a recurrent layer, a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.wave = nn.Conv1d(16, 16, 3, padding=1)
        self.memory = nn.LSTM(16, 16, batch_first=True)
        self.bilinear = nn.Parameter(torch.randn(16, 8))
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        x = self.wave(self.table(ids).transpose(1, 2)).transpose(1, 2)
        x, _ = self.memory(x)
        return {"y": self.head(x).tanh() @ self.head.weight @ self.bilinear}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture
def saved(root, tiny_tokenizer):
    """``saved(name)``: an artifact, made once; ``files`` are about those of its weights."""

    def save(name: str, files: int = 1) -> Path:
        folder = root / f"{name}-{files}"
        if not folder.exists():
            torch.manual_seed(0)
            given: dict[str, Any] = {"rehearse": False, "graph": "require"}
            if name == "texts":
                module = bert_classifier()
                given["tokenizer"] = tiny_tokenizer
            elif name == "images":
                module = make_viewer()
                given["processor"] = make_processor(size={"height": 32, "width": 32})
            else:
                module = Mixes()
                given |= {"task": "raw", "input_example": rows(name), "graph": "only"}
            nbytes = sum(parameter.nbytes for parameter in module.parameters())
            with pytest.MonkeyPatch.context() as patch:
                if files > 1:
                    patch.setattr(tensors, "SHARD_BYTES", nbytes // files + 1)
                mlflow_safeflavor.save_model(module, folder, **given)
        return folder

    return save


def bert_classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=35, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(host_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weights_files, "_SMALL", -1)
    monkeypatch.setattr(weights_files, "_SETTLED", -1.0)
    return tmp_path / "cache"


def load(folder: Path, **options):
    model = mlflow_safeflavor.load_model(folder, model_config={"engine": "onnx"}, **options)
    assert model.report.engine == "onnx"
    return model


def rows(name: str):
    if name == "texts":
        return pd.DataFrame({"text": TEXTS})
    if name == "images":
        return [
            np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), np.uint8) for i in range(3)
        ]
    return {"ids": np.random.default_rng(0).integers(0, 50, (3, 7))}


def bits(answer) -> object:
    return (
        {key: value.tobytes() for key, value in answer.items()}
        if isinstance(answer, dict)
        else answer.to_dict()
    )


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("packed-*/packed.*"))


def is_mapped(path: Path) -> bool:
    return f"{path}\n" in Path("/proc/self/maps").read_text()


# --- mapped --------------------------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch) -> list[Session]:
    """Sessions that got arrays."""
    found, share = [], Session._share

    def seen(self, options):
        found.append(self)
        return share(self, options)

    monkeypatch.setattr(Session, "_share", seen)
    return found


@pytest.mark.parametrize("where", ["cache", "artifact", "relative", "link"])
@pytest.mark.parametrize(
    ("name", "files"), [("texts", 1), ("texts", 3), ("mixes", 1), ("mixes", 3)]
)
def test_mapped_by_name_or_given_as_arrays(
    saved, cache, shared, tmp_path, monkeypatch, name, files, where
):
    folder = saved(name, files)
    shared.clear()
    assert len([*folder.glob("safeflavor/model*.safetensors")]) >= files
    if where != "cache":
        monkeypatch.setenv(host_cache.VARIABLE, "off")
    if where == "link":
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    if where == "relative":
        monkeypatch.chdir(folder.parent)
        folder = Path(folder.name)
    model = load(folder)
    monkeypatch.chdir(tmp_path)
    assert not shared
    own = bits(model.predict(rows(name)))
    monkeypatch.setattr(HeldFile, "has_name", lambda self: False)
    other = load(saved(name, files))
    assert shared == [other.engine.session]
    assert bits(other.predict(rows(name))) == own


def test_a_small_file_is_a_copy_in_memory(saved, shared):
    """A copy that has no name."""
    folder = saved("texts")
    shared.clear()
    model = load(folder)
    assert shared == [model.engine.session]


@pytest.mark.parametrize("where", ["cache", "artifact"])
def test_a_file_that_took_the_name_meanwhile(saved, cache, tmp_path, monkeypatch, where):
    folder = Path(shutil.copytree(saved("mixes"), tmp_path / "artifact"))
    if where == "artifact":
        monkeypatch.setenv(host_cache.VARIABLE, "off")
    locate = Session._locate

    def swap(self, options):
        (file,) = self._files.values()
        assert file.kind == ("copy" if where == "cache" else "file")
        other = file.name.with_name("other")
        shutil.copy(file.name, other)
        os.replace(other, file.name)
        return locate(self, options)

    monkeypatch.setattr(Session, "_locate", swap)
    with pytest.raises(IntegrityError, match="changed since it was compared"):
        load(folder)
    monkeypatch.undo()
    assert load(folder).predict(rows("mixes"))


def test_a_copy_that_somebody_removed_is_still_used(saved, cache, shared, monkeypatch):
    hold = weights_files.hold

    def removed(*given, **options):
        found = hold(*given, **options)
        found[0].name.unlink()
        return found

    folder = saved("mixes")
    shared.clear()
    monkeypatch.setattr("mlflow_safeflavor.artifact.inventory_file.hold", removed)
    model = load(folder)
    own = bits(model.predict(rows("mixes")))
    assert shared == [model.engine.session]
    monkeypatch.undo()
    assert bits(load(folder).predict(rows("mixes"))) == own


PEAK = """
import sys
from pathlib import Path
import numpy as np
import mlflow_safeflavor

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

model = mlflow_safeflavor.load_model(sys.argv[1])
before = peak()
model = mlflow_safeflavor.load_model(sys.argv[2])
model.predict({"ids": np.zeros((1, 3), np.int64)})
print(model.report.engine, peak() - before)
"""


class Table(nn.Module):
    """Rows of a table, which nothing packs."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding(rows, 1024)

    def forward(self, ids):
        return {"y": self.table(ids).sum(1)}


def test_opening_takes_no_copy(tmp_path):
    """A table of 82 MB, of which a forward reads three rows."""
    for count in (10, 20_000):
        mlflow_safeflavor.save_model(
            Table(count), tmp_path / str(count), task="raw", rehearse=False, graph="only",
            input_example={"ids": np.zeros((1, 3), np.int64)},
        )  # fmt: skip
    environ = {**os.environ, host_cache.VARIABLE: str(tmp_path / "cache")}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "10"), str(tmp_path / "20000")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    engine, kilobytes = done.stdout.split()
    assert engine == "onnx"
    assert int(kilobytes) < 40_000


# --- packed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["texts", "images", "mixes"])
def test_the_second_writes_and_the_first_changes_over(saved, cache, name):
    first = load(saved(name))
    own = bits(first.predict(rows(name)))
    assert files(cache) == []  # who is alone pays for nobody
    second = load(saved(name))
    graph, data = files(cache)[::-1]
    assert (graph.name, data.name) == ("packed.onnx", "packed.data")
    assert is_mapped(data)
    assert bits(second.predict(rows(name))) == own
    before = first.engine.session._session
    assert bits(first.predict(rows(name))) == own
    assert first.engine.session._session is not before
    del second
    third = load(saved(name))
    assert bits(third.predict(rows(name))) == own
    assert files(cache) == [data, graph]


def test_what_is_kept_and_cannot_be_read_is_done_without(saved, cache, caplog):
    first = load(saved("texts"))
    own = bits(first.predict(rows("texts")))
    load(saved("texts"))
    files(cache)[1].write_bytes(b"no graph")
    with caplog.at_level(logging.INFO, "mlflow.safeflavor"):
        assert bits(load(saved("texts")).predict(rows("texts"))) == own
        assert bits(first.predict(rows("texts"))) == own
    assert caplog.text.count("packed weights are not shared") == 2


def test_what_was_kept_for_a_week_is_written_again(saved, cache):
    holding = [load(saved("texts")) for _ in range(2)]
    own = bits(holding[1].predict(rows("texts")))
    data, graph = files(cache)
    os.utime(graph, (time.time() - 8 * 86400,) * 2)
    inode = data.stat().st_ino
    holding.append(load(saved("texts")))
    assert data.stat().st_ino != inode
    assert [bits(model.predict(rows("texts"))) for model in holding] == [own] * 3


@pytest.mark.parametrize("why", ["rehash", "restart unknown", "no room", "no cache"])
def test_nothing_is_kept(saved, cache, monkeypatch, why):
    if why == "restart unknown":
        monkeypatch.setattr("mlflow_safeflavor.graph.packed_weights.boot", lambda: "")
    if why == "no room":
        monkeypatch.setattr(host_cache, "has_room", lambda folder, nbytes: False)
    if why == "no cache":
        monkeypatch.setenv(host_cache.VARIABLE, "off")
    option = {"verify": "rehash"} if why == "rehash" else {}
    models = [load(saved("texts"), **option) for _ in range(2)]
    answers = [bits(model.predict(rows("texts"))) for model in models]
    assert answers[0] == answers[1]
    assert files(cache) == []
