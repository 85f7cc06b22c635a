"""Many callers, one model.

Answers are those of each alone, nobody waits for company, and only the guilty fail.
"""

import gc
import itertools
import multiprocessing
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mlflow_safeflavor.errors import (
    AnswerError,
    DeadlineError,
    InputError,
    OverloadedError,
    SafeFlavorError,
)
from mlflow_safeflavor.predict.answers import predict_rows
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.scheduler import Scheduler
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.predict.turns import next_batch


class Length:
    """A task that answers with the length of a text.

    Its forward can be held up, and fails over the text "bad".
    """

    forward_params = frozenset({"language"})

    def __init__(self):
        self.batches, self.threads = [], []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)

    def require_clean(self, rows, params):
        pass

    def holds(self, features):
        return 1

    def check_params(self, params):
        return {"language": "en", "suffix": "", **(params or {})}

    def encode(self, rows, params):
        if any(row["text"] == "not a row" for row in rows):
            raise InputError("no row")
        return [{"text": row["text"]} for row in rows]

    def pieces(self, features):
        return [{"text": part} for part in features["text"].split("|")]

    def cost(self, features):
        return len(features["text"])

    def batch_budget(self, max_batch_tokens):
        return max_batch_tokens

    def forward(self, engine, batch, params):
        self.entered.release()
        assert self.open.wait(20)
        self.batches.append([piece["text"] for piece in batch])
        self.threads.append(threading.current_thread().name)
        if any(piece["text"] == "bad" for piece in batch):
            raise ZeroDivisionError("bad row")
        return [
            {"length": np.array([len(piece["text"])]), "language": params["language"]}
            for piece in batch
        ]

    def join(self, outputs):
        return {
            "length": np.concatenate([o["length"] for o in outputs]),
            "language": outputs[0]["language"],
        }

    def decode(self, rows, features, outputs, params, first=0):
        return [
            {"length": o["length"].sum(), "by": o["language"] + params["suffix"]} for o in outputs
        ]


class Model:
    """A scheduler of the task above; ``ask`` predicts, ``later`` predicts in another thread.

    With two forwards beside each other where any thread may run them.
    """

    def __init__(self, **options):
        task: Any = Length()
        engine: Any = None  # the task does without
        self.task = task
        self.abreast = 2 if options.get("anywhere") else 1
        self.scheduler = Scheduler(
            task, engine, **{"forward_cost": 1000, "abreast": self.abreast, **options}
        )
        self.pool = ThreadPoolExecutor(32)

    def ask(self, *texts, timeout=None, **params):
        rows = [{"text": text} for text in texts]
        return predict_rows(self.task, self.scheduler, rows, params, timeout=timeout)[0]

    def later(self, *texts, **options):
        return self.pool.submit(self.ask, *texts, **options)

    def busy(self):
        """All forwards that may run held up, each of a request of its own; the future of one."""
        self.task.open.clear()
        for _ in range(self.abreast):
            future = self.later("busy")
            assert self.task.entered.acquire(timeout=20)
        return future

    def waiting(self, count):
        """Return once so many requests wait."""
        until = time.monotonic() + 20
        while len(self.scheduler._state.tickets) < count:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def model():
    made = Model()
    yield made
    made.task.open.set()
    made.pool.shutdown()


@pytest.mark.parametrize(
    ("anywhere", "timeout", "length", "here"),
    [(True, None, 1, True), (True, None, 600, True), (False, None, 1, False), (True, 60, 1, False)],
)
def test_a_lone_request_is_run_at_once_in_its_own_thread_where_any_will_do(
    anywhere, timeout, length, here
):
    """With a deadline the caller must be told in time, and torch's forwards need a fresh thread."""
    model = Model(anywhere=anywhere)
    assert model.ask("x" * length, timeout=timeout) == [{"length": length, "by": "en"}]
    assert model.ask("abc", "de", timeout=timeout) == [
        {"length": 3, "by": "en"},
        {"length": 2, "by": "en"},
    ]
    assert [len(batch) for batch in model.task.batches] == [1, 2]
    assert (
        model.task.threads == [threading.current_thread().name if here else "safeflavor-model"] * 2
    )
    assert (not model.scheduler._state.threads) == here


def test_what_comes_meanwhile_waits_for_those_that_run_here_and_is_run_together():
    model = Model(anywhere=True)
    first = model.busy()
    others = [model.later("x" * n) for n in range(1, 21)]
    late = model.later("late", timeout=0.05)
    model.waiting(21)
    with pytest.raises(DeadlineError):
        late.result(20)
    model.task.open.set()
    assert [future.result(20)[0]["length"] for future in others] == list(range(1, 21))
    assert first.result(20)[0]["length"] == 4
    assert sorted(len(batch) for batch in model.task.batches) == [1, 1, 20]
    assert model.task.threads.count("safeflavor-model") == 1


def test_a_table_of_several_batches_has_one_forward_at_a_time_and_leaves_the_other_to_others():
    model = Model(anywhere=True, max_batch_tokens=10)
    model.task.open.clear()
    table = model.later(*["x" * 10] * 3)
    assert model.task.entered.acquire(timeout=20)
    small = model.later("y", timeout=20)  # it goes to the model's threads, as the table does
    assert model.task.entered.acquire(timeout=20)
    assert not model.task.entered.acquire(timeout=0.2)
    model.task.open.set()
    assert len(table.result(20)) == 3
    assert small.result(20)[0]["length"] == 1
    assert model.task.threads == ["safeflavor-model"] * 4
    assert sorted(model.task.batches) == [["x" * 10]] * 3 + [["y"]]


def test_a_failure_or_an_interruption_in_the_callers_own_thread_leaves_the_model_free(monkeypatch):
    model = Model(anywhere=True)
    with pytest.raises(AnswerError, match="bad row"):
        model.ask("bad")
    forward = model.task.forward
    monkeypatch.setattr(
        model.task, "forward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        model.ask("interrupted")
    monkeypatch.setattr(model.task, "forward", forward)
    assert model.ask("after")[0]["length"] == 5
    assert set(model.task.threads) == {threading.current_thread().name}


@pytest.mark.parametrize("anywhere", [True, False])
def test_never_more_forwards_at_once_than_may_be(anywhere):
    model = Model(anywhere=anywhere, max_batch_tokens=8)
    inside, most, forward = [], [], model.task.forward

    def counted(*args):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.0005)
        inside.pop()
        return forward(*args)

    model.task.forward = counted
    asked = [("x" * (1 + i % 9),) * (1 + i % 3) for i in range(200)]
    found = list(
        model.pool.map(
            lambda texts: model.ask(*texts, timeout=20 if len(texts) == 2 else None), asked
        )
    )
    assert [[answer["length"] for answer in answers] for answers in found] == [
        list(map(len, t)) for t in asked
    ]
    assert set(most) == {*range(1, model.abreast + 1)}
    assert len(set(model.task.threads)) > 1 or not anywhere


def test_whatever_waits_is_run_together(model):
    first = model.busy()
    others = [model.later("x" * n) for n in range(1, 21)]
    model.waiting(20)
    model.task.open.set()
    assert [future.result(20)[0]["length"] for future in others] == list(range(1, 21))
    assert first.result(20)[0]["length"] == 4
    assert [len(batch) for batch in model.task.batches] == [1, 20]


def test_only_requests_that_agree_in_what_forward_reads_share_a_batch(model):
    model.busy()
    params = [
        {"language": "de"},
        {"language": "en", "suffix": "!"},
        {"language": "de", "suffix": "?"},
        {},
    ]
    futures = [model.later("x" * (i + 1), **given) for i, given in enumerate(params)]
    model.waiting(4)
    model.task.open.set()
    assert [future.result(20)[0]["by"] for future in futures] == ["de", "en!", "de?", "en"]
    assert sorted(sorted(batch) for batch in model.task.batches[1:]) == [
        ["x", "xxx"],
        ["xx", "xxxx"],
    ]


def test_pieces_of_a_row_come_back_in_order(model):
    pieces = ["x" * n for n in (5, 1, 9, 3)]
    rows = [{"text": "|".join(pieces)}, {"text": "y"}]
    answers, outputs = predict_rows(model.task, model.scheduler, rows)
    assert outputs[0]["length"].tolist() == [5, 1, 9, 3]
    assert [answer["length"] for answer in answers] == [18, 1]


def test_one_bad_request_fails_alone(model):
    model.busy()
    futures = [model.later(text) for text in ("a", "bad", "bbb")]
    mixed = model.later("fine", "bad")
    model.waiting(4)
    model.task.open.set()
    assert [futures[i].result(20)[0]["length"] for i in (0, 2)] == [1, 3]
    for future in (futures[1], mixed):
        with pytest.raises(AnswerError, match="bad row") as raised:
            future.result(20)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert model.ask("after")[0]["length"] == 5


def test_a_row_that_cannot_be_encoded_never_reaches_the_model(model):
    with pytest.raises(InputError):
        model.ask("fine", "not a row")
    assert model.task.batches == []


def test_a_caller_that_gave_up_costs_no_forward(model):
    first = model.busy()
    late = model.later("late", timeout=0.05)
    with pytest.raises(DeadlineError, match=r"within 0\.05 seconds") as raised:
        late.result(20)
    assert raised.value.get_http_status_code() == 504
    model.task.open.set()
    first.result(20)
    assert model.ask("after")[0]["length"] == 5
    assert model.task.batches == [["busy"], ["after"]]


def test_an_interrupted_caller_costs_no_forward(model):
    first = model.busy()
    ticket = model.scheduler.submit([{"text": "interrupted"}], model.task.check_params({}))
    ticket.wait = lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model.scheduler.run(ticket, Deadline())
    model.task.open.set()
    first.result(20)
    model.ask("after")
    assert model.task.batches == [["busy"], ["after"]]


def test_too_many_waiting_requests_are_refused_and_the_others_answered():
    model = Model(max_queue=3)
    model.busy()
    futures = [model.later("abc") for _ in range(3)]
    model.waiting(3)
    with pytest.raises(OverloadedError, match="at most 3") as raised:
        model.ask("one too many")
    assert raised.value.get_http_status_code() == 503
    model.task.open.set()
    assert [future.result(20)[0]["length"] for future in futures] == [3, 3, 3]
    assert model.ask("again")[0]["length"] == 5


def test_a_request_is_counted_once_on_its_way_to_the_model():
    model = Model(max_queue=2)
    model.busy()
    with model.scheduler.arriving() as arrival:
        model.scheduler.submit([{"text": "a"}], model.task.check_params({}), arrival)
        with model.scheduler.arriving(), pytest.raises(OverloadedError), model.scheduler.arriving():
            pass
    model.task.open.set()


def test_a_large_request_does_not_keep_others_waiting():
    model = Model(max_batch_tokens=10)
    model.task.open.clear()
    large = model.later(*["x" * 10] * 1000)
    assert model.task.entered.acquire(timeout=20)
    small = model.later("y")
    model.waiting(2)
    model.task.open.set()
    assert small.result(20)[0]["length"] == 1
    assert len(large.result(20)) == 1000
    assert ["y"] in model.task.batches[:10]
    assert len(model.task.batches) == 1001


def test_deterministic_runs_every_piece_by_itself():
    model = Model(deterministic=True)
    model.busy()
    futures = [model.later("a", "b|c") for _ in range(5)]
    model.waiting(5)
    model.task.open.set()
    assert [future.result(20)[1]["length"] for future in futures] == [2] * 5
    assert all(len(batch) == 1 for batch in model.task.batches)


def test_progress_is_told(model):
    model.task.open.clear()
    seen = []
    rows = [{"text": "abc"}] * 3

    def tell(done, total):
        seen.append((done, total))
        model.task.open.set()

    predict_rows(model.task, model.scheduler, rows, tell=tell)
    assert seen[0] == (0, 3)


def test_a_deadline_holds_while_progress_is_told(model):
    model.task.open.clear()
    rows = [{"text": "abc"}]
    with pytest.raises(DeadlineError):
        predict_rows(model.task, model.scheduler, rows, timeout=0.5, tell=lambda done, total: None)


@pytest.mark.parametrize("anywhere", [True, False])
def test_a_model_that_nobody_holds_is_freed_with_its_threads(anywhere):
    model = Model(anywhere=anywhere)
    model.ask("abc", timeout=20)
    threads, task = model.scheduler._state.threads, weakref.ref(model.task)
    assert [thread.is_alive() for thread in threads] == [True] * model.abreast
    model.pool.shutdown()
    del model
    gc.collect()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    gc.collect()
    assert task() is None


def _ask_in_child(model, queue):
    # The task's own locks were copied in whatever state they were.
    model.task.open, model.task.entered = threading.Event(), threading.Semaphore(0)
    model.task.open.set()
    queue.put(model.ask("in the child", "too"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("anywhere", [True, False])
def test_a_forked_process_answers_and_the_parent_still_does(anywhere):
    model = Model(anywhere=anywhere)
    model.ask("in the parent")
    model.busy()
    waits = model.later("waits")
    model.waiting(1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ask_in_child, args=(model, queue))
    child.start()
    assert [answer["length"] for answer in queue.get(timeout=30)] == [12, 3]
    child.join(30)
    assert child.exitcode == 0
    model.task.open.set()
    assert waits.result(20)[0]["length"] == 5


@pytest.mark.parametrize("anywhere", [True, False])
def test_a_batch_that_cannot_be_cut_fails_who_waits_and_not_who_comes_next(monkeypatch, anywhere):
    model = Model(anywhere=anywhere)

    def broken(*args):
        monkeypatch.undo()
        raise MemoryError("no batch")

    monkeypatch.setattr("mlflow_safeflavor.predict.forwards.next_batch", broken)
    with pytest.raises(SafeFlavorError, match="no batch"):
        model.ask("a", timeout=20)
    assert model.ask("after", timeout=20)[0]["length"] == 5


def test_long_requests_come_up_more_seldom_than_short_ones_and_all_come_up():
    model = Model(max_batch_tokens=50, forward_cost=0)
    state, ran = model.scheduler._state, []
    long = [Ticket([{}] * 200, [50] * 200, {}, "") for _ in range(4)]
    short = [Ticket([{}], [5], {}, "") for _ in range(4)]
    for _ in range(400):
        tickets = [*long, *short]
        batch = next_batch(state, tickets)
        ran.append({"long" if ticket in long else "short" for ticket, _ in batch})
        # Whoever asked for little asks again as soon as it is answered.
        short = [ticket for ticket in short if ticket.waiting]
        while len(short) < 4:
            short.append(Ticket([{}], [5], {}, ""))
            short[-1].turn = state.spent
    kinds = [kind for (kind,) in ran]  # never both: they share no batch
    assert not any(pair == ("long", "long") for pair in itertools.pairwise(kinds[4:]))
    # Eight wait, of which four are long ones with fifty tokens a time, where the others have twenty
    # in all.
    assert 0.2 < kinds.count("long") / len(kinds) < 0.4
    assert all(len(ticket.waiting) < 195 for ticket in long)


def test_an_observer_that_fails_fails_no_request_and_is_told_on(caplog):
    seen = []

    def observer(costs, seconds):
        seen.append(costs)
        raise OSError("no space left")

    model = Model(anywhere=True)
    model.scheduler.observe(observer)
    with caplog.at_level("ERROR"):
        assert model.ask("abc") == [{"length": 3, "by": "en"}]
        assert model.ask("ab", timeout=20) == [{"length": 2, "by": "en"}]  # in the model's thread
    assert seen == [[3], [2]]
    assert model.task.batches == [["abc"], ["ab"]], "no forward is run again"
    [record] = caplog.records
    assert "what observes forwards failed" in record.message
    assert record.exc_info
