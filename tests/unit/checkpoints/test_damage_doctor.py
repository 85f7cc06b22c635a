"""The save-time doctor: silent on sound models of any kind and dtype, loud on damaged ones."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mlflow_safeflavor.checkpoints import damage as doctor
from mlflow_safeflavor.checkpoints.damage import format_damage
from mlflow_safeflavor.errors import InputError, WeightsError
from mlflow_safeflavor.module.subject import Subject


def find_damage(module):
    return doctor.find_damage(Subject.of(module))


def require_undamaged(module, *how):
    doctor.require_undamaged(Subject.of(module), *how)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TINY = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers",
        "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"),
        2),
    **dict.fromkeys(("num_key_value_heads", "num_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
        "d_ff", "ffn_dim"), 64),
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "image_size"), 32),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    "num_local_experts": 2, "d_kv": 16, "word_embed_proj_dim": 32, "d_inner": 64, "patch_size": 16,
}  # fmt: skip

CLASSES = """
    AlbertForMaskedLM BartForConditionalGeneration BertForSequenceClassification BloomForCausalLM
    CLIPTextModel CamembertForMaskedLM DebertaModel DebertaV2ForSequenceClassification
    DistilBertForMaskedLM ElectraForPreTraining FalconForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM
    GemmaForCausalLM LlamaForCausalLM MPNetModel M2M100ForConditionalGeneration MarianMTModel
    MistralForCausalLM MixtralForCausalLM OPTForCausalLM PhiForCausalLM Qwen2ForCausalLM
    RobertaForSequenceClassification RoFormerForMaskedLM SiglipVisionModel
    T5ForConditionalGeneration ViTModel XLMRobertaModel
""".split()


def tiny(name: str) -> transformers.PreTrainedModel:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**TINY)).eval()


def tiny_llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **config})).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    ).eval()


# Sound models.


# DeBERTa in transformers 4
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_silent_on_fresh_models(name):
    model = tiny(name)
    assert {dtype: find_damage(copy.deepcopy(model).to(dtype)) for dtype in DTYPES} == {
        dtype: [] for dtype in DTYPES
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_silent_on_real_weights(minilm_folder, dtype):
    model = BertModel.from_pretrained(minilm_folder, dtype=dtype)
    assert find_damage(model) == []
    assert find_damage(model.float()) == []  # rounded once, but sound


def test_silent_on_models_built_in_half_precision(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for dtype in DTYPES:
        assert find_damage(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == []


def test_silent_on_odd_but_sound_values():
    model = tiny_gpt2()
    model.transformer.wte.weight.data[10:] = 0  # a vocabulary padded to a round number
    model.transformer.h[0].ln_1.weight.data.fill_(1)
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    model.register_buffer("limits", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))
    assert find_damage(model) == []


def test_silent_on_tied_weights_copied_apart():
    model = tiny_gpt2()
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    assert find_damage(model) == []


class Learned(nn.Module):
    """Nobody knows how it was constructed."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width, width))
        self.register_buffer("noise", torch.randn(width), persistent=False)
        self.extra = torch.arange(width)


def test_silent_on_modules_that_cannot_be_constructed_again():
    assert find_damage(Learned(16)) == []


# Damaged ones.


def test_unwritten_memory_with_a_poisoned_allocator():
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            model = tiny_llama().to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    damage = find_damage(model)
    assert any("rotary_emb.inv_freq: this non-persistent buffer differs" in line for line in damage)
    assert any("q_proj.weight: holds NaN" in line for line in damage)


def test_unwritten_memory_as_it_comes():
    """Fresh pages are zero, and what was freed before holds anything.

    The buffers give it away either way.
    """
    with torch.device("meta"):
        model = tiny_llama().to_empty(device="cpu")
    assert find_damage(model)


@pytest.mark.parametrize(
    "raw",
    [
        bytes(8),  # fresh pages
        b"\xcd" * 8,  # allocators that mark what they give
        b"\xaa" * 8,
        (0x00007F3A5C0012D0).to_bytes(8, "little"),  # addresses
        b"\x01\x00\x00\x00" * 2,  # small integers
        b"\xff" * 8,
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_bytes_in_a_weight(tiny_bert, raw, dtype):
    model = tiny_bert().to(dtype)
    weight = model.classifier.weight
    weight.data = torch.frombuffer(bytearray(raw * (weight.nbytes // 8)), dtype=dtype).reshape(
        weight.shape
    )
    assert [line.split(":")[0] for line in find_damage(model)] == ["classifier.weight"]


def test_random_bytes_in_a_weight(tiny_bert):
    model = tiny_bert()
    weight = model.bert.encoder.layer[0].output.dense.weight
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (weight.nbytes,), dtype=torch.uint8, generator=generator)
    weight.data = raw.view(torch.float32).reshape(weight.shape).nan_to_num(0)
    assert [line.split(":")[0] for line in find_damage(model)] == [
        "bert.encoder.layer.0.output.dense.weight"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e35])
def test_one_bad_value(tiny_bert, value):
    model = tiny_bert()
    model.classifier.weight.data[1, 7] = value
    assert [line.split(":")[0] for line in find_damage(model)] == ["classifier.weight"]


def test_denormals(tiny_bert):
    model = tiny_bert()
    model.classifier.bias.data[:] = torch.tensor([4.5e-41, 0.1])
    assert "classifier.bias: 50% of its values are smaller than" in find_damage(model)[0]


def test_a_buffer_that_its_constructor_would_not_compute(tiny_bert):
    model = tiny_llama()
    model.model.rotary_emb.inv_freq *= 1.01
    # In transformers 4 a plain attribute is the same tensor.
    assert find_damage(model)[:1] == [
        "model.rotary_emb.inv_freq: this non-persistent buffer differs from what its constructor "
        "computes"
    ]
    bert = tiny_bert()
    bert.bert.embeddings.position_ids[0, 3] = 5
    assert find_damage(bert)[0].startswith("bert.embeddings.position_ids")


def test_a_broken_tie():
    model = tiny_gpt2()
    model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    assert find_damage(model) == [
        "lm_head.weight: is declared to be tied to transformer.wte.weight, but has other values"
    ]


def test_meta():
    with torch.device("meta"):
        model = tiny_gpt2()
    damage = find_damage(model)
    assert "lm_head.weight: is on the meta device, it has no values" in damage


def test_modules_that_cannot_be_constructed_again_are_judged_by_value():
    model = Learned(16)
    model.scale.data[0, 0] = float("nan")
    assert find_damage(model) == ["scale: holds NaN"]


# The verdict.


def test_error_and_warning(tiny_bert):
    model = tiny_bert()
    require_undamaged(model)
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(
        WeightsError, match=r"looks damaged already(?s:.*)classifier.bias: holds NaN"
    ) as caught:
        require_undamaged(model)
    assert "from_pretrained" in str(caught.value)
    with pytest.warns(UserWarning, match="looks damaged already"):
        require_undamaged(model, "warn")
    with pytest.raises(InputError, match="on_damage"):
        require_undamaged(model, "ignore")


def test_long_findings_are_cut():
    assert format_damage([str(i) for i in range(12)], most=2).endswith("… and 10 more")


def test_it_only_looks(tiny_bert):
    model = tiny_bert().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_damage(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())
