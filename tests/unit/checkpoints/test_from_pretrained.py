"""``from_pretrained``.

Every tensor from the checkpoint or the constructor, or an error that names it.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from architectures import differing
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from mlflow_safeflavor.checkpoints.from_pretrained import from_pretrained
from mlflow_safeflavor.errors import (
    InputError,
    IntegrityError,
    PlacementError,
    StructureError,
    TrustError,
    WeightsError,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture
def checkpoint(tiny_bert, tmp_path):
    """A tiny classifier's checkpoint folder, and the model."""
    model = tiny_bert()
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", model


def rewrite(folder, change):
    """Put other tensors into the checkpoint's file."""
    file = folder / "model.safetensors"
    state = change(load_file(file))
    save_file(
        {key: value.contiguous() for key, value in state.items()}, file, metadata={"format": "pt"}
    )


# What comes out.


def test_the_real_model_is_what_transformers_loads(minilm_folder):
    plain = BertModel.from_pretrained(minilm_folder, dtype=torch.float32)
    loaded = from_pretrained(minilm_folder)
    assert type(loaded) is BertModel
    assert not loaded.training
    assert differing(loaded, plain) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (ViTModel, lambda: ViTConfig(**TINY, image_size=32)),  # other key names in the file
        # fused experts
        (MixtralForCausalLM, lambda: MixtralConfig(**TINY, vocab_size=60, num_local_experts=2)),
        # tied
        (GPT2LMHeadModel, lambda: GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)),
        # Keeps submodules in float32, and computes sinusoids that the checkpoint leaves out.
        (T5ForConditionalGeneration,
            lambda: T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        (
            MarianMTModel,
            lambda: MarianConfig(
                vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=59,
                decoder_start_token_id=59, max_position_embeddings=32,
            ),
        ),
    ],
)  # fmt: skip
def test_native_classes_are_what_transformers_loads(cls, config, dtype, tmp_path):
    torch.manual_seed(0)
    cls(config()).save_pretrained(tmp_path)
    plain = cls.from_pretrained(tmp_path, dtype=dtype)
    loaded: Any = from_pretrained(tmp_path, dtype=dtype)
    assert differing(loaded, plain) == []
    assert loaded.config.to_dict() == plain.config.to_dict()


def test_tied_weights_are_one_object(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)).save_pretrained(
        tmp_path
    )
    loaded: Any = from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_what_is_loaded_does_not_look_at_the_file(checkpoint):
    folder, model = checkpoint
    loaded = from_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert differing(loaded, model) == []


def test_shards_and_pickled_state_dicts(checkpoint, tmp_path):
    folder, model = checkpoint
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert differing(from_pretrained(tmp_path / "shards"), model) == []
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert differing(from_pretrained(folder), model) == []


def test_constructor_arguments_and_config_changes(checkpoint):
    folder, model = checkpoint
    loaded = from_pretrained(
        folder, model_class=BertModel, add_pooling_layer=False, attn_implementation="eager",
        hidden_dropout_prob=0.5,
        drop=("classifier.*", "bert.pooler.*"),
    )  # fmt: skip
    assert loaded.pooler is None
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.hidden_dropout_prob == 0.5
    assert torch.equal(
        loaded.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight
    )


def test_generation_config_comes_along(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded: Any = from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7


# Both ways strict.


def test_missing_keys_are_named(checkpoint):
    folder, _ = checkpoint
    rewrite(folder, lambda state: {k: v for k, v in state.items() if k != "classifier.bias"})
    with pytest.raises(WeightsError, match=r"1 missing \(classifier.bias\)"):
        from_pretrained(folder)


def test_unexpected_keys_are_named(checkpoint):
    folder, _ = checkpoint
    rewrite(folder, lambda state: {**state, "extra.weight": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"1 unexpected \(extra.weight\)"):
        from_pretrained(folder)
    assert from_pretrained(folder, drop=("extra.*",)) is not None


def test_mismatched_shapes_are_named(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(
        WeightsError, match=r"classifier.weight has shape \[2, 32\], wanted \[5, 32\]"
    ):
        from_pretrained(folder, num_labels=5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "a.b."])
def test_prefixes_are_named(checkpoint, prefix):
    folder, _ = checkpoint
    rewrite(folder, lambda state: {prefix + key: value for key, value in state.items()})
    with pytest.raises(WeightsError, match=f"start with {prefix!r}") as caught:
        from_pretrained(folder)
    assert f"take {prefix!r} off the keys" in str(caught.value)


def test_tied_in_the_model_but_different_in_the_checkpoint(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60))
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {**state, "lm_head.weight": torch.ones(60, 32)})
    with pytest.raises(WeightsError, match="are tied in the model, but have different values"):
        from_pretrained(tmp_path)
    untied: Any = from_pretrained(tmp_path, tie_word_embeddings=False)
    assert torch.equal(untied.lm_head.weight, torch.ones(60, 32))


def test_another_model_type_is_refused_although_all_keys_fit(checkpoint, tiny_bert):
    folder, _ = checkpoint
    tiny_bert(None).save_pretrained(folder)
    with pytest.raises(StructureError, match="another model type"):
        from_pretrained(folder, model_class=RobertaModel)


def test_integers_in_the_place_of_weights(checkpoint):
    folder, _ = checkpoint
    rewrite(folder, lambda state: {**state, "classifier.bias": torch.zeros(2, dtype=torch.int8)})
    with pytest.raises(WeightsError, match=r"classifier.bias is int8, wanted float32"):
        from_pretrained(folder)


def test_too_large_for_float16(checkpoint):
    folder, _ = checkpoint
    rewrite(folder, lambda state: {**state, "classifier.bias": torch.full((2,), 1e6)})
    with pytest.raises(WeightsError, match="too large for float16"):
        from_pretrained(folder, dtype="float16")


def test_old_checkpoints_with_a_stored_position_buffer(checkpoint):
    folder, model = checkpoint
    rewrite(folder, lambda state: {**state, "bert.embeddings.position_ids": torch.arange(32)[None]})
    assert differing(from_pretrained(folder), model) == []


# Fresh heads.


def test_a_fresh_head_is_initialised_on_real_memory(checkpoint, tiny_bert):
    folder, _ = checkpoint
    base = tiny_bert(None)
    base.save_pretrained(folder)
    torch.use_deterministic_algorithms(True)  # unwritten memory holds NaN now
    try:
        torch.manual_seed(3)
        loaded: Any = from_pretrained(
            folder, model_class=BertForSequenceClassification, new=("classifier.*",)
        )
        again: Any = from_pretrained(
            folder, model_class=BertForSequenceClassification, new=("classifier.*",)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert differing(loaded.bert, base) == []
    assert 0.005 < loaded.classifier.weight.std() < 0.05
    assert torch.equal(loaded.classifier.bias, torch.zeros(2))
    assert not torch.equal(loaded.classifier.weight, again.classifier.weight)


def test_new_takes_the_checkpoints_head_where_it_fits_and_a_fresh_one_where_not(checkpoint):
    folder, model = checkpoint
    assert differing(from_pretrained(folder, new=("classifier.*",)), model) == []
    fresh: Any = from_pretrained(folder, new=("classifier.*",), num_labels=5)
    assert fresh.classifier.weight.shape == (5, 32)
    assert torch.isfinite(fresh.classifier.weight).all()


def test_a_head_from_another_head(checkpoint):
    folder, model = checkpoint
    other: Any = from_pretrained(
        folder, model_class=BertForMaskedLM, new=("cls.*",), drop=("classifier.*", "bert.pooler.*")
    )
    assert differing(other.bert.encoder, model.bert.encoder) == []
    assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


class TinyConfig(PretrainedConfig):
    model_type = "tiny-for-tests"


class Unwritten(PreTrainedModel):
    """Allocates a head that nothing initialises."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Linear(4, 4)
        self.head = torch.nn.Parameter(torch.empty(4, 100))
        self.post_init()


class Noise(PreTrainedModel):
    """Draws a buffer that no checkpoint holds."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Linear(4, 4)
        self.register_buffer("noise", torch.randn(8), persistent=False)
        self.post_init()


def test_new_never_means_unwritten_memory(tmp_path):
    model = Unwritten(TinyConfig())
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {k: v for k, v in state.items() if k != "head"})
    with pytest.raises(WeightsError, match=r"does not compute it(?s:.*)head"):
        from_pretrained(tmp_path, model_class=Unwritten, new=("head",))


def test_a_random_buffer_that_no_checkpoint_holds(tmp_path):
    Noise(TinyConfig()).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"does not compute it(?s:.*)noise"):
        from_pretrained(tmp_path, model_class=Noise)
    loaded: Any = from_pretrained(tmp_path, model_class=Noise, new=("noise",))
    assert loaded.noise.std() > 0.1


# Where it comes from.


def test_a_hub_id_needs_a_commit_hash():
    for revision in (None, "main", "v1.0", "abc123"):
        with pytest.raises(StructureError, match="pinned revision") as caught:
            from_pretrained("some/model", revision=revision)
        assert "40 hexadecimal digits" in str(caught.value)


def test_a_pinned_hub_repository_comes_from_the_cache(checkpoint, tmp_path):
    folder, model = checkpoint
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    loaded = from_pretrained(
        "some/model", revision=commit, cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert differing(loaded, model) == []


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(StructureError, match="no such checkpoint"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(StructureError, match="no readable checkpoint"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "device_map",
        "low_cpu_mem_usage",
        "torch_dtype",
        "ignore_mismatched_sizes",
        "trust_remote_code",
    ],
)
def test_options_that_would_weaken_it_are_refused(checkpoint, name):
    given: dict[str, Any] = {name: True}
    with pytest.raises(InputError, match=name):
        from_pretrained(checkpoint[0], **given)


def test_dtype_is_never_auto(checkpoint):
    with pytest.raises(PlacementError, match="Not a serving dtype"):
        from_pretrained(checkpoint[0], dtype="auto")


def test_damaged_files(checkpoint, tmp_path):
    folder, _ = checkpoint
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="cannot be read"):
        from_pretrained(folder)
    file.unlink()
    with pytest.raises(StructureError, match="no model weights"):
        from_pretrained(folder)
    canary = tmp_path / "canary"
    torch.save({"weight": Touch(str(canary))}, folder / "pytorch_model.bin")
    with pytest.raises(TrustError, match="nothing of it was run"):
        from_pretrained(folder)
    assert not canary.exists()


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_quantised_checkpoint_is_refused(checkpoint):
    folder, _ = checkpoint
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(StructureError, match="quantised"):
        from_pretrained(folder)


# Whatever is around.


def test_inside_a_meta_context(checkpoint):
    folder, model = checkpoint
    with torch.device("meta"):
        assert differing(from_pretrained(folder), model) == []
    torch.set_default_device("meta")
    try:
        assert differing(from_pretrained(folder), model) == []
    finally:
        torch.set_default_device(None)


def test_the_process_stays_as_it_was(checkpoint):
    state = torch.get_rng_state()
    from_pretrained(checkpoint[0], dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_many_threads_with_mixed_models_and_dtypes(checkpoint, tmp_path):
    folder, _ = checkpoint
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)).save_pretrained(
        tmp_path / "gpt2"
    )
    wanted = {
        (source, dtype): from_pretrained(source, dtype=dtype)
        for source in (folder, tmp_path / "gpt2")
        for dtype in ("float32", "bfloat16")
    }
    problems: list[object] = []

    def work():
        for (source, dtype), model in wanted.items():
            try:
                problems.extend(differing(from_pretrained(source, dtype=dtype), model))
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert torch.get_default_dtype() == torch.float32
