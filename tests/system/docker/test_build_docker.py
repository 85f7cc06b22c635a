"""Plain ``mlflow models build-docker --env-manager local``.

The image answers as this machine, or does not serve.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import edit_json, flip, reseal
from data import make_pairs
from model import FixClassifier
from safetensors.numpy import load_file, save_file
from system.docker.containers import running
from system.docker.engine import IMAGES
from torch import nn
from train import COLUMNS, MODEL_CONFIG
from transformers import AutoModel, AutoTokenizer

import mlflow_safeflavor

pytest_plugins = "saved_models"
pytestmark = [pytest.mark.docker, pytest.mark.slow]

# The same on both sides, so that sums come in the same order.
ONE_THREAD = {"MLFLOW_SAFEFLAVOR_NUM_THREADS": "1", "MLFLOW_MODELS_WORKERS": "1"}
PICKLES = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}
STRICT = {"MLFLOW_SAFEFLAVOR_ENVIRONMENT": "error"}
ROWS = 200


@dataclass(frozen=True)
class Saved:
    """A saved model, rows to ask, this machine's answers, and variables that loading needs."""

    path: Path
    rows: list[dict[str, Any]]
    here: list[Any]
    env: dict[str, str]

    @property
    def body(self):
        return {"dataframe_records": self.rows}

    @property
    def volume(self):
        return [] if self is _saved.get(FIRST) else in_its_place(self.path)


def in_its_place(path: Path) -> list[str]:
    """Options that put another model in the place of the image's own."""
    return ["--volume", f"{path}:/opt/ml/model:ro"]


# Models


def sentences(words: str, longest: int) -> list[str]:
    """Texts of one word up to ``longest``, most of them short, in no order."""
    chance, choice = random.Random(0), words.split()
    lengths = [longest, *(round(longest ** (chance.random() ** 2)) for _ in range(ROWS - 1))]
    return [" ".join(chance.choices(choice, k=length)) for length in lengths]


def save_minilm(path, options, request):
    """Real weights; texts beyond the limit of 512 tokens, several scripts, and none at all."""
    folder = request.getfixturevalue("minilm_folder")
    mlflow_safeflavor.save_model(
        AutoModel.from_pretrained(folder, dtype="float32"),
        path,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        task="feature-extraction",
        model_config={"pooling": "mean", "normalize": True},
        graph="no",
        **options,
    )
    words = (
        "the cat sat; naïve Straße привет 你好 🙂 return x[0] + y if else def f(x): 3.14 "
        "https://example.org/a?b=c"
    )
    return [{"text": text} for text in [*sentences(words, 600)[:-1], ""]]


def save_pickled(path, options, request):
    """A notebook's class, with hooks, whose constructor reads a checkpoint that the image lacks."""
    tokenizer = request.getfixturevalue("tiny_tokenizer")
    checkpoint = request.getfixturevalue("tmp_path") / "encoder"
    request.getfixturevalue("tiny_bert")(None, initializer_range=0.5).save_pretrained(checkpoint)

    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = AutoModel.from_pretrained(checkpoint, dtype="float32")
            self.out = nn.Linear(self.encoder.config.hidden_size + 1, 1)

        def forward(self, input_ids, attention_mask, weight):
            hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
            return {"score": self.out(torch.cat([hidden, weight[:, None]], dim=1))[:, 0]}

    def preprocess(rows, tokenizer):
        found = tokenizer(
            [row["code"] for row in rows], padding=True, truncation=True, return_tensors="pt"
        )
        weight = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        return {
            "input_ids": found["input_ids"],
            "attention_mask": found["attention_mask"],
            "weight": weight,
        }

    def postprocess(outputs, rows):
        return [
            {"score": float(score), "code": row["code"]}
            for score, row in zip(outputs["score"], rows, strict=True)
        ]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Scorer().eval()
    chance = random.Random(1)
    texts = sentences("the cat sat on x = y + ( z ) if else", 60)
    rows = [{"code": text, "weight": chance.uniform(-2, 2)} for text in texts]
    hooks: dict[str, Any] = {
        "preprocess": preprocess,
        "postprocess": postprocess,
        "input_example": rows[:3],
    }
    mlflow_safeflavor.save_model(
        model,
        path,
        tokenizer=tokenizer,
        task="custom",
        allow_pickle=True,
        graph="no",
        **hooks,
        **options,
    )
    shutil.rmtree(checkpoint)
    assert json.loads((path / "safeflavor" / "structure.json").read_text())["kind"] == "pickle"
    return rows


def save_pair(path, options, request):
    """A classifier of pairs, with the user's own names of columns."""
    mlflow_safeflavor.save_model(
        request.getfixturevalue("tiny_bert")(initializer_range=0.5),
        path,
        tokenizer=request.getfixturevalue("tiny_tokenizer"),
        task="text-classification",
        input_columns={"text": "buggy_code", "text_pair": "fixed_code"},
        graph="no",
        **options,
    )
    left, right = (
        sentences(words, 40) for words in ("return x + y", "if x else y - ( cat ) = tree zebra")
    )
    return [{"buggy_code": a, "fixed_code": b} for a, b in zip(left, right, strict=True)]


def save_codebuggy(path, options, request):
    """The example's classifier, whose constructor loads real weights, and pairs of other files."""
    folder = request.getfixturevalue("minilm_folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FixClassifier(str(folder), tokenizer.sep_token_id).eval().requires_grad_(False)
    mlflow_safeflavor.save_model(
        model,
        path,
        tokenizer=tokenizer,
        task="text-classification",
        input_columns=COLUMNS,
        model_config=MODEL_CONFIG,
        code_paths=[str(sys.modules[FixClassifier.__module__].__file__)],
        allow_pickle=True,
        graph="no",
        **options,
    )
    pairs = make_pairs(1400)["heldout"][:ROWS]
    return [{"buggy_code": pair.buggy_code, "fixed_code": pair.fixed_code} for pair in pairs]


MODELS: dict[str, tuple[Callable[..., list[dict[str, Any]]], dict[str, str]]] = {
    "minilm": (save_minilm, {}),
    "pickled": (save_pickled, PICKLES),
    "pair": (save_pair, {}),
    "codebuggy": (save_codebuggy, PICKLES),
}
FIRST = "minilm"
_saved: dict[str, Saved] = {}
_images: list[str] = []


@pytest.fixture
def saved_as(torch_index, tmp_path_factory, request, monkeypatch) -> Callable[[str], Saved]:
    """``saved_as("minilm")``: saved, and asked here, once a session."""

    def get(name: str) -> Saved:
        if name not in _saved:
            save, env = MODELS[name]
            path = tmp_path_factory.mktemp("docker") / "model"
            options = {"torch_index": torch_index, "rehearse": False}
            options["extra_pip_requirements"] = ["prometheus-client"]  # for metrics
            rows = save(path, options, request)
            assert len(rows) == ROWS
            here = answers_here(path, rows, {**ONE_THREAD, **env}, monkeypatch)
            _saved[name] = Saved(path, rows, here, env)
        return _saved[name]

    return get


@pytest.fixture
def image(engine, saved_as) -> str:
    """The image of the first model, built once a session.

    A build takes minutes and downloads everything anew, because MLflow copies the model before it
    installs what the model requires. So the other models are put in the place of the first: where
    all of them require the same, ``build-docker`` would install the same for each.
    """
    if not _images:
        started = time.monotonic()
        build(engine, saved_as(FIRST).path, f"{IMAGES}:{FIRST}")
        _images.append(f"{IMAGES}:{FIRST}")
        print(f"image built in {time.monotonic() - started:.0f} s")
    return _images[0]


def answers_here(path, rows, env, monkeypatch):
    """pyfunc's answer in this process, written and read as a server and its callers do."""
    # warns, so not while tests are collected
    from mlflow.pyfunc.scoring_server import predictions_to_json

    with monkeypatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        answers = mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame(rows))
    text = io.StringIO()
    predictions_to_json(answers, text)
    return json.loads(text.getvalue())["predictions"]


def build(engine, path, image):
    command = [sys.executable, "-m", "mlflow", "models", "build-docker", "--env-manager", "local"]
    command += ["--model-uri", str(path), "--name", image]
    # Its output is pytest's to show, where the test fails.
    done = subprocess.run(command, env=engine.environ, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}: exit status {done.returncode}"


# Comparison


def require_same(found, wanted):
    """Equal in every row and field.

    JSON holds all digits, so equal numbers are equal bit for bit.
    """
    different = [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    assert different == [], (
        f"{len(different)} rows differ, row {different[0]}: {found[different[0]]} is not "
        f"{wanted[different[0]]}"
    )


def require_close(found, wanted, tolerance):
    """Equal but for numbers, and these within the tolerance recorded at save."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            require_close(found[key], wanted[key], tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            require_close(a, b, tolerance)
    elif isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=tolerance["rtol"], abs_tol=tolerance["atol"])
    else:
        assert found == wanted


def parts(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def recorded_tolerance(path):
    parity = json.loads((path / "safeflavor" / "parity.json").read_text())
    return {"atol": parity["tolerance"]["atol"], "rtol": parity["tolerance"]["rtol"]}


def test_all_models_require_the_same(saved_as):
    """So that one image serves them all as its own would."""
    needed = {name: (saved_as(name).path / "requirements.txt").read_text() for name in MODELS}
    assert set(needed.values()) == {needed[FIRST]}


@pytest.mark.parametrize("name", MODELS)
def test_image_pyfunc_and_server_answer_the_same_bits(engine, image, saved_as, serve, name):
    model = saved_as(name)
    assert len({json.dumps(row) for row in model.here}) > ROWS / 2, (
        "rows that answer alike prove little"
    )
    with serve(model.path, env={**ONE_THREAD, **model.env}) as server:
        there = server.invoke(model.body)
        assert there.status == 200, there.text
        require_same(there.json()["predictions"], model.here)
    # With STRICT an image with any other version than what was recorded does not start.
    env = {**ONE_THREAD, **STRICT, **model.env, "MLFLOW_SAFEFLAVOR_METRICS": "9090"}
    with running(engine, image, *model.volume, env=env) as container:
        container.wait_until_serving()
        require_same(container.invoke(model.body)["predictions"], model.here)
        assert "1 threads by num_threads" in container.log()
        assert "safeflavor_rows_total" in container.metrics()


# Options, variables, and what the log says of it.
LESS = {
    "one core's time": (["--cpus=1"], {}, " cores, a quota of 1, 1 workers: 1 threads"),
    "half a core's time": (["--cpus=0.5"], {}, " cores, a quota of 0.5, 1 workers: 1 threads"),
    "the oldest kernels": ([], {"ATEN_CPU_CAPABILITY": "default"}, " cores, no quota, 1 workers: "),
}


@pytest.mark.parametrize("name", ["minilm", "pickled", "pair"])
def test_with_less_of_the_machine_the_answers_are_within_tolerance(engine, image, saved_as, name):
    model = saved_as(name)
    with contextlib.ExitStack() as stack:
        # Side by side, because the slowest of them hardly uses half a core.
        containers = {}
        for less, (options, env, _) in LESS.items():
            env = {"MLFLOW_MODELS_WORKERS": "1", **env, **model.env}
            containers[less] = stack.enter_context(
                running(engine, image, *model.volume, *options, env=env)
            )
        for less, container in containers.items():
            container.wait_until_serving()
            assert LESS[less][2] in container.log()
            # In parts: the proxy of MLflow's image gives up after 60 s.
            answers = [
                container.invoke({"dataframe_records": part})["predictions"]
                for part in parts(model.rows, 50)
            ]
            require_close(
                [row for part in answers for row in part],
                model.here,
                recorded_tolerance(model.path),
            )


def test_without_any_network_it_answers(engine, image, saved_as):
    model = saved_as(FIRST)
    with running(engine, image, "--network", "none", env=ONE_THREAD) as container:
        container.wait_until_serving(inside=True)
        require_same(container.invoke_inside(model.body)["predictions"], model.here)


# What must not be served


@pytest.fixture
def damaged(saved_as, tmp_path):
    """``damaged(change)``.

    Options that put a changed copy of the model in the place of the image's own.
    """

    def copy(change: Callable[[Path], object]) -> list[str]:
        path = Path(
            shutil.copytree(saved_as(FIRST).path, tmp_path / change.__name__, copy_function=os.link)
        )
        change(path)
        return in_its_place(path)

    return copy


def other_golden_outputs(path):
    """As if the image computed something else than what was recorded."""
    file = path / "safeflavor" / "parity.safetensors"
    arrays = load_file(file)
    changed = {
        name: array * np.float32(1.5) if array.dtype == np.float32 else array
        for name, array in arrays.items()
    }
    assert any(not np.array_equal(changed[name], array) for name, array in arrays.items())
    file.unlink()
    save_file(changed, file)
    reseal(path)


def flipped_bit(path):
    flip(path / "safeflavor" / "model.safetensors")


def other_platform(path):
    def change(environment):
        environment["machine"] = "riscv64"
        environment["distributions"]["tokenizers"] = "0.0.1"

    edit_json(path / "safeflavor" / "environment.json", change)
    reseal(path)


def test_an_untouched_copy_is_served(engine, image, damaged):
    """So that what the next tests see comes from the damage alone."""
    with running(engine, image, *damaged(reseal), env={**ONE_THREAD, **STRICT}) as container:
        container.wait_until_serving()


REFUSED = {
    "golden outputs": (other_golden_outputs, "ParityError", {}),
    "a flipped bit": (flipped_bit, "IntegrityError", {}),
    "another platform": (other_platform, "EnvironmentMismatchError", STRICT),
}


def test_a_model_that_fails_a_check_ends_the_container(engine, image, damaged):
    with contextlib.ExitStack() as stack:
        containers = {}
        for name, (change, _, env) in REFUSED.items():
            env = {"MLFLOW_MODELS_WORKERS": "1", **env}
            containers[name] = stack.enter_context(
                running(engine, image, *damaged(change), env=env)
            )
        for name, container in containers.items():
            log = container.wait_until_refused()
            assert not container.state()["Running"]
            assert f"{REFUSED[name][1]}: " in log, f"{name}:\n{log}"


def test_workers_that_are_started_again_do_not_serve_either(engine, image, damaged):
    """With several workers the server starts a new one for each that ends.

    None gets as far as /ping.
    """
    options = damaged(other_golden_outputs)
    with running(engine, image, *options, env={"MLFLOW_MODELS_WORKERS": "2"}) as container:
        container.wait_until_refused("ParityError: ", times=3)


def test_without_enough_memory_it_ends_and_does_not_serve(engine, image):
    limit = ["--memory=200m", "--memory-swap=200m"]
    with running(engine, image, *limit, env={"MLFLOW_MODELS_WORKERS": "1"}) as container:
        container.wait_until_refused()
        state = container.state()
        assert not state["Running"]
        assert state["OOMKilled"], f"{state}\n{container.log()}"


def test_a_graph_alone_makes_an_image_without_torch(
    engine, torch_index, minilm_folder, tmp_path, monkeypatch
):
    """Smaller by all that only a module needs.

    MLflow itself is installed whole, whatever the pins say.
    """
    path, tag = tmp_path / "model", f"{IMAGES}:graph"
    model, tokenizer = (
        AutoModel.from_pretrained(minilm_folder),
        AutoTokenizer.from_pretrained(minilm_folder),
    )
    mlflow_safeflavor.save_model(model, path, tokenizer=tokenizer, graph="only", rehearse=False)
    rows = [
        {"text": text} for text in ["", *sentences("the cat sat; naïve Straße 你好 🙂", 300)[:40]]
    ]
    here = answers_here(path, rows, {}, monkeypatch)
    build(engine, path, tag)
    env = {"MLFLOW_MODELS_WORKERS": "1", **STRICT}
    with running(engine, tag, "--cpus=1", env=env) as container:
        container.wait_until_serving()
        require_same(container.invoke({"dataframe_records": rows})["predictions"], here)
        look = (
            "import importlib.util as u; print([name for name in ('torch', 'transformers') if "
            "u.find_spec(name)])"
        )
        assert engine.docker("exec", container.name, "python", "-c", look).strip() == "[]"
