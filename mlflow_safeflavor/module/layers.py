"""Modules of ``torch.nn`` alone, as a tree of classes and plain arguments.

A class of ``torch.nn`` notes each argument of its constructor under the same name, but for those of
``_ELSEWHERE``. So a ``Sequential`` or an ``LSTM`` is described by its attributes, and needs neither
code of the artifact nor agreement to come back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn import functional

from mlflow_safeflavor.errors import StructureError

__all__ = ["describe_layers", "find_foreign", "is_tree", "make_layers"]

# ``class``, ``arguments`` and ``modules`` of a module, pairs of name and node in order; or
# ``same``, the path of a shared one that came before.
Node = dict[str, Any]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def describe_layers(module: nn.Module) -> Node | None:
    """The tree of a module of ``torch.nn``, JSON only; None where a part of it is none.

    Changes after construction are not in the tree: compare the module that ``make_layers`` makes.
    """
    try:
        return _describe(module, "", {})
    except _NotPlain:
        return None


def find_foreign(container: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the first of another class in a container of ``torch.nn``; else None."""
    if type(container) not in _CONTAINERS:
        return None
    return next(
        (
            found
            for found in container.named_modules()
            if _class_named(type(found[1]).__name__) is not type(found[1])
        ),
        None,
    )


class _NotPlain(Exception):
    """A class, or an argument, that is not described here."""


def _describe(module: nn.Module, path: str, seen: dict[int, str]) -> Node:
    # A module that stands in two places is made once, and so are its weights.
    if (first := seen.setdefault(id(module), path)) != path:
        return {"same": first}
    cls: Any = type(module)
    if _class_named(cls.__name__) is not cls:
        raise _NotPlain
    children: dict[str, nn.Module | None] = dict(module._modules) if cls in _CONTAINERS else {}
    arguments: dict[str, Any] = {}
    for name, default in _parameters(cls).items():
        value = _value_of(module, name, default)
        if value is _NOWHERE:  # counts only where another argument is left out
            continue
        if isinstance(value, nn.Module):
            children[name] = value
        elif not _is_plain(value):
            raise _NotPlain
        elif type(value) is not type(default) or value != default:
            arguments[name] = value
    modules = [
        [name, None if child is None else _describe(child, f"{path}.{name}".lstrip("."), seen)]
        for name, child in children.items()
    ]
    return {"class": cls.__name__, "arguments": arguments, "modules": modules}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


# --- classes and arguments -----------------------------------------------------------------------


def _class_named(name: str) -> Any:
    """A class of ``torch.nn`` by its name, unless it is lazy; else None."""
    # Defined in torch.nn.modules: the namespace also holds functions, Module and other packages.
    cls = getattr(nn, name, None)
    ours = (
        isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and cls.__module__.startswith("torch.nn.modules.")
    )
    return cls if ours and cls is not nn.Module and not hasattr(cls, "cls_to_become") else None


_NOWHERE: Any = inspect.Parameter.empty


@functools.cache
def _parameters(cls: type[Any]) -> Mapping[str, Any]:
    """Argument of the constructor → default, without device and dtype, which the load decides."""
    found: Mapping[str, inspect.Parameter] = {}
    for base in () if cls in _CONTAINERS else cls.__mro__[: cls.__mro__.index(nn.Module)]:
        found = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in found.values()):
            break  # LSTM hands all on to its base, which also gets to know its "mode"
    fixed = (
        "self",
        "device",
        "dtype",
        "args",
        "kwargs",
        *(("mode",) if issubclass(cls, nn.RNNBase) else ()),
    )
    known = {
        name: one.default
        for name, one in found.items()
        if not name.startswith("_") and name not in fixed
    }
    return known | {name: known.get(name, _NOWHERE) for name in _ELSEWHERE.get(cls, {})}


def _value_of(module: nn.Module, name: str, default: Any) -> Any:
    if name in (elsewhere := _ELSEWHERE.get(type(module), {})):
        return elsewhere[name](module)
    value = getattr(module, name, _NOWHERE)
    if isinstance(default, bool) and value is not _NOWHERE and not isinstance(value, bool):
        return value is not None  # ``bias=True`` is noted as the bias
    return value


_NAMED = ((functional.relu, "relu"), (functional.gelu, "gelu"))

_BLOCK: dict[str, Callable[[Any], Any]] = {
    "d_model": lambda block: block.self_attn.embed_dim,
    "nhead": lambda block: block.self_attn.num_heads,
    "dim_feedforward": lambda block: block.linear1.out_features,
    "dropout": lambda block: block.dropout.p,
    "activation": lambda block: next(
        (n for f, n in _NAMED if f is block.activation), block.activation
    ),
    "layer_norm_eps": lambda block: block.norm1.eps,
    "batch_first": lambda block: block.self_attn.batch_first,
    "bias": lambda block: block.linear1.bias is not None,
}
# Class → argument → where it is noted, unless under its own name.
_ELSEWHERE: dict[type, dict[str, Callable[[Any], Any]]] = {
    nn.RNN: {"nonlinearity": lambda cell: cell.nonlinearity},
    nn.MultiheadAttention: {
        "bias": lambda attention: attention.in_proj_bias is not None,
        "add_bias_kv": lambda attention: attention.bias_k is not None,
    },
    nn.TransformerEncoderLayer: _BLOCK,
    nn.TransformerDecoderLayer: _BLOCK,
    nn.TransformerEncoder: {
        "encoder_layer": lambda encoder: encoder.layers[0],
        # The value that came of the argument: with that one torch warns again.
        "enable_nested_tensor": lambda encoder: encoder.use_nested_tensor,
    },
    nn.TransformerDecoder: {"decoder_layer": lambda decoder: decoder.layers[0]},
    nn.Transformer: {
        "custom_encoder": lambda whole: whole.encoder,
        "custom_decoder": lambda whole: whole.decoder,
    },
    nn.PairwiseDistance: {"p": lambda distance: distance.norm},
    nn.AdaptiveLogSoftmaxWithLoss: {"cutoffs": lambda softmax: softmax.cutoffs[:-1]},
}


# --- make ----------------------------------------------------------------------------------------


def is_tree(node: Any) -> bool:
    """Whether this is a tree: known classes, arguments of theirs, plain values."""
    # Types exactly, since the tree is a stranger's JSON: a dict as a name has no hash.
    if not isinstance(node, dict) or node.keys() not in (
        {"same"},
        {"class", "arguments", "modules"},
    ):
        return False
    if "same" in node:
        return type(node["same"]) is str
    cls = _class_named(node["class"]) if type(node["class"]) is str else None
    if cls is None or type(node["arguments"]) is not dict or type(node["modules"]) is not list:
        return False
    if not all(
        type(pair) is list and len(pair) == 2 and type(pair[0]) is str for pair in node["modules"]
    ):
        return False
    children = [child for _, child in node["modules"]]
    names = {
        *node["arguments"],
        *(() if cls in _CONTAINERS else (name for name, _ in node["modules"])),
    }
    return (
        names <= _parameters(cls).keys()
        and all(map(_is_plain, node["arguments"].values()))
        and all(child is None or is_tree(child) for child in children)
    )


def make_layers(node: Mapping[str, Any]) -> nn.Module:
    """Call the constructors of a tree.

    Raises:
        StructureError: A shared module is not there. Constructors raise what they like.
    """
    return _make(node, "", {})


def _make(node: Mapping[str, Any], path: str, made: dict[str, nn.Module]) -> nn.Module:
    if "same" in node:
        if node["same"] not in made:
            raise StructureError(
                "A module is shared that is not there", where=path, wanted=node["same"]
            )
        return made[node["same"]]
    modules = {
        name: None if child is None else _make(child, f"{path}.{name}".lstrip("."), made)
        for name, child in node["modules"]
    }
    cls = _class_named(node["class"])
    if cls in _CONTAINERS:
        module: nn.Module = cls()
        for name, child in modules.items():
            module.add_module(name, child)
    else:
        module = cls(
            **{name: _tuples(value) for name, value in node["arguments"].items()}, **modules
        )
    return made.setdefault(path, module)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, as the module's attributes had them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
