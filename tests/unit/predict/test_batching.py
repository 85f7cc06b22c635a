"""Batches: every row once, in budget, and answers in the order asked."""

import random
from typing import Any

import pytest

from mlflow_safeflavor.errors import AnswerError
from mlflow_safeflavor.predict.answers import predict_rows
from mlflow_safeflavor.predict.batching import cut_into_batches
from mlflow_safeflavor.predict.scheduler import Scheduler


@pytest.mark.parametrize("budget", [1, 7, 64, 512, 10**9])
def test_every_row_is_in_one_batch_within_the_budget(budget):
    draw = random.Random(budget)
    costs = [draw.randint(0, 120) for _ in range(300)]
    batches = cut_into_batches(costs, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= budget


def test_near_lengths_share_a_batch_and_the_longest_come_first():
    assert cut_into_batches([2, 50, 3, 49, 2, 200], 100, 10) == [[5], [1, 3], [2, 0, 4]]


def test_no_padding_is_computed_where_calls_are_free():
    assert cut_into_batches([2, 50, 3, 49, 2, 3], 1000) == [[1], [3], [2, 5], [0, 4]]


def test_one_call_where_calls_are_dear():
    assert cut_into_batches([2, 50, 3, 49, 2, 3], 1000, 10_000) == [[1, 3, 2, 5, 0, 4]]


def test_a_batch_is_filled_to_the_budget():
    for forward_cost in (0, 10):
        assert [len(batch) for batch in cut_into_batches([8] * 130, 512, forward_cost)] == [
            64,
            64,
            2,
        ]


def test_no_rows_no_batches():
    assert cut_into_batches([], 512) == []


def _cost(batches, costs, forward_cost):
    return sum(forward_cost + len(batch) * max(1, *(costs[i] for i in batch)) for batch in batches)


def _all_partitions(places):
    """Every way to part a few places into batches, neighbours or not."""
    if not places:
        yield []
        return
    first, *rest = places
    for others in _all_partitions(rest):
        yield [[first], *others]
        for i, batch in enumerate(others):
            yield [*others[:i], [first, *batch], *others[i + 1 :]]


@pytest.mark.parametrize("seed", range(25))
def test_no_other_way_to_part_the_rows_costs_less(seed):
    draw = random.Random(seed)
    costs = [draw.randint(0, 30) for _ in range(7)]
    budget, forward_cost = draw.choice([1, 20, 60, 500]), draw.choice([0, 1, 8, 50])
    found = _cost(cut_into_batches(costs, budget, forward_cost), costs, forward_cost)
    allowed = [
        batches
        for batches in _all_partitions(list(range(7)))
        if all(len(b) == 1 or len(b) * max(1, *(costs[i] for i in b)) <= budget for b in batches)
    ]
    assert found == min(_cost(batches, costs, forward_cost) for batches in allowed)


class Echo:
    """A task whose output is its input: what comes back shows where it went."""

    forward_params = frozenset()

    def __init__(self):
        self.batches = []

    def require_clean(self, rows, params):
        pass

    def holds(self, features):
        return 1

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

    def decode(self, rows, features, outputs, params, first=0):
        return [{"text": output["joined"] + params["suffix"]} for output in outputs]


NO_ENGINE: Any = None


def test_answers_and_outputs_come_in_the_order_asked():
    draw = random.Random(0)
    texts = ["x" * draw.randint(1, 90) + str(i) for i in range(200)]
    task: Any = Echo()
    answers, outputs = predict_rows(
        task, Scheduler(task, NO_ENGINE), [{"text": text} for text in texts], {"suffix": "!"}
    )
    assert [answer["text"] for answer in answers] == [text + "!" for text in texts]
    assert [output["joined"] for output in outputs] == texts
    assert 1 < len(task.batches) < 200


def test_the_budget_is_passed_on():
    rows = [{"text": "x" * 10}] * 20
    for budget, wanted in ((10, [1] * 20), (200, [20]), (512, [20])):
        task: Any = Echo()
        predict_rows(task, Scheduler(task, NO_ENGINE, max_batch_tokens=budget), rows)
        assert task.batches == wanted


def test_a_forward_that_loses_a_row_is_no_answer():
    class Lossy(Echo):
        def forward(self, engine, batch, params):
            return super().forward(engine, batch, params)[1:]

    task: Any = Lossy()
    with pytest.raises(AnswerError, match="shorter"):
        predict_rows(task, Scheduler(task, NO_ENGINE), [{"text": "a"}, {"text": "b"}])
