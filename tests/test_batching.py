"""Batches: every row once, in budget, and answers in the order asked."""

import random

import numpy as np
import pytest

from mlflow_safeflavor.batching import DEFAULT_MAX_BATCH_TOKENS, cut_into_batches, predict_rows
from mlflow_safeflavor.errors import InputError


@pytest.mark.parametrize("budget", [1, 7, 64, 512, 10**9])
def test_every_row_is_in_one_batch_within_the_budget(budget):
    draw = random.Random(budget)
    costs = [draw.randint(0, 120) for _ in range(300)]
    batches = cut_into_batches(costs, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= budget


def test_near_lengths_share_a_batch_and_the_longest_come_first():
    assert cut_into_batches([2, 50, 3, 49, 2, 200], 100) == [[5], [1, 3], [2, 0, 4]]


def test_a_batch_is_filled_to_the_budget():
    assert [len(batch) for batch in cut_into_batches([8] * 130, 512)] == [64, 64, 2]


def test_no_rows_no_batches():
    assert cut_into_batches([], 512) == []


@pytest.mark.parametrize("budget", [0, -1, True, 1.5, "512", None])
def test_a_budget_that_is_no_positive_whole_number(budget):
    with pytest.raises(InputError, match="max_batch_tokens"):
        cut_into_batches([1], budget)


def test_a_numpy_budget_is_fine():
    assert cut_into_batches([1, 1], np.int64(1)) == [[0], [1]]


class Echo:
    """A task whose output is its input: what comes back shows where it went."""

    def __init__(self):
        self.batches = []

    def check_params(self, params):
        return {"suffix": "", **(params or {})}

    def encode(self, rows, params):
        return [{"input_ids": list(row["text"])} for row in rows]

    def cost(self, features):
        return len(features["input_ids"])

    def pieces(self, features):
        return [features]

    def join(self, outputs):
        return outputs[0]

    def batch_budget(self, max_batch_tokens):
        return max_batch_tokens

    def forward(self, engine, batch, params):
        self.batches.append(len(batch))
        return [{"joined": "".join(row["input_ids"])} for row in batch]

    def decode(self, rows, features, outputs, params):
        return [{"text": output["joined"] + params["suffix"]} for output in outputs]


def test_answers_and_outputs_come_in_the_order_asked():
    draw = random.Random(0)
    texts = ["x" * draw.randint(1, 90) + str(i) for i in range(200)]
    task = Echo()
    answers, outputs = predict_rows(task, None, [{"text": text} for text in texts], {"suffix": "!"})
    assert [answer["text"] for answer in answers] == [text + "!" for text in texts]
    assert [output["joined"] for output in outputs] == texts
    assert 1 < len(task.batches) < 200


def test_the_budget_is_passed_on():
    rows = [{"text": "x" * 10}] * 20
    for budget, wanted in ((10, [1] * 20), (200, [20]), (DEFAULT_MAX_BATCH_TOKENS, [20])):
        task = Echo()
        predict_rows(task, None, rows, max_batch_tokens=budget)
        assert task.batches == wanted


def test_a_forward_that_loses_a_row_is_no_answer():
    class Lossy(Echo):
        def forward(self, engine, batch, params):
            return super().forward(engine, batch, params)[1:]

    with pytest.raises(ValueError, match="shorter"):
        predict_rows(Lossy(), None, [{"text": "a"}, {"text": "b"}])
