"""The engine that runs the rebuilt module: arrays in, tensors on its device, arrays out."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlflow_safeflavor.artifact.arrays import array_of
from mlflow_safeflavor.artifact.weights_files import HeldFile, require_unchanged
from mlflow_safeflavor.errors import PlacementError, StructureError
from mlflow_safeflavor.module.devices import require_usable
from mlflow_safeflavor.module.generation import Generation
from mlflow_safeflavor.module.precision import exact_products

__all__ = ["ModuleEngine", "arrays_of", "evaluating", "named_tensors", "tensors_of"]


class ModuleEngine:
    """Runs a module's ``forward``.

    Args:
        module: Rebuilt, checked and placed.
        device: Where it is.
        dtype: Its serving dtype.
        weights: Files that its tensors are mapped from.
        compile: Run ``forward`` through ``torch.compile``, which takes a minute at first and rounds
            differently. ``generate`` runs as it is.

    Raises:
        PlacementError: There is no compiler.
    """

    name = "module"
    keeps_bits = False

    def __init__(
        self,
        module: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        weights: Sequence[HeldFile] = (),
        *,
        compile: bool = False,
    ) -> None:
        self.module = module
        self._forward = _compiled(module) if compile else module
        self.device = device
        self.dtype = dtype
        self.on_cpu = device.type == "cpu"
        self._weights = weights

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # A mapped file that others write to would change weights, and a cut one ends the process.
        require_unchanged(self._weights)
        require_usable(self.device)
        tensors = tensors_of(inputs, self.device, self.dtype)
        with torch.inference_mode(), exact_products(self.device):
            return arrays_of(named_tensors(self._forward(**tensors)))

    def generate(
        self, inputs: Mapping[str, np.ndarray], generation: Generation
    ) -> dict[str, np.ndarray]:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        require_unchanged(self._weights)
        require_usable(self.device)
        keep_logits = generation.keep_logits
        returned = {"return_dict_in_generate": keep_logits, "output_logits": keep_logits}
        view = _with_settings(self.module, {**generation.settings, **returned})
        with torch.inference_mode(), exact_products(self.device):
            found = view.generate(
                **tensors_of(inputs, self.device, self.dtype),
                generation_config=view.generation_config,
                logits_processor=LogitsProcessorList(generation.processors),
                stopping_criteria=StoppingCriteriaList(generation.stopping),
                **generation.arguments,
            )
            if not keep_logits:
                return arrays_of({"sequences": found})
            logits = torch.stack(found["logits"], dim=1)
            return arrays_of({"sequences": found["sequences"], "logits": logits})


def tensors_of(
    inputs: Mapping[str, np.ndarray], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Inputs as ``forward`` takes them: on its device, floating point ones in the serving dtype."""
    # Copies, always: a forward may write to its input, and the address of a tensor decides on the
    # last bits of some kernels. Numpy aligns to 16 bytes, torch to 64.
    made = {name: torch.tensor(array) for name, array in inputs.items()}
    return {
        name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in made.items()
    }


def arrays_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Arrays of a forward in ``inference_mode``: each owns its memory alone, or is read-only."""
    found = {}
    for name, tensor in tensors.items():
        array = array_of(tensor)
        # Shared with the tensor: a caller that writes to its answer must reach no weight, no other
        # answer, and no tensor that the module keeps.
        if (
            tensor.device.type == "cpu"
            and tensor.data_ptr() == array.__array_interface__["data"][0]
        ):
            if tensor.is_inference():  # made in that forward, which may keep it or return it twice
                array.flags.writeable = False
            else:  # a weight, an input, or a part of one
                array = array.copy()
        found[name] = array
    return found


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module as it is served, in eval mode and gradients off; afterwards as it was."""
    modes = [(child, child.training) for child in module.modules()]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    try:
        # Even without a backward pass: torch chooses other kernels for weights that require them,
        # and in float32 answers differed by up to 7e-7.
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for child, training in modes:
            child.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


def _with_settings(module: torch.nn.Module, settings: Mapping[str, Any]) -> Any:
    """The same module, sharing all parameters, with another generation config."""
    if getattr(module, "generation_config", None) is None or not callable(
        getattr(module, "generate", None)
    ):
        raise StructureError(
            "The model cannot write text",
            where=type(module).__name__,
            wanted="a transformers model with generate() and a generation_config",
            hint="choose the task this model was made for: task=...",
        )
    from transformers import GenerationConfig

    # A setting that is None in a config given to ``generate`` comes from the module's own config,
    # which is not rebuilt with the module. A copy for each call, since ``generate`` leaves state on
    # its module that another thread would meet.
    view: Any = copy.copy(module)
    view.generation_config = GenerationConfig.from_dict(dict(settings))
    return view


def _compiled(module: torch.nn.Module) -> Callable[..., Any]:
    if not any(
        shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name
    ):
        raise PlacementError(
            "compile needs a C++ compiler, and this machine has none",
            where="compile",
            wanted="g++ or clang++ on the PATH, or its name in CXX",
            hint="install one (Debian: apt-get install g++), or leave compile out",
        )
    # Sizes are symbols: otherwise every new length of a batch would be compiled anew.
    forward: Callable[..., Any] = torch.compile(module, dynamic=True)
    return forward


def named_tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """Flatten the result of a forward: ``logits``, ``output_0``, ``aux_h``, ``output_1_0`` ….

    Tuples, lists, dicts, named tuples and dataclasses may be nested; numbers become tensors, None
    is left out, and so are caches of transformers.

    Raises:
        StructureError: A part is none of these, or two parts have the same name; names its path.
    """
    if isinstance(outputs, torch.Tensor):
        return {"output_0": outputs}
    if not (parts := _parts(outputs)) and not isinstance(outputs, (tuple, list, Mapping)):
        raise _no_tensor(type(outputs).__name__, outputs)
    names = (
        {}
        if isinstance(outputs, Mapping) or _fields(outputs)
        else {k: f"output_{k}" for k in parts}
    )
    found: dict[str, torch.Tensor] = {}
    for key, value in parts.items():
        _flatten(names.get(key, str(key)), value, found)
    return found


# KV caches and other states of transformers, which only the next step of generation could read.
_CACHES = frozenset(("past_key_values", "cache_params", "mems", "past_buckets_states"))


def _flatten(path: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    if value is None or path in _CACHES or type(value).__name__.endswith("Cache"):
        return
    if isinstance(value, (bool, int, float)):
        value = torch.tensor(value)
    if isinstance(value, torch.Tensor):
        if path in found:
            raise StructureError(
                "Two outputs of forward have the same name when they are flattened",
                where=path,
                hint="return them under other names",
            )
        found[path] = value
    elif isinstance(value, (tuple, list, Mapping)) or _fields(value):
        for key, item in _parts(value).items():
            _flatten(f"{path}_{key}", item, found)
    else:
        raise _no_tensor(path, value)


def _parts(value: Any) -> dict[Any, Any]:
    if fields := _fields(value):
        return {name: getattr(value, name) for name in fields}
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else {}


def _fields(value: Any) -> tuple[str, ...]:
    """Names of the parts of a named tuple or dataclass.

    A transformers ModelOutput, which is both, is a dict.
    """
    if isinstance(value, (Mapping, type)):
        return ()
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return tuple(getattr(value, "_fields", ())) if isinstance(value, tuple) else ()


def _no_tensor(path: str, value: Any) -> StructureError:
    return StructureError(
        "The module's forward returns something that is no tensor",
        where=f"output of forward, {path}",
        wanted="tensors and numbers, also in nested tuples, lists, dicts, named tuples and "
        "dataclasses",
        found=type(value).__name__,
        hint="return tensors alone, or wrap the module in one whose forward does",
    )
