"""Wrappers of training around or in a module: taken off where exact, else refused with a hint.

They are told by names of classes and attributes, so that no library is imported to look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mlflow_safeflavor.errors import SafeFlavorError, StructureError

__all__ = ["require_given_back", "require_plain", "taken_off"]

_logger = logging.getLogger("mlflow.safeflavor")

# Wrappers that answer as what is inside them does, and the attribute that holds it.
_AROUND = {
    "torch._dynamo.eval_frame:OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel:DataParallel": "module",
    "torch.nn.parallel.distributed:DistributedDataParallel": "module",
    "torch.optim.swa_utils:AveragedModel": "module",
}


def taken_off(module: Any) -> Any:
    """The module inside its wrappers; anything else is given back.

    Wrappers are those of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and
    ``AveragedModel``.
    """
    # Several may be in each other: torch.compile(DataParallel(model)).
    while (attribute := _around(module)) is not None:
        _logger.info(
            "safeflavor: %s is taken off, and the module inside it saved", type(module).__name__
        )
        module = getattr(module, attribute)
    return module


def _around(module: Any) -> str | None:
    return next((_AROUND[name] for name in _names_of(type(module)) if name in _AROUND), None)


def _names_of(cls: type) -> list[str]:
    return [f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__]


def require_plain(module: torch.nn.Module) -> None:
    """Refuse wrapped, hooked, scripted or quantised modules.

    Raises:
        StructureError: With the line that makes a plain module.
    """
    for path, child in module.named_modules():
        for looks, what, line in _REFUSED:
            if looks(child):
                raise StructureError(
                    what,
                    where=f"{path or 'the model itself'}, {type(child).__name__}",
                    wanted="a plain module with all tensors in memory",
                    hint=line.format(model=f"model.{path}" if path else "model"),
                )


def _is_of(*prefixes: str) -> Callable[[torch.nn.Module], bool]:
    return lambda child: any(name.startswith(prefixes) for name in _names_of(type(child)))


def _has(name: str) -> Callable[[torch.nn.Module], bool]:
    return lambda child: bool(vars(child).get(name))


# Predicate, message and hint; of several that hold the first is told.
_REFUSED: tuple[tuple[Callable[[torch.nn.Module], bool], str, str], ...] = (
    (
        _has("_hf_hook"),
        "The module carries accelerate hooks, which move or offload its tensors",
        "accelerate.hooks.remove_hook_from_module(model, recurse=True) after bringing all weights "
        "back",
    ),
    (
        lambda child: "forward" in vars(child) and "_original_forward" in vars(child),
        "The module's forward is wrapped by accelerate for mixed precision, as transformers' "
        "Trainer does, too",
        "{model} = accelerate.utils.extract_model_from_parallel({model}, keep_fp32_wrapper=False)",
    ),
    (
        lambda child: _around(child) is not None,
        "A part of the module is wrapped by training",
        "{model} = {model}._orig_mod for torch.compile, {model}.module for the others",
    ),
    (
        _has("_compiled_call_impl"),
        "The module was compiled in place, and compiled code cannot be saved",
        "{model}._compiled_call_impl = None",
    ),
    (
        _is_of("torch.distributed.fsdp", "torch.distributed._composable", "deepspeed."),
        "The module's weights are spread over processes",
        "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True)) and load them into a plain module of the "
        "same class",
    ),
    (
        _is_of("peft.peft_model", "peft.mixed_model"),
        "Adapters lie beside the weights of the module",
        "{model} = {model}.merge_and_unload()",
    ),
    (
        _is_of("peft.tuners"),
        "Adapters lie beside the weights of the module",
        "model.merge_and_unload() of the PeftModel; for adapters that transformers itself added "
        "(add_adapter, load_adapter): model = peft.PeftModel.from_pretrained(plain_model, "
        "folder).merge_and_unload()",
    ),
    (
        lambda child: (
            _is_of("lightning.", "pytorch_lightning.")(child) and bool(vars(child).get("_trainer"))
        ),
        "The LightningModule holds the trainer that trained it",
        "{model}._trainer = None, or save the network inside it",
    ),
    (
        lambda child: isinstance(child, torch.jit.ScriptModule),
        "TorchScript keeps no class that could be called again",
        "save the module that was scripted or traced",
    ),
    (
        _is_of("torch.ao.nn.", "torch.nn.quantized", "bitsandbytes.", "torchao."),
        "The module is quantised, and its integer weights cannot be rebuilt from a config",
        "save the model before quantising it",
    ),
    (
        lambda child: (
            getattr(child, "hf_quantizer", None) is not None
            or bool(getattr(child, "is_quantized", False))
        ),
        "The module is quantised, and its integer weights cannot be rebuilt from a config",
        "save the model before quantising it, or model.dequantize() first",
    ),
)


def require_given_back(module: torch.nn.Module, error: SafeFlavorError, *, pickle: bool) -> None:
    """Refuse parametrizations and masks of pruning where no constructor gives the module back.

    Args:
        module: Not given back.
        error: The reason.
        pickle: Whether the module is to be pickled instead, which torch refuses for parametrized
            ones.

    Raises:
        StructureError: With the line that folds them into the weights.
    """
    # Weights computed from other tensors by a hook or a property: few constructors make them so.
    found = list(_folded(module, pickle=pickle))
    if found:
        what, path, _ = found[0]
        raise StructureError(
            f"{what}, and no constructor gives it back",
            where=path,
            wanted="plain weights, or a constructor that makes it so",
            found=f"{len(found)} such tensors; {error.what}",
            hint="; ".join(line for _, _, line in found[:3]) + (" …" if len(found) > 3 else ""),
        ) from error


def _folded(module: torch.nn.Module, *, pickle: bool) -> Iterator[tuple[str, str, str]]:
    """Message, path, and the line that folds it into the weights."""
    for path, child in module.named_modules():
        here = f"model.{path}" if path else "model"
        for name in getattr(child, "parametrizations", None) or ():
            line = f'torch.nn.utils.parametrize.remove_parametrizations({here}, "{name}")'
            yield "The module is parametrized", f"{path}.{name}".lstrip("."), line
        # A pickle takes masks and norms along, hooks and all.
        for hook in () if pickle else child._forward_pre_hooks.values():
            kind, name = (
                type(hook).__name__,
                getattr(hook, "name", getattr(hook, "_tensor_name", "")),
            )
            if type(hook).__module__ == "torch.nn.utils.prune":
                line = f'torch.nn.utils.prune.remove({here}, "{hook._tensor_name}")'
                yield (
                    "The module is pruned by a mask",
                    f"{path}.{hook._tensor_name}".lstrip("."),
                    line,
                )
            elif type(hook).__module__ in (
                "torch.nn.utils.weight_norm",
                "torch.nn.utils.spectral_norm",
            ):
                function = "remove_weight_norm" if kind == "WeightNorm" else "remove_spectral_norm"
                line = f'torch.nn.utils.{function}({here}, "{name}")'
                yield "The module is normalised by a hook", f"{path}.{name}".lstrip("."), line
