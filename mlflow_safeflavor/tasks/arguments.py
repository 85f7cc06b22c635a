"""Arguments that a module's ``forward`` takes by name."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["arguments_of", "named_arguments", "needed_arguments", "takes_any"]


def named_arguments(module: torch.nn.Module) -> list[str]:
    """Names in the signature of ``forward``."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _parameters(module) if p.kind in kinds]


def needed_arguments(module: torch.nn.Module) -> list[str]:
    """Named arguments without a default; all where each has one."""
    named = named_arguments(module)
    without = {p.name for p in _parameters(module) if p.default is p.empty}
    return [name for name in named if name in without] or named


def takes_any(module: torch.nn.Module) -> bool:
    """Whether ``forward`` has ``**kwargs``."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(module))


def arguments_of(module: torch.nn.Module) -> list[str] | None:
    """Names that ``forward`` takes; None for any, as with ``**kwargs``."""
    # Not in classes of transformers: their ``**kwargs`` swallow every name, a misspelt one, too,
    # and are meant for none that tokenizers or processors make.
    own = type(module).__module__.startswith("transformers.models.")
    return None if takes_any(module) and not own else named_arguments(module)


def _parameters(module: torch.nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(module.forward).parameters.values())
