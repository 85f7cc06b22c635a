"""Trial whether a model that generates text ignores padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.tasks.generation_params import GENERATION_PARAMS, KEEP_LOGITS

if TYPE_CHECKING:
    from mlflow_safeflavor.tasks.generation import GenerationTask

__all__ = ["ignores_padding"]


def ignores_padding(cls: type[GenerationTask], model: Any, config: Mapping[str, Any]) -> bool:
    """Whether a prompt is continued alike alone and padded beside a longer one."""
    # Tried, because no attribute says so: recurrent models read masked tokens, or mix the rows of a
    # batch up, and some decoders count positions from the padding on.
    import torch

    from mlflow_safeflavor.module.engine import ModuleEngine, evaluating

    task = cls(config, cls.columns_for(None))
    special = {config["pad_token_id"], config["generation"].get("bos_token_id"), *task.ends}
    size = min(7, (config["max_length"] or 9) - 2)
    ids = [
        token for token in range(model.config.get_text_config().vocab_size) if token not in special
    ][-size:]
    if len(ids) < 4:
        return False  # too few tokens or positions to try it: rows then run alone
    params = {param.name: param.default for param in GENERATION_PARAMS} | {
        "max_new_tokens": 2,
        KEEP_LOGITS.name: True,
    }
    short, long = (task.featured(part, params) for part in (ids[:3], ids))
    first = next(model.parameters())
    engine = ModuleEngine(model, first.device, first.dtype)
    with evaluating(model):
        alone, beside = (
            task.forward(engine, batch, params)[0]["logits"] for batch in ([short], [short, long])
        )
    # (steps, vocabulary) each. Rounding changes with the batch, in halves by their last bits.
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 2e-2
    return alone.shape == beside.shape and bool(
        np.abs(alone - beside).max() <= tolerance * np.abs(alone).max()
    )
