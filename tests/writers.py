"""Tiny models that write text, with random weights, and their tokenizers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("a", "n"),
    ("o", "n"),
    ("e", "r"),
    ("i", "n"),
    ("Ġ", "c"),
]
VOCABULARY = ["<pad>", "<s>", "</s>", *BYTES, *("".join(pair) for pair in MERGES)]
SIZE = len(VOCABULARY)


def byte_tokenizer(
    *,
    pad: str | None = "<pad>",
    bos: bool = False,
    eos: bool = False,
    chat: bool = False,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Every byte is a token, so that characters span several."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(ids, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


_TOKENS = {"vocab_size": SIZE, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.5},
    **{"max_position_embeddings": 96, "pad_token_id": 0, "decoder_start_token_id": 2},
}
_LLAMA = {
    **{
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    **{"max_position_embeddings": 96, "initializer_range": 0.3},
}

DECODERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 96,
        "initializer_range": 0.3,
    },
    "LlamaForCausalLM": {**_LLAMA, "num_key_value_heads": 1},
    "OPTForCausalLM": {
        **{
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "init_std": 0.3,
        },
        **{"num_attention_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0},
    },
    "GPTNeoXForCausalLM": _LLAMA,
}
ODD_DECODERS: dict[str, dict[str, Any]] = {
    # Counts positions from the padding on.
    "BartForCausalLM": _BART,
    # Recurrent.
    "RwkvForCausalLM": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "context_length": 96,
        "use_cache": True,
    },
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {
        **{
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "initializer_factor": 3.0,
        },
        **{"pad_token_id": 0, "decoder_start_token_id": 0},
    },
    "BartForConditionalGeneration": _BART,
    "MarianMTModel": {**_BART, "decoder_start_token_id": 0},
    "MBartForConditionalGeneration": _BART,
}
ALL: dict[str, dict[str, Any]] = {**DECODERS, **ODD_DECODERS, **ENCODER_DECODERS}


def writer(
    name: str, *, seed: int = 0, generation: dict[str, Any] | None = None, **config: Any
) -> Any:
    """A new, seeded model of class ``name``; ``generation`` goes into its generation config."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(cls.config_class(**{**_TOKENS, **ALL[name], **config})).eval()
    said = {"bos_token_id": 1, "eos_token_id": 2, **model.generation_config.to_diff_dict()}
    said.pop("_from_model_config", None)
    model.generation_config = GenerationConfig.from_dict({**said, **(generation or {})})
    return model
