"""Runs the recorded graph behind the engine's seam."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlflow_safeflavor.devices import require_usable
from mlflow_safeflavor.engine import Engine
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.graph import GraphModule
from mlflow_safeflavor.module_engine import arrays_of, tensors_of
from mlflow_safeflavor.precision import exact_products
from mlflow_safeflavor.weights_files import HeldFile, require_unchanged

__all__ = ["GraphEngine"]


class GraphEngine:
    """Runs a recorded graph, and rebuilds the module only for what the graph does not take.

    Args:
        module: The graph with its constants, where they are to run.
        device: Where that is.
        dtype: Its serving dtype.
        rebuild: Makes the engine of the module; None where the artifact holds a graph alone.
        weights: Files that its tensors are mapped from.
    """

    name = "graph"

    def __init__(
        self,
        module: GraphModule,
        device: torch.device,
        dtype: torch.dtype,
        rebuild: Callable[[], Engine] | None = None,
        weights: Sequence[HeldFile] = (),
    ) -> None:
        self.module = module
        self.device = device
        self.dtype = dtype
        self.on_cpu = device.type == "cpu"
        self._rebuild = rebuild
        self._weights = weights
        self._rebuilt: Engine | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = tensors_of(inputs, self.device, self.dtype)
        if self._rebuild is not None and self.module.graph.misfit(tensors):
            return self.fallback()(inputs)
        require_unchanged(self._weights)
        require_usable(self.device)
        with torch.inference_mode(), exact_products(self.device):
            return arrays_of(self.module(**tensors))

    def fallback(self) -> Engine:
        """The engine of the module, rebuilt on first use. Raises ``StructureError`` where there is none."""
        with self._lock:
            if self._rebuilt is None:
                if self._rebuild is None:
                    raise StructureError(
                        "The model was stored as a graph of one forward, which cannot do this",
                        where="engine",
                        way_out='save the model with its module, too: structure="auto"',
                    )
                self._rebuilt = self._rebuild()
            return self._rebuilt

    def generate(
        self, inputs: Mapping[str, np.ndarray], settings: Mapping[str, Any], **options: Any
    ) -> dict[str, np.ndarray]:
        return self.fallback().generate(inputs, settings, **options)
