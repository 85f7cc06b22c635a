"""The engine that runs a graph, and rebuilds the module only for what the graph does not take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from mlflow_safeflavor.artifact.weights_files import HeldFile, require_unchanged
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.graph.graph import Graph, format_input
from mlflow_safeflavor.module.generation import Generation

if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.module.engine import ModuleEngine

__all__ = ["GraphEngine", "Session", "runtime_of"]

T = TypeVar("T")


class Session(Protocol):
    """A graph with its weights, ready to run on the CPU; safe from many threads."""

    # Of the engine: "onnx" or "openvino".
    name: str
    # In which it computes; outputs are float32 all the same.
    dtype: str
    # Most that an output may differ from the module's, relative to the largest value of that output
    # plus 1: see ``proof``.
    tolerance: float
    graph: Graph

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the forward on what the graph takes."""
        ...


def runtime_of(engine: str, dtype: str | None = None) -> Callable[..., Session]:
    """The constructor of an engine's sessions, called as (graph, weights, threads=…).

    Args:
        engine: "onnx" or "openvino".
        dtype: In which OpenVINO computes; by default float32.

    Raises:
        PlacementError: OpenVINO is not installed.
    """
    if engine == "onnx":
        from mlflow_safeflavor.graph import onnx_engine

        return onnx_engine.Session
    from mlflow_safeflavor.graph import openvino_engine

    openvino_engine.require_installed()
    return partial(openvino_engine.Session, dtype=dtype or "float32")


class GraphEngine:
    """Runs a graph.

    Args:
        session: The graph with its weights, in ONNX Runtime or OpenVINO.
        rebuild: Makes the engine of the module; None where the artifact holds a graph alone.
        weights: Files that its weights are mapped from.
        keeps_bits: See ``Engine``.
    """

    def __init__(
        self,
        session: Session,
        rebuild: Callable[[], ModuleEngine] | None = None,
        weights: Sequence[HeldFile] = (),
        *,
        keeps_bits: bool = False,
    ) -> None:
        self.session, self.name, self.on_cpu = session, session.name, True
        self.keeps_bits = keeps_bits
        self._rebuild = rebuild
        self._weights = weights
        self._rebuilt: ModuleEngine | None = None
        self._lock, self._module_lock = threading.Lock(), threading.Lock()

    @property
    def module(self) -> torch.nn.Module:
        """The module that the graph was recorded from, rebuilt and checked on first use.

        Raises:
            StructureError: The artifact holds a graph alone.
        """
        return self.fallback().module

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        graph = self.session.graph
        dtypes = {known.name: known.dtype for known in graph.inputs}
        arrays = {name: _fitted(array, dtypes.get(name, "")) for name, array in inputs.items()}
        # Another optional argument, dtype or size than was recorded: the module takes it.
        if misfit := graph.misfit(arrays):
            if self._rebuild is not None:
                return self._apart(lambda: self.fallback()(inputs))
            raise StructureError(
                "The model was stored as a graph, which does not take this input",
                where="forward",
                wanted=", ".join(f"{known.name} {format_input(known)}" for known in graph.inputs),
                found=misfit,
                hint='save the model with its module, too: graph="auto"',
            )
        graph.require_rows(arrays)
        # A file that was written to since is still mapped: its new bytes are not those compared.
        require_unchanged(self._weights)
        return self.session(arrays)

    def fallback(self) -> ModuleEngine:
        """The engine of the module, rebuilt on first use.

        Raises ``StructureError`` where there is none.
        """
        # Under the lock: two callers would rebuild twice, and hold the weights twice.
        with self._lock:
            if self._rebuilt is None:
                if self._rebuild is None:
                    raise StructureError(
                        "The model was stored as a graph of one forward, which cannot do this",
                        where="engine",
                        hint='save the model with its module, too: graph="auto"',
                    )
                self._rebuilt = self._rebuild()
            return self._rebuilt

    def generate(self, inputs: Mapping[str, np.ndarray], generation: Generation) -> Any:
        """Let the module write; see ``Engine.generate``."""
        return self._apart(lambda: self.fallback().generate(inputs, generation))

    def _apart(self, run: Callable[[], T]) -> T:
        """Run in a thread of its own, out of reach of the caller's contexts of torch.

        Those are its device, autocast and number of threads.
        """
        # One at a time, as where the module answers everything.
        with self._module_lock, ThreadPoolExecutor(1) as thread:
            return thread.submit(run).result()


def _fitted(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating point numbers in the serving dtype, whole ones as wide as the graph takes them."""
    # Whole numbers are only widened (tokenizers give int64, hooks also int32): no value is lost.
    floats = array.dtype.kind == "f" and dtype == "float32"
    wider = array.dtype.kind in "iu" and dtype.startswith("int") and np.can_cast(array.dtype, dtype)
    return array.astype(dtype, copy=False) if floats or wider else array
