"""One vector a text: pooling of tokens, and sentence-transformers' layers around it.

A pooling alone is the business of the task. With layers that have weights, or in another order, all
of it becomes one module, the ``Embedder``, so that an engine can run it in a single forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.pooling import POOLINGS

__all__ = ["ACTIVATIONS", "Embedder"]

# Classes of ``torch.nn`` without weights, made without arguments.
ACTIVATIONS = frozenset(
    (
        *(
            "CELU",
            "ELU",
            "GELU",
            "Hardsigmoid",
            "Hardswish",
            "Hardtanh",
            "Identity",
            "LeakyReLU",
            "LogSigmoid",
            "Mish",
        ),
        *("ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh", "Tanhshrink"),
    )
)


def pool(hidden: torch.Tensor, mask: torch.Tensor, kinds: Sequence[str]) -> torch.Tensor:
    """``pooling.pool`` for a batch, of tensors, so that it is a part of a forward.

    Args:
        hidden: Hidden states, shape (rows, longest, size).
        mask: Tokens that count, bool of shape (rows, longest).
        kinds: Names in ``POOLINGS``.

    Returns:
        Shape (rows, size times kinds), in the dtype of ``hidden``.
    """
    real = mask[:, :, None]
    # (rows, longest, size). Masked out, not multiplied by zero: a padding position may hold NaN.
    # Sums are in float32 at least: in halves those of hundreds of tokens would lose digits.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = hidden.masked_fill(~real, 0).to(wide)
    count = real.sum(dim=1).to(wide).clamp(min=1e-9)  # (rows, 1); a text without tokens has 0
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None, :]
    found = []
    for kind in kinds:
        if kind == "mean":
            vector = kept.sum(dim=1) / count
        elif kind == "mean_sqrt_len":
            vector = kept.sum(dim=1) / count.sqrt()
        elif kind == "max":
            vector = hidden.masked_fill(~real, -torch.inf).amax(dim=1)
        elif kind == "weightedmean":
            weights = (places * mask)[:, :, None].to(wide)
            vector = (kept * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        else:
            # argmax of place times mask: the last token has the largest place, and the first one
            # ("cls") the largest counted from the end.
            order = places if kind == "last" else hidden.shape[1] + 1 - places
            chosen = (order * mask).argmax(dim=1)
            vector = hidden.gather(1, chosen[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(
                1
            )
        found.append(vector.to(hidden.dtype))
    return torch.cat(found, dim=1)


class Embedder(torch.nn.Module):
    """A model of tokens, and the layers that make one vector a text of its hidden states.

    Args:
        transformer: The model.
        layers: Kind and arguments of each layer, in order; JSON only, see ``_LAYERS``. Exactly one
            is a pooling.

    Raises:
        StructureError: A layer is unknown.
    """

    def __init__(self, transformer: torch.nn.Module, layers: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.transformer = transformer
        self.described = [dict(layer) for layer in layers]
        self.layers = torch.nn.ModuleList(_layer(layer) for layer in layers)

    @property
    def config(self) -> Any:
        """The config of the model of tokens."""
        return self.transformer.config

    def forward(
        self,
        input_ids: torch.Tensor,
        pooling_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``sentence_embedding``, shape (rows, size).

        Args:
            input_ids: Shape (rows, longest).
            pooling_mask: 1 for tokens that are pooled, 0 for padding, and for prompts where they do
                not count.
            attention_mask: For the model, if it takes one.
            token_type_ids: For the model, if it takes them.
        """
        more = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: tensor for name, tensor in more.items() if tensor is not None}
        vectors = self.transformer(input_ids=input_ids, **given)[0]  # (rows, longest, size)
        mask = pooling_mask.bool()
        for layer in self.layers:
            vectors = (
                pool(vectors, mask, layer.kinds) if isinstance(layer, _Pooling) else layer(vectors)
            )
        return {"sentence_embedding": vectors}


class _Pooling(torch.nn.Module):
    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        if not kinds or not set(kinds) <= {*POOLINGS}:
            raise ValueError(f"unknown pooling {kinds}")
        self.kinds = list(kinds)


class _Dense(torch.nn.Module):
    def __init__(
        self, size: int, new_size: int, bias: bool, activation: str, residual: bool
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation}")
        self.linear = torch.nn.Linear(size, new_size, bias=bias)
        self.activation = getattr(torch.nn, activation)()
        self.adds = residual
        if residual and size != new_size:
            self.residual = torch.nn.Linear(size, new_size, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        new: torch.Tensor = self.activation(self.linear(vectors))
        if not self.adds:
            return new
        return new + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class _LayerNorm(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(size)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(vectors)
        return normed


class _Normalize(torch.nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1)


# Kind → class; weights have the names that sentence-transformers gives them.
_LAYERS: Mapping[str, type[torch.nn.Module]] = {
    "dense": _Dense,
    "layer_norm": _LayerNorm,
    "normalize": _Normalize,
    "pooling": _Pooling,
}


def _layer(described: Mapping[str, Any]) -> torch.nn.Module:
    arguments = dict(described)
    try:
        return _LAYERS[arguments.pop("kind")](**arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise StructureError(
            "A layer of the model is unknown", where=f"layers, {described}", found=error
        ) from error
