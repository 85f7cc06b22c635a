"""Fit a classifier of pairs, find its temperature, ask it many pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from data import Pair, label_of_the_opposite
from model import FixClassifier
from torch import nn

BATCH = 32
MAX_TOKENS = 240
"""Of each side, while training; what is longer is cut."""


@dataclass(frozen=True)
class Recipe:
    """How to fit.

    Attributes:
        epochs: Passes over the training pairs.
        rate: Peak learning rate of the encoder; the head, which starts from nothing, learns five
            times as fast.
        frozen: Layers of the encoder that stay as they are, counted from the embeddings, which then
            stay, too.
        bfloat16: Whether matrix products of the training use bfloat16; the weights stay float32.
        seed: Of the order of pairs and of dropout.
    """

    epochs: int
    rate: float
    frozen: int
    bfloat16: bool
    seed: int


def batches(pairs: Sequence[Pair], rng: random.Random | None = None) -> Iterator[list[Pair]]:
    """Pairs of similar length together, so that little is padding; shuffled if ``rng`` is given."""
    order = list(pairs) if rng is None else rng.sample(list(pairs), len(pairs))
    stretch = BATCH * 20 if rng else len(order)
    parts = []
    for start in range(0, len(order), stretch or 1):
        near = sorted(
            order[start : start + stretch],
            key=lambda pair: len(pair.buggy_code) + len(pair.fixed_code),
        )
        parts += [near[i : i + BATCH] for i in range(0, len(near), BATCH)]
    yield from rng.sample(parts, len(parts)) if rng else parts


def encode(texts: list[str], tokenizer: Any, multiple: int = 1) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of single texts, their length padded to a multiple."""
    length = min(MAX_TOKENS, tokenizer.model_max_length)
    options = {
        "padding": True,
        "pad_to_multiple_of": multiple,
        "truncation": True,
        "max_length": length,
    }
    encoded = tokenizer(texts, return_tensors="pt", **options)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def fit(
    model: FixClassifier,
    tokenizer: Any,
    pairs: Sequence[Pair],
    recipe: Recipe,
    on_step: Callable[[int, int, float], None],
    on_epoch: Callable[[int], None],
) -> None:
    """Train ``model`` in place; it is left in eval mode.

    Args:
        model: What to train.
        tokenizer: Its tokenizer.
        pairs: To learn from.
        recipe: How.
        on_step: Told the number of steps done, of all steps, and the loss of this one.
        on_epoch: Told the number of epochs done; the model is in eval mode meanwhile.
    """
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    steps = recipe.epochs * -(-len(pairs) // BATCH)
    optimizer, schedule = _optimizer(model, recipe, steps)
    step = 0
    for epoch in range(recipe.epochs):
        model.head.train()  # without dropout in the encoder, which costs a fifth of the time
        for part in batches(pairs, rng):
            loss = _step(model, tokenizer, part, optimizer, recipe)
            schedule.step()
            step += 1
            on_step(step, steps, loss)
        model.eval()
        on_epoch(epoch + 1)


def _optimizer(
    model: FixClassifier, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    layers = model.encoder.encoder.layer
    encoder = layers[recipe.frozen :] if recipe.frozen else model.encoder
    groups: list[dict[str, Any]] = [
        {"params": list(encoder.parameters()), "lr": recipe.rate},
        {"params": list(model.head.parameters()), "lr": 5 * recipe.rate},
    ]
    model.requires_grad_(False)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.requires_grad = True  # of the rest no gradient is even computed
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm, max(0.0, 1 - done / (steps + 1)))
    )
    return optimizer, schedule


def _step(
    model: FixClassifier,
    tokenizer: Any,
    pairs: Sequence[Pair],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> float:
    texts = [*(pair.buggy_code for pair in pairs), *(pair.fixed_code for pair in pairs)]
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
        # Every length is compiled anew for bfloat16, so let there be few.
        before, after = model.embed(**encode(texts, tokenizer, multiple=16)).float().chunk(2)
        # Each change there and back: what was encoded once is learned from twice.
        logits = model.judge(torch.cat((after - before, before - after)))
    labels = torch.tensor(
        [pair.label for pair in pairs] + [label_of_the_opposite(pair) for pair in pairs]
    )
    loss = nn.functional.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def ask(model: FixClassifier, tokenizer: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """Logits in the order of ``pairs``, shape (pairs, 2), float32."""
    rows: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for part in batches(pairs):
            before, after = (
                model.embed(**encode(texts, tokenizer))
                for texts in (
                    [pair.buggy_code for pair in part],
                    [pair.fixed_code for pair in part],
                )
            )
            rows.update(zip(map(id, part), model.judge(after - before), strict=True))
    return torch.stack([rows[id(pair)] for pair in pairs])


def calibrate(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, from 0.25 to 8, under which ``labels`` are likeliest."""
    candidates = torch.logspace(-2, 3, 101, base=2)
    losses = [nn.functional.cross_entropy(logits / candidate, labels) for candidate in candidates]
    return float(candidates[int(torch.stack(losses).argmin())])
