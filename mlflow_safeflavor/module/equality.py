"""Equality of two values: the bits of tensors, and plain values of all kinds."""

from __future__ import annotations

import enum
import json
import pickle
import types
from typing import Any

import numpy as np
import torch

from mlflow_safeflavor.artifact.trust import portable
from mlflow_safeflavor.module.user_code import name_of

__all__ = ["NOTHING", "bits_equal", "equal", "is_object", "plain_config"]


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


# Stands for an attribute or key that is not there.
NOTHING: Any = _Nothing()


def is_object(value: Any) -> bool:
    """Whether a value is an instance with attributes; one of C++ or Rust may have none."""
    others = (
        type,
        types.FunctionType,
        types.ModuleType,
        types.BuiltinFunctionType,
        enum.Enum,
        np.ndarray,
    )
    return bool(getattr(value, "__dict__", None)) and not isinstance(
        value, (*others, set, frozenset)
    )


def equal(given: Any, built: Any) -> bool:
    """Whether two values are the same, as far as they can be compared."""
    if isinstance(given, np.ndarray) or isinstance(built, np.ndarray):
        return np.array_equal(
            given, built, equal_nan=given.dtype.kind in "fc" if hasattr(given, "dtype") else False
        )
    if isinstance(given, type) and isinstance(built, type):
        return name_of(given) == name_of(built)
    try:
        if given == built or (given != given and built != built):  # NaN is not equal to itself
            return True
    except Exception:  # no comparison, no difference
        return True
    if type(given) is not type(built) or isinstance(given, (bool, int, float, complex, str, bytes)):
        return False
    if isinstance(given, (list, tuple, set, frozenset, enum.Enum)) or given is None:
        return False
    if type(given).__module__ == "tokenizers":
        return bool(_vocabulary(given) == _vocabulary(built))
    try:
        return pickle.dumps(given) == pickle.dumps(built)
    except Exception:  # a lock, a file: nothing that could be compared
        return True


def _vocabulary(tokenizer: Any) -> Any:
    """A tokenizer's JSON without truncation and padding."""
    # These are state of the last call: transformers sets them on the Rust object for each.
    return json.loads(tokenizer.to_str()) | {"truncation": None, "padding": None}


# Entries of a config about its own file and about training.
_CONFIG_NOTES = frozenset(
    (
        *("architectures", "dtype", "torch_dtype", "transformers_version"),
        *("_commit_hash", "use_cache", "_attn_implementation_autoset"),
    )
)


def plain_config(config: Any) -> Any:
    """The values of a config of transformers, without its notes."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in _CONFIG_NOTES}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(portable(json.loads(config.to_json_string(use_diff=False))))


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
