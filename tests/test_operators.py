"""Operators whose kernels trust their arguments: what fits is answered with torch's bits, what does not is refused."""

from __future__ import annotations

import pytest
import torch

from mlflow_safeflavor import operators


def of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


NORM, ONE = of(4), of(1)
HEADS = of(2, 4, 9, 8)
PIXELS, PLACES = of(2, 4, 6, 6), of(2, 5, 5, 2)
WEIGHT_NORM, BATCH_NORM = "aten._weight_norm.default", "aten._native_batch_norm_legit_no_training.default"
ATTENTION = "aten.scaled_dot_product_attention.default"
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
GRIDS = ("aten.grid_sampler.default", "aten.grid_sampler_2d.default")

FITS = [
    (WEIGHT_NORM, (of(4, 3), of(4, 1)), {}),
    (WEIGHT_NORM, (of(4, 3, 2), of(1, 1, 2), 2), {}),
    (WEIGHT_NORM, (of(4, 3, 2), of(1, 3, 1), 1), {}),
    (WEIGHT_NORM, (of(4, 3), of(1), -1), {}),
    (ATTENTION, (HEADS, of(2, 4, 7, 8), of(2, 4, 7, 8)), {}),
    (ATTENTION, (HEADS, of(1, 4, 7, 8), of(1, 4, 7, 5)), {"attn_mask": of(1, 7)}),
    (ATTENTION, (of(9, 8), of(7, 8), of(7, 3), None, 0.0, False), {}),
    (FLASH, (HEADS, of(2, 4, 7, 8), of(2, 4, 7, 8)), {}),
    (FLASH, (HEADS, HEADS, HEADS), {"attn_mask": of(2, 1, 1, 9), "scale": 0.5}),
    (BATCH_NORM, (PIXELS, NORM, None, NORM, NORM.abs(), 0.1, 1e-5), {}),
    *(
        (name, (PIXELS, PLACES, mode, padding, False), {})
        for name in GRIDS
        for mode in range(3)
        for padding in range(3)
    ),
]
LIES = [
    (WEIGHT_NORM, (torch.zeros(0, 3), torch.zeros(0, 3), 1), {}),
    (WEIGHT_NORM, (of(2, 3, 4), of(1), 2), {}),
    (WEIGHT_NORM, (of(4, 3), of(4, 1).bfloat16()), {}),
    (ATTENTION, (HEADS, of(2, 4, 90, 8), of(2, 4, 1, 8)), {}),
    (ATTENTION, (), {"query": HEADS, "key": of(2, 4, 90, 8), "value": of(2, 4, 1, 8)}),
    (FLASH, (HEADS, of(1, 1, 3, 8), of(1, 1, 1, 8)), {}),
    (FLASH, (HEADS, of(2, 2, 9, 8), of(2, 2, 9, 8)), {}),
    (FLASH, (HEADS, HEADS, HEADS), {"attn_mask": of(5, 7)}),
    (BATCH_NORM, (PIXELS, NORM, NORM, ONE, ONE, 0.1, 1e-5), {}),
    (BATCH_NORM, (PIXELS, ONE, None, NORM, NORM, 0.1, 1e-5), {}),
    *((name, (PIXELS, PLACES, 77, 0, False), {}) for name in GRIDS),
    *((name, (PIXELS, PLACES, 0, -1, False), {}) for name in GRIDS),
]


def names(cases):
    return [f"{i} {name.split('.')[1]}" for i, (name, _, _) in enumerate(cases)]


@pytest.mark.parametrize(("name", "args", "kwargs"), FITS, ids=names(FITS))
def test_what_fits_has_the_bits_of_torch(name, args, kwargs):
    _, packet, overload = name.split(".")
    wanted = getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)
    found = operators.signature_of(name).call(*args, **kwargs)
    wanted, found = (list(one) if isinstance(one, tuple) else [one] for one in (wanted, found))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize(("name", "args", "kwargs"), LIES, ids=names(LIES))
def test_what_does_not_fit_never_reaches_the_kernel(name, args, kwargs):
    # The second is torch's own, of a mask that is only looked at.
    with pytest.raises((ValueError, RuntimeError), match=r"that do not fit|The expanded size of the tensor"):
        operators.signature_of(name).call(*args, **kwargs)
