"""Facts about a process and its environment, and the reserved request that asks a server."""

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
    "labelled_row",
    "process_facts",
    "recorded_facts",
    "told_environment",
]

# Label of the row that asks, and the only key of the answer. MLflow drops params that a signature
# does not declare, and columns too; the label of a row passes through its scoring server. Models of
# arrays have no labels: there the values of an array spell this name in bits.
ENVIRONMENT_LABEL = "safeflavor_environment"

_BITS = np.unpackbits(np.frombuffer(ENVIRONMENT_LABEL.encode(), np.uint8))
_MOST_NUMBERS = 10**6  # of a request that only asks: beyond it is as long as a prediction


# The request and its answer


def labelled_row(columns: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The request to a model with columns: one row under the reserved label."""
    # A row that the model could answer: a server that does not tell predicts, and nothing fails.
    return {
        "dataframe_split": {
            "columns": list(columns),
            "index": [ENVIRONMENT_LABEL],
            "data": [list(values)],
        }
    }


def arrays_asking(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The request to a model of arrays, one bit a row; None for single numbers and huge rows.

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
        array.T[...] = _BITS  # transposed, so that the bits run along the first axis
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
    """Facts that the server told; None where it answered with a prediction."""
    told = predictions.get(ENVIRONMENT_LABEL) if isinstance(predictions, Mapping) else None
    return dict(told) if isinstance(told, Mapping) else None


# The facts


def process_facts(
    pins: Iterable[str], *, device: str, budget: Budget | None = None
) -> dict[str, Any]:
    """Facts about this process, as JSON.

    Args:
        pins: Names of the distributions that the model was saved with.
        device: Where the model is.
        budget: Choice of its threads, if one was made.
    """
    # No variables, paths, names of hosts or users, nor other distributions: this is told to
    # whoever can send a request.
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


def recorded_facts(environment: Environment, loader_version: str) -> dict[str, Any]:
    """Facts about the environment that the model was saved in, in the same shape."""
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
