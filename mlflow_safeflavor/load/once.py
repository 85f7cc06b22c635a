"""One load in each worker process of Spark, which runs many tasks and asks for the model in each.

``mlflow.pyfunc.spark_udf`` loads for each task where all executors see the model's folder, and
otherwise keeps models by the name of an archive, whatever they were to be loaded with.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import read_manifest

__all__ = ["in_spark_task", "once"]

LoadedT = TypeVar("LoadedT")

# A worker lives as long as the executor, and may be asked for one model after another.
_MOST = 2

_kept: OrderedDict[tuple[str, str], Any] = OrderedDict()


def in_spark_task() -> bool:
    """Whether this process is a worker of Spark, with a task at hand."""
    # Never imported here: a worker has imported it before any of our code runs.
    spark = sys.modules.get("pyspark")
    return spark is not None and spark.TaskContext.get() is not None


def once(load: Callable[[], LoadedT], root: Path, asked: str) -> LoadedT:
    """The model as ``load`` gives it; the same object for the same files and the same options.

    Args:
        load: Loads it from ``root``.
        root: Folder of the artifact; a copy elsewhere with the same manifest is the same model.
        asked: The effective options in words, those of the environment among them.
    """
    key = (read_manifest(Layout(root))["sha256"], asked)
    if key not in _kept:
        model = load()
        while len(_kept) >= _MOST:
            _kept.popitem(last=False)
        _kept[key] = model
    _kept.move_to_end(key)
    kept: LoadedT = _kept[key]
    return kept
