"""Many threads load while others are in transformers' own loader.

Every model right or refused by name, none wrong.

That loader swaps torch's default dtype and ``PreTrainedModel.tie_weights`` for the whole process.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from architectures import modernbert, seeded
from artifacts import TEXTS
from memory import all_bits, memory
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import mlflow_safeflavor
from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.module.memory import real_memory

pytest_plugins = "saved_models"

IDS = {"input_ids": np.array([[1, 5, 9, 4], [7, 2, 2, 3]])}
X = {"x": np.array([[1.0, 2.0, 3.0, 4.0]], dtype=np.float32)}
SECONDS = 60
THREADS, LOADS = 32, 64


class Sensitive(nn.Module):
    """Its constructor obeys torch's default dtype everywhere."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(4, width)
        self.register_buffer("transient", torch.linspace(0, 1, width), persistent=False)
        self.register_buffer(
            "fixed", torch.linspace(0, 1, width, dtype=torch.float32), persistent=False
        )
        self.plain = [torch.linspace(1, 2, width)]

    def forward(self, x):
        return self.layer(x) * self.transient + self.plain[0]


def gpt2():
    return seeded(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        )
    )


def pickled():
    class Local(Sensitive):
        pass

    return seeded(lambda: Local(3))


def picture(model, data):
    """All that can be told of a loaded model: bits, sharing of memory, answers."""
    answers = model.predict(data)
    if not isinstance(answers, dict):
        answers = {"frame": answers.to_json()}
    shared = {path: where[0] for path, where in memory(model.module).items()}
    return (
        all_bits(model.module),
        shared,
        {name: np.asarray(value).tobytes() for name, value in answers.items()},
    )


@pytest.fixture
def cases(tmp_path, saved):
    """Name → (path, options, data), for models that another thread could spoil in some way."""

    def save(name, model, example, **options):
        mlflow_safeflavor.save_model(
            model,
            tmp_path / name,
            task="raw",
            input_example=example,
            rehearse=False,
            graph="no",
            **options,
        )
        return str(tmp_path / name)

    tied = save("tied", gpt2(), IDS)
    sensitive = save("sensitive", seeded(lambda: Sensitive(3)), X, init_args={"width": 3})
    code = {"trust": {"code"}}
    return {
        "classifier": (str(saved), {}, TEXTS),
        "tied": (tied, {}, IDS),
        "tied, cast": (tied, {"dtype": "bfloat16"}, IDS),
        "tied, saved in half precision": (save("half", gpt2(), IDS, dtype="bfloat16"), {}, IDS),
        "rotary": (save("rotary", modernbert(), IDS), {}, IDS),
        "rotary, cast": (str(tmp_path / "rotary"), {"dtype": "float16"}, IDS),
        "custom": (sensitive, code, X),
        "custom, cast": (sensitive, {**code, "dtype": "bfloat16"}, X),
        "pickled": (save("pickled", pickled(), X, allow_pickle=True), {"trust": {"pickle"}}, X),
    }


class Background:
    """Threads in transformers' loader, one for each dtype, for as long as the block lasts."""

    def __init__(self, folder, *dtypes):
        self.folder, self.dtypes = str(folder), dtypes or (torch.bfloat16, torch.float32)
        self.stop, self.loads = threading.Event(), [0] * len(self.dtypes)

    def _run(self, i):
        while not self.stop.is_set():
            with contextlib.suppress(Exception):
                GPT2LMHeadModel.from_pretrained(self.folder, dtype=self.dtypes[i])
            self.loads[i] += 1

    def __enter__(self):
        self.threads = [
            threading.Thread(target=self._run, args=(i,)) for i in range(len(self.dtypes))
        ]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def checkpoint(tmp_path):
    gpt2().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(autouse=True)
def _process_as_before():
    """A storm must not leave the process changed, and if it does, not for the next test."""
    before = torch.get_default_dtype(), PreTrainedModel.tie_weights
    yield
    torch.set_default_dtype(before[0])
    PreTrainedModel.tie_weights = before[1]


def storm(cases, load):
    """``load`` each case many times from many threads.

    Gives problems, and how many loads were refused.
    """
    names = [list(cases)[i % len(cases)] for i in range(LOADS)]
    barrier = threading.Barrier(THREADS)
    problems, refused = [], []

    def work(i):
        if i < THREADS:
            barrier.wait()
        try:
            problem = load(names[i])
        except SafeFlavorError as error:
            refused.append(f"{names[i]}: {type(error).__name__}: {error.what}")
        except Exception as error:
            problems.append(f"{names[i]}: {type(error).__name__}: {error}")
        else:
            problems.extend([f"{names[i]}: {problem}"] if problem else [])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(LOADS)))
    return problems, refused


def test_thirty_two_threads_beside_transformers_own_loader(cases, checkpoint):
    expected = {
        name: picture(mlflow_safeflavor.load_model(path, **options), data)
        for name, (path, options, data) in cases.items()
    }
    parts = ("values", "sharing of memory", "answers")

    def load(name):
        path, options, data = cases[name]
        found = picture(mlflow_safeflavor.load_model(path, **options), data)
        return ", ".join(
            part for part, new, old in zip(parts, found, expected[name], strict=True) if new != old
        )

    started = time.monotonic()
    with Background(checkpoint) as background:
        problems, refused = storm(cases, load)
    seconds = time.monotonic() - started
    assert problems == [], "loads came back wrong, or failed without a name"
    assert min(background.loads) >= 2, "the test is void: nobody was in the other loader"
    assert len(refused) < LOADS / 2, f"refused instead of right: {sorted(set(refused))}"
    assert seconds < SECONDS
    for name in cases:
        assert load(name) == "", "the process stayed broken"


def test_the_process_is_left_as_it_was(cases, checkpoint):
    """Whoever restores a global out of turn would leave another thread's value behind for good.

    Only one thread is in the other loader: two of them already do this to each other.
    """
    names = [name for name in cases if cases[name][1] in ({}, {"trust": {"code"}})]
    chosen = {name: cases[name] for name in names}
    tie = PreTrainedModel.tie_weights

    def load(name):
        path, options, _ = chosen[name]
        mlflow_safeflavor.load_model(path, verify="off", **options)

    for _ in range(3):
        with Background(checkpoint, torch.bfloat16):
            problems, _ = storm(chosen, load)
        assert problems == []
        assert torch.get_default_dtype() == torch.float32, "torch's default dtype stayed another"
    PreTrainedModel.tie_weights = tie  # the other loader's own matter
    assert nn.Linear(1, 1).weight.dtype == torch.float32


def test_what_another_thread_had_set_for_a_moment_is_not_put_back():
    entered = threading.Event()

    def other_loader():
        torch.set_default_dtype(torch.bfloat16)
        entered.set()
        time.sleep(0.05)
        torch.set_default_dtype(torch.float32)

    thread = threading.Thread(target=other_loader)
    thread.start()
    entered.wait()
    with real_memory(inventory=Inventory({}, {}, {})):
        thread.join()
        assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_an_outer_device_of_this_thread_reaches_no_tensor(cases):
    """Right, or refused by name.

    Recorded rows are answered in the caller's context, where arrays may go to meta.
    """
    expected = {
        name: picture(mlflow_safeflavor.load_model(path, **options), data)
        for name, (path, options, data) in cases.items()
    }
    for name, (path, options, data) in cases.items():
        with torch.device("meta"):
            try:
                model = mlflow_safeflavor.load_model(path, **options)
            except SafeFlavorError:
                model = mlflow_safeflavor.load_model(path, verify="off", **options)
        assert picture(model, data) == expected[name], f"{name} under torch.device('meta')"


def test_an_outer_default_dtype_reaches_nothing_and_is_put_back(cases):
    for name, (path, options, data) in cases.items():
        expected = picture(mlflow_safeflavor.load_model(path, **options), data)
        torch.set_default_dtype(torch.float64)
        try:
            model = mlflow_safeflavor.load_model(path, **options)
            assert torch.get_default_dtype() == torch.float64, (
                "the caller's default dtype was not put back"
            )
        finally:
            torch.set_default_dtype(torch.float32)
        assert picture(model, data) == expected, f"{name} under another default dtype"


def test_one_loaded_model_from_many_threads(cases):
    """Bit by bit: each row is run by itself.

    What merging does to the bits is in test_scheduler.py.
    """
    path, options, data = cases["classifier"]
    model = mlflow_safeflavor.load_model(path, **options, model_config={"deterministic": True})
    expected = [model.predict([text])["score"].item() for text in data]
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda i: model.predict([data[i % len(data)]])["score"].item(), range(160))
        )
    assert found == [expected[i % len(data)] for i in range(160)]


def test_saving_beside_loading(cases, checkpoint, tmp_path):
    """Saved while others load: the same bytes as saved alone."""
    model = seeded(lambda: Sensitive(3))

    def save(name):
        options: dict[str, Any] = {
            "task": "raw",
            "init_args": {"width": 3},
            "input_example": X,
            "dtype": "bfloat16",
        }
        mlflow_safeflavor.save_model(model, tmp_path / name, rehearse=False, graph="no", **options)

    save("alone")
    wanted = (tmp_path / "alone" / "safeflavor" / "model.safetensors").read_bytes()
    names = [f"again-{i}" for i in range(4)]
    with Background(checkpoint), ThreadPoolExecutor(4) as pool:
        outcomes = [pool.submit(save, name) for name in names]
    errors = [outcome.exception() for outcome in outcomes if outcome.exception() is not None]
    assert all(isinstance(error, SafeFlavorError) for error in errors), (
        f"failed without a name: {errors}"
    )
    assert len(errors) < len(names), f"none was saved: {errors}"
    for name in names:
        file = tmp_path / name / "safeflavor" / "model.safetensors"
        assert not file.exists() or file.read_bytes() == wanted, "saved in another dtype"
