"""Many callers, one model.

Answers are those of each alone, nobody waits for company, and only the guilty fail.
"""

import gc
import itertools
import multiprocessing
import os
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import mlflow_safeflavor
from mlflow_safeflavor.errors import AnswerError, DeadlineError, InputError, OverloadedError
from mlflow_safeflavor.graph import file
from mlflow_safeflavor.graph.engine import GraphEngine
from mlflow_safeflavor.predict import batching
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
    """A scheduler of the task above; ``ask`` predicts, ``later`` predicts in another thread."""

    def __init__(self, **options):
        self.task = Length()
        self.scheduler = Scheduler(self.task, None, **{"forward_cost": 1000, **options})
        self.pool = ThreadPoolExecutor(32)

    def ask(self, *texts, timeout=None, **params):
        rows = [{"text": text} for text in texts]
        return predict_rows(self.task, self.scheduler, rows, params, timeout=timeout)[0]

    def later(self, *texts, **options):
        return self.pool.submit(self.ask, *texts, **options)

    def busy(self):
        """The model's thread, held up in a forward for a request of its own, with this future."""
        self.task.open.clear()
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
    assert (model.scheduler._state.thread is None) == here


def test_what_comes_meanwhile_waits_for_the_one_that_runs_here_and_is_run_together():
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
    assert [len(batch) for batch in model.task.batches] == [1, 20]
    assert model.task.threads[1] == "safeflavor-model" != model.task.threads[0]


def test_a_table_of_several_batches_leaves_the_model_to_others():
    model = Model(anywhere=True, max_batch_tokens=10)
    assert len(model.ask(*["x" * 10] * 3)) == 3
    assert model.task.threads == ["safeflavor-model"] * 3


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
def test_never_two_forwards_at_once(anywhere):
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
    assert set(most) == {1}
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

    def watch(done, total):
        seen.append((done, total))
        model.task.open.set()

    predict_rows(model.task, model.scheduler, rows, watch=watch)
    assert seen[0] == (0, 3)


def test_a_deadline_holds_while_progress_is_told(model):
    model.task.open.clear()
    rows = [{"text": "abc"}]
    with pytest.raises(DeadlineError):
        predict_rows(model.task, model.scheduler, rows, timeout=0.5, watch=lambda done, total: None)


def test_a_model_that_nobody_holds_is_freed_with_its_thread():
    model = Model()
    model.ask("abc")
    thread, task = model.scheduler._state.thread, weakref.ref(model.task)
    assert thread.is_alive()
    model.pool.shutdown()
    del model
    gc.collect()
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


# A real model.


WORDS = "the a cat dog sat ran on under mat tree red green return x y = + - ( ) def if else".split()


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 28))) for _ in range(200)]


@pytest.fixture
def saved(tiny_bert, tiny_tokenizer, tmp_path_factory):
    """A classifier that was saved once."""
    folder = tmp_path_factory.getbasetemp() / "scheduled"
    if not folder.exists():
        model = tiny_bert(
            num_labels=5, initializer_range=0.3, num_hidden_layers=1, intermediate_size=32
        )
        mlflow_safeflavor.save_model(model, folder, tokenizer=tiny_tokenizer, rehearse=False)
    return folder


PARAMS = [None, {"top_k": -1}, {"top_k": 2, "max_length": 9}, {"function_to_apply": "none"}]


def _requests(texts, count):
    draw = random.Random(1)
    return [
        (draw.choices(texts, k=draw.choice([1] * 9 + [4])), draw.choice(PARAMS))
        for _ in range(count)
    ]


def _answered_by(model, requests, threads):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda request: model.predict(*request), requests))


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["onnx", "module"])
def test_requests_from_32_threads(saved, texts, engine, count):
    """Each is answered as alone: by a graph to the bit, else within 1e-5.

    None lost, none swapped.
    """
    model = mlflow_safeflavor.load_model(saved, model_config={"engine": engine})
    known = {}
    requests = _requests(texts, count)
    for chosen, params in requests:
        for text in chosen:
            if (text, str(params)) not in known:
                known[text, str(params)] = model.predict([text], params).iloc[0].to_dict()
    answers = _answered_by(model, requests, 32)
    assert len(answers) == count
    for (chosen, params), found in zip(requests, answers, strict=True):
        wanted = pd.DataFrame([known[text, str(params)] for text in chosen])
        if engine == "onnx":
            assert found.to_dict() == wanted.to_dict()
        else:
            pd.testing.assert_frame_equal(found, wanted, check_exact=False, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("engine", "deterministic"), [("module", True), ("onnx", True), ("onnx", False)]
)
def test_the_same_bits_whatever_else_is_in_flight(saved, texts, engine, deterministic):
    model = mlflow_safeflavor.load_model(
        saved, model_config={"engine": engine, "deterministic": deterministic}
    )
    alone = [model.predict([text])["score"].item() for text in texts]
    assert model.predict(texts)["score"].tolist() == alone
    assert model.predict(texts[::-1])["score"].tolist() == alone[::-1]


@pytest.mark.parametrize("fact", [None, "batch", "padding"])
def test_deterministic_costs_nothing_where_the_same_bits_were_seen(
    saved, texts, tmp_path, monkeypatch, fact
):
    model = mlflow_safeflavor.load_model(saved)
    seen = {"dtype": "float32", "batch": True, "padding": True, fact: False}
    engine = GraphEngine(model.engine.session, keeps_bits=model.engine.keeps_bits)
    if fact is not None:
        monkeypatch.setattr(file, "_read_facts", lambda layout: {"proof": {"onnx": seen}})
        engine.keeps_bits = file.keeps_bits(model.files, "onnx", "float32")
    rows = []
    run = engine.session

    def counted(inputs):
        rows.append(len(inputs["input_ids"]))
        return run(inputs)

    engine.session, counted.graph = counted, run.graph
    strict = replace(model, options={**model.options, "deterministic": True}).answered_by(engine)
    strict.predict(texts[:20])
    assert (max(rows) > 1) == (fact is None)
    assert sum(rows) == 20


def test_what_a_forward_costs_is_measured_once_and_stored(saved, monkeypatch):
    stored = mlflow_safeflavor.load_model(saved).spec.model_config["forward_cost"]
    assert stored >= 1  # 0 would be measured again by every host, and each would make other batches
    monkeypatch.setattr(
        "mlflow_safeflavor.predict.batching.measure_forward_cost",
        lambda *_: pytest.fail("measured again"),
    )
    assert mlflow_safeflavor.load_model(saved).scheduler.forward_cost == stored
    assert (
        mlflow_safeflavor.load_model(
            saved, model_config={"forward_cost": 48}
        ).scheduler.forward_cost
        == 48
    )


def test_what_a_forward_costs_is_measured_where_it_is_not_known(saved, monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.predict.batching.measure_forward_cost", lambda *_: 77)
    model = mlflow_safeflavor.load_model(saved, model_config={"forward_cost": 0})
    assert model.scheduler.forward_cost == 77


@pytest.mark.parametrize(
    ("call", "token", "wanted"), [(2.0, 0.1, 16), (2.0, 0.05, 32), (0.0, 0.1, 1), (9.0, 0.0, 1)]
)
def test_the_measure_finds_what_a_call_costs(saved, monkeypatch, call, token, wanted):
    model, clock = mlflow_safeflavor.load_model(saved), [0.0]
    monkeypatch.setattr(batching.time, "perf_counter", lambda: clock[0])

    def engine(inputs):
        clock[0] += call + token * inputs["input_ids"].size
        return model.engine(inputs)

    rows = [{"text": "a"}, {"text": "the cat sat on the mat " * 4}]
    assert batching.measure_forward_cost(model.task, engine, rows, 128) == wanted
    assert batching.measure_forward_cost(model.task, engine, rows[:1], 128) == 1


def test_extra_columns_are_ignored_only_if_asked(tmp_path, tiny_bert, tiny_tokenizer, texts):
    table = pd.DataFrame({"text": texts[:3], "id": [1, 2, 3]})
    given = {
        "tokenizer": tiny_tokenizer,
        "input_columns": {"text": "text"},
        "rehearse": False,
        "graph": "no",
    }
    mlflow_safeflavor.save_model(tiny_bert(), tmp_path / "named", **given)
    with pytest.raises(InputError, match="columns that the model does not know"):
        mlflow_safeflavor.load_model(tmp_path / "named").predict(table)
    model = mlflow_safeflavor.load_model(
        tmp_path / "named", model_config={"extra_columns": "ignore"}
    )
    wanted = model.predict(table[["text"]])
    pd.testing.assert_frame_equal(model.predict(table), wanted)
    pd.testing.assert_frame_equal(model.predict(table.to_dict("list")), wanted)
    pd.testing.assert_frame_equal(model.predict(table.to_dict("records")), wanted)
    with pytest.raises(InputError, match="missing"):
        model.predict(table[["id"]])


def test_named_arrays_are_no_columns_to_ignore(tmp_path):
    arrays = {"input": np.ones((2, 3), np.float32)}
    mlflow_safeflavor.save_model(
        torch.nn.Linear(3, 1), tmp_path / "raw", task="raw", input_example=arrays, rehearse=False,
        graph="no",
        init_args={"in_features": 3, "out_features": 1},
    )  # fmt: skip
    model = mlflow_safeflavor.load_model(
        tmp_path / "raw", model_config={"extra_columns": "ignore"}, trust={"code"}
    )
    assert model.predict(arrays)["output_0"].shape == (2, 1)


def test_a_timeout_of_the_model_or_of_the_call(saved, texts):
    model = mlflow_safeflavor.load_model(saved, model_config={"timeout": 1e-6})
    with pytest.raises(DeadlineError, match="in time"):
        model.predict(texts)
    assert len(model.predict(texts, timeout=60)) == len(texts)


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
