"""Engine: what turns a dict of input tensors into a dict of output tensors.

Tasks and batching see only this seam. ``ModuleEngine`` runs the rebuilt module, ``GraphEngine`` the recorded graph.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from mlflow_safeflavor.devices import is_out_of_memory, require_usable
from mlflow_safeflavor.errors import AnswerError, OverloadedError, PlacementError, SafeFlavorError, StructureError
from mlflow_safeflavor.graph import GraphModule
from mlflow_safeflavor.precision import exact_products
from mlflow_safeflavor.weights_files import HeldFile, require_unchanged

__all__ = ["Engine", "GraphEngine", "ModuleEngine", "evaluating", "named_failure", "named_tensors"]


class Engine(Protocol):
    """One forward pass, without gradients and without state between calls; safe from many threads."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Serving dtype: what floating point inputs must be."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the model.

        Args:
            inputs: Argument name → tensor on any device; moved to the engine's device if elsewhere.

        Returns:
            Output name → tensor on the engine's device.
        """
        ...

    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        settings: Mapping[str, Any],
        *,
        processors: Sequence[Callable[..., torch.Tensor]] = (),
        stopping: Sequence[Callable[..., torch.Tensor]] = (),
        keep_logits: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Let the model write, token by token.

        Args:
            inputs: ``input_ids`` and, if the model takes it, ``attention_mask``, shape (rows, longest).
            settings: All there is to a generation config; what the module says of its own counts for nothing.
            processors: Applied in turn to the scores of each step, (ids so far, scores) → scores, after those that the
                settings ask for.
            stopping: (ids so far, scores) → which rows are done, bool of shape (rows,).
            keep_logits: Also return what the model said at each step, before any processing.

        Returns:
            ``sequences``, int64 of shape (rows, length): the prompts as given, or the decoder's start token, and
            what was written. With ``keep_logits`` also ``logits``, shape (rows, steps, vocabulary).

        Raises:
            StructureError: The model cannot write, or not with this engine.
        """
        ...


class ModuleEngine:
    """Runs a module's ``forward``.

    Args:
        module: Rebuilt, checked and placed.
        device: Where it is.
        dtype: Its serving dtype.
        weights: Files that its tensors are mapped from.
        compile: Run ``forward`` through ``torch.compile``, which takes a minute at first and rounds differently.
            ``generate`` runs as it is.

    Raises:
        PlacementError: There is no compiler.
    """

    name = "module"

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
        self._weights = weights

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        require_unchanged(self._weights)
        require_usable(self.device)
        with torch.inference_mode(), exact_products(self.device):
            outputs = self._forward(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return named_tensors(outputs)

    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        settings: Mapping[str, Any],
        *,
        processors: Sequence[Callable[..., torch.Tensor]] = (),
        stopping: Sequence[Callable[..., torch.Tensor]] = (),
        keep_logits: bool = False,
    ) -> dict[str, torch.Tensor]:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        require_unchanged(self._weights)
        require_usable(self.device)
        view = _with_settings(self.module, {**settings, "return_dict_in_generate": True, "output_logits": keep_logits})
        with torch.inference_mode(), exact_products(self.device):
            found = view.generate(
                **{name: tensor.to(self.device) for name, tensor in inputs.items()},
                generation_config=view.generation_config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(stopping),
            )
        kept = {"logits": torch.stack(found.logits, dim=1)} if keep_logits else {}
        return {"sequences": found.sequences, **kept}


class GraphEngine:
    """Runs a recorded graph, and rebuilds the module only for what the graph does not take.

    Args:
        module: The graph with its constants, where they are to run.
        device: Where that is.
        dtype: Its serving dtype.
        rebuild: Makes the engine of the module; None where the artifact holds a graph alone.
        weights: Files that its tensors are mapped from.
    """

    name = "graph"

    def __init__(
        self,
        module: GraphModule,
        device: torch.device,
        dtype: torch.dtype,
        rebuild: Callable[[], Engine] | None = None,
        weights: Sequence[HeldFile] = (),
    ) -> None:
        self.module = module
        self.device = device
        self.dtype = dtype
        self._rebuild = rebuild
        self._weights = weights
        self._rebuilt: Engine | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._rebuild is not None and self.module.graph.misfit(inputs):
            return self.fallback()(inputs)
        require_unchanged(self._weights)
        require_usable(self.device)
        with torch.inference_mode(), exact_products(self.device):
            found: dict[str, torch.Tensor] = self.module(
                **{name: tensor.to(self.device) for name, tensor in inputs.items()}
            )
        return found

    def fallback(self) -> Engine:
        """The engine of the module, rebuilt on first use. Raises ``StructureError`` where there is none."""
        with self._lock:
            if self._rebuilt is None:
                if self._rebuild is None:
                    raise StructureError(
                        "The model was stored as a graph of one forward, which cannot do this",
                        where="engine",
                        way_out='save the model with its module, too: structure="auto"',
                    )
                self._rebuilt = self._rebuild()
            return self._rebuilt

    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        settings: Mapping[str, Any],
        *,
        processors: Sequence[Callable[..., torch.Tensor]] = (),
        stopping: Sequence[Callable[..., torch.Tensor]] = (),
        keep_logits: bool = False,
    ) -> dict[str, torch.Tensor]:
        return self.fallback().generate(
            inputs, settings, processors=processors, stopping=stopping, keep_logits=keep_logits
        )


def named_failure(error: BaseException, where: str = "forward") -> SafeFlavorError:
    """Name what a forward raised, so that each caller gets an error of its own; what has a name stays as it is.

    ``SystemExit`` gets one, too: raised again in a caller's thread it would end the server.
    """
    if isinstance(error, SafeFlavorError):
        return error
    if is_out_of_memory(error):
        # Not as the cause: its frames would hold what the forward had made, for as long as the error is looked at.
        return OverloadedError(
            "Memory ran out, and there is nothing smaller to try",
            where=where,
            found=error,
            way_out="ask with fewer or shorter rows, or for fewer tokens, or later, when what else is on the device "
            "needs less; or serve the model on one with more memory",
        )
    named = AnswerError(
        "The model failed over the rows it was asked",
        where=where,
        found=f"{type(error).__name__}: {error}",
        way_out="ask with fewer or other rows; the cause is chained to this error, and in the log of the server",
    )
    named.__cause__ = error
    return named


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module as it is served: in eval mode, gradients off; afterwards everything is as it was.

    Gradients matter to the bits: torch chooses other kernels for weights that require them.
    """
    modes = [(child, child.training) for child in module.modules()]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for child, training in modes:
            child.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


def _with_settings(module: torch.nn.Module, settings: Mapping[str, Any]) -> Any:
    """The same module, parameters and all, with another generation config.

    Whatever a config given to ``generate`` leaves open, transformers takes from the module's own; and that one is
    not rebuilt with the module. A copy for each call also keeps what ``generate`` leaves behind on its module from
    the calls of other threads.
    """
    if getattr(module, "generation_config", None) is None or not callable(getattr(module, "generate", None)):
        raise StructureError(
            "The model cannot write text",
            where=type(module).__name__,
            wanted="a transformers model with generate() and a generation_config",
            way_out="choose the task this model was made for: task=...",
        )
    from transformers import GenerationConfig

    view: Any = copy.copy(module)
    view.generation_config = GenerationConfig.from_dict(dict(settings))
    return view


def _compiled(module: torch.nn.Module) -> Callable[..., Any]:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name):
        raise PlacementError(
            "compile needs a C++ compiler, and this machine has none",
            where="compile",
            wanted="g++ or clang++ on the PATH, or its name in CXX",
            way_out="install one (Debian: apt-get install g++), or leave compile out",
        )
    # Sizes are symbols: otherwise every new length of a batch would be compiled anew.
    forward: Callable[..., Any] = torch.compile(module, dynamic=True)
    return forward


def named_tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """Flatten the result of a forward to tensors by name: ``logits``, ``output_0``, ``aux_h``, ``output_1_0`` ….

    Tuples, lists, dicts, named tuples and dataclasses may be nested; numbers become tensors, None is left out. So are
    the caches of a transformers model, which only its next step could read.

    Raises:
        StructureError: A part is none of these, or two parts have the same name; names its path.
    """
    if isinstance(outputs, torch.Tensor):
        return {"output_0": outputs}
    if not (parts := _parts(outputs)) and not isinstance(outputs, (tuple, list, Mapping)):
        raise _no_tensor(type(outputs).__name__, outputs)
    names = {} if isinstance(outputs, Mapping) or _fields(outputs) else {k: f"output_{k}" for k in parts}
    found: dict[str, torch.Tensor] = {}
    for key, value in parts.items():
        _flatten(names.get(key, str(key)), value, found)
    return found


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
                way_out="return them under other names",
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
    """Names of the parts of a named tuple or dataclass; a transformers ModelOutput, which is both, is a dict."""
    if isinstance(value, (Mapping, type)):
        return ()
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return tuple(getattr(value, "_fields", ())) if isinstance(value, tuple) else ()


def _no_tensor(path: str, value: Any) -> StructureError:
    return StructureError(
        "The module's forward returns something that is no tensor",
        where=f"output of forward, {path}",
        wanted="tensors and numbers, also in nested tuples, lists, dicts, named tuples and dataclasses",
        found=type(value).__name__,
        way_out="return tensors alone, or wrap the module in one whose forward does",
    )
