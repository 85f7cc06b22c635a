"""The surroundings in which constructors run.

Real memory, float32, no random values, and no trace left.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, MarianConfig, MarianModel

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.inventory import take_inventory
from mlflow_safeflavor.module.memory import real_memory
from mlflow_safeflavor.module.slots import find_slots

NOTHING = Inventory({}, {}, {})
RANDOM = [
    "uniform_",
    "normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
]


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", RANDOM)
def test_random_initialisers_leave_their_tensor_alone(name):
    tensor = torch.full((4, 4), 7.0)
    with real_memory():
        assert getattr(nn.init, name)(tensor) is tensor
    assert (tensor == 7).all()
    with real_memory(initialise=True):
        getattr(nn.init, name)(tensor)
    assert (tensor != 7).any()


def test_truncated_values_are_drawn_and_end():
    """Torch draws until every value is within bounds, so what it draws with must not be skipped."""
    with real_memory():
        tensor = nn.init.trunc_normal_(torch.full((64,), 7.0), a=-2.0, b=2.0)
    assert tensor.abs().max() <= 2 or (tensor == 7).all()


def test_the_random_state_is_left_as_it_was():
    before = torch.get_rng_state()
    with real_memory(initialise=True):
        nn.Linear(3, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [
    lambda: torch.linspace(0, 1, 3), lambda: torch.arange(0.0, 3.0), lambda: torch.tensor([0.1]),
    lambda: torch.zeros(3), lambda: torch.full((3,), 0.1), lambda: nn.Linear(3, 3).weight,
])  # fmt: skip
def test_float32_whatever_the_default_is(half_by_default, make):
    with real_memory(inventory=NOTHING):
        tensor = make()
        assert torch.get_default_dtype() == torch.bfloat16, "another thread may rely on it"
    torch.set_default_dtype(torch.float32)
    assert tensor.dtype == torch.float32
    expected = make()
    assert expected.shape == tensor.shape
    assert expected.requires_grad or torch.equal(tensor, expected), (
        "first rounded to the default, then cast"
    )


@pytest.mark.parametrize(("make", "dtype"), [
    (lambda: torch.arange(3), torch.int64), (lambda: torch.tensor([True]), torch.bool),
    (lambda: torch.zeros(3, dtype=torch.float16), torch.float16),
    (lambda: torch.as_tensor(torch.zeros(3, dtype=torch.float64)), torch.float64),
])  # fmt: skip
def test_what_has_a_dtype_of_its_own_keeps_it(half_by_default, make, dtype):
    with real_memory(inventory=NOTHING):
        assert make().dtype == dtype


def test_what_is_initialised_without_chance_is_initialised():
    """A constructor's own values are what a checkpoint is compared with."""
    config = MarianConfig(
        vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, pad_token_id=0
    )
    config.encoder_attention_heads = config.decoder_attention_heads = 2
    config.max_position_embeddings, config.decoder_start_token_id = 4, 0
    with real_memory():
        positions = MarianModel(config).encoder.embed_positions.weight
    assert torch.allclose(positions[1, 0].double(), torch.tensor(1.0).double().sin())
    with real_memory(inventory=take_inventory(find_slots(MarianModel(config)))[0]):
        model = MarianModel(config)
    assert model.encoder.layers[0]._is_hf_initialized


def test_another_default_dtype_is_set_and_put_back():
    with real_memory(torch.float16):
        assert nn.Linear(1, 1).weight.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32


def test_an_outer_device_reaches_nothing():
    with torch.device("meta"):
        with real_memory():
            assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1).is_meta


def test_submodules_of_other_threads_are_initialised_as_ever():
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    made = []
    with real_memory(inventory=NOTHING):
        thread = threading.Thread(target=lambda: made.append(BertModel(config)))
        thread.start()
        thread.join()
        made.append(BertModel(config))
    deviations = [float(model.pooler.dense.weight.detach().std()) for model in made]
    assert 0.01 < deviations[0] < 0.04, "the initializer_range of a new model is 0.02"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert 0.01 < float(BertModel(config).pooler.dense.weight.detach().std()) < 0.04, (
            "nothing stays behind"
        )


def test_more_memory_than_the_stored_tensors_take_is_refused():
    inventory, _ = take_inventory(find_slots(nn.Linear(3, 3)))
    with real_memory(inventory=inventory):
        nn.Linear(300, 300)
        with pytest.raises(StructureError, match="far more memory"):
            nn.Linear(40_000, 40_000)
    with real_memory(inventory=inventory):
        for _ in range(1020):
            torch.zeros(1)
        with pytest.raises(StructureError, match="far more memory"):
            torch.zeros(1)
