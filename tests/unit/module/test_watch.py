"""Marks in memory that a constructor gets: dense in small tensors, in large ones few pages."""

from __future__ import annotations

import pytest
import torch

from mlflow_safeflavor.module.watch import FIRST_MARK, SECOND_MARK, Watch


def marked(numel, dtype=torch.float32, mark=FIRST_MARK):
    with Watch(torch.get_default_dtype(), mark):
        return torch.empty(numel, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_all_of_a_small_tensor_is_marked(dtype):
    assert (marked(4096, dtype) == FIRST_MARK).all()
    assert (marked(4096, dtype, SECOND_MARK) == SECOND_MARK).all()


def test_a_larger_one_is_marked_at_4096_places_and_at_its_end():
    tensor = marked(10**6)
    assert (tensor[:: 10**6 // 4096] == FIRST_MARK).all()
    assert tensor[-1] == FIRST_MARK


@pytest.mark.parametrize("megabytes", [16, 128])
def test_of_a_large_one_few_pages_are_touched(megabytes):
    """Other pages are no memory yet: a save makes two of each model that it holds."""
    elements = megabytes * 2**20 // 4
    tensor = marked(elements, mark=7)  # the others may have been where this one is
    places = max(512, megabytes * 16)
    assert (tensor[:: elements // places] == 7).all()
    assert tensor[-1] == 7
    pages = tensor.view(-1, 1024)  # of 4 kB
    touched = (pages == 7).any(dim=1).float().mean()
    assert touched < 0.2
