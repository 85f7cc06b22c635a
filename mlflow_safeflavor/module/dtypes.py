"""The serving dtype: chosen at save, recorded, and logged where weights are cast unasked."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from mlflow_safeflavor.artifact.spec import AS_IS, DTYPES
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.module.inventory import dtype_name
from mlflow_safeflavor.module.slots import Slot

__all__ = [
    "announced_cast",
    "count_dtypes",
    "dtypes_of",
    "input_dtype",
    "read_as",
    "resolve_dtype",
    "serving_dtype",
]

_logger = logging.getLogger("mlflow.safeflavor")

DEFAULT = "float32"


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` → ``torch.bfloat16``.

    Raises:
        PlacementError: It is none of the serving dtypes; there is no "auto".
    """
    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise PlacementError(
            "Not a serving dtype", where="dtype", wanted=" | ".join(DTYPES), found=repr(name)
        )
    dtype: torch.dtype = getattr(torch, text)
    return dtype


def dtypes_of(slots: Sequence[Slot]) -> dict[str, int]:
    """Floating point dtypes → number of values, of the parameters, or else of all tensors."""
    weights = [
        slot.tensor
        for slot in slots
        if slot.kind == "parameter" and slot.tensor.is_floating_point()
    ]
    return count_dtypes(weights or [slot.tensor for slot in slots])


def count_dtypes(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Floating point dtypes → number of values, the most first."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            found[dtype_name(tensor.dtype)] += tensor.numel()
    return dict(found.most_common())


def serving_dtype(asked: str | torch.dtype | None, found: Mapping[str, int]) -> str:
    """Name of the serving dtype.

    Args:
        asked: A dtype of ``DTYPES``; ``"as-is"``, which is the module's own dtype if all of its
            weights have one, and else stays ``"as-is"``; None for float32.
        found: As ``dtypes_of`` has it.

    Raises:
        PlacementError: It is none of these.
    """
    if asked == AS_IS:
        # One dtype is recorded as such; only several stay "as-is".
        only = next(iter(found), DEFAULT)
        return only if len(found) < 2 and only in DTYPES else AS_IS
    return dtype_name(resolve_dtype(DEFAULT if asked is None else asked))


def announced_cast(asked: str | torch.dtype | None, found: Mapping[str, int], serving: str) -> str:
    """Dtypes that weights are cast from unasked, logged once; empty where none is."""
    others = ", ".join(name for name in found if name != serving)
    if asked is not None or not others:
        return ""
    _logger.warning(
        "safeflavor: the weights are %s, and become %s because no dtype was given; "
        "dtype='as-is' keeps them, and dtype=%r says that this is meant",
        others,
        serving,
        serving,
    )
    return others


def read_as(asked: str | torch.dtype | None, found: Mapping[str, int]) -> str:
    """The dtype that a checkpoint with weights of these dtypes is read in.

    ``"as-is"`` is the dtype of most of its values; a class may keep islands in float32 beside it.

    Raises:
        PlacementError: What was asked for is no serving dtype.
    """
    if asked == AS_IS:
        # The most frequent first; a float8 among them is no serving dtype.
        return next((name for name in found if name in DTYPES), DEFAULT)
    return serving_dtype(asked, found)


def input_dtype(name: str | torch.dtype, slots: Sequence[Slot]) -> torch.dtype:
    """The dtype of floating point inputs: the serving dtype, for "as-is" the widest weight's."""
    if name != AS_IS:
        return resolve_dtype(name)
    floating = [
        slot.tensor
        for slot in slots
        if slot.tensor.is_floating_point() and slot.tensor.itemsize > 1
    ]
    weights = [tensor for tensor in floating if isinstance(tensor, torch.nn.Parameter)]
    kinds = [tensor.dtype for tensor in weights or floating] or [torch.float32]
    return functools.reduce(torch.promote_types, kinds)
