"""The source of a save: a module with its tokenizer, processor, task and hooks."""

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
    """A module to save, with its tokenizer, processor, task, hooks and options.

    Attributes:
        module: The module itself.
        task: Name of the task; empty while it is not known.
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
    """The library's class that an object is an instance of, told without importing the library.

    Args:
        model: Any object.
        package: Name of a package, or of one inside.
        names: One of the class's bases must be called so; empty for any class of the package.

    Returns:
        Its own class or the nearest base that ``package`` defines; None where there is none.
    """
    # By names: whoever holds such an object has imported its library, and nobody else need pay.
    found = [cls for cls in type(model).__mro__ if f"{cls.__module__}.".startswith(f"{package}.")]
    return found[0] if found and (not names or {cls.__name__ for cls in found} & {*names}) else None


def require_unchanged(model: Any, cls: type, hint: str) -> None:
    """Refuse an object with methods of its own or of a subclass: saving would lose them.

    Args:
        model: The object.
        cls: Its class by ``library_class``.
        hint: For the message.

    Raises:
        StructureError: Names the methods.
    """
    # Methods that were replaced on the object, then those of classes below the library's.
    own = [
        name
        for name, value in vars(model).items()
        if callable(value) and callable(getattr(cls, name, None))
    ]
    for base in type(model).__mro__[: type(model).__mro__.index(cls)]:
        own += [
            # Public attributes of a class count as well: a pipeline's subclass may set a default.
            name
            for name, value in vars(base).items()
            if callable(value) or not name.startswith("_")
        ]
    if own:
        raise StructureError(
            f"Methods of your own in a {cls.__name__} would be lost",
            where=name_of(type(model)),
            wanted=f"a {cls.__name__} as its library makes it",
            found=f"methods of your own: {', '.join(sorted(set(own)))}",
            hint=hint,
        )
