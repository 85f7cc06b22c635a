"""Named tensors of a checkpoint, from files or memory, and the tensor of a module each is for."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlflow_safeflavor.artifact.json_files import parse_json
from mlflow_safeflavor.errors import IntegrityError, StructureError, TrustError, WeightsError
from mlflow_safeflavor.module.inventory import dtype_name
from mlflow_safeflavor.module.slots import some

__all__ = [
    "Fit",
    "Group",
    "bits_equal",
    "cast",
    "find_groups",
    "fit",
    "read_state",
    "require_fit",
    "with_base_prefix",
]


# --- reading -------------------------------------------------------------------------------------

# What a folder's weights are called, the preferred one first.
_IN_FOLDERS = (
    *("model.safetensors.index.json", "model.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


def read_state(source: str | Path | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Key → tensor on the CPU, of a folder, an index of shards, a file or a state dict.

    Safetensors are memory-mapped. Other files are read with ``torch.load(weights_only=True)``,
    which runs nothing.

    Raises:
        StructureError: There are no weights at this place.
        IntegrityError: A file is damaged, or a shard is missing.
        TrustError: A file holds more than tensors.
        WeightsError: A value is no tensor, or has no memory.
    """
    # Readers allocate too, and must not do so on the meta device of an outer context.
    with torch.device("cpu"):
        state = dict(source) if isinstance(source, Mapping) else _read_path(Path(source))
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise WeightsError(
                "The checkpoint holds something else than tensors with values",
                where=key,
                found="a tensor on the meta device"
                if isinstance(value, torch.Tensor)
                else type(value).__name__,
                hint="hand the state dict itself to mlflow_safeflavor.materialize, like "
                "torch.load(file, weights_only=True)['state_dict']",
            )
    return state


def _read_path(path: Path) -> dict[str, Any]:
    file = _find_weights(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if not file.is_file():
        raise StructureError(
            "There is no such checkpoint", where=path, wanted="a file or folder with weights"
        )
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def _find_weights(folder: Path) -> Path:
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.iterdir() if file.is_file())
    adapter = "adapter_config.json" in found
    raise StructureError(
        "The folder holds no model weights",
        where=folder,
        wanted=" | ".join(_IN_FOLDERS),
        found=f"a PEFT adapter: {some(found)}" if adapter else some(found) or "an empty folder",
        hint="load the base model with peft, merge_and_unload() and save that"
        if adapter
        else "mlflow_safeflavor.materialize(module, FILE) takes a file of any name",
    )


_HINT = "fetch the checkpoint again, or save it again where it comes from"


def _read_shards(index: Path) -> dict[str, Any]:
    try:
        weight_map = dict(parse_json(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        plain = all(os.path.basename(name) == name for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            "The index of shards is malformed", where=index, found=error, hint=_HINT
        ) from None
    if not plain:
        raise IntegrityError(
            "The index of shards points outside its folder",
            where=index,
            found=some(names),
            hint=_HINT,
        )
    state: dict[str, Any] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise IntegrityError(
                "A shard of the checkpoint is missing", where=index.parent / name, hint=_HINT
            )
        state.update(_read_path(index.parent / name))
    if odd := sorted(weight_map.keys() ^ state.keys()):
        raise IntegrityError(
            "The shards do not hold what their index lists",
            where=index,
            found=some(odd),
            hint=_HINT,
        )
    return state


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            "A safetensors file cannot be read", where=file, found=error, hint=_HINT
        ) from None


def _read_torch(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrustError(
            "The file holds more than tensors, and nothing of it was run",
            where=file,
            wanted="a state dict",
            found=str(error).strip().splitlines()[0],
            hint="torch.save(model.state_dict(), …) where the model comes from, or better: "
            "safetensors",
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise IntegrityError(
            "A checkpoint file cannot be read", where=file, found=error, hint=_HINT
        ) from None
    if not isinstance(content, Mapping):
        raise WeightsError(
            "The file holds no state dict",
            where=file,
            wanted="a dict of tensors",
            found=type(content).__name__,
        )
    return dict(content)


# --- matching ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """State-dict names that all mean one tensor of the module (tied weights)."""

    names: tuple[str, ...]
    tensor: torch.Tensor


@dataclass
class Fit:
    """How a state dict fits a module.

    Attributes:
        values: First name of a group → the tensor that belongs there.
        missing: First names of the groups that nothing belongs to.
        unexpected: Keys that belong nowhere.
        mismatched: First name → what does not fit, as a sentence.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> int:
        """How many things do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


def find_groups(module: torch.nn.Module, ties: Mapping[str, str] | None = None) -> list[Group]:
    """The module's state-dict names, those that look at the same values together.

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
    first = {name: home.setdefault(_place(tensor), name) for name, tensor in tensors.items()}
    for one, other in (ties or {}).items():
        if one in first and other in first:
            old, new = first[one], first[other]
            first = {name: new if root == old else root for name, root in first.items()}
    groups: dict[str, list[str]] = {}
    for name, root in first.items():
        groups.setdefault(root, []).append(name)
    return [Group(tuple(names), tensors[root]) for root, names in groups.items()]


def _place(tensor: torch.Tensor) -> object:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def fit(
    groups: Iterable[Group], state: Mapping[str, torch.Tensor], ignored: Sequence[str] = ()
) -> Fit:
    """Say which tensor of the state dict belongs to which group.

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
        if not bits_equal(value, state[present[0]]):
            return (
                f"{present[0]} and {name} are tied in the model, but have different values in the "
                "checkpoint"
            )
    return None


def _number(dtype: torch.dtype) -> str:
    """Whether a cast between two dtypes keeps the meaning: real to real, or the very same dtype."""
    return "real" if dtype.is_floating_point and dtype.itemsize > 1 else dtype_name(dtype)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals NaN."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (
        # A single value counts as contiguous with any stride, and then has no bytes to look at.
        tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        for tensor in (one, other)
    )
    return torch.equal(first, second)


def cast(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The values in another dtype.

    Raises:
        WeightsError: One is too large for float16.
    """
    result = value.to(dtype)
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
    """What to take off the unexpected keys so that they become known ones."""
    if not unexpected:
        return None
    parts = unexpected[0].split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if all(key.startswith(prefix) and key.removeprefix(prefix) in known for key in unexpected):
            return prefix
    return None
