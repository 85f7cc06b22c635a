"""What the user hands over to a save, as one source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from mlflow.models import ModelSignature

from mlflow_safeflavor.checkpoints.source import Source, resolve_source
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.module.wrappers import require_plain, taken_off
from mlflow_safeflavor.save.signature import columns_of
from mlflow_safeflavor.tasks.table import task_class

__all__ = ["source_of"]


def source_of(
    model: Any,
    tokenizer: Any,
    task: str | None,
    dtype: str | torch.dtype | None,
    processor: Any,
    hooks: Mapping[str, Callable[..., Any] | None],
    example: Any,
    signature: ModelSignature | Literal[False] | None,
) -> Source:
    """The source of a save: what was handed over, without wrappers, with hooks and example.

    Args:
        model: As ``save_model`` takes it.
        tokenizer: As ``save_model`` takes it.
        task: As ``save_model`` takes it.
        dtype: As ``save_model`` takes it.
        processor: As ``save_model`` takes it.
        hooks: "preprocess" and "postprocess" → function or None.
        example: Rows of the user's example, without params.
        signature: As ``save_model`` takes it; it may name a sole column.

    Raises:
        InputError: Hooks that the task does not have, or lacks; see ``resolve_source``, too.
        StructureError: It is nothing that can be saved.
    """
    # Taken off twice: wrappers (torch.compile, DDP) may lie around what was given, and around its
    # module.
    source = resolve_source(taken_off(model), tokenizer, task, dtype, processor)
    module = taken_off(source.module)
    require_plain(module)
    return replace(
        source,
        module=module,
        hooks=_hooks(source.task, hooks),
        example=example,
        columns=source.columns or columns_of(signature, task_class(source.task)),
    )


def _hooks(
    task: str, given: Mapping[str, Callable[..., Any] | None]
) -> dict[str, Callable[..., Any]]:
    hooks = {name: hook for name, hook in given.items() if hook is not None}
    if len(hooks) != (2 if task == "custom" else 0):
        raise InputError(
            "preprocess and postprocess belong to the custom task, which needs both",
            where=f"task {task!r}",
            found=", ".join(hooks) or "none of them",
            hint='pass task="custom", preprocess=… and postprocess=…',
        )
    return hooks
