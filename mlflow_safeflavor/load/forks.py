"""What a process has imported that is forked into workers, which then share it."""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

__all__ = ["share_with_forks"]

# Left out is torch, which reads its number of threads when it is imported.
_NEEDED = (
    "mlflow_safeflavor.load.pyfunc",
    "mlflow_safeflavor.load.engines",
    "mlflow_safeflavor.graph.engine",
    "mlflow_safeflavor.graph.onnx_engine",
    "tokenizers",
)


def share_with_forks() -> None:
    """Import what a load and an answer need, for all forks of this process; after all else."""
    for name in _NEEDED:
        with suppress(ImportError):  # of the runtime, where there are no graphs
            import_module(name)
    # Else a fork's collector would write to each page, which then is the fork's own.
    gc.collect()
    gc.freeze()
