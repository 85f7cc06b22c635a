"""Embedding table of a model, and tokens that it has no row for.

Looking up a token beyond the last row is an ``IndexError`` in the middle of an answer, and on an
accelerator the end of the process; a tokenizer that got tokens without ``resize_token_embeddings``
answers well until a text has one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder

if TYPE_CHECKING:
    import torch

__all__ = ["find_table", "require_known_tokens", "require_rows"]


def find_table(module: torch.nn.Module) -> tuple[str, int] | None:
    """Name and rows of the parameter in which tokens are looked up; None where it is not told."""
    # By ``get_input_embeddings`` of a part, else by a single torch.nn.Embedding. Of two tables
    # nothing tells which one the tokenizer is for.
    from torch import nn

    parts = [module] if _said_table(module) is not None else list(module.modules())
    said = [table for part in parts if (table := _said_table(part)) is not None]
    tables = said or [child for child in module.modules() if isinstance(child, nn.Embedding)]
    # By weight: an encoder and its decoder may be two modules of one table.
    if len({id(table.weight) for table in tables}) != 1:
        return None
    table = tables[0]
    names = (
        name
        for name, tensor in module.named_parameters(remove_duplicate=False)
        if tensor is table.weight
    )
    name = next(names, None)
    return None if name is None else (name, table.weight.shape[0])


def _said_table(module: torch.nn.Module) -> torch.nn.Embedding | None:
    from torch import nn

    try:
        table = module.get_input_embeddings()  # type: ignore[operator]
    # Plain modules have no such method; some classes of transformers have one that raises.
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def require_known_tokens(tokenizer: Any, module: torch.nn.Module) -> str | None:
    """Refuse a tokenizer with tokens that the module has no row for.

    Args:
        tokenizer: Of transformers.
        module: Its model.

    Returns:
        Name of the table, as ``find_table`` gives it.

    Raises:
        StructureError: Names token, id and rows.
    """
    found = find_table(module)
    if found is None:
        return None
    name, rows = found
    # By id, not by count: an id may lie beyond the table though there are fewer tokens than rows.
    unknown = sorted(
        (number, token) for token, number in tokenizer.get_vocab().items() if number >= rows
    )
    if unknown:
        number, token = unknown[0]
        more = f", and {len(unknown) - 1} more tokens" if len(unknown) > 1 else ""
        raise StructureError(
            "The tokenizer has tokens that the model has no embedding for",
            where=f"token {token!r}, id {number}{more}",
            wanted=f"ids below {rows}, the rows of {name}",
            found=f"ids up to {unknown[-1][0]}",
            hint="model.resize_token_embeddings(len(tokenizer)) before training, "
            "or pass the tokenizer that the model was trained with",
        )
    return name


def require_rows(
    config: Mapping[str, Any], encoder: TextEncoder | None, inventory: Inventory
) -> None:
    """Refuse an artifact whose tokenizer, or padding token, is beyond the stored embedding table.

    Args:
        config: Of the task; its ``encoder`` names the table.
        encoder: The tokenizer, where the task has one.
        inventory: What is stored.

    Raises:
        IntegrityError: Names token and rows.
    """
    table = (config.get("encoder") or {}).get("table")
    if table is None:
        return
    row = inventory.rows.get(table)
    if row is None or not row.shape:
        raise IntegrityError(
            "There is no such table of embeddings",
            where="encoder, table",
            found=table,
            hint=FETCH_AGAIN,
        )
    # Both may pad: the model's own token, or the tokenizer's where the model has none.
    said = [("task_config", config), ("encoder", config["encoder"])]
    tokens = {
        f"{place}, {name}": found[name]
        for place, found in said
        for name in ("pad_token_id", "mask_token_id")
        if found.get(name) is not None
    }
    wrong = {name: token for name, token in tokens.items() if not 0 <= token < row.shape[0]}
    # By count: ids of a vocabulary without gaps end there.
    if encoder is not None and encoder.size > row.shape[0]:
        wrong["tokens of the tokenizer"] = encoder.size
    for name, token in wrong.items():
        raise IntegrityError(
            "A token has no embedding",
            where=name,
            wanted=f"at most {row.shape[0]}, the rows of {table}",
            found=token,
            hint=FETCH_AGAIN,
        )
