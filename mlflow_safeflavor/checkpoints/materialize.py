"""Values for modules that were built on the meta device: for every tensor, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.checkpoints.fit import (
    Fit,
    Group,
    cast,
    find_groups,
    fit,
    require_fit,
    with_base_prefix,
)
from mlflow_safeflavor.checkpoints.state_dict import read_state
from mlflow_safeflavor.checkpoints.transformers_keys import (
    base_prefix,
    convert,
    ignored_keys,
    is_optional,
)
from mlflow_safeflavor.errors import StructureError, WeightsError
from mlflow_safeflavor.module.construction import (
    Recipe,
    construct,
    construct_twice,
    declared_ties,
    recipe_of,
    require_memory,
)
from mlflow_safeflavor.module.devices import resolve_device
from mlflow_safeflavor.module.dtype_plan import dtype_plan
from mlflow_safeflavor.module.dtypes import resolve_dtype
from mlflow_safeflavor.module.placement import place
from mlflow_safeflavor.module.slots import find_slots, some
from mlflow_safeflavor.module.subject import Subject

__all__ = ["materialize"]


@checked
def materialize(
    module: torch.nn.Module,
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    *,
    device: str | int | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> torch.nn.Module:
    """Fill a module that was built on the meta device, wholly or in part; it is changed in place.

    Every tensor without memory gets the values of the checkpoint; tensors that were one object stay
    one, and declared ties are tied. Buffers and plain tensors that no checkpoint holds are computed
    by constructing the class again on real memory, if its arguments can be told: a
    ``transformers.PreTrainedModel`` has a config. Else they are refused. Nothing is changed before
    there is a value for everything. Tensors that have memory keep their values.

    Args:
        module: The module to fill.
        checkpoint: A safetensors file, a ``.bin`` or ``.pt`` state dict, the index of shards, a
            folder with any of them, or a state dict.
        device: Where the whole module goes then: "cpu", "cuda:0", an accelerator's index, …
        dtype: Serving dtype to cast to; None keeps the dtypes that the module has.

    Returns:
        The same module.

    Raises:
        WeightsError: It names every tensor for which there is no data.
        StructureError: The module carries accelerate's hooks, or there is no such checkpoint.
        PlacementError: There is no such device.
    """
    # Arguments first: a mistyped device is told before gigabytes are read.
    target = resolve_device(device)
    wanted = None if dtype is None else resolve_dtype(dtype)
    _require_unhooked(module)
    state = read_state(checkpoint)
    where = "the given state dict" if isinstance(checkpoint, Mapping) else checkpoint
    # Found for all, then assigned: a refusal leaves the module as it was.
    _assign(module, _find_values(module, state, where))
    require_memory(module)
    place(module, target, {} if wanted is None else _casts(module, wanted))
    return module


def _require_unhooked(module: torch.nn.Module) -> None:
    for name, child in module.named_modules():
        # Such a hook moves tensors back to meta after each forward.
        if hasattr(child, "_hf_hook"):
            raise StructureError(
                "The module carries accelerate's hooks, which would take its tensors away again",
                where=name or "the model itself",
                hint="accelerate.hooks.remove_hook_from_module(model, recurse=True) first",
            )


def _find_values(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: object
) -> dict[int, torch.Tensor]:
    """``id`` of each tensor on meta → its substitute: new memory, or the tensor that it is tied to.

    Raises:
        WeightsError: A tensor has no data, or data of the checkpoint has no tensor.
    """
    meta = [slot for slot in find_slots(module) if slot.tensor.is_meta]
    groups = find_groups(module, declared_ties(module))
    tensors = module.state_dict(keep_vars=True)
    skeleton, reason = _skeleton_of(module) if meta else (None, "")
    computed = skeleton.computed if skeleton is not None else {}
    # A state dict made by hand may hold non-persistent buffers, which state_dict() does not list.
    given = {
        slot.path: state[slot.path] for slot in meta if not slot.persistent and slot.path in state
    }
    rest = {key: value for key, value in state.items() if key not in given}
    result = _fit_meta(module, groups, rest)
    # Unexpected keys may be old names, which transformers' loader knows.
    if (
        result.unexpected
        and skeleton is not None
        and hasattr(skeleton.recipe.cls, "from_pretrained")
    ):
        result = _fit_meta_converted(skeleton, module, groups, rest, result)
    result.missing = [
        name for name in result.missing if not (name in computed and is_optional(module, name))
    ]
    require_fit(result, tensors, where, _HINT_META)
    found: dict[int, torch.Tensor] = {}
    for group in groups:
        members = [tensors[name] for name in group.names]
        # A tied tensor that has memory keeps it, and the others become it: two copies would drift
        # apart in training.
        home = next((tensor for tensor in members if not tensor.is_meta), None)
        value = result.values.get(group.names[0])
        if home is None and value is not None:
            home = _new_memory(value, members[0], group.names[0])
        found.update(
            {id(tensor): home for tensor in members if tensor.is_meta and home is not None}
        )
    for slot in meta:
        value = given.get(slot.path, computed.get(slot.path))
        # The shape too: a constructor of these arguments may compute another one.
        if id(slot.tensor) not in found and value is not None and value.shape == slot.tensor.shape:
            found[id(slot.tensor)] = _new_memory(value, slot.tensor, slot.path)
    _require_all([slot.path for slot in meta if id(slot.tensor) not in found], where, reason)
    return found


_HINT_META = (
    "take the checkpoint that was saved from this very class; the keys and shapes must be those "
    "of module.state_dict()"
)


def _require_all(paths: Sequence[str], where: object, reason: str) -> None:
    if paths:
        raise WeightsError(
            "There is no data for tensors on the meta device",
            where=some(paths),
            wanted=f"values in {where}, or a constructor that computes them",
            found=reason or "neither: the constructor gives random values, or no such tensor",
            hint="build the module without torch.device('meta') and load the state dict into it, "
            "or add the values to the state dict under these names",
        )


@dataclass(frozen=True)
class _Skeleton:
    """The same class on real memory.

    Attributes:
        recipe: Class, config and arguments that it was made with.
        module: The module.
        computed: Path → tensor that its constructor computes.
    """

    recipe: Recipe
    module: torch.nn.Module
    computed: Mapping[str, torch.Tensor]


def _skeleton_of(module: torch.nn.Module) -> tuple[_Skeleton | None, str]:
    """The skeleton, or None and the reason why the constructor cannot be called."""
    recipe = recipe_of(Subject.of(module))
    if recipe is None:
        return None, f"how {type(module).__name__} was constructed is stored nowhere"
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        built, computed = construct_twice(recipe, dtype)
    except StructureError as error:
        return None, f"{error.what} ({error.found})"
    values = {slot.path: slot.tensor for slot in built.slots if slot.path in computed}
    return _Skeleton(recipe, built.module, values), ""


def _fit_meta(
    module: torch.nn.Module, groups: Sequence[Group], state: Mapping[str, torch.Tensor]
) -> Fit:
    """Fit a state dict; only a group that is wholly on meta can miss anything."""
    tensors = module.state_dict(keep_vars=True)
    result = fit(
        groups, with_base_prefix(state, tensors, base_prefix(module)), ignored_keys(module)
    )
    # Of a tied group one name with memory is enough.
    filled = {
        group.names[0] for group in groups if any(not tensors[name].is_meta for name in group.names)
    }
    result.missing = [name for name in result.missing if name not in filled]
    return result


def _fit_meta_converted(
    skeleton: _Skeleton,
    module: torch.nn.Module,
    groups: Sequence[Group],
    state: Mapping[str, torch.Tensor],
    plain: Fit,
) -> Fit:
    try:
        converted, unexpected = convert(skeleton.recipe, skeleton.module, state)
    except WeightsError:
        raise
    except Exception:
        # Not a class for transformers' loader: the plain misfit says more than its exception.
        return plain
    result = _fit_meta(module, groups, converted)
    result.unexpected = unexpected
    return result if result.problems < plain.problems else plain


def _new_memory(value: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of the values, as a parameter or plain tensor like ``like``."""
    # A copy: tensors of a state dict may be a mapped file's, or another module's.
    copied = cast(value.detach().cpu(), like.dtype, name).clone(
        memory_format=torch.contiguous_format
    )
    return (
        torch.nn.Parameter(copied, requires_grad=like.requires_grad)
        if _is_parameter(like)
        else copied
    )


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _assign(module: torch.nn.Module, found: Mapping[int, torch.Tensor]) -> None:
    for slot in find_slots(module):
        if slot.tensor.is_meta:
            slot.put(found[id(slot.tensor)])


def _casts(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Path → dtype of parameters that have another one than a module of this serving dtype."""
    subject = Subject.of(module)
    recipe = recipe_of(subject)
    try:
        slots = [] if recipe is None else construct(recipe, dtype).slots
    except StructureError:  # as in ``_skeleton_of``
        slots = []
    return dtype_plan(
        module, dtype, subject.slots, {slot.path: slot.tensor.dtype for slot in slots}
    )
