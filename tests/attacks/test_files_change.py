"""A loaded model depends on no file afterwards.

The same answers, or an error with a name, and never a signal.

In processes of their own, since what is tested ended them: SIGBUS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import forks

import mlflow_safeflavor
from mlflow_safeflavor.artifact import weights_files
from mlflow_safeflavor.errors import IntegrityError, SafeFlavorError
from mlflow_safeflavor.load import saved as reading

pytest_plugins = "saved_models"
CHILD = '''
import json, os, shutil, subprocess
from pathlib import Path
import mlflow.pyfunc, mlflow_safeflavor, torch, transformers.models.bert.modeling_bert
from mlflow_safeflavor.artifact import weights_files
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.load.pyfunc import facts_of

text = [{"text": "the cat sat on the mat"}, {"text": "a dog"}]

def files_of(folder, there):
    """Pairs of files that can be written over."""
    return [(f, there / f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]

def rewrite(folder, there):
    for mine, theirs in files_of(folder, there):
        if theirs.exists():
            with mine.open("r+b") as file:
                file.write(theirs.read_bytes())
def truncate(folder, there):
    for mine, _ in files_of(folder, there):
        os.truncate(mine, mine.stat().st_size // 2)
def empty(folder, there):
    for mine, _ in files_of(folder, there):
        mine.open("wb").close()
def replace(folder, there):
    for mine, theirs in files_of(folder, there):
        if theirs.exists():
            os.replace(shutil.copy(theirs, folder / "scratch"), mine)
def delete(folder, there):
    shutil.rmtree(folder)
def copy_over(folder, there):
    subprocess.run(["cp", "-r", f"{there}/.", folder], check=True)
def reload(folder, there):
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    mlflow.artifacts.download_artifacts(str(there), dst_path=str(folder.parent))
    copy_over(folder, there)

def native(path, engine):
    model = mlflow_safeflavor.load_model(path, model_config={"engine": engine})
    return model, model.predict
def pyfunc(path, engine):
    model = mlflow.pyfunc.load_model(path, model_config={"engine": engine}, suppress_warnings=True)
    return model._model_impl.model, model.predict

def everything(model, predict):
    """All that a loaded model can be asked for, also what nobody asked for before."""
    answers = {"predict": lambda: predict(text)}
    if hasattr(model.engine, "fallback"):
        answers["fallback"] = lambda: model.engine.fallback() and "rebuilt"
    answers["tokenizer"] = lambda: model.tokenizer("a cat")["input_ids"]
    answers["facts"] = lambda: facts_of(model)["environment"]["distributions"]["torch"]
    found = {}
    for name, ask in answers.items():
        try:
            found[name] = str(ask())
        except SafeFlavorError as error:
            found[name] = type(error).__name__
    return found

def job(base, other, scratch, engine, kind):
    weights_files._SMALL = {"memory": 10**7}.get(kind, -1)
    os.environ["MLFLOW_SAFEFLAVOR_CACHE"] = "off" if kind == "file" else f"{scratch}/cache"
    for load in (native, pyfunc):
        fresh = everything(*load(base, engine))
        for change in (rewrite, truncate, empty, replace, delete, copy_over, reload):
            print(json.dumps({"load": load.__name__, "change": change.__name__}), flush=True)
            path = Path(scratch) / f"{load.__name__}-{change.__name__}" / "model"
            shutil.copytree(base, path)
            model, predict = load(str(path), engine)
            before = str(predict(text))
            change(path, Path(other))
            print(json.dumps({"before": before, "fresh": fresh, "after": everything(model, predict),
                              "weights": model.report.weights}), flush=True)
'''


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folder in which the versions of a model are made once."""
    return tmp_path_factory.mktemp("versions")


@pytest.fixture
def other(others, tiny_bert, tiny_tokenizer) -> Path:
    """Another version of ``saved_with_graph``.

    Files of the same names and, where that is possible, sizes.
    """
    path: Path = others / "model"
    if not path.exists():
        model = tiny_bert(initializer_range=0.5, seed=7)
        tiny_tokenizer.add_tokens(["more"])
        model.resize_token_embeddings(len(tiny_tokenizer))
        mlflow_safeflavor.save_model(
            model, path, tokenizer=tiny_tokenizer, rehearse=False, graph="require"
        )
    return path


@pytest.fixture(scope="module")
def ask(tmp_path_factory) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """``ask(base, other, scratch, engine, kind)``: what a process says of each change, in turn."""
    with forks(CHILD, tmp_path_factory.mktemp("asked") / "stderr") as run:

        def ask(*given: object) -> list[dict[str, Any]]:
            ended = run(*map(str, given), seconds=300)
            assert ended.status == 0, ended
            lines = [json.loads(line) for line in ended.lines if line.startswith("{")]
            return [{**what, **found} for what, found in zip(lines[::2], lines[1::2], strict=True)]

        yield ask


@pytest.mark.parametrize("engine", ["module", "onnx"])
@pytest.mark.parametrize("kind", ["memory", "copy", "file"])
def test_whatever_happens_to_the_files_of_a_loaded_model(
    saved_with_graph, other, tmp_path, ask, engine, kind
):
    found = ask(saved_with_graph, other, tmp_path, engine, kind)
    assert len(found) == 14
    for row in found:
        where = (row["load"], row["change"])
        assert row["weights"] == kind, where
        assert row["fresh"]["predict"] == row["before"], where
        for name, answer in row["after"].items():
            allowed = {row["fresh"][name]} | ({"IntegrityError"} if kind == "file" else set())
            assert answer in allowed, (where, name, answer)


def test_no_module_is_rebuilt_from_a_file_that_was_changed(saved_with_graph, tmp_path, monkeypatch):
    """The module behind a graph is built when it is needed, long after its weights were hashed."""
    monkeypatch.setattr(weights_files, "_SMALL", -1)
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_CACHE", "off")
    path = Path(shutil.copytree(saved_with_graph, tmp_path / "model"))
    engine: Any = mlflow_safeflavor.load_model(path, model_config={"engine": "onnx"}).engine
    with (path / "safeflavor" / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 2000)  # the header, too
    with pytest.raises(IntegrityError, match="was changed since it was compared"):
        engine.fallback()


# What a load raises; None where the file is not read again.
SWAPPED = {
    "structure.json": None,
    "config.json": None,
    "tensors.json": None,
    "parity.json": None,
    "parity.safetensors": "IntegrityError",
    "tokenizer/tokenizer.json": None,
    "graph.onnx": "IntegrityError",
    "model.safetensors": "IntegrityError",
}


@pytest.mark.parametrize("name", SWAPPED)
def test_a_file_that_changes_between_check_and_use_is_named_or_changes_nothing(
    saved_with_graph, other, tmp_path, monkeypatch, name
):
    """What was hashed is what is parsed.

    Files are written to just after all of them were compared.
    """
    text = [{"text": "the cat sat on the mat"}]
    path = Path(shutil.copytree(saved_with_graph, tmp_path / "model"))
    compare = reading.require_intact

    def compare_and_swap(*given, **options):
        compare(*given, **options)
        space = b" " * name.endswith(".json")  # so that no file is the same in both versions
        (path / "safeflavor" / name).write_bytes((other / "safeflavor" / name).read_bytes() + space)

    monkeypatch.setattr(reading, "require_intact", compare_and_swap)
    engine = "onnx" if name == "graph.onnx" else "module"
    asked: dict[str, Any] = {"model_config": {"engine": engine}}
    if SWAPPED[name] is None:
        found = mlflow_safeflavor.load_model(str(path), **asked).predict(text)
        monkeypatch.undo()
        wanted = mlflow_safeflavor.load_model(str(saved_with_graph), **asked).predict(text)
        assert found.equals(wanted)
        return
    with pytest.raises(SafeFlavorError) as refused:
        mlflow_safeflavor.load_model(str(path), **asked)
    assert type(refused.value).__name__ == SWAPPED[name]
    assert Path(name).name in str(refused.value)


@pytest.mark.slow
@pytest.mark.serve
def test_whatever_happens_to_the_files_of_a_server(saved_with_graph, other, tmp_path, serve):
    path = Path(shutil.copytree(saved_with_graph, tmp_path / "model"))
    weights = path / "safeflavor" / "model.safetensors"
    request = {"dataframe_records": [{"text": "the cat sat on the mat"}]}

    def rewrite() -> None:
        with weights.open("r+b") as file:
            file.write((other / "safeflavor" / "model.safetensors").read_bytes())

    changes = {
        "rewrite": rewrite,
        "truncate": lambda: os.truncate(weights, 4096),
        "replace": lambda: os.replace(
            shutil.copy(other / "safeflavor" / weights.name, tmp_path / "new"), weights
        ),
        "cp -r": lambda: subprocess.run(["cp", "-r", f"{other}/.", path], check=True),
        "delete": lambda: shutil.rmtree(path),
    }
    with serve(path) as server:
        wanted = server.invoke(request)
        assert wanted.status == 200
        for name, change in changes.items():
            change()
            assert server.invoke(request) == wanted, name
