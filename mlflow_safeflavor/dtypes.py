"""The serving dtype: chosen at save, recorded, and said aloud where weights are cast and nobody asked for it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.inventory import dtype_name, find_slots
from mlflow_safeflavor.placement import resolve_dtype
from mlflow_safeflavor.spec import AS_IS, DTYPES
from mlflow_safeflavor.statedict import read_state

__all__ = ["announced_cast", "count_dtypes", "dtypes_of", "read_as", "reading_dtype", "serving_dtype"]

_logger = logging.getLogger("mlflow.safeflavor")

DEFAULT = "float32"


def dtypes_of(module: torch.nn.Module) -> dict[str, int]:
    """Floating point dtypes of a module → number of values, of its parameters, or of all else if it has none."""
    slots = find_slots(module)
    weights = [slot.tensor for slot in slots if slot.kind == "parameter" and slot.tensor.is_floating_point()]
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
        asked: A dtype of ``DTYPES``; ``"as-is"``, which is the module's own dtype if all of its weights have one, and
            else stays ``"as-is"``; None for float32.
        found: As ``dtypes_of`` has it.

    Raises:
        PlacementError: It is none of these.
    """
    if asked == AS_IS:
        only = next(iter(found), DEFAULT)
        return only if len(found) < 2 and only in DTYPES else AS_IS
    return dtype_name(resolve_dtype(DEFAULT if asked is None else asked))


def announced_cast(asked: str | torch.dtype | None, found: Mapping[str, int], serving: str) -> str:
    """What weights are cast from although nobody asked for it, which is logged once; empty where nothing is."""
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


def reading_dtype(asked: str | torch.dtype | None, model: Any) -> tuple[str, dict[str, int]]:
    """The dtype that a checkpoint folder is read in, and the dtypes of its weights; none for anything but a folder.

    ``"as-is"`` is the dtype of most of its values; a class may keep islands in float32 beside it.
    """
    folder = model.get("model") if isinstance(model, Mapping) else model
    if not isinstance(folder, (str, Path)) or asked not in (None, AS_IS) or not Path(folder).is_dir():
        return read_as(asked, {}), {}
    found = _stored(Path(folder))
    return read_as(asked, found), found


def read_as(asked: str | torch.dtype | None, found: Mapping[str, int]) -> str:
    """The dtype that a checkpoint with weights of these dtypes is read in; see ``reading_dtype``.

    Raises:
        PlacementError: What was asked for is no serving dtype.
    """
    if asked == AS_IS:
        return next((name for name in found if name in DTYPES), DEFAULT)
    return serving_dtype(asked, found)


def _stored(folder: Path) -> dict[str, int]:
    """Dtypes of a checkpoint; of pickled weights, which would have to be read for it, what its config says."""
    if any(folder.glob("*.safetensors")):
        return count_dtypes(read_state(folder).values())
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError):  # is named where the folder is read
        return {}
    return {name: 1} if isinstance(name, str) else {}
