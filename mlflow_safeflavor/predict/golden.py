"""Golden rows: recorded with their answers when a model is saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_safeflavor.artifact.arrays import read_arrays, write_arrays
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.predict.answers import predict_rows
from mlflow_safeflavor.predict.model import LoadedModel
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["TOLERANCES", "Golden", "answers_of", "features_of", "read_golden", "record"]

# Other CPUs, thread counts and kernels round differently; 1e-5 was seen in float32. A wrong or
# unwritten weight is orders of magnitude away. A half precision number has 8 or 11 bits. In float64
# 5e-13 was seen, by another number of threads in a badly conditioned solve.
TOLERANCES = {
    "float64": {"atol": 1e-8, "rtol": 1e-8},
    "float32": {"atol": 1e-4, "rtol": 1e-4},
    "float16": {"atol": 1e-2, "rtol": 1e-2},
    "bfloat16": {"atol": 5e-2, "rtol": 5e-2},
}

_COARSEST = TOLERANCES["bfloat16"]
_LOOSEST = max(number for tolerance in TOLERANCES.values() for number in tolerance.values())
_VERSION = 1


def record(
    model: LoadedModel, rows: Sequence[Row], dtypes: Collection[str], layout: Layout
) -> list[dict[str, Any]]:
    """Answer ``rows``, and write features, raw outputs and answers to the artifact.

    Returns the answers. The tolerance is that of the coarsest of ``dtypes``.
    """
    features = features_of(model, rows)
    answers, outputs = answers_of(model, rows)
    # Not ascontiguousarray, which would give a single number a dimension.
    arrays = {
        f"{index}.{part}.{name}": np.asarray(value, order="C")
        for part, rowwise in (("input", features), ("output", outputs))
        for index, named in enumerate(rowwise)
        for name, value in named.items()
    }
    facts, tensors = layout.golden(model.engine.name)
    write_arrays(arrays, tensors)
    write_json(
        facts,
        {
            "version": _VERSION,
            "rows": [model.task.to_record(row) for row in rows],
            "answers": [model.task.to_record(answer) for answer in answers],
            "tolerance": max(
                (TOLERANCES.get(dtype, _COARSEST) for dtype in dtypes), key=lambda t: t["atol"]
            ),
        },
    )
    return answers


def answers_of(
    model: LoadedModel, rows: Sequence[Row]
) -> tuple[list[dict[str, Any]], list[RowOutput]]:
    """Answers and raw outputs of golden rows, which are by field already and know no caps."""
    params = model.task.golden(model.task.config)
    return predict_rows(model.task.uncapped, model.scheduler, rows, params)


def features_of(model: LoadedModel, rows: Sequence[Row]) -> list[Features]:
    """Features of each row, where the task records them; else an empty dict a row."""
    if not model.task.records_features:
        return [{} for _ in rows]
    encoded = model.task.uncapped.encoded(
        rows, model.task.check_params(model.task.golden(model.task.config))
    )
    return [_recordable(model.task.pieces(row)) for row in encoded]


def _recordable(pieces: Sequence[Features]) -> Features:
    """The lists and arrays of all pieces of a row; from the second piece on ``NUMBER.NAME``."""
    return {
        f"{i}.{name}" if i else name: value
        for i, piece in enumerate(pieces)
        for name, value in piece.items()
        if isinstance(value, (list, np.ndarray))
    }


@dataclass(frozen=True)
class Golden:
    """Golden rows, as ``record`` wrote them.

    Attributes:
        rows: Rows as JSON.
        answers: What was answered to them, as JSON.
        arrays: Encoded inputs and raw outputs, ``INDEX.input.NAME`` and ``INDEX.output.NAME``.
        atol: Absolute tolerance, in units of the outputs.
        rtol: Relative tolerance.
        where: The file, as messages call it.
    """

    rows: list[Any]
    answers: list[Any]
    arrays: Mapping[str, np.ndarray]
    atol: float
    rtol: float
    where: str

    def inputs(self, index: int) -> dict[str, np.ndarray]:
        """Encoded inputs of one row, by name."""
        return _named(self.arrays, f"{index}.input.")

    def outputs(self, index: int) -> dict[str, np.ndarray]:
        """Raw outputs of one row, by name."""
        return _named(self.arrays, f"{index}.output.")


def read_golden(layout: Layout, engine: str) -> Golden:
    """Read the golden rows that an engine is compared with.

    Raises:
        IntegrityError: The recording is malformed.
    """
    facts, tensors = layout.recorded(engine)
    recorded = layout.read_json(facts)
    arrays = read_arrays(layout.read_bytes(tensors), tensors.name)
    try:
        rows, answers, tolerance = (
            list(recorded["rows"]),
            recorded["answers"],
            recorded["tolerance"],
        )
        atol, rtol = float(tolerance["atol"]), float(tolerance["rtol"])
        if recorded["version"] != _VERSION or len(rows) != len(answers) or not rows:
            raise ValueError(
                f"version {recorded['version']!r}, {len(rows)} rows, {len(answers)} answers"
            )
        # Whoever can rewrite the file could let any weights pass; a NaN fails both comparisons.
        if not (0 <= atol <= _LOOSEST and 0 <= rtol <= _LOOSEST):
            raise ValueError(f"tolerances {atol}, {rtol}: with these, any answer would do")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise IntegrityError(
            "The golden rows are malformed",
            where=layout.name_of(facts),
            found=error,
            hint=FETCH_AGAIN,
        ) from None
    return Golden(rows, answers, arrays, atol, rtol, layout.name_of(facts))


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
