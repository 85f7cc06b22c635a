"""The constructor call that makes a module: its class, config and arguments, found by building."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
from collections.abc import Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact.trust import find_steering, is_proven
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.attributes import same_attributes
from mlflow_safeflavor.module.build import flags_of
from mlflow_safeflavor.module.comparison import require_same_shapes
from mlflow_safeflavor.module.configs import NO_CONFIG, describe_config
from mlflow_safeflavor.module.layers import describe_layers, find_foreign
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.module.user_code import name_of

__all__ = ["describe_call"]


def describe_call(
    subject: Subject, init_args: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Subject]:
    """The description of the constructor's call, and the module that this call makes."""
    module = subject.module
    cls = type(module)
    if init_args is None and (tree := describe_layers(module)) is not None:
        of_torch = {"kind": "torch", "class": name_of(cls), "tree": tree}
        return of_torch, require_same_shapes(subject, of_torch)
    if foreign := find_foreign(module):
        raise StructureError(
            "A container of torch.nn does not know how modules of other classes were made",
            where=f"{name_of(cls)}, {foreign[0]}",
            found=name_of(type(foreign[1])),
            hint="write a class whose constructor makes all of it, or pass allow_pickle=True or "
            "graph='only'",
        )
    config = getattr(module, "config", None)
    structure: dict[str, Any] = {
        "kind": "transformers" if _is_transformers(cls) and init_args is None else "import",
        "class": name_of(cls),
        **NO_CONFIG,
        "arguments": {},
        "layers": None,
    }
    if structure["kind"] == "import":
        _require_importable(cls)
    if init_args is not None:
        structure["arguments"] = {
            name: _argument_to_json(name, value) for name, value in init_args.items()
        }
        return structure, require_same_shapes(subject, structure)
    if hasattr(cls, "config_class") and config is not None:
        structure |= describe_config(config)
        _require_plain_config(structure)
    return _find_arguments(subject, structure)


def _is_transformers(cls: type) -> bool:
    """Whether it is a class of transformers that is proven to come back as it was."""
    ours = cls.__module__.startswith("transformers.models.") and hasattr(cls, "config_class")
    return ours and is_proven(cls.__name__)


def _require_plain_config(structure: Mapping[str, Any]) -> None:
    if found := list(find_steering(structure, trusted=structure["kind"] != "transformers")):
        raise StructureError(
            "The config names code, files or repositories, which a load would look for",
            where=structure["class"],
            found="; ".join(found),
            hint="set them to None in model.config, or pass allow_pickle=True",
        )


def _require_importable(cls: type) -> None:
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise StructureError(
            "The module's class cannot be imported anywhere else",
            where=name_of(cls),
            wanted="a class at the top of a module",
            found="a class of a script, notebook or function",
            hint="move it to a file and pass code_paths=[file], or pass allow_pickle=True",
        )


def _argument_to_json(name: str, value: Any) -> dict[str, Any]:
    if hasattr(value, "to_json_string"):
        return describe_config(value)
    try:
        # A tuple becomes a list and a key 1 becomes "1": stored only if it comes back equal.
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return {"value": value}
    except (TypeError, ValueError):
        pass
    raise StructureError(
        "A constructor argument cannot be stored as JSON",
        where=f"init_args, {name}",
        wanted="numbers, strings, lists, dicts, None, or a transformers config",
        found=type(value).__name__,
        hint="pass allow_pickle=True instead of init_args",
    )


def _find_arguments(
    subject: Subject, structure: Mapping[str, Any]
) -> tuple[dict[str, Any], Subject]:
    """The description with the constructor's arguments, and the module that they make.

    Arguments are stored nowhere in a module, so they are found by building: boolean ones other than
    the defaults (``add_pooling_layer=False``) are tried, for a class of the user's also attributes
    of the same names as arguments. The first that give the same tensors and attributes are taken,
    else the first that give the same tensors.
    """
    flags = [
        (name, {"value": not default}) for name, default in flags_of(type(subject.module)).items()
    ]
    named = _named_like_arguments(subject.module) if structure["kind"] == "import" else {}
    first: StructureError | None = None
    best: tuple[dict[str, Any], Subject] | None = None
    # The fewest changed flags first: those at their defaults need no explanation.
    for count, start in itertools.product(range(len(flags) + 1), [{}, named] if named else [{}]):
        for arguments in itertools.combinations(flags, count):
            tried = {**structure, "arguments": {**start, **dict(arguments)}}
            try:
                found = tried, require_same_shapes(subject, tried)
            except StructureError as error:
                first = first or error
                continue
            if same_attributes(subject, found[1]):
                return found
            best = best or found
        # Each further count multiplies the constructions; the tensors agree already.
        if best is not None and 2 ** len(flags) > _MOST_TRIED:
            break
    if best is not None:
        return best
    assert first is not None  # noqa: S101  (the combination of no flags was tried)
    raise first


_MOST_TRIED = 64


def _named_like_arguments(module: torch.nn.Module) -> dict[str, Any]:
    """Arguments of the constructor whose names, and values other than defaults, are attributes."""
    found = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        value = vars(module).get(name, parameter.default)
        if value is not parameter.default and type(value) in (bool, int, float, str, list, dict):
            with contextlib.suppress(StructureError):
                found[name] = _argument_to_json(name, value)
    return found
