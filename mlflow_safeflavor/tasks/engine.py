"""Engine: named input arrays to named output arrays.

Tasks, batching and scheduler see only this protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlflow_safeflavor.module.generation import Generation

if TYPE_CHECKING:
    import torch

__all__ = ["Engine"]


class Engine(Protocol):
    """One forward pass, without gradients or state between calls; safe from many threads."""

    name: str
    # Whether it runs on the CPU, and not on an accelerator.
    on_cpu: bool
    # Whether the proof saw the bits of a row depend neither on its batch nor on padding.
    keeps_bits: bool

    @property
    def module(self) -> torch.nn.Module:
        """The module itself; see ``LoadedModel.module``."""
        ...

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            inputs: Argument name → array, never written to; floating point numbers are cast to the
                serving dtype.

        Returns:
            Output name → array; halves as float32, since numpy knows no bfloat16. Either it is the
            caller's own, or it is read-only: a forward may return a weight, or its input, as it is.
        """
        ...

    def generate(
        self, inputs: Mapping[str, np.ndarray], generation: Generation
    ) -> dict[str, np.ndarray]:
        """Generate, token by token.

        Args:
            inputs: ``input_ids`` and, if the model takes it, ``attention_mask``, shape (rows,
                longest); or ``input_features`` of sounds.
            generation: How it writes.

        Returns:
            ``sequences``, int64 of shape (rows, length): the prompts as given, or the decoder's
            start token, and the new tokens. With ``keep_logits`` also ``logits``, shape (rows,
            steps, vocabulary).

        Raises:
            StructureError: The model cannot write, or not with this engine.
        """
        ...
