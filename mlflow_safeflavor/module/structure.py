"""Describe a module so that it can be built again on real memory, and build it.

Four kinds of structure, tried in this order when a model is saved (a fifth, ``graph``, has no module; see ``graph``):

* ``transformers``: a class of the transformers package and its config; runs no code of the artifact;
* ``torch``: a tree of classes of ``torch.nn`` and their arguments (``layers.py``); runs none either;
* ``import``: any class that can be imported, and JSON arguments; runs the user's code;
* ``pickle``: the module itself without its tensors (``pickled.py``), only if the user allows it; then also where a
  constructor would load a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact.description import malformed, read_description
from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import WAY_OUT
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.artifact.trust import find_steering, is_proven, portable, require_agreed
from mlflow_safeflavor.errors import SafeFlavorError, StructureError
from mlflow_safeflavor.module.attributes import find_differences, same_attributes
from mlflow_safeflavor.module.bounds import within
from mlflow_safeflavor.module.embedding import Embedder
from mlflow_safeflavor.module.guard import guarded
from mlflow_safeflavor.module.inventory import UNKNOWN, find_slots, shape_of, some
from mlflow_safeflavor.module.layers import describe_layers, find_foreign, is_tree, make_layers
from mlflow_safeflavor.module.leftovers import covered, fresh, written_by_forward
from mlflow_safeflavor.module.memory import real_memory
from mlflow_safeflavor.module.user_code import import_name, name_of
from mlflow_safeflavor.module.wrappers import require_given_back, require_plain

__all__ = ["build", "describe", "describe_constructor", "read_structure", "write_structure"]

_logger = logging.getLogger("mlflow.safeflavor")


# --- describe ------------------------------------------------------------------------------------


def describe(
    module: torch.nn.Module,
    *,
    init_args: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    forward: Callable[[torch.nn.Module], None],
) -> tuple[dict[str, Any], torch.nn.Module]:
    """What is needed to make a module of the same structure.

    Args:
        module: Only looked at.
        init_args: Arguments of its constructor, where they cannot be told: JSON values and configs.
        allow_pickle: Whether the kind ``pickle`` may be used when no constructor gives the module back by itself.
        forward: Runs a module as it will be asked, to see which state that leaves behind.

    Returns:
        The description, JSON only; and the module it describes: the one given, or, where a forward had left state in
        it, one of the same weights as its constructor makes it.

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
        return described if described["kind"] == "pickle" else {**described, "layers": module.described}, whole
    try:
        # A constructor that reads what only this machine has gives the module back nowhere else.
        with guarded(unpickles=True) if allow_pickle and init_args is None else contextlib.nullcontext():
            described, built = _describe_constructor(module, init_args)
        return described, _compared(module, built, described, forward)
    except SafeFlavorError as error:
        require_given_back(module, error, pickle=allow_pickle)
        if not allow_pickle:
            raise
        reason = error.what if error.found is None else f"{error.what}: {error.found}"
    _logger.info("safeflavor: the module is pickled. %s", reason)
    return {"kind": "pickle", "class": name_of(type(module)), "reason": reason}, module


def _around(embedder: Embedder, transformer: torch.nn.Module) -> Embedder:
    """The same layers around another model."""
    view = copy.copy(embedder)
    view._modules = {**embedder._modules, "transformer": transformer}
    return view


def describe_constructor(module: torch.nn.Module) -> dict[str, Any]:
    """How a constructor makes the same tensors; see ``describe``. Nothing else is compared."""
    require_plain(module)
    return _describe_constructor(module, None)[0]


def _compared(
    module: torch.nn.Module,
    built: torch.nn.Module,
    described: Mapping[str, Any],
    forward: Callable[[torch.nn.Module], None],
) -> torch.nn.Module:
    """The module to be saved; refuses one that holds what its constructor does not give back."""
    found = list(find_differences(module, built))
    if not found:
        return module
    # The user's own class, in the user's own process: there is nothing to agree to.
    written = written_by_forward(module, lambda: build(described, trust={"code"}), forward)
    left = covered(found, written)
    if lost := [difference for difference in found if difference.path not in left and not difference.tensor]:
        more = f"; and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        raise StructureError(
            "The constructor does not give back all that the module holds: it was changed after it was made",
            where=f"{described['class']}, {lost[0].path}",
            wanted="each attribute as it is in the module",
            found="; ".join(map(str, lost[:_MOST_NAMED])) + more,
            way_out=_way_out(described, "pass init_args={…} with the constructor's arguments, "),
        )
    if not left:
        return module
    _logger.info("safeflavor: not saved, because a forward makes it anew: %s", some(left))
    return fresh(module, build(described, trust={"code"}, initialise=True), left)


_MOST_NAMED = 5


def _way_out(described: Mapping[str, Any], first: str) -> str:
    """No arguments make a ``Sequential`` what it was not made for."""
    return f"{'' if described['kind'] == 'torch' else first}allow_pickle=True, or graph='only'"


def _describe_constructor(
    module: torch.nn.Module, init_args: Mapping[str, Any] | None
) -> tuple[dict[str, Any], torch.nn.Module]:
    """The description, and what the constructor makes by it."""
    cls = type(module)
    if init_args is None and (tree := describe_layers(module)) is not None:
        of_torch = {"kind": "torch", "class": name_of(cls), "tree": tree}
        return of_torch, _require_same_shapes(module, of_torch)
    if foreign := find_foreign(module):
        raise StructureError(
            "A container of torch.nn does not know how modules of other classes were made",
            where=f"{name_of(cls)}, {foreign[0]}",
            found=name_of(type(foreign[1])),
            way_out="write a class whose constructor makes all of it, or pass allow_pickle=True or graph='only'",
        )
    config = getattr(module, "config", None)
    structure: dict[str, Any] = {
        "kind": "transformers" if _is_transformers(cls) and init_args is None else "import",
        "class": name_of(cls),
        **_NO_CONFIG,
        "arguments": {},
        "layers": None,
    }
    if structure["kind"] == "import":
        _require_importable(cls)
    if init_args is not None:
        structure["arguments"] = {name: _argument_to_json(name, value) for name, value in init_args.items()}
        return structure, _require_same_shapes(module, structure)
    if hasattr(cls, "config_class") and config is not None:
        structure |= _describe_config(config)
        _require_plain_config(structure)
    return _find_arguments(module, structure)


def _is_transformers(cls: type) -> bool:
    """Whether it is a class that anybody may build: of transformers, and proven to come back as it was."""
    ours = cls.__module__.startswith("transformers.models.") and hasattr(cls, "config_class")
    return ours and is_proven(cls.__name__)


def _require_plain_config(structure: Mapping[str, Any]) -> None:
    if found := list(find_steering(structure, trusted=structure["kind"] != "transformers")):
        raise StructureError(
            "The config names code, files or repositories, which a load would look for",
            where=structure["class"],
            found="; ".join(found),
            way_out="set them to None in model.config, or pass allow_pickle=True",
        )


def _require_importable(cls: type) -> None:
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise StructureError(
            "The module's class cannot be imported anywhere else",
            where=name_of(cls),
            wanted="a class at the top of a module",
            found="a class of a script, notebook or function",
            way_out="move it to a file and pass code_paths=[file], or pass allow_pickle=True",
        )


_NO_CONFIG: dict[str, Any] = {
    "config": None,
    "config_class": None,
    "attn_implementation": {},
    "experts_implementation": {},
}


def _describe_config(config: Any) -> dict[str, Any]:
    # Implementations are no part of a saved config, but they decide which kernels run, part by part: a
    # backbone may use another than the model around it, and may not even know the model's.
    return {
        "config": _config_to_json(config),
        "config_class": name_of(type(config)),
        **{
            kind: {path: getattr(part, f"_{kind}") for path, part in _parts(config) if hasattr(part, f"_{kind}")}
            for kind in _IMPLEMENTATIONS
        },
    }


_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def _parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and the configs of its parts, outer first, each with its path: ``text_config``."""
    yield path, config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part, f"{path}.{name}".removeprefix("."))


def _config_to_json(config: Any) -> dict[str, Any]:
    return dict(portable(json.loads(config.to_json_string(use_diff=False))))


def _argument_to_json(name: str, value: Any) -> dict[str, Any]:
    if hasattr(value, "to_json_string"):
        return _describe_config(value)
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return {"value": value}
    except (TypeError, ValueError):
        pass
    raise StructureError(
        "A constructor argument cannot be stored as JSON",
        where=f"init_args, {name}",
        wanted="numbers, strings, lists, dicts, None, or a transformers config",
        found=type(value).__name__,
        way_out="pass allow_pickle=True instead of init_args",
    )


def _find_arguments(module: torch.nn.Module, structure: Mapping[str, Any]) -> tuple[dict[str, Any], torch.nn.Module]:
    """The description with the constructor's arguments, and what comes of them.

    Arguments are stored nowhere in a module, so they are found by building: boolean ones other than the defaults
    (``add_pooling_layer=False``) are tried, for a class of the user's also attributes of the same names as
    arguments. They are right when the same tensors and attributes come out, else the first with the same tensors.
    """
    flags = [(name, {"value": not default}) for name, default in _flags(type(module)).items()]
    named = _named_like_arguments(module) if structure["kind"] == "import" else {}
    first: StructureError | None = None
    best: tuple[dict[str, Any], torch.nn.Module] | None = None
    for count, start in itertools.product(range(len(flags) + 1), [{}, named] if named else [{}]):
        for arguments in itertools.combinations(flags, count):
            tried = {**structure, "arguments": {**start, **dict(arguments)}}
            try:
                found = tried, _require_same_shapes(module, tried)
            except StructureError as error:
                first = first or error
                continue
            if same_attributes(module, found[1]):
                return found
            best = best or found
        if best is not None and 2 ** len(flags) > _MOST_TRIED:
            break
    if best is not None:
        return best
    assert first is not None  # noqa: S101  (the combination of no flags was tried)
    raise first


def _flags(cls: type) -> dict[str, bool]:
    """Boolean constructor arguments of a class, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, bool)}


_MOST_TRIED = 64


def _named_like_arguments(module: torch.nn.Module) -> dict[str, Any]:
    """Arguments of the constructor whose names and other than default values the module's attributes have."""
    found = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        value = vars(module).get(name, parameter.default)
        if value is not parameter.default and type(value) in (bool, int, float, str, list, dict):
            with contextlib.suppress(StructureError):
                found[name] = _argument_to_json(name, value)
    return found


def _require_same_shapes(module: torch.nn.Module, structure: Mapping[str, Any]) -> torch.nn.Module:
    """Call the constructor, and refuse one that makes other parameters and buffers than the module has."""
    # The user's own class, in the user's own process: there is nothing to agree to.
    built = build(structure, trust={"code"})
    wanted, found = (
        {slot.path: shape_of(slot.tensor) for slot in find_slots(each) if slot.persistent} for each in (built, module)
    )
    odd = sorted(
        path
        for path in wanted.keys() | found.keys()
        if wanted.get(path) != found.get(path) and not (path in found and wanted.get(path) == UNKNOWN)
    )
    if odd:
        raise StructureError(
            "The constructor does not give back the module: it was changed after it was made",
            where=f"{structure['class']}, {odd[0]}",
            wanted=f"{wanted.get(odd[0], 'no such tensor')} as the constructor makes it",
            found=f"{found.get(odd[0], 'no such tensor')} in the module, and {len(odd) - 1} more differences",
            way_out=_way_out(structure, "keep config in step with the module, pass init_args={…}, "),
        )
    return built


# --- build ---------------------------------------------------------------------------------------


def build(
    structure: Mapping[str, Any],
    *,
    trust: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    inventory: Inventory | None = None,
    initialise: bool = False,
) -> torch.nn.Module:
    """Call the constructor on real CPU memory, without random initialisation unless it is asked for.

    The values of its parameters mean nothing before ``inventory.fill``.

    Args:
        structure: From ``describe`` or ``read_structure``, of a kind other than ``pickle``.
        trust: What the caller agreed to run.
        dtype: Torch's default dtype during construction.
        inventory: What the module must hold; bounds what its constructor may allocate.
        initialise: Run random initialisers, too.

    Raises:
        TrustError: The class is the user's own, and nobody agreed to run it.
        StructureError: The class is not there any more, or its constructor fails.
    """
    try:
        make = _maker(structure, trust)
        with real_memory(dtype, inventory=inventory, initialise=initialise):
            module = make() if inventory is None else within(8 * inventory.nbytes, make)
    except SafeFlavorError:
        raise
    except Exception as error:
        raise StructureError(
            "The constructor of the model failed",
            where=structure["class"],
            found=f"{type(error).__name__}: {error}",
            way_out="when saving, pass init_args={…} or allow_pickle=True",
        ) from error
    if not isinstance(module, torch.nn.Module):  # a class may have a __new__ of its own
        raise StructureError("The class does not make a module", where=structure["class"])
    for parameter in module.parameters():
        if not torch.nn.parameter.is_lazy(parameter):  # which has no gradient, and no shape
            parameter.requires_grad_(False)
    return module.eval()


def _maker(structure: Mapping[str, Any], trust: Collection[str]) -> Callable[[], Any]:
    """What calls the constructor, once it was looked at what that is."""
    if structure["kind"] == "torch":
        return functools.partial(make_layers, structure["tree"])
    lookup = _transformers_class
    if structure["kind"] == "import":
        require_agreed("code", trust, structure["class"])
        lookup = import_name
    elif not is_proven(structure["class"].rpartition(":")[2]):
        raise StructureError(
            "Nobody has proven that this class of transformers is built for what was saved, and for nothing else",
            where=structure["class"],
            wanted="a class in proven_classes.txt of this release",
            way_out='save the model again with this release: it is then of the kind "import", for trust={"code"}',
        )
    cls = lookup(structure["class"])
    # Looked at before it is called: os.system is no model, and a call would be too late to tell.
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise StructureError("The class is no module", where=structure["class"], wanted="a torch.nn.Module")
    if structure["kind"] == "transformers" and (odd := sorted(structure["arguments"].keys() - _flags(cls))):
        raise StructureError("The class has no such flag", where=f"{structure['class']}, {odd[0]}", way_out=WAY_OUT)

    def make() -> Any:
        arguments = {
            name: value["value"] if "value" in value else _config_from_json(value, lookup)
            for name, value in structure["arguments"].items()
        }
        config = _config_from_json(structure, lookup)
        made = cls(**arguments) if config is None else cls(config, **arguments)
        return made if structure["layers"] is None else Embedder(made, structure["layers"])

    return make


def _config_from_json(described: Mapping[str, Any], lookup: Callable[[str], Any]) -> Any:
    if described["config_class"] is None:
        return None
    config_class = lookup(described["config_class"])
    # Infinities are written as objects, and read by from_json_file but not by from_dict (transformers 5).
    decode = getattr(config_class, "_decode_special_floats", dict)
    config = config_class.from_dict(decode(dict(described["config"])))
    for kind in _IMPLEMENTATIONS:
        for path, part in _parts(config):  # outer first: setting one sets those of its parts, too
            if path in described.get(kind, {}):
                setattr(part, f"_{kind}", described[kind][path])
    return config


_DEFINES_MODELS = re.compile(r"transformers\.models(\.\w+)+\.(modeling|configuration)_\w+", re.ASCII)


def _transformers_class(full_name: str) -> Any:
    """A model or config class of the transformers package, by the module it was in or the package's own table.

    Nothing outside that package is ever imported for an artifact's sake, and of that package only
    modules that define models and configs: others hold command lines, downloads and what they import.
    """
    module_name, _, name = full_name.partition(":")
    if _DEFINES_MODELS.fullmatch(module_name) and name.isidentifier():
        try:
            found = getattr(importlib.import_module(module_name), name, None)
        except ImportError:
            found = None
        if found is None:  # moved between releases
            found = getattr(importlib.import_module("transformers"), name, None)
        if isinstance(found, type) and found.__module__.startswith("transformers.models."):
            return found
    raise StructureError(
        "The model's class is not in the installed transformers",
        where=full_name,
        wanted="a class of the transformers package",
        way_out=WAY_OUT,
    )


# --- files ---------------------------------------------------------------------------------------


def write_structure(structure: Mapping[str, Any], layout: Layout) -> None:
    """Write ``structure.json`` and, beside it, the config under the name other tools look for."""
    write_json(layout.structure, {key: value for key, value in structure.items() if key != "config"})
    if structure.get("config") is not None:
        write_json(layout.config, structure["config"])


def read_structure(layout: Layout, spec: ModelSpec) -> dict[str, Any]:
    """Read back what ``write_structure`` wrote; see ``read_description``, which looks at no tree."""
    content = read_description(layout, spec)
    if content["kind"] == "torch" and not is_tree(content["tree"]):
        raise malformed(layout)
    return content
