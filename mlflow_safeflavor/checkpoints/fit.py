"""The fit of a state dict to a module: tensors by name, and those that are left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.inventory import dtype_name
from mlflow_safeflavor.module.slots import some

__all__ = ["Fit", "Group", "cast", "find_groups", "fit", "require_fit", "with_base_prefix"]


@dataclass(frozen=True)
class Group:
    """Names in the state dict of one tensor of the module (tied weights)."""

    names: tuple[str, ...]
    tensor: torch.Tensor


@dataclass
class Fit:
    """How a state dict fits a module.

    Attributes:
        values: First name of a group → its tensor in the state dict.
        missing: First names of groups without a tensor.
        unexpected: Keys without a group.
        mismatched: First name → the misfit, as a sentence.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> int:
        """Number of names that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


def find_groups(module: torch.nn.Module, ties: Mapping[str, str] | None = None) -> list[Group]:
    """Group the names of a module's state dict, those that view the same values together.

    Args:
        module: On real memory or on meta, where only the very same object can be told to be tied.
        ties: Further pairs of names that are declared to be tied.
    """
    tensors: dict[str, torch.Tensor] = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    home: dict[object, str] = {}
    first = {name: home.setdefault(_view_of(tensor), name) for name, tensor in tensors.items()}
    for one, other in (ties or {}).items():
        if one in first and other in first:
            # Whole groups are joined: either name may be tied to others already.
            old, new = first[one], first[other]
            first = {name: new if root == old else root for name, root in first.items()}
    groups: dict[str, list[str]] = {}
    for name, root in first.items():
        groups.setdefault(root, []).append(name)
    return [Group(tuple(names), tensors[root]) for root, names in groups.items()]


def _view_of(tensor: torch.Tensor) -> object:
    """A key that is equal for two tensors which view the same values."""
    # On meta every address is 0, and tensors without elements may share one: told by identity.
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def fit(
    groups: Iterable[Group], state: Mapping[str, torch.Tensor], ignored: Sequence[str] = ()
) -> Fit:
    """Match tensors of the state dict with groups.

    Args:
        groups: All groups of the module.
        state: From ``read_state``.
        ignored: Regular expressions of keys that may be left over.
    """
    result = Fit()
    known: set[str] = set()
    for group in groups:
        known.update(group.names)
        present = [name for name in group.names if name in state]
        if not present:
            result.missing.append(group.names[0])
        elif odd := _misfit(group, state, present):
            result.mismatched[group.names[0]] = odd
        else:
            result.values[group.names[0]] = state[present[0]]
    # Both directions: a key without a place is as bad as a place without a key, since it may be the
    # misnamed one.
    patterns = [re.compile(pattern) for pattern in ignored]
    result.unexpected = [
        key
        for key in sorted(state.keys() - known)
        if not any(pattern.search(key) for pattern in patterns)
    ]
    return result


def _misfit(group: Group, state: Mapping[str, torch.Tensor], present: Sequence[str]) -> str | None:
    for name in present:
        value = state[name]
        if value.shape != group.tensor.shape:
            return f"{name} has shape {list(value.shape)}, wanted {list(group.tensor.shape)}"
        if _number(value.dtype) != _number(group.tensor.dtype):
            return f"{name} is {dtype_name(value.dtype)}, wanted {dtype_name(group.tensor.dtype)}"
        # Tied in the class and stored apart: whichever were taken, the other would be lost.
        if not bits_equal(value, state[present[0]]):
            return (
                f"{present[0]} and {name} are tied in the model, but have different values in the "
                "checkpoint"
            )
    return None


def _number(dtype: torch.dtype) -> str:
    """Kind of a dtype; casts within one kind keep the meaning of values."""
    # Integers, booleans and float8 are kinds of their own: a cast of them is no rounding.
    return "real" if dtype.is_floating_point and dtype.itemsize > 1 else dtype_name(dtype)


def cast(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The values in another dtype.

    Raises:
        WeightsError: One is too large for float16.
    """
    result = value.to(dtype)
    # bfloat16 has float32's range; float16 ends at 65504, and gives infinity without a word.
    if (
        dtype == torch.float16
        and result is not value
        and torch.isinf(result).any()
        and not torch.isinf(value).any()
    ):
        raise WeightsError(
            "A weight is too large for float16", where=name, hint="dtype='bfloat16' or 'float32'"
        )
    return result


def with_base_prefix(
    state: Mapping[str, torch.Tensor], names: Iterable[str], prefix: str | None
) -> dict[str, torch.Tensor]:
    """Add or drop transformers' base-model prefix (``bert.``), where that gives a known name."""
    known = set(names)
    # A head's checkpoint names bert.encoder…, that of the base alone encoder…; either class may be
    # built.
    return {
        _rename(key, known, f"{prefix}." if prefix else ""): value for key, value in state.items()
    }


def _rename(key: str, known: set[str], prefix: str) -> str:
    if key not in known and prefix:
        if key.startswith(prefix) and key.removeprefix(prefix) in known:
            return key.removeprefix(prefix)
        if prefix + key in known:
            return prefix + key
    return key


# --- judging -------------------------------------------------------------------------------------

_WRAPPERS = {
    "module.": "torch.nn.DataParallel or DistributedDataParallel: save model.module.state_dict()",
    "_orig_mod.": "torch.compile: save model._orig_mod.state_dict()",
    "_fsdp_wrapped_module.": "FSDP: save a full state dict",
}


def require_fit(result: Fit, names: Iterable[str], where: object, hint: str) -> None:
    """Refuse a state dict that does not fit in both directions.

    Raises:
        WeightsError: It names every kind of key, and a prefix that they share.
    """
    if not result.problems:
        return
    # The commonest cause: saved inside a wrapper of training, or of a larger module.
    prefix = _shared_prefix(result.unexpected, set(names))
    if prefix is not None:
        hint = (
            f"take {prefix!r} off the keys; it comes from "
            f"{_WRAPPERS.get(prefix, 'a module around the model')}"
        )
    raise WeightsError(
        "The checkpoint and the module do not fit each other",
        where=where,
        wanted="every tensor of the module in the checkpoint, and nothing else",
        found=_summary(result) + (f"; all of these keys start with {prefix!r}" if prefix else ""),
        hint=hint,
    )


def _summary(result: Fit) -> str:
    kinds = {
        "missing": result.missing,
        "mismatched": [*result.mismatched.values()],
        "unexpected": result.unexpected,
    }
    return "; ".join(
        f"{len(found)} {kind} ({some(found)})" for kind, found in kinds.items() if found
    )


def _shared_prefix(unexpected: Sequence[str], known: set[str]) -> str | None:
    """The prefix without which all unexpected keys are known; None where there is none."""
    if not unexpected:
        return None
    parts = unexpected[0].split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if all(key.startswith(prefix) and key.removeprefix(prefix) in known for key in unexpected):
            return prefix
    return None
