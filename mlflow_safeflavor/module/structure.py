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
from dataclasses import replace
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
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.module.user_code import name_of
from mlflow_safeflavor.module.wrappers import require_given_back, require_plain

__all__ = ["describe", "describe_constructor", "read_structure", "write_structure"]

_logger = logging.getLogger("mlflow.safeflavor")


def describe(
    subject: Subject,
    *,
    init_args: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    forward: Callable[[torch.nn.Module], None],
) -> Subject:
    """Describe how to make a module of the same structure.

    Args:
        subject: The module; not changed.
        init_args: Arguments of its constructor, where they cannot be found: JSON values, configs.
        allow_pickle: Whether the kind ``pickle`` may be used when no constructor gives the module
            back by itself.
        forward: Runs a module as it will be asked, to see which state that leaves behind.

    Returns:
        The module described, with its structure, JSON only, and its skeleton: the module given, or,
        where a forward had left state in it, one of the same weights as its constructor makes it.

    Raises:
        StructureError: No allowed kind can rebuild it.
    """
    module = subject.module
    if isinstance(module, Embedder):
        inner = describe(
            subject.part("transformer"),
            init_args=init_args,
            allow_pickle=allow_pickle,
            forward=lambda transformer: forward(_around(module, transformer)),
        )
        whole = module if inner.module is module.transformer else _around(module, inner.module)
        structure = dict(inner.structure or {})
        if structure["kind"] != "pickle":
            structure["layers"] = module.described
        return _described(subject, whole, structure, inner.skeleton)
    try:
        # Guarded, since a constructor that reads files of this machine gives the module back
        # nowhere else; a refusal is then a reason to pickle.
        with (
            guarded(unpickles=True)
            if allow_pickle and init_args is None
            else contextlib.nullcontext()
        ):
            structure, skeleton = describe_call(subject, init_args)
        kept = compared(subject, skeleton, structure, forward)
        return _described(subject, kept, structure, skeleton)
    except SafeFlavorError as error:
        require_given_back(module, error, pickle=allow_pickle)
        if not allow_pickle:
            raise
        reason = error.what if error.found is None else f"{error.what}: {error.found}"
    _logger.info("safeflavor: the module is pickled. %s", reason)
    structure = {"kind": "pickle", "class": name_of(type(module)), "reason": reason}
    return _described(subject, module, structure, None)


def _described(
    subject: Subject,
    kept: torch.nn.Module,
    structure: Mapping[str, Any],
    skeleton: Subject | None,
) -> Subject:
    # One made anew has tensors of its own where a forward had left some in the given one.
    found = subject if kept is subject.module else Subject.of(kept)
    return replace(found, structure=structure, skeleton=skeleton)


def _around(embedder: Embedder, transformer: torch.nn.Module) -> Embedder:
    """The same layers around another model."""
    view = copy.copy(embedder)  # shallow: weights are shared, the given one keeps its model
    view._modules = {**embedder._modules, "transformer": transformer}
    return view


def describe_constructor(subject: Subject) -> dict[str, Any]:
    """The constructor's call that makes the same tensors; see ``describe``. No more is compared."""
    require_plain(subject.module)
    return describe_call(subject, None)[0]


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
