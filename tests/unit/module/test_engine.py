"""The seam between tasks and models: arrays in, arrays out, and nobody else's memory."""

import warnings

import numpy as np
import pytest
import torch

from mlflow_safeflavor.module import embedding, pooling
from mlflow_safeflavor.module.engine import ModuleEngine

CPU = torch.device("cpu")


class Leaky(torch.nn.Module):
    """Returns its weights, input and what it keeps, whole and in parts, and writes to its input."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3, 4))
        self.b: torch.Tensor
        self.register_buffer("b", torch.ones(4))
        self.cache = None

    def forward(self, x):
        x += 1
        self.cache = x * 2 if self.cache is None else self.cache
        ours = {
            "weight": self.w,
            "turned": self.w.t(),
            "row": self.w[1],
            "buffer": self.b[:2],
            "cache": self.cache,
        }
        return {**ours, "input": x, "part": x[:, 1:], "fresh": x @ self.w.t(), "number": 3}


@pytest.mark.parametrize(
    "inference", [False, True], ids=["weights", "weights made in inference mode"]
)
def test_nobody_elses_memory_can_be_written_through_an_output(inference):
    with torch.inference_mode(inference):
        module = Leaky().eval()
    engine, x = ModuleEngine(module, CPU, torch.float32), np.zeros((2, 4), np.float32)
    wanted = {name: array.copy() for name, array in engine({"x": x}).items()}
    found = engine({"x": x})
    for array in found.values():
        assert not np.shares_memory(array, x)
        if array.flags.writeable:
            array *= 7
    again = engine({"x": x})
    assert wanted.keys() == again.keys()
    assert all(np.array_equal(wanted[name], again[name]) for name in wanted)
    assert np.array_equal(x, np.zeros((2, 4))), "forward wrote to its caller's array"


def test_what_cannot_be_written_is_taken_without_a_warning():
    x = np.zeros((2, 4), np.float32)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            ModuleEngine(Leaky(), CPU, torch.float32)({"x": x})["input"].tolist()
            == np.ones((2, 4)).tolist()
        )


class Kinds(torch.nn.Module):
    def forward(self, **inputs):
        self.seen = {name: tensor.dtype for name, tensor in inputs.items()}
        return {name: tensor * 1 for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    ("serving", "answered"),
    [
        (torch.float32, "float32"),
        (torch.float64, "float64"),
        (torch.bfloat16, "float32"),
        (torch.float16, "float32"),
    ],
    ids=str,
)
def test_floating_point_numbers_come_in_the_serving_dtype_and_whole_ones_as_they_are(
    serving, answered
):
    whole = {name: np.ones(2, name) for name in ("int64", "int32", "uint8", "bool")}
    floating = {name: np.array([1 / 3, 2.0], name) for name in ("float16", "float32", "float64")}
    module = Kinds()
    found = ModuleEngine(module, CPU, serving)({**whole, **floating})
    assert module.seen == {name: getattr(torch, name) for name in whole} | dict.fromkeys(
        floating, serving
    )
    assert {name: str(array.dtype) for name, array in found.items()} == {
        **{name: "int64" if name == "bool" else name for name in whole},
        **dict.fromkeys(floating, answered),
    }
    wide = torch.tensor(floating["float32"]).to(serving).double().numpy()
    assert np.array_equal(found["float32"].astype(np.float64), wide), "widening is exact"


@pytest.mark.parametrize("kind", pooling.POOLINGS)
def test_poolings_are_those_of_the_module_for_any_padding(kind):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(6, 9, 5)).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [4], [1], [7], [0], [9]])
    mask[3] = mask[3][::-1]  # on the left
    mask[5, 2:4] = False  # what is not counted within a text
    wanted = embedding.pool(torch.tensor(hidden), torch.tensor(mask), [kind]).numpy()
    hidden[~mask & mask.any(axis=1, keepdims=True)] = np.nan
    found = np.array(
        [pooling.pool(row, real, [kind]) for row, real in zip(hidden, mask, strict=True)]
    )
    assert found.dtype == np.float32
    assert np.allclose(found, wanted, atol=1e-6)
    for row, real in zip(hidden[:3], mask[:3], strict=True):
        alone = pooling.pool(row[: real.sum()], real[: real.sum()], [kind])
        assert np.array_equal(pooling.pool(row, real, [kind]), alone), "its bits depend on padding"
