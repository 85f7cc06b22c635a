"""Dtypes of a module's tensors, where the module is served in one dtype."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlflow_safeflavor.artifact.spec import AS_IS
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.dtypes import resolve_dtype
from mlflow_safeflavor.module.slots import Slot, find_slots
from mlflow_safeflavor.module.watch import Watch

__all__ = ["casts_of", "dtype_plan"]


def casts_of(
    module: torch.nn.Module,
    structure: Mapping[str, Any],
    name: str | torch.dtype,
    slots: Sequence[Slot],
) -> dict[str, torch.dtype]:
    """``dtype_plan`` of a module that is saved or was loaded, by its structure.

    Empty for "as-is", and where all parameters have that dtype: the user's own cast is not undone.
    """
    if name == AS_IS:
        return {}
    dtype = resolve_dtype(name)
    floating = [slot for slot in slots if slot.tensor.is_floating_point()]
    if all(slot.tensor.dtype == dtype for slot in floating if slot.kind == "parameter"):
        return {}
    return dtype_plan(module, dtype, slots, _constructed_dtypes(structure, dtype))


def dtype_plan(
    module: torch.nn.Module,
    dtype: torch.dtype,
    slots: Sequence[Slot],
    constructed: Mapping[str, torch.dtype],
) -> dict[str, torch.dtype]:
    """Path → dtype of each tensor that has another dtype in a module of this serving dtype.

    As ``from_pretrained(dtype=…)`` decides: the islands that the class keeps in float32 are
    parameters and persistent buffers (a router's correction bias); everything else takes the dtype
    that the constructor gives it when ``dtype`` is torch's default: rotary frequencies, for
    instance, are float32 by their own code. Parameters of other modules than transformers', and
    persistent buffers where no constructor can be called, are cast, as ``nn.Module.to`` does.
    Integers and booleans stay.

    Args:
        module: Its classes name the islands.
        dtype: The serving dtype.
        slots: The module's tensors.
        constructed: Path → dtype in a module that was constructed with that default; empty where
            no constructor can be called.
    """
    islands = _islands_of(module, dtype)
    plan = {}
    for slot in slots:
        if not slot.tensor.is_floating_point():
            continue
        stored = slot.kind == "parameter" or (slot.kind == "buffer" and slot.persistent)
        if stored and islands and islands.search(f".{slot.path}."):
            planned = torch.float32
        elif slot.kind == "parameter" and not hasattr(module, "from_pretrained"):
            planned = dtype
        else:
            planned = constructed.get(slot.path, dtype if stored else slot.tensor.dtype)
        if planned != slot.tensor.dtype:
            plan[slot.path] = planned
    return plan


def _constructed_dtypes(structure: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    if structure["kind"] in ("pickle", "graph"):
        return {}
    described = {
        **structure,
        "config": _with_dtype(structure.get("config"), str(dtype).removeprefix("torch.")),
    }
    seen = []
    for attempt in range(_TRIES):
        watch = Watch(dtype)
        # Running the class was agreed to before: it is being saved, or was just loaded.
        skeleton = build(described, trust={"code"}, dtype=dtype, watch=watch)
        seen.append({slot.path: slot.tensor.dtype for slot in find_slots(skeleton)})
        if not watch.disturbed:
            return seen[-1]
        time.sleep(0.01 * attempt)
    if any(other != seen[0] for other in seen):
        raise PlacementError(
            "Torch's default dtype kept changing while the model was constructed",
            where=structure["class"],
            wanted=str(dtype),
            hint="do not call torch.set_default_dtype, or transformers' from_pretrained in other "
            "threads, meanwhile",
        )
    return seen[0]  # the constructor itself changes it, always in the same way


_TRIES = 10


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config, as JSON, with ``dtype`` at every level."""
    # Constructors of submodels obey it more than torch's default.
    if not isinstance(config, Mapping):
        return config
    changed = {key: _with_dtype(value, dtype) for key, value in config.items()}
    return changed | {
        key: dtype for key in ("dtype", "torch_dtype") if key in config and "model_type" in config
    }


def _islands_of(module: torch.nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Pattern of the tensors that the class keeps in float32 (T5's ``wo``), for ``.path.``."""
    names: set[str] = set()
    for child in module.modules():
        # Overflow is float16's alone; strict islands lose too many bits in bfloat16, too.
        if dtype == torch.float16:
            names |= set(getattr(child, "_keep_in_fp32_modules", None) or ())
        if dtype in (torch.float16, torch.bfloat16):
            names |= set(getattr(child, "_keep_in_fp32_modules_strict", None) or ())
    if not names:
        return None
    # As in transformers' own loader: whole components of a path before 5, any part of it since, *
    # for anything.
    import transformers

    whole = int(transformers.__version__.partition(".")[0]) < 5
    patterns = [rf"\.{name}\." if whole else name.replace("*", ".*") for name in sorted(names)]
    return re.compile("|".join(patterns))
