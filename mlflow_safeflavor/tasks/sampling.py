"""Drawing tokens at random, without torch's one random generator for the whole process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["SAMPLING", "Draw", "sampler", "seed_of"]

# Setting → transformers' class for it, in its order, and the value for which that does nothing.
SAMPLING: Mapping[str, tuple[str, Any]] = {
    "temperature": ("TemperatureLogitsWarper", 1.0),
    "top_k": ("TopKLogitsWarper", 0),
    "top_p": ("TopPLogitsWarper", 1.0),
    "min_p": ("MinPLogitsWarper", 0.0),
    "typical_p": ("TypicalLogitsWarper", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", 0.0),
}


class Draw:
    """Adds Gumbel noise to scores: the largest sum is a sample of their softmax.

    Args:
        generators: One a row.
    """

    # transformers draws from torch's global generator, which threads share: a seed there promises
    # nothing to a request beside which another one runs, and setting it disturbs all others. Here
    # each row has a generator of its own, on the CPU, so that a seed means the same on all devices.
    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with noise, shape (rows, vocabulary)."""
        import torch

        rows = [
            torch.empty(scores.shape[1]).exponential_(generator=generator)
            for generator in self.generators
        ]
        # Gumbel noise is -log of an exponential draw. A draw of exactly 0 would be infinite noise,
        # and NaN where a score is minus infinity.
        noise = torch.stack(rows).clamp_min(torch.finfo(torch.float32).tiny).log()
        return scores - noise.to(scores.device)


def seed_of(seed: int, draw: int) -> int:
    """Seed of one of the texts that are drawn for a prompt; the request's own for the first."""
    if seed < 0 or draw == 0:
        return seed
    # Not seed + draw: the second text of one seed would be the first of the next. 63 bits, since
    # torch takes a seed as a signed number.
    return int(np.random.SeedSequence((seed, draw)).generate_state(1, np.uint64)[0] >> 1)


def sampler(settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Any]:
    """Processors of the scores of each step with which greedy decoding samples.

    Args:
        settings: Values for names in ``SAMPLING``; missing ones do nothing.
        seeds: Of each row that is decoded together; negative for another one each time.
    """
    import torch
    from transformers.generation import logits_process

    generators = [torch.Generator() for _ in seeds]
    for generator, seed in zip(generators, seeds, strict=True):
        # All rows of a seed draw alike: a row's text depends on nothing beside it.
        generator.manual_seed(seed) if seed >= 0 else generator.seed()
    asked = {name: value for name in SAMPLING if (value := settings.get(name)) is not None}
    warpers = [
        getattr(logits_process, SAMPLING[name][0])(value)
        for name, value in asked.items()
        if value != SAMPLING[name][1]
    ]
    return [*warpers, Draw(generators)]
