"""A graph in ONNX Runtime: arrays in, arrays out, and no torch.

The session gets the checked bytes of the graph and the weights as arrays that were mapped and compared already, so it
opens no file. Its memory comes from one arena of this process with an upper bound, so that a graph that asks for more
is an error and not the end of the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

import numpy as np
import onnxruntime

from mlflow_safeflavor.onnx_graph import Graph

__all__ = ["Session"]

_lock = threading.Lock()
_limited = False


def _limit_memory() -> None:
    """Bound what all sessions of this process hold together: ONNX Runtime registers one arena a process.

    Half of the machine's memory, since models that are loaded later share it.
    """
    global _limited
    with _lock:
        if not _limited:
            most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 8 << 30
            place = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            # Strategy 1: as much as was asked for, and not twice the last extension.
            arena = onnxruntime.OrtArenaCfg({"max_mem": most, "arena_extend_strategy": 1})
            onnxruntime.create_and_register_allocator(place, arena)
            _limited = True


class Session:
    """A graph with its weights, ready to run; safe from many threads, as ONNX Runtime lets several run at once.

    Args:
        graph: Checked.
        weights: Name → array, of the dtype and shape that the graph says; kept alive and never written.
        threads: Of one run. They sleep as soon as they have nothing to do: a spinning one takes a core from its
            neighbours, and with containers' quotas from itself.

    Raises:
        Exception: ONNX Runtime's own, where it has no kernel for a node.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, np.ndarray], *, threads: int) -> None:
        _limit_memory()
        self.graph = graph
        self._weights = {name: weights[name] for name in graph.weights}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # what it says of fusions is for its makers; errors are raised
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
        options.add_external_initializers(list(self._weights), values)
        self._session = onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the forward.

        Raises:
            IndexError: A row of a table is asked for that the table does not have.
            Exception: ONNX Runtime's own, where a node cannot take what it is given.
        """
        for name, rows in self.graph.lookups.items():
            least, most = int(inputs[name].min(initial=0)), int(inputs[name].max(initial=0))
            if least < 0 or most >= rows:  # the standard counts negative ones from the end, torch refuses them
                raise IndexError(f"{name} has {least if least < 0 else most}, which is no row of a table of {rows}")
        found = self._session.run(None, {f"input.{name}": array for name, array in inputs.items()})
        return dict(zip(self.graph.outputs, found, strict=True))
