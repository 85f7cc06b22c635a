"""``structure.json``: how a module is rebuilt, read and checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.artifact.trust import require_harmless
from mlflow_safeflavor.errors import IntegrityError

__all__ = ["malformed", "read_description", "what_runs"]

# Keys of structure.json → types. Other keys are refused: one that this release does not know could
# change the meaning of those that it knows.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "class": str,
    "hooks": dict,
    "hooks_pickle": (dict, type(None)),
    "pickle": (dict, type(None)),
}
_CONSTRUCTOR_KEYS: dict[str, type | tuple[type, ...]] = {
    **_KEYS,
    "config_class": (str, type(None)),
    "config": (dict, type(None)),
    "attn_implementation": dict,
    "experts_implementation": dict,
    "arguments": dict,
    "layers": (list, type(None)),
}
_KEYS_OF: dict[str, dict[str, type | tuple[type, ...]]] = {
    "torch": {**_KEYS, "tree": dict},
    "pickle": {**_KEYS, "reason": str, "pickle": dict},
    "graph": _KEYS,
}


def read_description(layout: Layout, spec: ModelSpec) -> dict[str, Any]:
    """Read ``structure.json`` and ``config.json``; no tree of layers is looked at.

    Raises:
        IntegrityError: A file is missing or malformed, or wants to run more than ``MLmodel`` says.
    """
    content = layout.read_json(layout.structure)
    if isinstance(content, dict) and spec.structure not in _KEYS_OF:
        has_config = content.get("config_class")
        content = {**content, "config": layout.read_json(layout.config) if has_config else None}
    keys = _KEYS_OF.get(spec.structure, _CONSTRUCTOR_KEYS)
    well_formed = (
        isinstance(content, dict)
        and content.keys() == keys.keys()
        and all(isinstance(content[key], types) for key, types in keys.items())
        and content["kind"] == spec.structure
        # The caller agreed to what MLmodel says, which may be less than what this file would run.
        and what_runs(content) == spec.runs
        # Other tasks call no hooks; but to read one is to import a module or a pickle.
        and (spec.task == "custom" or not content["hooks"])
        and all(
            type(name) is str or (name is None and content["hooks_pickle"])
            for name in content["hooks"].values()
        )
        # Its classes run without agreement, and an argument that is a text could name a repository.
        and (content["kind"] != "transformers" or all(map(_is_flag, content["arguments"].values())))
    )
    if not well_formed:
        raise malformed(layout)
    # A tree of layers holds classes of torch.nn, numbers, and parts of any name, "checkpoint" too.
    if content["kind"] != "torch":
        require_harmless(
            content, layout.name_of(layout.config), trusted=content["kind"] != "transformers"
        )
    return dict(content)


def _is_flag(argument: Any) -> bool:
    """Whether a constructor argument is a boolean and nothing beside."""
    return (
        isinstance(argument, dict)
        and argument.keys() == {"value"}
        and isinstance(argument["value"], bool)
    )


def what_runs(structure: Mapping[str, Any]) -> tuple[str, ...]:
    """Kinds of agreement that a structure needs: "code" for own classes and hooks, "pickle"."""
    names = [
        structure["class"] if structure["kind"] == "import" else None,
        *structure["hooks"].values(),
    ]
    code = any(name is not None for name in names)
    pickles = any(structure[key] is not None for key in ("pickle", "hooks_pickle"))
    return tuple(kind for kind, runs in (("code", code), ("pickle", pickles)) if runs)


def malformed(layout: Layout) -> IntegrityError:
    """The error about a description that no save writes."""
    return IntegrityError(
        "The description of the module is malformed",
        where=layout.name_of(layout.structure),
        hint=FETCH_AGAIN,
    )
