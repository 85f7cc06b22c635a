"""A graph in ONNX Runtime: arrays in, arrays out, and no torch.

The session gets the checked bytes of the graph and the weights as arrays that were mapped and compared already, so it
opens no file. Its memory comes from one arena of this process with an upper bound, so that a graph that asks for more
is an error and not the end of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import onnxruntime

from mlflow_safeflavor.artifact import WAY_OUT
from mlflow_safeflavor.cpu import available_memory
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.onnx_graph import Graph

__all__ = ["Session"]

_lock = threading.Lock()
_most: int | None = None


def _limit_memory() -> int:
    """Bound what all sessions of this process hold together, in bytes: there is one arena a process.

    Three quarters of what there is; the rest is Python's, and what kernels use without asking the arena.
    """
    global _most
    with _lock:
        if _most is None:
            most = available_memory() // 4 * 3
            place = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            # Strategy 1: as much as was asked for, and not twice the last extension.
            arena = onnxruntime.OrtArenaCfg({"max_mem": most, "arena_extend_strategy": 1})
            onnxruntime.create_and_register_allocator(place, arena)
            _most = most
        return _most


_GREEDY = ("ConstantFolding", "ConvBNFusion", "ConvMulFusion")
"""What would compute while a session is made, outside the arena and for as long as it takes.

Without them sessions are made in a third of the time, weights that are transposed are not copied, and forwards take as
long: transposing and normalising are fused into the products all the same.
"""


class Session:
    """A graph with its weights, ready to run; safe from many threads, as ONNX Runtime lets several run at once.

    Args:
        graph: Checked.
        weights: Name → array, of the dtype and shape that the graph says; kept alive and never written.
        threads: Of one run. They sleep as soon as they have nothing to do: a spinning one takes a core from its
            neighbours, and with containers' quotas from itself.

    Raises:
        StructureError: ONNX Runtime has no kernel for a node, or its nodes do not fit each other or the memory.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, np.ndarray], *, threads: int) -> None:
        most = _limit_memory()
        self.graph = graph
        self._weights = {name: weights[name] for name in graph.weights}
        if graph.reused > most:
            raise _refused(
                f"constants that are used several times, {graph.reused} bytes in all: each use may be a copy"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # what it says of fusions is for its makers; errors are raised
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Otherwise a file that is both is read as ONNX Runtime's own format, which nobody checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
        try:
            options.add_external_initializers(list(self._weights), values)
            self._session = onnxruntime.InferenceSession(
                graph.content,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(_GREEDY),
            )
        except Exception as error:  # it has a class for each of its codes
            raise _refused(str(error).strip().partition("\n")[0][:400]) from error

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


def _refused(found: str) -> StructureError:
    return StructureError(
        "ONNX Runtime does not take the graph of the model", where="graph.onnx", found=found, way_out=WAY_OUT
    )
