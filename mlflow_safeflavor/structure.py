"""Describe a module so that it can be built again on real memory, and build it."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mlflow_safeflavor.artifact import WAY_OUT, Layout, read_json, write_json
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.inventory import find_slots

__all__ = ["build", "class_name", "describe", "read_structure", "real_memory", "write_structure"]

_build_lock = threading.RLock()


class _SkipRandomInit(TorchFunctionMode):
    """Random initialisers leave their tensor untouched: every value is replaced by a stored one.

    This needs no patching, so other threads see nothing of it. The initialisers arrive as functions
    of ``torch.nn.init``, of ``transformers.initialization`` and as tensor methods.
    """

    _NAMES = frozenset(
        (
            *("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_"),
            *("kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"),
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in self._NAMES:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def real_memory(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Constructors inside allocate on the CPU, whatever device context or default is around.

    One at a time in the process, because torch's default dtype is global to it. The random state is
    left as it was.
    """
    with _build_lock, torch.random.fork_rng(devices=[]):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            # Innermost wins: an outer torch.device("meta") or set_default_device reaches nothing here.
            with _SkipRandomInit(), torch.device("cpu"):
                yield
        finally:
            torch.set_default_dtype(before)


def class_name(module: torch.nn.Module) -> str:
    """``module:qualname`` of the module's class."""
    cls = type(module)
    return f"{cls.__module__}:{cls.__qualname__}"


def describe(module: torch.nn.Module) -> dict[str, Any]:
    """What ``build`` needs to make a module of the same structure; JSON only.

    Raises:
        StructureError: The module is hooked, quantised or changed after construction, so that its
            constructor does not give it back.
    """
    _require_plain(module)
    if not _is_transformers(module):
        raise StructureError(
            "The module's class does not come with transformers",
            where=class_name(module),
            wanted="a transformers.PreTrainedModel of the transformers package itself",
            way_out="save the transformers model inside it, or convert your class to one",
        )
    config = module.config
    structure = {
        "kind": "transformers",
        "class": type(module).__name__,
        "module": type(module).__module__,
        "config_class": type(config).__name__,
        "config_module": type(config).__module__,
        "config": _config_json(config),
        # Not part of a saved config, but it decides which kernels run.
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "arguments": {},
    }
    structure["arguments"] = _find_arguments(module, structure)
    return structure


def _is_transformers(module: torch.nn.Module) -> bool:
    cls = type(module)
    return cls.__module__.startswith("transformers.models.") and hasattr(cls, "config_class")


def _require_plain(module: torch.nn.Module) -> None:
    for name, child in module.named_modules():
        if hasattr(child, "_hf_hook"):
            raise StructureError(
                "The module carries accelerate hooks, which move or offload its tensors",
                where=name or "the model itself",
                wanted="a plain module with all tensors in memory",
                way_out="accelerate.hooks.remove_hook_from_module(model, recurse=True) after bringing all weights back",
            )
    if getattr(module, "hf_quantizer", None) is not None or getattr(module, "is_quantized", False):
        raise StructureError(
            "The module is quantised, and its integer weights cannot be rebuilt from a config",
            where=class_name(module),
            wanted="floating point weights",
            way_out="save the model before quantising it, or model.dequantize() first",
        )


def _config_json(config: Any) -> dict[str, Any]:
    content = json.loads(config.to_json_string(use_diff=False))
    # A local path of the machine that saved the model; it means nothing anywhere else.
    content.pop("_name_or_path", None)
    return dict(content)


def _find_arguments(module: torch.nn.Module, structure: Mapping[str, Any]) -> dict[str, bool]:
    """Boolean constructor arguments other than the defaults (``add_pooling_layer=False``).

    They are stored nowhere in a module, so they are found by building: the arguments are right when
    the same tensors come out.
    """
    wanted = {slot.path: tuple(slot.tensor.shape) for slot in find_slots(module)}
    flags = [
        (name, not parameter.default)
        for name, parameter in inspect.signature(type(module).__init__).parameters.items()
        if isinstance(parameter.default, bool)
    ]
    found: dict[str, tuple[int, ...]] = {}
    for count in range(len(flags) + 1):
        for arguments in itertools.combinations(flags, count):
            skeleton = build({**structure, "arguments": dict(arguments)})
            shapes = {slot.path: tuple(slot.tensor.shape) for slot in find_slots(skeleton)}
            if shapes == wanted:
                return dict(arguments)
            found = found or shapes
    odd = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    raise StructureError(
        "The constructor does not give back the module: it was changed after it was made",
        where=f"{class_name(module)}, {odd[0]}",
        wanted=f"{found.get(odd[0], 'no such tensor')} as {type(module).__name__}(config) makes it",
        found=f"{wanted.get(odd[0], 'no such tensor')} in the module, and {len(odd) - 1} more differences",
        way_out="merge adapters into the weights (merge_and_unload()), and keep config in step with the module",
    )


def build(structure: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Call the constructor on real CPU memory, without random initialisation.

    The values of its parameters mean nothing before ``tensors.fill``.

    Args:
        structure: From ``describe`` or ``read_structure``.
        dtype: Torch's default dtype during construction.

    Raises:
        StructureError: The class is not there any more, or its constructor fails.
    """
    try:
        cls = _transformers_class(structure["module"], structure["class"])
        config = _transformers_class(structure["config_module"], structure["config_class"]).from_dict(
            dict(structure["config"])
        )
        if structure["attn_implementation"] is not None:
            config._attn_implementation = structure["attn_implementation"]
        with real_memory(dtype):
            module = cls(config, **structure["arguments"])
    except StructureError:
        raise
    except Exception as error:
        raise StructureError(
            "The constructor of the model failed",
            where=f"{structure['module']}:{structure['class']}",
            found=f"{type(error).__name__}: {error}",
            way_out="install the pinned versions (mlflow-safeflavor inspect shows them)",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise StructureError("The class does not make a module", where=f"{structure['module']}:{structure['class']}")
    return module.eval().requires_grad_(False)


def _transformers_class(module_name: str, name: str) -> Any:
    """A class of the transformers package, by the module it was in or the package's own table.

    Nothing outside that package is ever imported for an artifact's sake.
    """
    if module_name.split(".")[0] == "transformers" and name.isidentifier():
        try:
            found = getattr(importlib.import_module(module_name), name, None)
        except ImportError:
            found = None
        if found is None:  # moved between releases
            found = getattr(importlib.import_module("transformers"), name, None)
        if isinstance(found, type):
            return found
    raise StructureError(
        "The model's class is not in the installed transformers",
        where=f"{module_name}:{name}",
        wanted="a class of the transformers package",
        way_out="install the pinned transformers (mlflow-safeflavor inspect shows it)",
    )


def write_structure(structure: Mapping[str, Any], layout: Layout) -> None:
    """Write ``structure.json`` and, beside it, the config under the name other tools look for."""
    rest = {key: value for key, value in structure.items() if key != "config"}
    write_json(layout.structure, rest)
    write_json(layout.config, structure["config"])


_KEYS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "class": str,
    "module": str,
    "config_class": str,
    "config_module": str,
    "config": dict,
    "attn_implementation": (str, type(None)),
    "arguments": dict,
}


def read_structure(layout: Layout) -> dict[str, Any]:
    """Read back what ``write_structure`` wrote.

    Raises:
        IntegrityError: A file is missing or malformed.
    """
    content = read_json(layout.structure)
    if isinstance(content, dict):
        content["config"] = read_json(layout.config)
    well_formed = (
        isinstance(content, dict)
        and content.keys() == _KEYS.keys()
        and all(isinstance(content[key], types) for key, types in _KEYS.items())
        and content["kind"] == "transformers"
        and all(isinstance(value, bool) for value in content["arguments"].values())
    )
    if not well_formed:
        raise IntegrityError(
            "The description of the module is malformed", where=layout.name_of(layout.structure), way_out=WAY_OUT
        )
    return dict(content)
