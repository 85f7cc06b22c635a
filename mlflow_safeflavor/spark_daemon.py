"""``spark.python.daemon.module``: the process that Spark forks its Python workers from.

Spark's own has imported nothing, so that each of its workers imports everything for itself.
"""

from __future__ import annotations

import sys
from importlib import import_module
from zipimport import zipimporter

from pyspark.daemon import manager

from mlflow_safeflavor.load.forks import share_with_forks

__all__: list[str] = []


def _forget_archives() -> None:
    # Each task invalidates the caches of imports, at which an importer of archives reads its list
    # of files again: 22 MB in each worker for those of Spark. One that is made later, when a worker
    # imports more, takes the list that is in memory.
    for path, importer in [*sys.path_importer_cache.items()]:
        if isinstance(importer, zipimporter):
            del sys.path_importer_cache[path]


if __name__ == "__main__":
    # What its workers run, by the names that they ask for: one that is missing ends the daemon.
    for name in ("pyspark.worker", "pyarrow.pandas_compat", "mlflow_safeflavor.spark"):
        import_module(name)
    share_with_forks()
    _forget_archives()
    manager()
