"""No memory that nobody wrote survives a load.

Shown with an allocator that fills it with NaN or the largest int.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from artifacts import TEXTS

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.module import structure
from mlflow_safeflavor.module.build import build

pytest_plugins = "saved_models"


deterministic: Any = torch.utils.deterministic  # its attributes are made at run time


@pytest.fixture
def poison():
    """Inside, memory that is allocated and not written holds NaN, or the largest int."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


SHAPE = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}

MODELS = {
    "Bert": ("Bert", {}),
    "Roberta": ("Roberta", {}),
    "XLMRoberta": ("XLMRoberta", {}),
    "Electra": ("Electra", {"embedding_size": 16}),
    "MPNet": ("MPNet", {}),
    "Albert (shared layers)": ("Albert", {"embedding_size": 16, "num_hidden_groups": 1}),
    "DistilBert": ("DistilBert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}),
    "DebertaV2 (relative positions)": (
        "DebertaV2",
        {"relative_attention": True, "position_buckets": 8},
    ),
    "GPT2 (causal mask)": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "n_inner": 64},
    ),
    "ModernBert (rotary)": (
        "ModernBert",
        {"num_hidden_layers": 4, "global_attn_every_n_layers": 3},
    ),
    "Llama (rotary)": ("Llama", {"num_key_value_heads": 1}),
    "Qwen2 (rotary)": ("Qwen2", {"num_key_value_heads": 1}),
}


def make(name):
    """A seeded tiny model, random in every float tensor, so that no default hides a missing one."""
    torch.manual_seed(0)
    if name == "T5 (tied, relative bias)":
        shape = {
            "vocab_size": 30,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
        }
        model = transformers.T5EncoderModel(transformers.T5Config(**shape, pad_token_id=0))
    else:
        architecture, values = MODELS[name]
        config = getattr(transformers, f"{architecture}Config")(**{**SHAPE, **values})
        model = getattr(transformers, f"{architecture}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 5)
    return model.eval()


def tensors_of(module):
    """Path → tensor: parameters, buffers and plain attributes, tied ones under each name."""
    found = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    for prefix, child in module.named_modules(remove_duplicate=False):
        plain = {
            name: value for name, value in vars(child).items() if isinstance(value, torch.Tensor)
        }
        found |= {f"{prefix}.{name}": value for name, value in plain.items()}
    return found


def unwritten(tensor):
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).max).any())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32], ids=str
)
def test_the_poison_works(poison, dtype):
    assert unwritten(torch.empty(3, dtype=dtype))
    assert unwritten(torch.empty_like(torch.zeros(3, dtype=dtype)))
    assert unwritten(
        torch.nn.Linear(2, 2, device="meta", dtype=torch.float32).to_empty(device="cpu").weight
    )


def test_the_poison_reaches_what_is_built_before_it_is_filled(saved, poison):
    spec = mlflow_safeflavor.load_model(str(saved)).spec
    skeleton = build(structure.read_structure(Layout(saved), spec))
    poisoned = {name for name, tensor in tensors_of(skeleton).items() if unwritten(tensor)}
    assert "bert.encoder.layer.0.attention.self.query.weight" in poisoned
    assert len(poisoned) > 5


@pytest.mark.parametrize("name", [*MODELS, "T5 (tied, relative bias)"])
def test_every_tensor_is_written_and_equal_to_the_original(tmp_path, tiny_tokenizer, poison, name):
    model = make(name)
    mlflow_safeflavor.save_model(
        model, tmp_path / "model", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    expected, found = tensors_of(model), tensors_of(loaded.module)
    assert found.keys() == expected.keys()
    for path, tensor in found.items():
        assert not tensor.is_meta, path
        assert not unwritten(tensor), path
        assert tensor.dtype == expected[path].dtype, path
        assert torch.equal(tensor, expected[path]), path
    assert loaded.report.bit_identical
    assert len(loaded.predict(TEXTS)) == len(TEXTS)


def test_tensors_that_are_in_no_checkpoint_are_among_them():
    """Else the test above would show nothing about the tensors that other loaders lose."""
    kinds = {name: set(tensors_of(make(name))) - set(make(name).state_dict()) for name in MODELS}
    assert any(
        "inv_freq" in path for path in kinds["ModernBert (rotary)"] | kinds["Llama (rotary)"]
    )
    assert any("position_ids" in path for path in kinds["Bert"])


@pytest.mark.parametrize("saved_as", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("served_as", [None, "float32", "bfloat16", "float16"])
def test_no_cast_leaves_memory_unwritten(tmp_path, tiny_tokenizer, poison, saved_as, served_as):
    path = tmp_path / "model"
    model = make("ModernBert (rotary)")
    mlflow_safeflavor.save_model(
        model, path, tokenizer=tiny_tokenizer, dtype=saved_as, rehearse=False, graph="no"
    )
    module = mlflow_safeflavor.load_model(str(path), dtype=served_as).module
    steps = [getattr(torch, dtype) for dtype in (saved_as, served_as) if dtype]
    for name, parameter in module.named_parameters():
        expected = model.get_parameter(name)
        for dtype in steps:
            expected = expected.to(dtype)
        assert torch.equal(parameter, expected), name
    assert [name for name, tensor in tensors_of(module).items() if unwritten(tensor)] == []


def test_a_checkpoint_is_read_without_unwritten_memory(tmp_path, poison):
    for name in ("Bert", "ModernBert (rotary)", "Llama (rotary)"):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        found = tensors_of(mlflow_safeflavor.from_pretrained(tmp_path / name))
        for path, tensor in tensors_of(model).items():
            assert torch.equal(found[path], tensor), f"{name}: {path}"
