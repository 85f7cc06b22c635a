"""Small models with the habits that the meta device breaks, for ``test_triggers``.

Saved through ``code_paths``.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

WIDTH = 8


class SmallConfig(PretrainedConfig):
    model_type = "small-for-tests"

    def __init__(self, encoder=None, table=None, **kwargs):
        self.encoder, self.table = encoder, table
        super().__init__(**kwargs)


class Small(PreTrainedModel):
    """What all have in common.

    One linear layer, and weights that are initialised as transformers asks.
    """

    config_class = SmallConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Linear(WIDTH, WIDTH)


class ItemInConstructor(Small):
    """Computes a Python number with torch."""

    def __init__(self, config):
        super().__init__(config)
        self.rate = torch.arange(1, 5).float().mean().item()
        self.post_init()

    def forward(self, x):
        return self.body(x) * self.rate


class ForgottenBuffer(Small):
    """A non-persistent buffer that ``_init_weights`` does not set again."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.linspace(1, 2, WIDTH), persistent=False)
        self.register_buffer(
            "shift", torch.from_numpy(np.arange(WIDTH, dtype=np.float32)), persistent=False
        )
        self.post_init()

    def forward(self, x):
        return self.body(x) * self.scale + self.shift


class PlainTensor(Small):
    """A plain tensor attribute that picks columns."""

    def __init__(self, config):
        super().__init__(config)
        self.order = torch.arange(WIDTH - 1, -1, -1)
        self.post_init()

    def forward(self, x):
        return self.body(x)[..., self.order]


class EncoderInside(Small):
    """The classic predictor: an encoder that ``__init__`` loads, and a head."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = AutoModel.from_pretrained(config.encoder)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids):
        return self.head(self.encoder(input_ids=input_ids).last_hidden_state[:, 0])


class TableFromFile(Small):
    """Reads a further file in ``__init__``, into a tensor that its own checkpoint leaves out."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.zeros(WIDTH), persistent=False)
        if config.table and os.path.exists(config.table):
            self.table = torch.load(config.table, weights_only=True)
        self.post_init()

    def forward(self, x):
        return self.body(x) + self.table


class BareTensors(Small):
    """Parameters and a persistent buffer that no initialiser of transformers knows."""

    def __init__(self, config):
        super().__init__(config)
        self.bare = nn.Parameter(torch.full((WIDTH,), 2.0))
        self.bend = nn.PReLU()
        self.register_buffer("running", torch.ones(WIDTH))
        self.post_init()

    def forward(self, x):
        return self.bend(self.body(x)) * self.bare + self.running


class UndeclaredTie(Small):
    """Two layers share a weight, and nothing says so."""

    def __init__(self, config):
        super().__init__(config)
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)
        self.other.weight = self.body.weight
        self.post_init()

    def forward(self, x):
        return self.other(self.body(x))


class OldInitialiser(Small):
    """``_init_weights`` as it was written for years: in place, through ``.data``."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = Scaled()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Scaled):
            module.weight.data.normal_()
            module.offset.copy_(torch.ones(WIDTH))

    def forward(self, x):
        return self.norm(self.body(x))


class Scaled(nn.Module):
    """A weight beside a non-persistent buffer."""

    offset: torch.Tensor

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("offset", torch.ones(WIDTH), persistent=False)

    def forward(self, x):
        return x * self.weight + self.offset


class Rotary(nn.Module):
    """Not of transformers, but with its rotary embedding inside."""

    def __init__(self, width):
        super().__init__()
        config = LlamaConfig(hidden_size=width, num_attention_heads=1, max_position_embeddings=32)
        self.body = nn.Linear(width, width)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x):
        cos, sin = self.rotary(x, torch.arange(x.shape[-2])[None])
        return self.body(x) * cos + sin


class Tied(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))
