"""Bookkeeping of libraries: attributes and hooks of a module that change no prediction."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BOOKKEEPING", "is_users_hook", "matters"]

_LIBRARIES = ("torch", "transformers", "accelerate")

# Attributes that act in training alone, and sizes, which are compared as those of tensors.
_TRAINING = {
    torch.nn.modules.dropout._DropoutNd: {"p"},
    torch.nn.modules.batchnorm._NormBase: {"momentum"},
    torch.nn.Embedding: {
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "scale_grad_by_freq",
        "sparse",
    },
    torch.nn.EmbeddingBag: {"num_embeddings", "embedding_dim", "scale_grad_by_freq", "sparse"},
    torch.nn.Linear: {"in_features", "out_features"},
}

# Attributes that transformers, torch and trainers keep on a module, and no forward in eval mode
# reads: from_pretrained, the Trainer and accelerate's prepare each leave some behind.
BOOKKEEPING = frozenset(
    (
        *(
            "_is_hf_initialized",
            "generation_config",
            "warnings_issued",
            "name_or_path",
            "model_tags",
            "hf_device_map",
        ),
        *("gradient_checkpointing", "_gradient_checkpointing_func", "_loss_function"),
        *("_require_grads_hook", "_require_grads_hooks", "_weight_conversions"),
        *(
            "loss_type",
            "is_parallelizable",
            "model_parallel",
            "device_map",
            "_tp_plan",
            "_pp_plan",
            "_ep_plan",
        ),
        *(
            "_tp_size",
            "all_tied_weights_keys",
            "_tied_weights_keys",
            "_no_split_modules",
            "_keep_in_fp32_modules",
        ),
        *(
            "_keep_in_fp32_modules_strict",
            "hf_quantizer",
            "_hf_peft_config_loaded",
            "_auto_class",
            "_use_kernels",
        ),
        *(
            "_device_mesh",
            "_skip_keys_device_placement",
            "_keys_to_ignore_on_load_unexpected",
            "_is_stateful",
        ),
        *(
            "_keys_to_ignore_on_load_missing",
            "_keys_to_ignore_on_save",
            "is_quantized",
            "quantization_method",
        ),
        *(
            "deprecation_warnings",
            "_compiled_call_impl",
            "_weights_initialized",
            "_is_torch_compile",
        ),
        *("_is_accelerate_prepared", "_compile_kwargs"),
    )
)


def matters(cls: type, name: str) -> bool:
    """Whether another value of this attribute could change a prediction."""
    if name in BOOKKEEPING or any(
        issubclass(cls, known) and name in names for known, names in _TRAINING.items()
    ):
        return False
    homes = {base.__module__ for base in cls.__mro__} - {"builtins"}
    if any(home.partition(".")[0] not in _LIBRARIES for home in homes):
        return True  # a class of the user's: anything on it may be read somewhere
    if name == "num_labels":
        return False  # stays behind where head and config were changed, and only losses read it
    return name in _names_read(
        frozenset(home for home in homes if home.startswith(("transformers.models", "torch")))
    )


# Methods that make or print a module; a forward calls none of them.
_MAKERS = frozenset(
    ("__init__", "_init_weights", "reset_parameters", "extra_repr", "__repr__", "__setstate__")
)


@functools.cache
def _names_read(homes: frozenset[str]) -> frozenset[str]:
    """Names that these modules' code mentions outside constructors, and decorators they import."""
    found: set[str] = set()
    # Without nn.Module's own code: a name in it would count as read by every class.
    for home in homes - {"torch.nn.modules.module"}:
        for thing in list(vars(sys.modules.get(home, types)).values()):
            if isinstance(thing, type) and thing.__module__ == home:
                for name, member in vars(thing).items():
                    if name not in _MAKERS:
                        found |= _names_in(member)
            elif isinstance(thing, types.FunctionType):
                found |= _names_in(thing)
    return frozenset(found)


def _names_in(thing: Any) -> set[str]:
    function = getattr(thing, "fget", None) or getattr(thing, "__func__", None) or thing
    function = getattr(function, "func", function)  # a cached property
    found: set[str] = set()
    while function is not None:  # and what a decorator hides
        codes: list[Any] = [getattr(function, "__code__", None)]
        while codes:
            code = codes.pop()
            if isinstance(code, types.CodeType):
                # Texts, too: getattr(self, "name") mentions a name as a constant.
                found |= {
                    *code.co_names,
                    *(const for const in code.co_consts if isinstance(const, str)),
                }
                codes += code.co_consts  # of functions within
        function = getattr(function, "__wrapped__", None)
    return found


def is_users_hook(hook: Callable[..., Any]) -> bool:
    """Whether a hook is of none of the libraries that place hooks themselves."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in ("transformers", "accelerate")
