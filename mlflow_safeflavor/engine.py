"""Engine: what turns a dict of input tensors into a dict of output tensors.

Tasks and batching see only this seam. ``ModuleEngine`` runs the rebuilt module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from mlflow_safeflavor.errors import StructureError

__all__ = ["Engine", "ModuleEngine"]


class Engine(Protocol):
    """One forward pass, without gradients and without state between calls; safe from many threads."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Serving dtype: what floating point inputs must be."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the model.

        Args:
            inputs: Argument name → tensor on any device; moved to the engine's device if elsewhere.

        Returns:
            Output name → tensor on the engine's device.
        """
        ...


class ModuleEngine:
    """Runs a module's ``forward``."""

    name = "module"

    def __init__(self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.module = module
        self.device = device
        self.dtype = dtype

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            outputs = self.module(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return _named_tensors(outputs)


def _named_tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of a forward's result under the names the model gives them, else ``output_0`` ….

    Caches and tuples of hidden states are left out, since no task reads them: unless they are all there
    is, as with the feature maps of a backbone, which become ``feature_maps_0`` ….
    """
    if isinstance(outputs, torch.Tensor):
        return {"output_0": outputs}
    if isinstance(outputs, (tuple, list)):
        outputs = {f"output_{i}": value for i, value in enumerate(outputs)}
    if isinstance(outputs, Mapping):
        single = {str(name): value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        return single or {
            f"{name}_{i}": item
            for name, value in outputs.items()
            if isinstance(value, (tuple, list))
            for i, item in enumerate(value)
            if isinstance(item, torch.Tensor)
        }
    raise StructureError(
        "The module's forward returns something without named tensors",
        where=type(outputs).__name__,
        wanted="a tensor, a tuple of tensors, a dict of tensors or a transformers ModelOutput",
    )
