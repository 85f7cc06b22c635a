"""``materialize``: every tensor on meta gets its value, or is named and nothing changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import differing
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import mlflow_safeflavor
from mlflow_safeflavor.checkpoints.materialize import materialize
from mlflow_safeflavor.errors import (
    IntegrityError,
    PlacementError,
    StructureError,
    TrustError,
    WeightsError,
)
from mlflow_safeflavor.module.slots import find_meta, find_slots


def on_meta(model):
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


class Shared(nn.Module):
    """A shared module, an undeclared tie, a buffer outside the state dict, arguments not stored."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = self.first
        self.third = nn.Linear(width, width, bias=False)
        self.third.weight = self.first.weight
        self.register_buffer("mean", torch.ones(width))


class Cached(Shared):
    """With a buffer that the state dict leaves out."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("steps", torch.arange(width), persistent=False)


def made(cls, *args, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return cls(*args).eval()


# Sources.


def test_every_kind_of_checkpoint(tiny_bert, tmp_path):
    model = tiny_bert()
    state = model.state_dict()
    model.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    save_file(state, tmp_path / "one.safetensors")
    torch.save(state, tmp_path / "one.pt")
    torch.save(state, tmp_path / "one.bin")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    for source in (
        state, tmp_path / "folder", str(tmp_path / "shards"), index, tmp_path / "one.safetensors",
        tmp_path / "one.pt",
        tmp_path / "one.bin",
    ):  # fmt: skip
        empty = on_meta(model)
        assert materialize(empty, source) is empty
        assert differing(empty, model) == []


def test_a_state_dict_is_copied_not_shared(tiny_bert):
    model = tiny_bert()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    filled = materialize(on_meta(model), state)
    for value in state.values():
        value.zero_()
    assert differing(filled, model) == []


def test_sources_that_cannot_be_used(tiny_bert, tmp_path):
    empty = on_meta(tiny_bert())
    with pytest.raises(StructureError, match="no such checkpoint"):
        materialize(empty, tmp_path / "nowhere.safetensors")
    with pytest.raises(StructureError, match="no model weights"):
        materialize(empty, tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(IntegrityError, match="cannot be read"):
        materialize(empty, tmp_path / "broken.safetensors")
    torch.save({"hook": Path}, tmp_path / "code.pt")
    with pytest.raises(TrustError, match="nothing of it was run"):
        materialize(empty, tmp_path / "code.pt")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "lightning.pt")
    with pytest.raises(WeightsError, match="something else than tensors"):
        materialize(empty, tmp_path / "lightning.pt")
    with pytest.raises(WeightsError, match="on the meta device"):
        materialize(empty, empty.state_dict())
    assert len(find_meta(find_slots(empty))) == len(find_slots(empty))


@pytest.mark.parametrize("name", ["../outside.safetensors", "gone.safetensors"])
def test_an_index_with_a_bad_shard(tiny_bert, tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"classifier.weight": name}}))
    with pytest.raises(IntegrityError, match="shard"):
        materialize(on_meta(tiny_bert()), tmp_path)


# Wholly and in part.


def test_only_what_is_on_meta_is_filled(tiny_bert):
    model = tiny_bert()
    partly = on_meta(model)
    partly.bert.embeddings.word_embeddings = nn.Embedding(30, 32)
    kept = partly.bert.embeddings.word_embeddings.weight
    materialize(partly, model.state_dict())
    assert partly.bert.embeddings.word_embeddings.weight is kept
    assert differing(partly, model) == ["bert.embeddings.word_embeddings.weight"]


def test_a_module_without_meta_stays_as_it_is(tiny_bert):
    model = tiny_bert()
    assert differing(materialize(copy.deepcopy(model), model.state_dict()), model) == []


def test_ties_and_shared_modules():
    model, empty = made(Shared, 8), made(Shared, 8, device="meta")
    filled: Any = materialize(empty,
        {k: v for k, v in model.state_dict().items() if k.split(".")[0] in ("third", "mean")}
                         | {"second.bias": model.first.bias.detach()})  # fmt: skip
    assert filled.second is filled.first
    assert filled.third.weight is filled.first.weight
    assert isinstance(filled.first.weight, nn.Parameter)
    assert filled.first.weight.requires_grad
    assert differing(filled, model) == []


def test_a_head_tied_to_an_embedding_that_is_there(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = made(LlamaForCausalLM, config)
    empty = on_meta(model)
    empty.set_input_embeddings(nn.Embedding(64, 32))
    empty.lm_head.weight = nn.Parameter(torch.ones(64, 32, device="meta"))
    state = {
        key: value
        for key, value in model.state_dict().items()
        if "embed" not in key and "lm_head" not in key
    }
    materialize(empty, state)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert torch.equal(empty.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_ties_with_different_values():
    model = made(Shared, 8)
    state = {**model.state_dict(), "third.weight": torch.zeros(8, 8)}
    with pytest.raises(WeightsError, match="are tied in the model, but have different values"):
        materialize(made(Shared, 8, device="meta"), state)


def test_a_base_checkpoint_for_a_class_with_the_prefix(tiny_bert):
    base = tiny_bert(None)
    empty = on_meta(tiny_bert())
    empty.classifier = nn.Linear(32, 2)
    materialize(empty, base.state_dict())
    assert differing(empty.bert, base) == []


# Refusals, after which nothing has changed.


def refused(module, state, message):
    before = len(find_meta(find_slots(module)))
    with pytest.raises(WeightsError, match=message):
        materialize(module, state)
    assert len(find_meta(find_slots(module))) == before


def test_refusals_name_the_tensor_and_change_nothing(tiny_bert):
    model = tiny_bert()
    state = model.state_dict()
    refused(
        on_meta(model),
        {k: v for k, v in state.items() if k != "classifier.bias"},
        "missing .*classifier.bias",
    )
    refused(on_meta(model), {**state, "extra": torch.ones(1)}, r"1 unexpected \(extra\)")
    refused(
        on_meta(model),
        {**state, "classifier.bias": torch.ones(3)},
        r"classifier.bias has shape \[3\], wanted \[2\]",
    )
    refused(on_meta(model), {f"module.{k}": v for k, v in state.items()}, "start with 'module.'")
    refused(made(Cached, 8, device="meta"), made(Cached, 8).state_dict(), r"no data(?s:.*)steps")


def test_a_state_dict_may_hold_more_than_state_dict_lists():
    model = made(Cached, 8)
    filled = materialize(
        made(Cached, 8, device="meta"), {**model.state_dict(), "steps": torch.arange(8)}
    )
    assert differing(filled, model) == []


class NoiseConfig(PretrainedConfig):
    model_type = "noise-for-tests"


class Noise(PreTrainedModel):
    """Draws a buffer that no checkpoint holds."""

    config_class = NoiseConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Linear(4, 4)
        self.register_buffer("noise", torch.randn(8), persistent=False)
        self.post_init()


def test_a_buffer_that_is_random_in_the_constructor():
    model = made(Noise, NoiseConfig())
    refused(on_meta(model), model.state_dict(), r"no data(?s:.*)noise(?s:.*)random")


# Device and dtype.


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices(tiny_bert, device):
    model = tiny_bert()
    assert differing(materialize(on_meta(model), model.state_dict(), device=device), model) == []


@pytest.mark.parametrize("device", [7, "cuda:7", "meta", torch.device("meta"), "no-such"])
def test_devices_that_do_not_exist(tiny_bert, device):
    empty = on_meta(tiny_bert())
    with pytest.raises(PlacementError):
        materialize(empty, tiny_bert().state_dict(), device=device)
    assert find_meta(find_slots(empty))


def test_dtypes(tiny_bert):
    model = tiny_bert()
    half = materialize(on_meta(model), model.state_dict(), dtype="bfloat16")
    assert differing(half, copy.deepcopy(model).to(torch.bfloat16)) == []
    kept = materialize(on_meta(model).to(torch.bfloat16), model.state_dict())
    assert differing(kept, half) == []
    with pytest.raises(PlacementError, match="Not a serving dtype"):
        materialize(on_meta(model), model.state_dict(), dtype="auto")


def test_inside_a_meta_context(tiny_bert, tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        filled = materialize(BertForSequenceClassification(model.config), tmp_path)
    assert differing(filled, model) == []


def test_the_package_never_allocates_in_the_place_of_values():
    """``to_empty`` and ``empty_like`` give memory that nobody wrote."""
    for file in Path(mlflow_safeflavor.__file__).parent.rglob("*.py"):
        code = "\n".join(
            line.split("#")[0] for line in file.read_text(encoding="utf-8").splitlines()
        )
        assert "to_empty(" not in code, file
        assert "empty_like(" not in code, file
