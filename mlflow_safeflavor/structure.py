"""Describe a module so that it can be built again on real memory, and build it.

Three kinds of structure, tried in this order when a model is saved (a fourth, ``graph``, has no module; see ``graph``):

* ``transformers``: a class of the transformers package and its config; runs no code of the artifact;
* ``import``: any class that can be imported, and JSON arguments; runs the user's code;
* ``pickle``: the module itself without its tensors (``pickled.py``), only if the user allows it; then also where a
  constructor would load a checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Any

import torch

from mlflow_safeflavor.artifact import WAY_OUT, Layout, write_json
from mlflow_safeflavor.bounds import within
from mlflow_safeflavor.embedding import Embedder
from mlflow_safeflavor.errors import IntegrityError, SafeFlavorError, StructureError
from mlflow_safeflavor.inventory import Inventory, find_places, find_slots
from mlflow_safeflavor.memory import real_memory
from mlflow_safeflavor.spec import ModelSpec
from mlflow_safeflavor.trust import find_steering, is_proven, portable, require_agreed, require_harmless
from mlflow_safeflavor.usercode import import_name, name_of

__all__ = ["build", "describe", "read_structure", "what_runs", "write_structure"]


# --- describe ------------------------------------------------------------------------------------


def describe(
    module: torch.nn.Module, *, init_args: Mapping[str, Any] | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """What is needed to make a module of the same structure; JSON only.

    Args:
        module: Only looked at.
        init_args: Arguments of its constructor, where they cannot be told: JSON values and configs.
        allow_pickle: Whether the kind ``pickle`` may be used when no constructor gives the module back by itself.

    Raises:
        StructureError: The module is hooked, quantised, or no allowed kind can rebuild it.
    """
    if isinstance(module, Embedder):
        described = describe(module.transformer, init_args=init_args, allow_pickle=allow_pickle)
        return described if described["kind"] == "pickle" else {**described, "layers": module.described}
    _require_plain(module)
    if not allow_pickle or init_args is not None:
        return _describe_constructor(module, init_args)
    try:
        with _calls("from_pretrained") as calls:
            described = _describe_constructor(module, None)
    except SafeFlavorError as error:
        reason = error.what
    else:
        if not calls:
            return described
        reason = "The constructor loads a checkpoint, which nobody else may have"
    return {"kind": "pickle", "class": name_of(type(module)), "reason": reason}


@contextlib.contextmanager
def _calls(name: str) -> Iterator[list[str]]:
    """A list that grows with each call of a function of that name, by this thread and inside the block.

    It stays empty under another profiler, which could not be put back; the rehearsal finds the same later.
    """
    found: list[str] = []

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == name:
            found.append(name)

    if sys.getprofile() is not None:
        yield found
        return
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _describe_constructor(module: torch.nn.Module, init_args: Mapping[str, Any] | None) -> dict[str, Any]:
    cls = type(module)
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
        _require_same_shapes(module, structure)
    else:
        if hasattr(cls, "config_class") and config is not None:
            structure |= _describe_config(config)
            _require_plain_config(structure)
        structure["arguments"] = _find_arguments(module, structure)
    return structure


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


def _require_plain(module: torch.nn.Module) -> None:
    for name, child in module.named_modules():
        if hasattr(child, "_hf_hook"):
            raise StructureError(
                "The module carries accelerate hooks, which move or offload its tensors",
                where=name or "the model itself",
                wanted="a plain module with all tensors in memory",
                way_out="accelerate.hooks.remove_hook_from_module(model, recurse=True) after bringing all weights back",
            )
        if getattr(child, "hf_quantizer", None) is not None or getattr(child, "is_quantized", False):
            raise StructureError(
                "The module is quantised, and its integer weights cannot be rebuilt from a config",
                where=name or name_of(type(child)),
                wanted="floating point weights",
                way_out="save the model before quantising it, or model.dequantize() first",
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


def _find_arguments(module: torch.nn.Module, structure: Mapping[str, Any]) -> dict[str, Any]:
    """Boolean constructor arguments other than the defaults (``add_pooling_layer=False``).

    They are stored nowhere in a module, so they are found by building: the arguments are right when
    the same tensors come out.
    """
    flags = [(name, {"value": not default}) for name, default in _flags(type(module)).items()]
    first: StructureError | None = None
    for count in range(len(flags) + 1):
        for arguments in itertools.combinations(flags, count):
            try:
                _require_same_shapes(module, {**structure, "arguments": dict(arguments)})
                return dict(arguments)
            except StructureError as error:
                first = first or error
    assert first is not None  # noqa: S101  (the combination of no flags was tried)
    raise first


def _flags(cls: type) -> dict[str, bool]:
    """Boolean constructor arguments of a class, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, bool)}


def _require_same_shapes(module: torch.nn.Module, structure: Mapping[str, Any]) -> None:
    """Refuse a constructor that makes other tensors than the module has."""
    # The user's own class, in the user's own process: there is nothing to agree to.
    built = build(structure, trust={"code"})
    wanted = {slot.path: tuple(slot.tensor.shape) for slot in find_slots(built)}
    found = {slot.path: tuple(slot.tensor.shape) for slot in find_slots(module)}
    # What a forward pass left in a place that the constructor leaves empty is stored and put back.
    place = find_places(built)
    left = {
        slot.path
        for slot in find_slots(module)
        if slot.kind == "attribute" and slot.tensor.is_contiguous() and place(slot.path)
    }
    odd = sorted(path for path in (wanted.keys() | found.keys()) - left if wanted.get(path) != found.get(path))
    if odd:
        raise StructureError(
            "The constructor does not give back the module: it was changed after it was made",
            where=f"{structure['class']}, {odd[0]}",
            wanted=f"{wanted.get(odd[0], 'no such tensor')} as the constructor makes it",
            found=f"{found.get(odd[0], 'no such tensor')} in the module, and {len(odd) - 1} more differences",
            way_out="merge adapters (merge_and_unload()) and keep config in step with the module, "
            "pass init_args={…}, or pass allow_pickle=True",
        )


# --- build ---------------------------------------------------------------------------------------


def build(
    structure: Mapping[str, Any],
    *,
    trust: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    inventory: Inventory | None = None,
) -> torch.nn.Module:
    """Call the constructor on real CPU memory, without random initialisation.

    The values of its parameters mean nothing before ``inventory.fill``.

    Args:
        structure: From ``describe`` or ``read_structure``, of a kind other than ``pickle``.
        trust: What the caller agreed to run.
        dtype: Torch's default dtype during construction.
        inventory: What the module must hold; bounds what its constructor may allocate.

    Raises:
        TrustError: The class is the user's own, and nobody agreed to run it.
        StructureError: The class is not there any more, or its constructor fails.
    """
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
    try:
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

        with real_memory(dtype, inventory=inventory):
            module = make() if inventory is None else within(8 * inventory.nbytes, make)
    except SafeFlavorError:
        raise
    except Exception as error:
        raise StructureError(
            "The constructor of the model failed",
            where=structure["class"],
            found=f"{type(error).__name__}: {error}",
            way_out="install the pinned versions (mlflow-safeflavor inspect shows them); "
            "when saving, pass init_args={…} or allow_pickle=True",
        ) from error
    if not isinstance(module, torch.nn.Module):  # a class may have a __new__ of its own
        raise StructureError("The class does not make a module", where=structure["class"])
    return module.eval().requires_grad_(False)


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
        way_out="install the pinned transformers (mlflow-safeflavor inspect shows it)",
    )


# --- files ---------------------------------------------------------------------------------------


def write_structure(structure: Mapping[str, Any], layout: Layout) -> None:
    """Write ``structure.json`` and, beside it, the config under the name other tools look for."""
    write_json(layout.structure, {key: value for key, value in structure.items() if key != "config"})
    if structure.get("config") is not None:
        write_json(layout.config, structure["config"])


_KEYS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "class": str,
    "hooks": dict,
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
    "pickle": {**_KEYS, "reason": str, "pickle": dict},
    "graph": _KEYS,
}


def read_structure(layout: Layout, spec: ModelSpec) -> dict[str, Any]:
    """Read back what ``write_structure`` wrote.

    Raises:
        IntegrityError: A file is missing or malformed, or wants to run more than ``MLmodel`` says,
            which is what the caller agreed to.
    """
    content = layout.read_json(layout.structure)
    if isinstance(content, dict) and spec.structure not in _KEYS_OF:
        content["config"] = layout.read_json(layout.config) if content.get("config_class") else None
    keys = _KEYS_OF.get(spec.structure, _CONSTRUCTOR_KEYS)
    well_formed = (
        isinstance(content, dict)
        and content.keys() == keys.keys()
        and all(isinstance(content[key], types) for key, types in keys.items())
        and content["kind"] == spec.structure
        and what_runs(content) == spec.runs
        and (spec.task == "custom" or not content["hooks"])
        and all(type(name) is str or (name is None and content["pickle"]) for name in content["hooks"].values())
        and (content["kind"] != "transformers" or all(map(_is_flag, content["arguments"].values())))
    )
    if not well_formed:
        raise IntegrityError(
            "The description of the module is malformed", where=layout.name_of(layout.structure), way_out=WAY_OUT
        )
    try:
        require_harmless(content, layout.name_of(layout.config), trusted=content["kind"] != "transformers")
    except RecursionError:
        raise IntegrityError("The config is nested too deep", where=layout.name_of(layout.config)) from None
    return dict(content)


def _is_flag(argument: Any) -> bool:
    """Whether this is all that ``describe`` ever passes to a class that runs without agreement."""
    return isinstance(argument, dict) and argument.keys() == {"value"} and isinstance(argument["value"], bool)


def what_runs(structure: Mapping[str, Any]) -> tuple[str, ...]:
    """What of its own the artifact runs: "code" for imported classes and hooks, "pickle" for pickles."""
    names = [structure["class"] if structure["kind"] == "import" else None, *structure["hooks"].values()]
    code = any(name is not None for name in names)
    return tuple(kind for kind, runs in (("code", code), ("pickle", structure["pickle"] is not None)) if runs)
