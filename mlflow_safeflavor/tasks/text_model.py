"""Facts of a model that reads text: its arguments, its length, its padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.arguments import arguments_of, named_arguments

if TYPE_CHECKING:
    import torch

__all__ = ["describe_text_model"]


def describe_text_model(model: torch.nn.Module) -> dict[str, Any]:
    """Facts of a model for ``TextTask``; JSON only.

    Returns:
        ``input_names`` that its forward takes, ``max_length`` in tokens or None, ``pad_token_id``
        or None, and ``padding_side`` ("right" or "left").

    Raises:
        StructureError: The model does not take token ids alone.
    """
    config = _text_config(model)
    names = _input_names(model)
    if "input_ids" not in names:
        raise StructureError(
            "The model does not read text",
            where=f"{type(model).__name__}.forward",
            wanted="an argument input_ids",
            found=", ".join(named_arguments(model)),
        )
    return {
        "input_names": names,
        "max_length": _max_length(model, config),
        # The model's own and not the tokenizer's: RoBERTa counts positions, and GPT-like
        # classifiers find the last token, by comparing with it.
        "pad_token_id": _pad_token_id(config),
        # Not the tokenizer's: padding on the left shifts the positions of the real tokens where
        # they are looked up in a table, and puts padding where classifiers look for the first
        # token. Behind the last token it does no harm, causal models included, but to those that
        # read the last position (XLNet).
        "padding_side": "left" if getattr(config, "summary_type", None) == "last" else "right",
    }


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _pad_token_id(config: Any) -> int | None:
    pad_id = getattr(config, "pad_token_id", None)  # -1 in some configs, for none
    return pad_id if isinstance(pad_id, int) and pad_id >= 0 else None


def _input_names(model: torch.nn.Module) -> list[str]:
    takes = arguments_of(model)
    known = ("input_ids", "token_type_ids", "attention_mask")
    return [name for name in known if takes is None or name in takes]


def _position_tables(model: torch.nn.Module) -> list[torch.nn.Embedding]:
    """Tables of absolute positions, by names that architectures have for them."""
    import torch

    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and ("pos" in (last := name.rpartition(".")[2]) or last == "wpe")
    ]


def _max_length(model: torch.nn.Module, config: Any) -> int | None:
    limits = [getattr(config, "max_position_embeddings", None)]
    # Tables with a padding index (RoBERTa and its relatives) give the first real token the position
    # after it.
    limits += [
        table.num_embeddings - table.padding_idx - 1
        for table in _position_tables(model)
        if table.padding_idx is not None
    ]
    # XLNet says -1 for "no limit", others have no such attribute.
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
