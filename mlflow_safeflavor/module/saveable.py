"""Tensors that can be stored as plain values; all others are refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlflow_safeflavor.artifact.inventory_file import ITEM_SIZES
from mlflow_safeflavor.errors import StructureError, WeightsError
from mlflow_safeflavor.module.slots import Slot, find_meta, some

__all__ = ["STORABLE", "require_saveable"]

# Exactly these: a subclass (DTensor, tensors of quantisation) may hold its values elsewhere. Older
# releases of torch have no Buffer.
_TENSOR_TYPES = (
    (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if hasattr(torch.nn, "Buffer")
    else (
        torch.Tensor,
        torch.nn.Parameter,
    )
)


def require_saveable(slots: Sequence[Slot]) -> None:
    """Refuse tensors that cannot be stored as plain values.

    Raises:
        WeightsError: A tensor is on the meta device: it has no values.
        StructureError: A tensor is sparse, quantised, a lazy or unknown subclass, or a lazy view.
    """
    if meta := find_meta(slots):
        raise WeightsError(
            "The module holds tensors without values",
            where=some(meta),
            wanted="tensors in memory",
            found=f"{len(meta)} of {len(slots)} on the meta device",
            hint="load the checkpoint with mlflow_safeflavor.from_pretrained, "
            "or fill the module with mlflow_safeflavor.materialize, then save it",
        )
    if waiting := [slot.path for slot in slots if torch.nn.parameter.is_lazy(slot.tensor)]:
        raise StructureError(
            "The module has lazy parameters that no forward has made yet",
            where=some(waiting),
            wanted="parameters of known shape",
            hint="call the module once, model(example), and save it then",
        )
    seen: set[str] = set()
    for slot in slots:
        tensor = slot.tensor
        # "a.b" as a name of one attribute, or b inside a: one row would stand for two tensors.
        if slot.path in seen:
            raise StructureError(
                "Two tensors of the module have the same path",
                where=slot.path,
                found="an attribute whose name has dots or brackets in it",
                hint="rename that attribute",
            )
        seen.add(slot.path)
        odd = (
            f"a {type(tensor).__name__}" if type(tensor) not in _TENSOR_TYPES
            else f"layout {tensor.layout}" if tensor.layout != torch.strided
            else "a nested tensor" if tensor.is_nested
            else "a quantised tensor" if tensor.is_quantized
            else "a conjugated or negated view" if tensor.is_conj() or tensor.is_neg()
            else f"dtype {tensor.dtype}" if tensor.dtype not in STORABLE
            else None
        )  # fmt: skip
        if odd:
            raise StructureError(
                "The module holds a tensor that cannot be stored as plain values",
                where=slot.path,
                wanted="a dense torch.Tensor, nn.Parameter or buffer",
                found=odd,
                hint="replace it by a dense tensor before saving (dequantise, .to_dense(), "
                ".resolve_conj())",
            )


STORABLE = frozenset(getattr(torch, name) for name in ITEM_SIZES if hasattr(torch, name))
