"""An argument of a public function is what its annotation says, or is refused by name first."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

import mlflow_safeflavor
from mlflow_safeflavor import arguments
from mlflow_safeflavor.checkpoints.prefetch import prefetch
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.save import logged
from mlflow_safeflavor.save.save import save_model
from mlflow_safeflavor.spark import score

FUNCTIONS = [
    prefetch,
    score,
    *(getattr(mlflow_safeflavor, name) for name in mlflow_safeflavor.__all__),
]
FUNCTIONS = [
    function
    for function in FUNCTIONS
    if inspect.isfunction(function) and hasattr(function, "__wrapped__")
]
PARAMETERS: list[Any] = [
    pytest.param(function, parameter, id=f"{function.__name__}-{parameter.name}")
    for function in FUNCTIONS
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.annotation != "Any"
]


class Nothing:
    """What no argument is."""


GOOD = {
    "str": "a text",
    "Path": Path("a"),
    "StrPath": Path("a"),
    "bool": np.bool_(True),
    "Literal[False]": False,
    "int": np.int64(3),
    "float": 0.5,
    "type[Any]": Nothing,
    "Callable[..., Any]": print,
    "Sequence[str]": ("a", "b"),
    "Sequence[str | Path]": ["a", Path("b")],
    "Collection[str]": {"a"},
    "Mapping[str, Any]": {"a": 1},
    "Mapping[str, str]": {"a": "b"},
    "Mapping[str, torch.Tensor]": {"a": torch.nn.Parameter(torch.ones(1))},
    "torch.dtype": torch.float32,
    "torch.device": torch.device("cpu"),
    "torch.nn.Module": torch.nn.Linear(1, 1),
    "ModelSignature": mlflow.models.infer_signature([{"a": 1}]),
    "Model": mlflow.models.Model(),
    "pd.DataFrame": pd.DataFrame(),
    # Told by its name: what has one has Spark, and no other process imports that.
    "pyspark.sql.DataFrame": type("DataFrame", (), {"__module__": "pyspark.sql"})(),
    "None": None,
}
BAD: dict[str, Any] = {
    "str": [b"a", 1, None, ["a"], Path("a")],
    "Path": ["a", None],
    "StrPath": [b"a", 1, None],
    "bool": ["yes", 1, 0.0, None],
    "int": ["1", 1.5, True, None, np.ones(1, int)],
    "float": ["1", True, None],
    "type[Any]": ["BertModel", Nothing()],
    "Callable[..., Any]": ["pre", {}],
    "Sequence[str]": ["src", {"a"}, {"a": 1}, ["a", 1], (None,), iter("a"), 3],
    "Sequence[str | Path]": ["/", Path("/"), b"/", [["a"]], [None]],
    "Collection[str]": ["code", {"code": True}, [1], 3],
    "Mapping[str, Any]": [[("a", 1)], {1: 2}, "a", {"a"}],
    "Mapping[str, str]": [{"a": 1}, {1: "a"}, "a"],
    "Mapping[str, torch.Tensor]": [{"a": 1}, {"a": np.ones(1)}],
    "torch.dtype": ["float32", np.float32, torch.ones(1)],
    "torch.device": ["cpu", 0],
    "torch.nn.Module": [torch.nn.Linear, "model", Nothing()],
    "ModelSignature": [True, {"inputs": []}],
    "Literal[False]": [True, 0, ""],
    "Model": [torch.nn.Linear(1, 1), "model"],
    "pd.DataFrame": [[{"a": 1}], np.ones(1)],
    "pyspark.sql.DataFrame": [pd.DataFrame(), [{"a": 1}]],
    "None": [False, "", 0, ()],
}


def test_every_public_function_is_checked():
    unchecked = {"get_default_conda_env"}  # takes anything
    names = {
        name
        for name in mlflow_safeflavor.__all__
        if inspect.isfunction(getattr(mlflow_safeflavor, name))
    }
    assert names - unchecked == {function.__name__ for function in FUNCTIONS} - {
        "prefetch",
        "score",
        "default_requirements",
    } | {"get_default_pip_requirements"}


def test_the_table_has_each_kind_and_the_tests_have_it_too():
    used = {
        kind
        for parameter in PARAMETERS
        for kind in arguments.kinds_of(parameter.values[1].annotation)
    }
    assert used <= arguments._KINDS.keys()
    assert GOOD.keys() == BAD.keys() == arguments._KINDS.keys() - {"Any"}


@pytest.mark.parametrize("kind", list(GOOD))
def test_each_kind_knows_what_it_is_and_what_not(kind):
    is_one = arguments._KINDS[kind][1]
    assert is_one(GOOD[kind])
    assert [value for value in BAD[kind] if is_one(value)] == []


@pytest.mark.parametrize(("function", "parameter"), PARAMETERS)
def test_each_argument_is_refused_by_name_and_nothing_is_copied(
    function, parameter, tmp_path, monkeypatch
):
    """With an odd object, None, a text and a path, wherever these are not meant."""
    monkeypatch.setattr(
        shutil, "copytree", lambda *args, **kwargs: pytest.fail("something was copied")
    )
    kinds = set(arguments.kinds_of(parameter.annotation))
    wrong: list[Any] = [Nothing(), *([] if "None" in kinds else [None])]
    wrong += [] if kinds & {"str", "StrPath", "Path"} else ["/", Path("/")]
    others = {
        other.name: GOOD[next(iter(arguments.kinds_of(other.annotation)))]
        for other in inspect.signature(function).parameters.values()
        if other.default is inspect.Parameter.empty
        and other.kind is not inspect.Parameter.VAR_KEYWORD
        if other.annotation != "Any"
    }
    others |= (
        {"model": torch.nn.Linear(1, 1)}
        if "model" in inspect.signature(function).parameters
        else {}
    )
    for value in wrong:
        with pytest.raises(InputError) as refused:
            function(**{**others, parameter.name: value})
        assert refused.value.where == parameter.name
        assert refused.value.wanted
        assert type(value).__name__ in str(refused.value.found) or value is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "hint"), [
    ({"code_paths": "hooks.py"}, "pass code_paths=['hooks.py']"),
    ({"code_paths": Path("hooks.py")}, "pass code_paths=[PosixPath('hooks.py')]"),
    ({"task": Path("raw")}, "pass str(task)"),
    ({"graph": None}, "leave graph out, which is graph='auto'"),
    ({"code_paths": ["hooks.py", 1]}, None),
    ({"artefact_path": "a"}, "leave it out"),
    ({"graphs": "auto"}, "is graph meant?"),
], ids=str)  # fmt: skip
def test_the_hint_is_what_to_write_instead(given, hint, tmp_path):
    with pytest.raises(InputError) as refused:
        save_model(torch.nn.Linear(1, 1), tmp_path / "model", **given)
    assert refused.value.hint == hint
    assert list(tmp_path.iterdir()) == []


def test_a_missing_argument_is_named():
    with pytest.raises(InputError, match="missing a required argument: 'path'"):
        save_model(torch.nn.Linear(1, 1))  # type: ignore[call-arg]  # which is the test


@pytest.mark.parametrize(("given", "where", "hint"), [
    ({"artifact_path": "model"}, "artifact_path", "leave artifact_path out"),
    ({"signature": True}, "signature", None),
    ({"code_paths": "/"}, "code_paths", "pass code_paths=['/']"),
    ({"path": "model"}, "path", "leave it out"),
], ids=str)  # fmt: skip
def test_log_model_refuses_before_mlflow_knows_of_a_model(given, where, hint, tracking):
    with pytest.raises(InputError) as refused:
        mlflow_safeflavor.log_model(torch.nn.Linear(1, 1), "model", **given)
    assert (refused.value.where, refused.value.hint) == (where, hint)
    if hasattr(mlflow, "search_logged_models"):
        assert mlflow.search_logged_models(output_format="list") == []


def test_log_model_takes_what_mlflow_does_and_params_are_ours(tracking, monkeypatch):
    given = {}

    def save(path, mlflow_model, **kwargs):
        given.update(kwargs)
        mlflow_model.add_flavor("python_function", loader_module="none")
        Path(path).mkdir()
        mlflow_model.save(f"{path}/MLmodel")

    monkeypatch.setattr("mlflow_safeflavor.save.save.save_model", save)
    logged.log(
        sys.modules["mlflow_safeflavor.save.save"],
        "model",
        model=1,
        params={"top_k": None},
        metadata={"a": 1},
    )
    assert given == {"model": 1, "params": {"top_k": None}}


def test_paths_are_taken_where_paths_are_meant(tmp_path):
    (tmp_path / "hooks.py").write_text("X = 1\n")
    (tmp_path / "requirements.txt").write_text("numpy\n")
    example = {"input": np.ones((1, 2), "float32")}
    mlflow_safeflavor.save_model(
        torch.nn.Linear(2, 2),
        tmp_path / "model",
        task="raw",
        input_example=example,
        code_paths=[tmp_path / "hooks.py"],
        pip_requirements=tmp_path / "requirements.txt",
        init_args={"in_features": 2, "out_features": 2},
        graph="no",
        rehearse=False,
    )
    assert (tmp_path / "model" / "code" / "hooks.py").read_text() == "X = 1\n"
    assert isinstance(
        mlflow_safeflavor.load_model(tmp_path / "model", trust=["code"]).options, Mapping
    )
