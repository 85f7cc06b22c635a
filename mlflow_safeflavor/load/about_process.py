"""What a process runs on, and the one reserved request that asks a server for it.

MLflow drops every param that a signature does not declare, so the request is put into what does
pass through its unchanged scoring server: the label of a row, or, for models that take nothing but
arrays, values that spell the same name in bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from mlflow_safeflavor.environment.installed import installed_version
from mlflow_safeflavor.environment.record import record
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.environment.threads import Budget
from mlflow_safeflavor.version import __version__

__all__ = [
    "ENVIRONMENT_LABEL",
    "arrays_asking",
    "asks_environment",
    "describe_process",
    "describe_recorded",
    "labelled_row",
    "told_environment",
]

# Label of the row that asks, and the only key of the answer.
ENVIRONMENT_LABEL = "safeflavor_environment"

_BITS = np.unpackbits(np.frombuffer(ENVIRONMENT_LABEL.encode(), np.uint8))
_MOST_NUMBERS = 10**6


# The request and its answer


def labelled_row(columns: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The request to a model with columns.

    One row that it could answer, under the reserved label.
    """
    return {
        "dataframe_split": {
            "columns": list(columns),
            "index": [ENVIRONMENT_LABEL],
            "data": [list(values)],
        }
    }


def arrays_asking(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The request to a model of arrays, one bit a row.

    None where all are single numbers or rows are very large.

    Args:
        example: Arrays that the model takes; only their names, types and the shapes of their rows
            count.
    """
    rows = {
        name: np.zeros((len(_BITS), *value.shape[1:]), value.dtype)
        for name, value in example.items()
        if value.ndim
    }
    if not rows or sum(array.size for array in rows.values()) > _MOST_NUMBERS:
        return None
    for array in rows.values():
        array.T[...] = _BITS
    return {name: rows.get(name, np.zeros((), value.dtype)) for name, value in example.items()}


def asks_environment(data: Any) -> bool:
    """Whether this is the reserved request, as MLflow hands it to the model."""
    if isinstance(data, pd.DataFrame):
        return len(data) == 1 and bool(np.all(data.index == ENVIRONMENT_LABEL))
    values = data.values() if isinstance(data, Mapping) else [data]
    arrays = [value for value in values if isinstance(value, np.ndarray) and value.ndim]
    return bool(arrays) and all(
        len(array) == len(_BITS) and bool(np.all(array.T == _BITS)) for array in arrays
    )


def told_environment(predictions: Any) -> dict[str, Any] | None:
    """What the server told; None where it answered as if it had been asked for a prediction."""
    told = predictions.get(ENVIRONMENT_LABEL) if isinstance(predictions, Mapping) else None
    return dict(told) if isinstance(told, Mapping) else None


# The facts


def describe_process(
    pins: Iterable[str], *, device: str, budget: Budget | None = None
) -> dict[str, Any]:
    """What this process runs on, as JSON. No variables, no paths, no names of hosts or users.

    Args:
        pins: Names of the distributions that the model was saved with; others are nobody's
            business.
        device: Where the model is.
        budget: How its threads were chosen, where they were.
    """
    installed = {
        name: version for name in pins if (version := installed_version(name, None)) is not None
    }
    environment = replace(record([], torch_build=_torch_build()), distributions=installed)
    return {
        "environment": environment.to_json(),
        "loader_version": __version__,
        "device": device,
        "budget": None if budget is None else asdict(budget),
    }


def describe_recorded(environment: Environment, loader_version: str) -> dict[str, Any]:
    """The same shape, from what was written when the model was saved."""
    return {"environment": environment.to_json(), "loader_version": loader_version}


def _torch_build() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # a loaded model has imported it; this module must not
    if torch is None:
        return {}
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
