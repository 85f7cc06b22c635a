"""transformers' rules for keys of checkpoints: prefixes, leftovers, and converted layouts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mlflow_safeflavor.checkpoints.fit import with_base_prefix
from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.module.construction import Recipe
from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.memory import real_memory

__all__ = ["base_prefix", "convert", "ignored_keys", "is_converted", "is_optional"]


def is_optional(module: torch.nn.Module, name: str) -> bool:
    """Whether the class lets checkpoints leave this tensor out."""
    patterns = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def base_prefix(module: torch.nn.Module) -> str | None:
    """Prefix of a head class for names of its base model, such as ``bert``."""
    return getattr(module, "base_model_prefix", None) or None


def ignored_keys(module: torch.nn.Module) -> list[str]:
    """Patterns of keys that may be left over, as in transformers."""
    # Buffers that old releases stored, and that are computed now.
    patterns = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in module.named_buffers()]
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq$")
    return patterns


def is_converted(module: torch.nn.Module, keys: Iterable[str]) -> bool:
    """Whether transformers would convert values of these keys."""
    # Even where all keys fit by name: a stored layout (q, k and v in one) may be another one now.
    converters = _converters(module)
    return any(
        converter.rename_source_key(key)[1] is not None for converter in converters for key in keys
    )


def _converters(module: torch.nn.Module) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 renames, but converts nothing
        return []
    found = get_model_conversion_mapping(module) if hasattr(module, "is_custom_code") else []
    return [entry for entry in found if isinstance(entry, WeightConverter)]


def convert(
    recipe: Recipe, module: torch.nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict as transformers' loader renames and converts it, and the keys left over.

    It loads in float32, so that nothing is rounded twice.

    Raises:
        WeightsError: A tensor came out in another dtype or with other values than it went in.
    """
    with real_memory(torch.float32):
        loaded, info = recipe.cls.from_pretrained(
            None,
            config=copy.deepcopy(recipe.config),
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            **recipe.arguments,
        )
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    # The loader does not report what the class calls optional, so it is taken only if it was there
    # by name.
    known = with_base_prefix(state, module.state_dict(), base_prefix(module))
    absent |= {
        name for name in loaded.state_dict() if name not in known and is_optional(module, name)
    }
    result = {name: value for name, value in loaded.state_dict().items() if name not in absent}
    _require_unchanged(result, known, loaded)
    return result, sorted(info["unexpected_keys"])


def _require_unchanged(
    result: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], module: torch.nn.Module
) -> None:
    """Refuse weights that a race on the default dtype, or a custom ``_init_weights``, changed."""
    converters = _converters(module)
    for name, value in result.items():
        renamed_only = not any(
            converter.rename_source_key(name)[1] is not None for converter in converters
        )
        if odd := _oddity(value, state.get(name) if renamed_only else None):
            raise WeightsError(
                "transformers' loader changed a tensor that it was only to rename",
                where=name,
                found=odd,
                hint="store torch.save(model.state_dict(), …) of this release, and use materialize",
            )


def _oddity(value: torch.Tensor, before: torch.Tensor | None) -> str | None:
    if value.is_meta:
        return "on the meta device"
    # Another thread had set the default dtype while transformers' loader built its module.
    if value.dtype in (torch.float16, torch.bfloat16):
        return f"{value.dtype}, wanted float32"
    if (
        before is not None
        and before.shape == value.shape
        and not bits_equal(value, before.to(value.dtype))
    ):
        return "other values than in the checkpoint"
    return None
