"""Random trees of the layers that encoders are made of.

Recorded, and right on inputs that nobody has seen.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlflow_safeflavor.graph.check import read
from mlflow_safeflavor.graph.onnx_engine import Session
from mlflow_safeflavor.graph.proof import Refusal
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.save.graph import record

TREES, WIDTH, WORDS = 6, 8, 30


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Both(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other, self.down = one, other, nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.cat([self.one(x), self.other(x)], dim=-1))


class Attention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, padding=kernel // 2)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Pooled(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=1, keepdim=True)


class Text(nn.Module):
    """Words in, a mean over the unpadded ones out."""

    def __init__(self, tree):
        super().__init__()
        self.words, self.tree, self.head = nn.Embedding(WORDS, WIDTH), tree, nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask):
        x = self.tree(self.words(input_ids))
        mask = attention_mask[..., None].to(x.dtype)
        pooled = (x * mask).sum(1) / mask.sum(1).clamp(min=1)
        return {"logits": self.head(pooled), "last_hidden_state": x}


LEAVES = (
    *(
        lambda draw, make=make: make()
        for make in (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, Pooled)
    ),
    lambda draw: nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.5),
    lambda draw: nn.LayerNorm(WIDTH),
    lambda draw: nn.Softmax(dim=-1),
    lambda draw: nn.Dropout(0.3),
    lambda draw: Attention(draw.choice([1, 2, 4])),
    lambda draw: Convolution(draw.choice([1, 3, 5])),
)


def make_tree(draw, depth=3):
    kind = draw.choice(["leaf", "chain", "chain", "residual", "both"]) if depth else "leaf"
    if kind == "leaf":
        return draw.choice(LEAVES)(draw)
    if kind == "chain":
        return nn.Sequential(*(make_tree(draw, depth - 1) for _ in range(draw.randint(2, 3))))
    if kind == "residual":
        return Residual(make_tree(draw, depth - 1))
    return Both(make_tree(draw, depth - 1), make_tree(draw, depth - 1))


def make_inputs(rows, length):
    mask = (torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1))).long()
    return {"input_ids": torch.randint(WORDS, (rows, length)), "attention_mask": mask}


@pytest.mark.slow
def test_random_trees_are_recorded_and_answer_as_their_modules_do():
    ends = Counter()
    first = random.SystemRandom().randrange(2**32)
    for seed in range(first, first + TREES):
        torch.manual_seed(seed)
        module = Text(make_tree(random.Random(seed))).eval().requires_grad_(False)
        try:
            graph, proof = record(
                module, find_slots(module), {}, [make_inputs(3, 7), make_inputs(1, 4)], limit=24
            )
        except Refusal as refusal:
            ends[str(refusal)] += 1
            continue
        ends["recorded"] += 1
        facts = proof["onnx"]
        ends["same bits"] += facts.threads is True
        engine = Session(read(graph.content), {}, threads=1)
        for rows, length in ((1, 1), (2, 3), (5, 11), (9, 24), (33, 6)):
            inputs = make_inputs(rows, length)
            with torch.inference_mode():
                wanted = module(**inputs)
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            found = engine(arrays)
            told = f"seed {seed}, {rows} rows of {length}\n{module}"
            for name, tensor in wanted.items():
                allowed = Session.tolerance * (1 + float(tensor.abs().max()))
                assert float((tensor - torch.from_numpy(found[name])).abs().max()) <= allowed, told
            if facts.batch:
                alone = engine({name: array[:1] for name, array in arrays.items()})
                assert all(found[name][:1].tobytes() == alone[name].tobytes() for name in found), (
                    told
                )
    assert ends["recorded"] >= 0.75 * TREES, ends
    assert ends["same bits"], ends
