"""Differences among MLflow's releases from 2.9.2 on; no other module asks for a release."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
from mlflow.types import ColSpec, DataType, ParamSchema, Schema
from mlflow.types.utils import _infer_schema

from mlflow_safeflavor.errors import EnvironmentMismatchError, InputError

__all__ = [
    "Array",
    "Object",
    "Property",
    "answer_of",
    "copies_runs",
    "inferred_signature",
    "log_arguments",
    "log_metrics",
    "log_name",
    "read_mlmodel",
    "request_schema",
    "require_schema",
    "rows_schema",
    "schema_of",
    "spark_fields",
]


class _Unsayable:
    """Stands for a type of columns that this MLflow lacks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


try:
    from mlflow.types.schema import Array, Object, Property

    _SAYS_LISTS = True
except ImportError:  # before 2.10, of which signatures say nothing of lists and dicts
    Array = Object = Property = _Unsayable  # type: ignore[assignment, misc]
    _SAYS_LISTS = False

try:
    from mlflow.types.schema import AnyType
except ImportError:  # before 2.19
    AnyType = None  # type: ignore[assignment, misc]


def schema_of(columns: Mapping[str, DataType | Array | Object]) -> Schema | None:
    """Column → type, as a part of a signature; None where this MLflow has no such type."""
    if any(isinstance(kind, _Unsayable) for kind in columns.values()):
        return None
    return Schema([ColSpec(kind, name) for name, kind in columns.items()])


def answer_of(columns: Mapping[str, DataType | Array | Object]) -> Schema | None:
    """As ``schema_of``, for answers: a sole column of lists becomes the property of an object."""
    # Spark would take the type of a sole column of lists for that of the whole answer, and find no
    # list in the table that comes back; an object it takes for a struct of columns.
    if len(columns) == 1 and not all(isinstance(kind, DataType) for kind in columns.values()):
        [(name, kind)] = columns.items()
        if isinstance(kind, _Unsayable):
            return None
        return Schema([ColSpec(Object([Property(name, kind)]))])
    return schema_of(columns)


def rows_schema(arrays: Mapping[str, np.ndarray]) -> Schema | None:
    """Answers that are arrays with one entry for each row, of any number of dimensions."""
    columns: dict[str, Any] = {}
    for name, array in arrays.items():
        # MLflow's own function has no types.
        columns[name] = DataType.from_numpy_type(array.dtype)  # type: ignore[no-untyped-call]
        for _ in array.shape[1:]:
            columns[name] = Array(columns[name])
    return answer_of(columns)


def require_schema(columns: Mapping[str, DataType | Array | Object]) -> Schema:
    """As ``schema_of``, for inputs. Raises ``InputError`` where this MLflow has no such type."""
    schema = schema_of(columns)
    if schema is None:
        raise _no_type(", ".join(columns))
    return schema


def request_schema(
    columns: Mapping[str, DataType | Array | Object],
    optional: Mapping[str, DataType],
    *,
    either: Collection[str],
) -> Schema:
    """A request: columns, and others that may be missing where this MLflow can say so.

    Args:
        columns: Column → type.
        optional: The same of columns that may be missing.
        either: More of these, each a text or a list of texts; since 2.19, and a list before.

    Raises:
        InputError: This MLflow has no such type.
    """
    schema = require_schema(columns)
    if not _SAYS_LISTS:
        return schema
    kind = Array(DataType.string) if AnyType is None else AnyType()  # type: ignore[no-untyped-call]
    more = {**optional, **dict.fromkeys(either, kind)}
    found = [ColSpec(kind, name, required=False) for name, kind in more.items()]
    return Schema([*schema.inputs, *found])


def inferred_signature(
    rows: pd.DataFrame, answers: pd.DataFrame | None, params: ParamSchema | None = None
) -> ModelSignature:
    """The signature as MLflow infers it, without answers that this MLflow has no types for.

    Args:
        rows: Rows that were asked.
        answers: Their answers as ``predict`` returns them, or None.
        params: Part of the signature as they are.

    Raises:
        InputError: This MLflow has no type for a column of ``rows``.
    """
    signature = _inferred(rows, answers)
    if params is not None:
        signature.params = params
    return signature


def _inferred(rows: pd.DataFrame, answers: pd.DataFrame | None) -> ModelSignature:
    signature = ModelSignature(inputs=_schema_of_table(rows))
    if answers is not None:
        with suppress(InputError), warnings.catch_warnings():
            # MLflow warns that whole numbers may be missing: of inputs it matters, not of answers.
            warnings.simplefilter("ignore")
            signature.outputs = _schema_of_table(answers)
    return _with_objects(signature) if _SAYS_LISTS else signature


def _schema_of_table(table: pd.DataFrame) -> Schema:
    """The types of columns; ``Any`` where MLflow infers none, as for a list of ints and floats."""
    specs = []
    # One column at a time: asked for all at once, MLflow gives up the names of all where one has no
    # type, and its schema check then drops all columns but the first from each request.
    for name in table.columns:
        try:
            (spec,) = _infer_schema(table[[name]]).inputs
        except MlflowException:
            if AnyType is None:
                raise _no_type(str(name)) from None
            spec = ColSpec(AnyType(), name)  # type: ignore[no-untyped-call]  # MLflow's
        specs.append(spec)
    return Schema(specs)


def _with_objects(signature: ModelSignature) -> ModelSignature:
    specs = getattr(signature.outputs, "inputs", ())
    columns: dict[Any, Any] = {spec.name: spec.type for spec in specs if isinstance(spec, ColSpec)}
    if len(columns) == 1 and None not in columns:
        signature.outputs = answer_of(columns)
    return signature


def _no_type(columns: str) -> InputError:
    return InputError(
        "This MLflow has no type for a column of lists or dicts",
        where=columns,
        wanted=f"MLflow {'2.19' if _SAYS_LISTS else '2.10'} or newer",  # Any came later than lists
        found=f"MLflow {mlflow.__version__}",
    )


def log_arguments(save: Callable[..., Any]) -> set[str]:
    """Arguments that ``log_model`` takes beside the model: those of ``save`` and ``Model.log``."""
    names = {
        name for function in (save, Model.log) for name in inspect.signature(function).parameters
    }
    return names - {"artifact_path", "flavor", "kwargs", "mlflow_model", "model", "path"}


def log_name(name: str | None, artifact_path: str | None) -> dict[str, str | None]:
    """Arguments of ``Model.log``: a model's own name since MLflow 3, before that a place in a run.

    Raises:
        InputError: Both are given; or neither, where this MLflow has to know.
    """
    if name is not None and artifact_path is not None:
        raise InputError(
            "A model is logged under one name",
            where="artifact_path",
            wanted="name alone, which artifact_path was called before MLflow 3",
            found=f"name={name!r}, artifact_path={artifact_path!r}",
            hint="leave artifact_path out",
        )
    if "name" in inspect.signature(Model.log).parameters:
        return {"artifact_path": artifact_path, "name": name}
    if name is None and artifact_path is None:
        raise InputError(
            "Before MLflow 3 a model is logged to a place below its run",
            where="name",
            wanted="a text",
            found=f"None, and MLflow {mlflow.__version__}",
            hint='pass name="model"',
        )
    return {"artifact_path": artifact_path if name is None else name}


def log_metrics(metrics: Mapping[str, float], step: int, info: ModelInfo) -> None:
    """Metrics of the active run; since MLflow 3 also of the logged model."""
    model_id = getattr(info, "model_id", None)
    linked = "model_id" in inspect.signature(mlflow.log_metrics).parameters and model_id
    mlflow.log_metrics(dict(metrics), step=step, **({"model_id": model_id} if linked else {}))


def copies_runs() -> bool:
    """Whether MLflow copies the model of ``runs:/…`` even on its own disk, as since MLflow 3."""
    return hasattr(RunsArtifactRepository, "_download_model_artifacts")


def read_mlmodel(folder: Path) -> Model:
    """``MLmodel`` as MLflow reads it.

    Raises:
        EnvironmentMismatchError: Its signature has fields that this MLflow does not know.
    """
    try:
        model: Model = Model.load(str(folder))
    # Before 2.10: "ColSpec.__init__() got an unexpected keyword argument 'required'".
    except TypeError as error:
        raise EnvironmentMismatchError(
            "A newer MLflow wrote the signature, and this one cannot read it",
            where=folder / "MLmodel",
            wanted="MLflow 2.10 or newer",
            found=f"MLflow {mlflow.__version__}: {error}",
            hint="load it with mlflow_safeflavor.load_model, which does not need the signature, "
            "or install the pins",
        ) from None
    return model


def spark_fields(answers: Schema | None, result_type: str | None) -> tuple[Any, bool]:
    """Fields of an answer as a ``StructType`` of Spark, and whether they are more than one value.

    Args:
        answers: From the signature.
        result_type: As Spark writes a type, which counts instead.

    Raises:
        InputError: Neither says what an answer is.
    """
    from mlflow.pyfunc import _infer_spark_udf_return_type
    from pyspark.sql.types import StructField, StructType, _parse_datatype_string

    if result_type is not None:
        kind = _parse_datatype_string(result_type)
    elif answers is not None:
        kind = _infer_spark_udf_return_type(answers)  # type: ignore[no-untyped-call]  # MLflow's
    else:
        raise InputError(
            "The signature of the model does not say what an answer is",
            where="result_type",
            hint="say it as Spark writes types: score(df, model_uri, result_type='label string')",
        )
    if isinstance(kind, StructType):
        return kind, True
    return StructType([StructField("value", kind)]), False
