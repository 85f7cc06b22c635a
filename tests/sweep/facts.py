"""What two modules are compared by, found without the package under test.

Both sides of the sweep use this file: the process that saved a model, and the clean one that loaded
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from sweep.inputs import Arrays, output_tensors, tensors

Facts = dict[str, list[Any]]


def inventory(module: torch.nn.Module) -> Facts:
    """Path → kind, dtype, shape, stride, if in ``state_dict``, first path of that memory, SHA-256.

    Parameters, buffers, and every other tensor that attributes of modules reach, through containers
    and through plain objects of transformers. Strides of dimensions of size one mean nothing, and
    are left out.
    """
    listed = set(module.state_dict(keep_vars=True))
    first: dict[tuple[int, int], str] = {}
    found: Facts = {}
    for path, kind, tensor in tensors_of(module):
        # The address of the first element: equal for tied weights, and different for two views of
        # one storage.
        place = (
            (tensor.data_ptr(), tensor.untyped_storage().data_ptr())
            if tensor.numel()
            else (id(tensor), 0)
        )
        stride = [
            step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
        ]
        alias = first.setdefault(place, path)
        facts = [
            kind,
            str(tensor.dtype),
            list(tensor.shape),
            stride,
            path in listed,
            alias,
            digest(tensor),
        ]
        found.setdefault(path, facts)
    return found


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for path, parameter in module.named_parameters(remove_duplicate=False):
        yield path, "parameter", parameter
    for path, buffer in module.named_buffers(remove_duplicate=False):
        yield path, "buffer", buffer
    own = set(vars(torch.nn.Module()))
    seen: set[int] = set()
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name not in own:
                for full_name, tensor in output_tensors(value, f"{path}.{name}", seen):
                    yield full_name.removeprefix("."), "attribute", tensor


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the values."""
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def outputs(module: torch.nn.Module, arrays: Arrays, dtype: torch.dtype) -> Facts:
    """Path → dtype, shape and SHA-256 of each tensor that a forward pass gives, caches included."""
    with torch.inference_mode():
        result = module(**tensors(arrays, dtype))
    return {path: [str(t.dtype), list(t.shape), digest(t)] for path, t in output_tensors(result)}


def differences(wanted: Facts, found: Facts) -> list[str]:
    """Paths whose facts differ, in words."""
    return [
        f"{path}: wanted {wanted.get(path)}, found {found.get(path)}"
        for path in sorted(wanted.keys() | found.keys())
        if wanted.get(path) != found.get(path)
    ]
