"""Describe a module so that it can be built again on real memory (``build``).

Four kinds of structure, tried in this order when a model is saved (a fifth, ``graph``, has no
module; see ``graph``):

* ``transformers``: a class of the transformers package and its config; runs no code of the
  artifact;
* ``torch``: a tree of classes of ``torch.nn`` and their arguments (``layers``); runs none either;
* ``import``: any class that can be imported, and JSON arguments; runs the user's code;
* ``pickle``: the module itself without its tensors (``pickled``), only if the user allows it; then
  also where a constructor would load a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact.description import malformed, read_description
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.module.comparison import compared
from mlflow_safeflavor.module.constructor import describe_call
from mlflow_safeflavor.module.embedding import Embedder
from mlflow_safeflavor.module.guarded import guarded
from mlflow_safeflavor.module.layers import is_tree
from mlflow_safeflavor.module.user_code import name_of
from mlflow_safeflavor.module.wrappers import require_given_back, require_plain

__all__ = ["describe", "describe_constructor", "read_structure", "write_structure"]

_logger = logging.getLogger("mlflow.safeflavor")


def describe(
    module: torch.nn.Module,
    *,
    init_args: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    forward: Callable[[torch.nn.Module], None],
) -> tuple[dict[str, Any], torch.nn.Module]:
    """Describe how to make a module of the same structure.

    Args:
        module: Not changed.
        init_args: Arguments of its constructor, where they cannot be found: JSON values, configs.
        allow_pickle: Whether the kind ``pickle`` may be used when no constructor gives the module
            back by itself.
        forward: Runs a module as it will be asked, to see which state that leaves behind.

    Returns:
        The description, JSON only; and the module it describes: the one given, or, where a forward
        had left state in it, one of the same weights as its constructor makes it.

    Raises:
        StructureError: No allowed kind can rebuild it.
    """
    if isinstance(module, Embedder):
        described, kept = describe(
            module.transformer,
            init_args=init_args,
            allow_pickle=allow_pickle,
            forward=lambda transformer: forward(_around(module, transformer)),
        )
        whole = module if kept is module.transformer else _around(module, kept)
        return described if described["kind"] == "pickle" else {
            **described,
            "layers": module.described,
        }, whole
    try:
        # Guarded, since a constructor that reads files of this machine gives the module back
        # nowhere else; a refusal is then a reason to pickle.
        with (
            guarded(unpickles=True)
            if allow_pickle and init_args is None
            else contextlib.nullcontext()
        ):
            described, built = describe_call(module, init_args)
        return described, compared(module, built, described, forward)
    except SafeFlavorError as error:
        require_given_back(module, error, pickle=allow_pickle)
        if not allow_pickle:
            raise
        reason = error.what if error.found is None else f"{error.what}: {error.found}"
    _logger.info("safeflavor: the module is pickled. %s", reason)
    return {"kind": "pickle", "class": name_of(type(module)), "reason": reason}, module


def _around(embedder: Embedder, transformer: torch.nn.Module) -> Embedder:
    """The same layers around another model."""
    view = copy.copy(embedder)  # shallow: weights are shared, the given one keeps its model
    view._modules = {**embedder._modules, "transformer": transformer}
    return view


def describe_constructor(module: torch.nn.Module) -> dict[str, Any]:
    """How a constructor makes the same tensors; see ``describe``. Nothing else is compared."""
    require_plain(module)
    return describe_call(module, None)[0]


def write_structure(structure: Mapping[str, Any], layout: Layout) -> None:
    """Write ``structure.json`` and, beside it, the config under the name other tools look for."""
    write_json(
        layout.structure, {key: value for key, value in structure.items() if key != "config"}
    )
    if structure.get("config") is not None:
        write_json(layout.config, structure["config"])


def read_structure(layout: Layout, spec: ModelSpec) -> dict[str, Any]:
    """Read ``structure.json`` and the config; see ``read_description``, which checks no tree."""
    content = read_description(layout, spec)
    if content["kind"] == "torch" and not is_tree(content["tree"]):
        raise malformed(layout)
    return content
