"""A module constructed for a checkpoint, and filled with it where everything fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from mlflow_safeflavor.checkpoints.fit import (
    Fit,
    cast,
    find_groups,
    fit,
    require_fit,
    with_base_prefix,
)
from mlflow_safeflavor.checkpoints.transformers_keys import (
    base_prefix,
    convert,
    ignored_keys,
    is_converted,
    is_optional,
)
from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.module.construction import (
    Recipe,
    construct_fresh,
    construct_twice,
    require_memory,
)
from mlflow_safeflavor.module.dtype_plan import dtype_plan
from mlflow_safeflavor.module.slots import some

__all__ = ["fitted", "matches"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits any of the patterns, such as ``classifier.*``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def fitted(
    recipe: Recipe,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    new: Sequence[str],
    where: Path,
) -> torch.nn.Module:
    """Construct a module, fit the checkpoint, and copy it where everything fits."""
    # Twice: tensors on which two constructions agree are computed, all others are random.
    built, computed = construct_twice(recipe, dtype)
    module = built.module
    result = _fit_or_convert(recipe, module, state, computed, new)
    require_fit(result, module.state_dict(), where, _HINT)
    absent = {group.names[0] for group in find_groups(module)} - result.values.keys()
    absent |= {slot.path for slot in built.slots if not slot.persistent}
    # Fresh tensors are allowed by name alone, and only if the constructor wrote them: memory that
    # nobody wrote looks like random values, too.
    if random := absent - computed:
        built, written = construct_fresh(recipe, dtype)
        module = built.module
        _require_data(
            sorted(path for path in random if path not in written or not matches(path, new)), where
        )
    plan = dtype_plan(
        module, dtype, built.slots, {slot.path: slot.tensor.dtype for slot in built.slots}
    )
    _copy(module, result.values, plan)
    require_memory(module)
    return module


_HINT = (
    "choose the class that the checkpoint was saved from (model_class=…); new=('head.*',) allows "
    "fresh tensors, drop=('head.*',) leaves keys out, tie_word_embeddings=False unties"
)


def _fit(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    computed: set[str],
    new: Sequence[str],
) -> Fit:
    """Fit a state dict, without misses that the class or the user allows."""
    groups = find_groups(module)
    names = [name for group in groups for name in group.names]
    result = fit(groups, with_base_prefix(state, names, base_prefix(module)), ignored_keys(module))
    result.missing = [
        name
        for name in result.missing
        # A class may call a table of sinusoids optional, say: which holds only if its constructor
        # computes it.
        if not matches(name, new) and not (name in computed and is_optional(module, name))
    ]
    result.mismatched = {
        name: odd for name, odd in result.mismatched.items() if not matches(name, new)
    }
    return result


def _require_data(paths: Sequence[str], where: object) -> None:
    if paths:
        raise WeightsError(
            "The checkpoint does not hold a tensor, and the constructor does not compute it",
            where=f"{where}: {some(paths)}",
            wanted="the same values in two constructions",
            found="random values, or memory that nobody wrote",
            hint="make it a parameter or persistent buffer and save the checkpoint again; "
            f"new=({paths[0]!r},) accepts the random values of a new construction, but never "
            "unwritten memory",
        )


def _copy(
    module: torch.nn.Module,
    values: Mapping[str, torch.Tensor],
    plan: Mapping[str, torch.dtype],
) -> None:
    """Copy values into the constructor's own memory, so that ties and views see them too."""
    for group in find_groups(module):
        name, target = group.names[0], group.tensor
        if name not in values:
            continue
        # Before the copy: rounded to a half precision first, the values would be lost.
        if name in plan:
            target.data = target.data.to(plan[name])
        with torch.no_grad():
            target.copy_(cast(values[name], target.dtype, name))


def _fit_or_convert(
    recipe: Recipe,
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    computed: set[str],
    new: Sequence[str],
) -> Fit:
    """Fit the state dict as it is, or else as transformers' loader converts it."""
    plain = _fit(module, state, computed, new)
    must = is_converted(module, state)
    # Another name or layout shows as an unexpected key; converting mends nothing else.
    if not must and not (plain.unexpected and hasattr(recipe.cls, "from_pretrained")):
        return plain
    try:
        converted, unexpected = convert(recipe, module, state)
    except WeightsError:
        raise
    except Exception:
        if must:
            raise
        return plain  # its loader cannot build this class: the misfit by name is the message
    result = _fit(module, converted, computed, new)
    result.unexpected = unexpected
    return result if must or result.problems < plain.problems else plain
