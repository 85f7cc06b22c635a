"""What the user handed over to be saved, as one thing.

A module, its tokenizer, its task, and what goes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.user_code import name_of

__all__ = ["Source", "library_class", "require_unchanged"]


@dataclass(frozen=True)
class Source:
    """A module to save, with what belongs to it.

    Attributes:
        module: Itself, whatever else it looks like.
        task: Name of the task; empty where nobody has said it yet.
        tokenizer: None where the task needs none.
        processor: None where the task needs none.
        hooks: Name → function, of the custom task.
        example: Rows of the user's.
        options: Options of the task that came with the model.
        params: Defaults of params that came with the model.
        columns: Field → column name that the model was made for; None for the task's own.
        stored: Floating point dtypes → number of values, of the files it was read from; empty for a
            module.
    """

    module: torch.nn.Module
    task: str = ""
    tokenizer: Any = None
    processor: Any = None
    hooks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    example: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] | None = None
    stored: Mapping[str, int] = field(default_factory=dict)


def library_class(model: object, package: str, names: tuple[str, ...] = ()) -> type | None:
    """The library's class that an object is an instance of, asked without importing the library.

    Args:
        model: Any object.
        package: Name of a package, or of one inside.
        names: One of the class's bases must be called so; empty for any class of the package.

    Returns:
        Its own class or the nearest base that ``package`` defines; None where there is none.
    """
    found = [cls for cls in type(model).__mro__ if f"{cls.__module__}.".startswith(f"{package}.")]
    return found[0] if found and (not names or {cls.__name__ for cls in found} & {*names}) else None


def require_unchanged(model: Any, cls: type, hint: str) -> None:
    """Refuse an object whose class, or which itself, has methods other than the library's.

    They would be lost.

    Args:
        model: The object.
        cls: What ``library_class`` returned for it.
        hint: For the message.

    Raises:
        StructureError: Names the methods.
    """
    own = [
        name
        for name, value in vars(model).items()
        if callable(value) and callable(getattr(cls, name, None))
    ]
    for base in type(model).__mro__[: type(model).__mro__.index(cls)]:
        own += [
            name
            for name, value in vars(base).items()
            if callable(value) or not name.startswith("_")
        ]
    if own:
        raise StructureError(
            f"What is your own in a {cls.__name__} would be lost",
            where=name_of(type(model)),
            wanted=f"a {cls.__name__} as its library makes it",
            found=f"methods of your own: {', '.join(sorted(set(own)))}",
            hint=hint,
        )
