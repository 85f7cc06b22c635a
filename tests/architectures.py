"""Tiny seeded models, some of a dozen architectures; and what differs between two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.slots import find_slots

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


def seeded(make: Callable[[], Any]) -> Any:
    """A module as made from seed 0, in eval mode; the process's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def modernbert() -> transformers.ModernBertModel:
    """A model whose layers see windows and the whole in turn."""
    special = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    shape = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    config = transformers.ModernBertConfig(
        num_attention_heads=2, attn_implementation="eager", **shape, **special
    )
    return seeded(lambda: transformers.ModernBertModel(config))


def differing(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """Paths of the tensors of any kind that are not the same in both, bit for bit."""
    ours, theirs = (
        {slot.path: slot.tensor.detach() for slot in find_slots(each)} for each in (one, other)
    )
    both = ours.keys() & theirs.keys()
    return sorted(
        (ours.keys() ^ theirs.keys())
        | {path for path in both if not bits_equal(ours[path], theirs[path])}
    )
