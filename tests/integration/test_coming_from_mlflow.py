"""Arguments of ``docs/coming-from-mlflow.md``: each of the peers has a row, and each row is run."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlflow
import pandas as pd
import pytest
import torch
from artifacts import SAME_BATCHES, TEXTS
from coming_page import table
from mlflow.models import Model, infer_signature
from packaging.version import Version
from writers import byte_tokenizer, writer

from mlflow_safeflavor import load_model, log_model, mlflow_compat, save_model
from mlflow_safeflavor.errors import InputError, PlacementError, StructureError

pytest_plugins = "saved_models"

FLAVORS = ("transformers", "pytorch", "sentence_transformers")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "save": save_model,
    "log": log_model,
    "load": load_model,
}
VERSION = Version(mlflow.__version__)
IS_3 = VERSION.major >= 3


class Row(NamedTuple):
    argument: str
    where: str
    verdict: str
    how: str

    @property
    def places(self):
        """(flavor, function) of the peers that have it."""
        parts = [part.split(": ") for part in self.where.split("; ")]
        return {(flavor, name) for flavor, names in parts for name in names.split(", ")}


ROWS = [Row(cells[0].strip("`"), *cells[1:]) for cells in table("Arguments")]
BY_NAME = {row.argument: row for row in ROWS}
EXAMPLE = pd.DataFrame({"text": TEXTS})


def peers():
    """(flavor, function, argument) of the installed MLflow."""
    for flavor in FLAVORS:
        module = importlib.import_module(f"mlflow.{flavor}")
        for name in FUNCTIONS:
            for argument in inspect.signature(getattr(module, f"{name}_model")).parameters:
                yield flavor, name, argument


def test_every_argument_of_the_installed_mlflow_has_a_row():
    told = {(*place, row.argument) for row in ROWS for place in row.places}
    old = {"example_no_conversion"}  # told below the table
    assert {peer for peer in peers() if peer[2] not in old} - told == set()
    if Version("3.17") <= VERSION < Version("3.18"):
        assert told - {*peers()} == set()
    assert len(BY_NAME) == len(ROWS)


def test_every_row_is_checked():
    assert {row.verdict for row in ROWS} == {"works", "differs", "refused"}
    assert {row.argument for row in ROWS if row.verdict == "works"} == WORKS.keys()
    assert {row.argument for row in ROWS if row.verdict == "differs"} == DIFFERS.keys()


# Refused: by name, before anything happens.


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.verdict == "refused"], ids=lambda row: row.argument
)
def test_refused(row, tmp_path):
    for name in {name for _, name in row.places}:
        module = torch.nn.Linear(1, 1)
        folder = tmp_path / "model"
        given: dict[str, list[Any]] = {
            "load": ["nowhere"],
            "log": [module],
            "save": [module, folder],
        }
        with pytest.raises(InputError, match="There is no such argument") as refused:
            FUNCTIONS[name](*given[name], **{row.argument: None})
        assert refused.value.where == row.argument
    assert list(tmp_path.iterdir()) == []


# Works: given all at once, and each to be seen.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("coming")


@pytest.fixture
def given(folders, tiny_bert, tiny_tokenizer):
    (folders / "helper.py").write_text("X = 1\n")
    return {
        "model": tiny_bert(),
        "tokenizer": tiny_tokenizer,
        "rehearse": False,
        "graph": "no",
        "code_paths": [str(folders / "helper.py")],
        "signature": infer_signature(EXAMPLE, params={"top_k": 1}),
        "input_example": EXAMPLE,
        "extra_pip_requirements": ["tinydb==4.8.2"],
        "metadata": {"a": 1},
    }


_logged = {}


@pytest.fixture
def logged(tracking, given):
    """``ModelInfo``, a local folder, the run, and the logged model; logged once a process."""
    if not _logged:
        taken = mlflow_compat.log_arguments(save_model)
        more: dict[str, Any] = {
            "tags": {"b": "2"},
            "model_type": "kind",
            "step": 3,
            "prompts": None,
        }
        with mlflow.start_run() as run:
            info = log_model(
                name="model",
                registered_model_name="registered",
                await_registration_for=0,
                **given,
                **{name: value for name, value in more.items() if name in taken},
            )
        _logged["info"], _logged["folder"] = info, Path(_fetched(info.model_uri))
        _logged["version"] = mlflow.MlflowClient().get_registered_model("registered")
        if IS_3:
            _logged["model"] = mlflow.MlflowClient().get_logged_model(info.model_id)
            _logged["run"] = mlflow.MlflowClient().get_run(run.info.run_id)
    return _logged


def _fetched(uri):
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    assert (folder / "MLmodel").is_file()
    return folder


def _pins(folder):
    return (folder / "requirements.txt").read_text().splitlines()


def _saved_with(given, folder, **more):
    given.pop("extra_pip_requirements")
    save_model(path=folder, **given, **more)
    return _pins(folder)


def _mlmodel(given, folder):
    model = Model(run_id="a" * 32)
    save_model(path=folder, mlflow_model=model, **given)
    return (
        model.run_id == Model.load(str(folder)).run_id == "a" * 32 and "safeflavor" in model.flavors
    )


def _model_id(given):
    if not IS_3:
        return True
    # MLflow asks pyspark for a type, and that ends a process without a main file, such as a worker
    # of xdist, as one of doctests: an interactive one it lets go on.
    with mock.patch.object(sys, "ps1", ">>> ", create=True):
        made = mlflow.create_external_model(name="made")
    return log_model(model_id=made.model_id, **given).model_id == made.model_id


def _conda(given, folder):
    conda = {"dependencies": ["python=3.11", {"pip": ["tinydb==4.8.2"]}]}
    return "tinydb==4.8.2" in _saved_with(given, folder, conda_env=conda)


# Argument → whether it did what it says, given what was logged, what to save, and a new folder.
WORKS = {
    "model": lambda logged, given, new: load_model(logged["folder"]),
    "path": lambda logged, given, new: save_model(path=new, **given) is None and load_model(new),
    "artifact_path": lambda logged, given, new: log_model(artifact_path="model", **given),
    "name": lambda logged, given, new: not IS_3 or logged["model"].name == "model",
    "processor": lambda logged, given, new: _is_taken("processor"),
    "code_paths": lambda logged, given, new: (logged["folder"] / "code/helper.py").is_file(),
    "mlflow_model": lambda logged, given, new: _mlmodel(given, new),
    "signature": lambda logged, given, new: (
        logged["info"].signature.inputs == given["signature"].inputs
    ),
    "input_example": lambda logged, given, new: (
        load_model(logged["folder"]).report.golden_rows > len(EXAMPLE)
    ),
    "pip_requirements": lambda logged, given, new: (
        "tinydb==4.8.2" in _saved_with(given, new, pip_requirements=["tinydb==4.8.2"])
    ),
    "extra_pip_requirements": lambda logged, given, new: "tinydb==4.8.2" in _pins(logged["folder"]),
    "conda_env": lambda logged, given, new: _conda(given, new),
    "metadata": lambda logged, given, new: logged["info"].metadata == {"a": 1},
    "prompt_template": lambda logged, given, new: _template(new),
    "registered_model_name": lambda logged, given, new: logged["version"].name == "registered",
    "await_registration_for": lambda logged, given, new: _is_taken("await_registration_for"),
    "prompts": lambda logged, given, new: not IS_3 or _is_handed_on("prompts"),
    "tags": lambda logged, given, new: not IS_3 or logged["model"].tags["b"] == "2",
    "model_type": lambda logged, given, new: not IS_3 or logged["model"].model_type == "kind",
    "step": lambda logged, given, new: (
        not IS_3 or [output.step for output in logged["run"].outputs.model_outputs] == [3]
    ),
    "model_id": lambda logged, given, new: _model_id(given),
    "model_uri": lambda logged, given, new: load_model(model_uri=str(logged["folder"])),
    "dst_path": lambda logged, given, new: _stays(logged["folder"], new),
}


def _template(folder):
    model = {"model": writer("GPT2LMHeadModel"), "tokenizer": byte_tokenizer()}
    template = "Q: {prompt} A:"
    save_model(model, folder, prompt_template=template, rehearse=False, graph="no")
    asked = {"max_new_tokens": 3, "return_full_text": True}
    (text,) = load_model(folder).predict(["why?"], asked)["generated_text"]
    return text.startswith("Q: why? A:")


def _is_taken(argument):
    return argument in {
        name for function in FUNCTIONS.values() for name in inspect.signature(function).parameters
    }


def _is_handed_on(argument):
    return argument in mlflow_compat.log_arguments(save_model)


def _stays(folder, new):
    new.mkdir()
    load_model(folder.as_uri(), dst_path=new)
    return any(new.rglob("MLmodel"))


@pytest.mark.parametrize("argument", WORKS)
def test_works(argument, logged, given, tmp_path):
    assert WORKS[argument](logged, given, tmp_path / "new")


# Differs: as the row says.


def _is_called(name, instead, tmp_path):
    given: dict[str, Any] = {name: None}
    with pytest.raises(InputError) as refused:
        save_model(torch.nn.Linear(1, 1), tmp_path / "model", **given)
    assert (refused.value.where, refused.value.hint) == (name, f"is {instead} meant?")
    assert f"called `{instead}`" in BY_NAME[name].how


def _first_is_model(name, tmp_path):
    _is_called(name, "model", tmp_path)
    for function in (save_model, log_model):
        assert next(iter(inspect.signature(function).parameters)) == "model"


def _refuses(argument, value, where, tmp_path, saved):
    with pytest.raises((InputError, StructureError)) as refused:
        save_model(saved_model(saved), tmp_path / "model", **{argument: value})
    assert where in str(refused.value)


def saved_model(saved):
    model = load_model(saved)
    return {"model": model.module, "tokenizer": model.tokenizer}


def _params(tmp_path, saved):
    given: dict[str, Any] = {
        "params": {"top_k": 2},
        "model_config": SAME_BATCHES,
        "rehearse": False,
    }
    save_model(saved_model(saved), tmp_path / "model", **given)
    answers = load_model(saved).predict(EXAMPLE, {"top_k": 2})
    found = load_model(tmp_path / "model").predict(EXAMPLE)
    assert [*found["labels"]] == [*answers["labels"]]
    assert [*found["score"]] == pytest.approx([*answers["score"]], abs=1e-5)
    assert "params" in mlflow_compat.log_arguments(save_model)


def _model_config(tmp_path, saved):
    _refuses("model_config", {"max_new_tokens": 3}, "max_new_tokens", tmp_path, saved)
    with pytest.raises(InputError, match="max_new_tokens"):
        load_model(saved, model_config={"max_new_tokens": 3})
    assert load_model(saved, model_config={"timeout": 3}).options["timeout"] == 3


def _device(tmp_path, saved):
    with pytest.raises(PlacementError):
        load_model(saved, device=-1)
    for device in ("cpu", torch.device("cpu")):
        assert load_model(saved, device=device).report.device == "cpu"


DIFFERS = {
    "transformers_model": lambda tmp_path, saved: _first_is_model("transformers_model", tmp_path),
    "pytorch_model": lambda tmp_path, saved: _first_is_model("pytorch_model", tmp_path),
    "task": lambda tmp_path, saved: _refuses("task", "no-task", "fill-mask", tmp_path, saved),
    "torch_dtype": lambda tmp_path, saved: _is_called("torch_dtype", "dtype", tmp_path),
    "inference_config": lambda tmp_path, saved: _is_called(
        "inference_config", "model_config", tmp_path
    ),
    "model_config": _model_config,
    "params": _params,
    "device": _device,
}


@pytest.mark.parametrize("argument", DIFFERS)
def test_differs(argument, tmp_path, saved):
    DIFFERS[argument](tmp_path, saved)
