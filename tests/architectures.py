"""Tiny random models of a dozen architectures, whose answers are far apart."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SMALL = {"vocab_size": 40, "max_position_embeddings": 34, "pad_token_id": 0, **SHAPE}
DIM = {
    "vocab_size": 40,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "max_position_embeddings": 34,
}
GPT = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 34}
XLNET = {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "DistilBert": DIM,
    "Electra": {**SMALL, "embedding_size": 16},
    "Albert": {**SMALL, "embedding_size": 16},
    "MPNet": SMALL,
    "DebertaV2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ModernBert": {**SMALL, "global_attn_every_n_layers": 2, "local_attention": 8},
    "GPT2": {**GPT, "pad_token_id": 0},
    "Llama": {**SMALL, "num_key_value_heads": 2},
    "XLNet": {**XLNET, "pad_token_id": 0},
    "FNet": SMALL,  # takes no attention mask
}


def tiny_model(architecture: str, head: str, **changes: Any) -> transformers.PreTrainedModel:
    """Seeded ``BertForTokenClassification`` of ("Bert", "ForTokenClassification"), in eval mode."""
    config = getattr(transformers, f"{architecture}Config")(
        **{**ARCHITECTURES[architecture], **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: transformers.PreTrainedModel = getattr(transformers, f"{architecture}{head}")(config)
        # Spread out, so that a wrong position or a token read from the padding shows.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    return model
