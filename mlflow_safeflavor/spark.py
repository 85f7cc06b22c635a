"""A table of Spark, scored by a saved model on the executors: each row once, or with a reason.

``mlflow.pyfunc.spark_udf`` serves these models too. This is for what it leaves out: run-time
options on a cluster, one copy of the model for all workers of an executor, and rows that cannot be
answered.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.errors import AnswerError, InputError, SafeFlavorError
from mlflow_safeflavor.load.download import located
from mlflow_safeflavor.load.load import load_folder
from mlflow_safeflavor.load.once import once
from mlflow_safeflavor.load.options import LoadOptions
from mlflow_safeflavor.load.saved import Saved, read_saved
from mlflow_safeflavor.mlflow_compat import read_mlmodel, spark_fields
from mlflow_safeflavor.predict.options import MODEL_CONFIG, asked_options, require_known_options
from mlflow_safeflavor.tasks.table import TASKS

if TYPE_CHECKING:
    import pyspark.sql
    from mlflow.models import ModelSignature
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["score"]

_ERRORS = ("raise", "null")
# A column of the table on the way, and a field beside those of an answer: names that nobody has.
_ANSWER, _REASON = "_safeflavor_answer", "_safeflavor_reason"
# Archives that tables of this process may still need: a table of Spark is computed when somebody
# asks for its rows, long after ``score`` has returned.
_shipped = ExitStack()
atexit.register(_shipped.close)

_logger = logging.getLogger("mlflow.safeflavor")


@checked
def score(
    df: pyspark.sql.DataFrame,
    model_uri: str | Path,
    *,
    columns: Collection[str] | None = None,
    output: str = "prediction",
    on_error: str = "raise",
    params: Mapping[str, Any] | None = None,
    partitions: int | None = None,
    result_type: str | None = None,
    trust: Collection[str] = (),
    model_config: Mapping[str, Any] | None = None,
) -> pyspark.sql.DataFrame:
    """Add a column of answers to a table of Spark; computed when the rows are asked for.

    The executors need this package, and of the model's environment as much as serving needs. The
    model travels with the job, once for each executor; it is loaded and checked once in each of
    Spark's Python workers.

    Args:
        df: Any table; its other columns never leave Spark.
        model_uri: A folder, or any URI that MLflow resolves.
        columns: The columns that the model reads, in the order of its own; by default those that
            its rows are named by.
        output: Name of the new column: a struct with the fields of an answer, or one value.
        on_error: What a row that cannot be answered does: "raise" ends the job; "null" gives no
            answer, and the reason in a column of texts, ``output + "_reason"``, else null.
        params: Per-request parameters of the task.
        partitions: Tasks to cut the job into; by default as it is, and at least one for each core.
        result_type: Type of an answer as Spark writes it, ``"label string, score double"``, for
            models whose signature does not say it.
        trust: Kinds of the artifact's own code that may run: "code", "pickle".
        model_config: Run-time options, as of ``load_model``, and "device" and "dtype".

    Raises:
        SafeFlavorError: The artifact is refused, or the table lacks a column of the model's.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.functions import pandas_udf

    if on_error not in _ERRORS:
        raise InputError(
            "Unknown value", where="on_error", wanted=" | ".join(_ERRORS), found=repr(on_error)
        )
    require_known_options(model_config or {}, MODEL_CONFIG)
    added = [output, f"{output}_reason"] if on_error == "null" else [output]
    _require_new(df, added)
    with located(model_uri) as folder:
        saved = read_saved(folder, weights=False, trust=frozenset(trust))
        _require_answers_by_row(saved)
        signature = read_mlmodel(folder).signature
        names = _columns_of(saved, signature, df, columns)
        fields, is_struct = spark_fields(signature and signature.outputs, result_type)
        archive = _ship(df.sparkSession, saved)
    job = _Job(
        model=archive,
        fields=tuple(fields.fieldNames()),
        params=dict(params or {}),
        trust=frozenset(trust),
        model_config=dict(model_config or {}),
        nulls=on_error == "null",
    )
    answers: Any = pandas_udf(_udf(job), _with_reason(fields))
    row = F.struct(*(F.col(f"`{name}`").alias(model) for model, name in names.items()))
    scored = _spread(df, partitions).withColumn(_ANSWER, answers(row))
    parts = [F.col(f"{_ANSWER}.`{name}`").alias(name) for name in fields.fieldNames()]
    reason = F.col(f"{_ANSWER}.{_REASON}")
    answer = F.when(reason.isNull(), F.struct(*parts) if is_struct else parts[0])
    columns_of_df = [F.col(f"`{name}`") for name in df.columns]
    return scored.select(
        *columns_of_df,
        *(column.alias(name) for column, name in zip((answer, reason), added, strict=False)),
    )


# On the driver.


def _require_new(df: DataFrame, names: Sequence[str]) -> None:
    if taken := sorted({*names, _ANSWER} & {*df.columns}):
        raise InputError(
            "The table has a column of that name",
            where=", ".join(taken),
            hint="choose another: score(df, model_uri, output=...)",
        )


def _require_answers_by_row(saved: Saved) -> None:
    if TASKS[saved.spec.task].one_answer:
        raise InputError(
            "The model gives one answer for all rows of a request, and a table needs one for each",
            where=f"task {saved.spec.task}",
            hint="save it with the task that answers row by row, such as feature-extraction for "
            "llm/v1/embeddings",
        )


def _columns_of(
    saved: Saved, signature: ModelSignature | None, df: DataFrame, given: Collection[str] | None
) -> dict[str, str]:
    """Column of the model → column of the table."""
    wanted = [name or field for field, name in saved.spec.input_columns.items()]
    unnamed = list(saved.spec.input_columns.values()) == [None]
    # Columns of a user's own are those of the example.
    if not wanted and signature is not None and signature.inputs.has_input_names():
        wanted = signature.inputs.input_names()
    if given is None:
        given = df.columns if unnamed and len(df.columns) == 1 else wanted
    missing = [name for name in given if name not in df.columns]
    if missing or len(given) != len(wanted):
        raise InputError(
            "The table does not have the columns that the model reads",
            where=", ".join(missing) or "columns",
            wanted=f"columns for {', '.join(wanted)}",
            found=", ".join(df.columns),
            hint="name the table's, in this order: score(df, model_uri, columns=[...])",
        )
    return dict(zip(wanted, given, strict=True))


def _spread(df: DataFrame, partitions: int | None) -> DataFrame:
    """The table cut into tasks: a file of Parquet is often one, at which one core would work."""
    cores = df.sparkSession.sparkContext.defaultParallelism
    # A stream has partitions only while it runs.
    if partitions is None and not df.isStreaming and df.rdd.getNumPartitions() < cores:
        partitions = cores
    return df if partitions is None else df.repartition(partitions)


def _with_reason(fields: StructType) -> StructType:
    from pyspark.sql.types import StringType, StructField, StructType

    return StructType([*fields.fields, StructField(_REASON, StringType())])


def _ship(spark: SparkSession, saved: Saved) -> str:
    """Give Spark the model for its executors; the name of the archive, which tells the model."""
    name = f"safeflavor-{saved.digest}.zip"
    if name not in {Path(file).name for file in spark.sparkContext.listFiles}:
        # Spark reads it from here whenever an executor starts.
        folder = _shipped.enter_context(scratch_folder("download"))
        # strict_timestamps: this format has no dates before 1980, which files may have.
        with zipfile.ZipFile(folder / name, "w", strict_timestamps=False) as archive:
            manifest = saved.layout.name_of(saved.layout.manifest)
            for file in (saved.layout.MLMODEL, manifest, *saved.files):
                archive.write(saved.layout.root / file, file)
        spark.sparkContext.addFile(str(folder / name))
    return name


# On the executors.


@dataclass(frozen=True)
class _Job:
    """All that a task of Spark needs; pickled to the executors.

    Attributes:
        model: Name of the archive.
        fields: Names of an answer's fields.
        nulls: Whether a row that cannot be answered is null.
    """

    model: str
    fields: tuple[str, ...]
    params: Mapping[str, Any]
    trust: frozenset[str]
    model_config: Mapping[str, Any]
    nulls: bool


def _udf(job: _Job) -> Any:
    """The function that Spark calls in each task; Spark reads its kind from the annotations."""

    def answer(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        model, rows, started = _loaded(job), 0, time.perf_counter()
        # Not a fault of any row.
        model.task.check_params(job.params)
        for batch in batches:
            yield _answers(model, batch, job)
            rows += len(batch)
        seconds = time.perf_counter() - started
        _logger.info("safeflavor: %d rows in %.2f s", rows, seconds)

    answer.__annotations__ = {
        "batches": Iterator[pd.DataFrame],
        "return": Iterator[pd.DataFrame],
    }
    return answer


def _loaded(job: _Job) -> LoadedModel:
    """The model, unpacked once for all workers of this executor, and loaded once in this one."""
    asked = asked_options(job.model_config)
    options = LoadOptions(
        device=asked.get("device", "auto"),
        dtype=asked.get("dtype") or None,
        verify=asked.get("verify", "full"),
        environment=asked.get("environment", "warn"),
        trust=job.trust,
        model_config=asked,
    )
    folder = _unpacked(job.model)
    return once(partial(load_folder, folder, options), folder, repr(options))


def _unpacked(name: str) -> Path:
    from pyspark import SparkFiles

    archive = Path(SparkFiles.get(name))
    folder = archive.with_suffix("")
    if not folder.is_dir():
        # Several workers may come here at once: each unpacks for itself, and the first stays.
        scratch = Path(tempfile.mkdtemp(dir=archive.parent))
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            shutil.rmtree(scratch)
    return folder


def _answers(model: LoadedModel, rows: pd.DataFrame, job: _Job) -> pd.DataFrame:
    """The answers to a batch, a row each, with the column of reasons."""
    parts = [
        answers.assign(**{_REASON: reason})
        for answers, reason in _answered(model, rows.reset_index(drop=True), job)
    ]
    return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def _answered(
    model: LoadedModel, rows: pd.DataFrame, job: _Job
) -> Iterator[tuple[pd.DataFrame, str | None]]:
    """Answers and no reason, or no answer and the reason, for parts of a batch in order.

    A part that is refused is halved, until the rows at fault stand alone: answers do not depend on
    what stands beside a row.
    """
    try:
        yield _table(model.predict(rows, job.params, progress=False), job.fields), None
    except (InputError, AnswerError) as error:
        if not job.nulls:
            raise
        if len(rows) == 1:
            nothing = pd.DataFrame({name: [None] for name in job.fields})
            yield nothing, _reason(error)
            return
        half = len(rows) // 2
        yield from _answered(model, rows.iloc[:half], job)
        yield from _answered(model, rows.iloc[half:], job)


def _reason(error: SafeFlavorError) -> str:
    """The error without its place: row 0 of a request of one row, made here."""
    facts = {"wanted": error.wanted, "found": error.found}
    return "; ".join(
        [error.what, *(f"{name}: {fact}" for name, fact in facts.items() if fact is not None)]
    )


def _table(answers: Any, fields: Sequence[str]) -> pd.DataFrame:
    """Answers of any task, a row each, with these columns."""
    if isinstance(answers, Mapping):  # arrays, of any number of dimensions
        answers = pd.DataFrame({name: list(array) for name, array in answers.items()})
    if not isinstance(answers, pd.DataFrame):
        answers = pd.DataFrame({fields[0]: list(answers)})
    if not {*fields} <= {*answers.columns}:  # one value, whose column has a name of the task's
        answers = answers.iloc[:, :1].set_axis([*fields], axis=1)
    return answers[[*fields]].reset_index(drop=True)
