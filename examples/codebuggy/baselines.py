"""What a model has to beat: answers that need no understanding of code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from data import Pair
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def score_majority(train: Sequence[Pair], heldout: Sequence[Pair]) -> float:
    """Accuracy of always saying what most training pairs are."""
    most = int(np.mean([pair.label for pair in train]) >= 0.5)
    return float(np.mean([pair.label == most for pair in heldout]))


def score_bag_of_tokens(train: Sequence[Pair], heldout: Sequence[Pair]) -> float:
    """Accuracy of logistic regression on tokens and pairs that came and went, and on lengths."""
    model = make_pipeline(DictVectorizer(), LogisticRegression(max_iter=2000))
    model.fit([_difference(pair) for pair in train], [pair.label for pair in train])
    return float(
        model.score([_difference(pair) for pair in heldout], [pair.label for pair in heldout])
    )


def _difference(pair: Pair) -> dict[str, float]:
    before, after = _bag(pair.buggy_code), _bag(pair.fixed_code)
    changed = {
        token: after[token] - before[token]
        for token in before | after
        if after[token] != before[token]
    }
    return {**changed, "<longer>": float(len(pair.fixed_code) > len(pair.buggy_code))}


def _bag(code: str) -> Counter[str]:
    tokens = re.findall(r"\w+|[^\w\s]+", code)
    return Counter([*tokens, *(" ".join(two) for two in pairwise(tokens))])
