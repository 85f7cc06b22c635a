"""The image of `generate_dockerfile`: built, run as strictly as can be, and asked."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from artifacts import edit_json, edit_mlmodel, flip, reseal
from system.docker.containers import running
from system.docker.engine import IMAGES, LABEL
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

import mlflow_safeflavor

pytestmark = [pytest.mark.docker, pytest.mark.slow]

TEXTS = ["", "a cat on the mat", "naïve Straße 你好 🙂", "def f(x): return x + 1 " * 90]
BODY = {"dataframe_records": [{"text": text} for text in TEXTS]}
HARDENED = (
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
)
ONE_THREAD = {"MLFLOW_SAFEFLAVOR_NUM_THREADS": "1"}
_made = {}


@pytest.fixture
def saved_minilm(torch_index, minilm_folder, tmp_path_factory):
    """Real weights, saved; and again with other ones."""
    if "saved" not in _made:
        folder = tmp_path_factory.mktemp("own")
        model = AutoModel.from_pretrained(minilm_folder, dtype="float32")
        for name in ("model", "retrained"):
            mlflow_safeflavor.save_model(
                model,
                folder / name,
                tokenizer=AutoTokenizer.from_pretrained(minilm_folder),
                task="feature-extraction",
                torch_index=torch_index,
                extra_pip_requirements=["prometheus-client"],
                rehearse=False,
            )
            model.embeddings.LayerNorm.bias.data.add_(0.5)
        _made["saved"] = folder
    return _made["saved"]


@pytest.fixture
def image(engine, saved_minilm):
    """Built once; the tag, and what the build printed."""
    if "image" not in _made:
        path = mlflow_safeflavor.generate_dockerfile(
            str(saved_minilm / "model"), saved_minilm / "context"
        )
        _made["image"] = (
            f"{IMAGES}:own",
            engine.docker("build", "--tag", f"{IMAGES}:own", path.parent, timeout=900),
        )
    return _made["image"]


def answers(path, monkeypatch):
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    found = mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame({"text": TEXTS}))
    return found["embedding"].tolist()


def test_it_answers_as_this_machine_without_root_network_or_a_writable_disk(
    engine, image, saved_minilm, monkeypatch
):
    expected = answers(saved_minilm / "model", monkeypatch)
    with running(engine, image[0], *HARDENED, "--network", "none", env=ONE_THREAD) as container:
        container.wait_until_serving(inside=True)
        found = container.invoke_inside(BODY)["predictions"]
        assert engine.docker("exec", container.name, "id", "--user").strip() == "10001"
        log = container.log()
    assert [row["embedding"] for row in found] == expected, "bit for bit, as JSON holds all digits"
    assert "safeflavor: feature-extraction" in log


def test_it_holds_what_the_graph_needs_and_no_more(engine, image, saved_minilm):
    assert ", onnx, " in image[1], "the report of the check in the build"
    pins = (saved_minilm / "context" / "environment" / "requirements.txt").read_text()
    assert "mlflow-skinny==" in pins
    heavy = ("torch", "transformers", "onnx", "scipy", "pyarrow", "sklearn", "matplotlib")
    look = f"import importlib.util as u; print([name for name in {heavy} if u.find_spec(name)])"
    assert in_container(engine, image, look).strip() == "[]"


def in_container(engine, image, code, *options):
    """What a program prints that runs in a container of the image, in place of the server."""
    return engine.docker(
        "run",
        "--rm",
        "--label",
        LABEL,
        *options,
        "--entrypoint",
        "python",
        image[0],
        "-c",
        code,
        timeout=600,
    )


WORDS = (
    "the a cat dog sat ran on under mat tree naïve Straße 你好 🙂 def f(x): return x + 1".split()
)
ASK = """
import json, sys, logging
logging.disable()
import mlflow.pyfunc, numpy as np, pandas as pd
rows = json.load(open("/rows/rows.json"))
answers = {}
for name in ("classifier", "embedding"):
    model = mlflow.pyfunc.load_model("/rows/" + name)
    answers[name] = model.predict(pd.DataFrame({"text": rows["texts"]})).to_dict("records")
arrays = {name: np.array(values) for name, values in rows["arrays"].items()}
found = mlflow.pyfunc.load_model("/rows/own").predict(arrays)
answers["own"] = {name: array.tolist() for name, array in found.items()}
print("ANSWERS" + json.dumps(answers))
"""


class Own(torch.nn.Module):
    """A module of the user's, with an encoder inside."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Linear(encoder.config.hidden_size, 5)

    def forward(self, ids, mask):
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"labels": self.head(hidden.mean(1)), "all": {"hidden": hidden[:, :2]}}


@pytest.fixture
def mixed(saved_minilm, minilm_folder, tmp_path):
    """A classifier, an embedding model, a user's module, 200 mixed rows, and the host's answers."""
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(minilm_folder, num_hidden_layers=2, dtype="float32").eval()
    classifier = BertForSequenceClassification(encoder.config).eval()
    classifier.bert.load_state_dict(encoder.state_dict(), strict=False)
    folder, drawn = tmp_path / "rows", random.Random(0)
    folder.mkdir(mode=0o755)
    options: dict[str, Any] = {"graph": "only", "rehearse": False}
    mlflow_safeflavor.save_model(
        classifier,
        folder / "classifier",
        tokenizer=AutoTokenizer.from_pretrained(minilm_folder),
        **options,
    )
    lengths = [0, 1, 2, 300, *(int(2 ** drawn.uniform(0, 7)) for _ in range(196))]
    texts = [" ".join(drawn.choices(WORDS, k=length)) for length in lengths]
    arrays = {
        "ids": torch.randint(5, 30000, (200, 24)).numpy(),
        "mask": torch.ones(200, 24, dtype=torch.long).numpy(),
    }
    arrays["mask"][::3, 11:] = 0
    example = {name: array[:2] for name, array in arrays.items()}
    mlflow_safeflavor.save_model(
        Own(encoder).eval(), folder / "own", task="raw", input_example=example, **options
    )
    shutil.copytree(saved_minilm / "model", folder / "embedding")
    rows = {"texts": texts, "arrays": {name: array.tolist() for name, array in arrays.items()}}
    (folder / "rows.json").write_text(json.dumps(rows))
    program = ASK.replace("/rows/", f"{folder}/")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return folder, json.loads(done.stdout.partition("ANSWERS")[2])


def test_the_same_bits_for_any_quota_and_any_number_of_threads(engine, image, mixed):
    folder, wanted = mixed
    assert (
        len(wanted["classifier"]) == len(wanted["embedding"]) == len(wanted["own"]["labels"]) == 200
    )
    assert len({row["score"] for row in wanted["classifier"]}) > 150, (
        "answers that are all alike prove nothing"
    )
    mounted = ("--volume", f"{folder}:/rows:ro", "--env", "MLFLOW_SAFEFLAVOR_ENVIRONMENT=error")
    threads = [("--env", f"MLFLOW_SAFEFLAVOR_NUM_THREADS={count}") for count in (1, 3)]
    for options in (("--cpus=2",), ("--cpus=1",), ("--cpus=0.5",), *threads):
        found = json.loads(
            in_container(engine, image, ASK, *mounted, *options).partition("ANSWERS")[2]
        )
        for name, answers in wanted.items():
            assert found[name] == answers, f"{name}, {options}"


def _servers(engine, container):
    """How many processes in `container` serve; `ww`, or ps may cut the command line short."""
    return engine.docker("top", container.name, "-efww").count("container.serve()")


def test_workers_are_as_many_as_the_quota_allows(engine, image):
    with running(engine, image[0], *HARDENED, "--cpus=1") as container:
        container.wait_until_serving()
        assert "a quota of 1, 1 workers: 1 threads" in container.log()
        assert _servers(engine, container) == 1
    env = {"MLFLOW_MODELS_WORKERS": "2", "MLFLOW_SAFEFLAVOR_METRICS": "9090"}
    with running(engine, image[0], *HARDENED, env=env) as container:
        container.wait_until_serving()
        assert "2 workers: " in container.log()
        assert _servers(engine, container) == 3  # with their parent
        container.invoke(BODY)
        assert f"safeflavor_rows_total {len(TEXTS)}.0" in container.metrics()


def test_it_becomes_healthy_and_stops_once_all_is_answered(engine, image):
    with running(engine, image[0], *HARDENED, "--health-interval=1s") as container:
        container.wait_until_serving()
        deadline = time.monotonic() + 60
        while container.state()["Health"]["Status"] != "healthy" and time.monotonic() < deadline:
            time.sleep(0.5)
        assert container.state()["Health"]["Status"] == "healthy"
        many = {"dataframe_records": BODY["dataframe_records"] * 25}  # seconds of work
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(container.invoke, many)
            time.sleep(0.5)
            assert not asked.done()
            started = time.monotonic()
            engine.docker("stop", "--time", "60", container.name)
            assert time.monotonic() - started < 55, "the server gets the signal itself"
            assert len(asked.result()["predictions"]) == 25 * len(TEXTS)
        assert not container.state()["OOMKilled"]


def test_a_change_of_weights_installs_nothing(engine, image, saved_minilm, monkeypatch):
    path = mlflow_safeflavor.generate_dockerfile(
        str(saved_minilm / "retrained"), saved_minilm / "context-2"
    )
    said = engine.docker("build", "--tag", f"{IMAGES}:own-2", path.parent, timeout=900)
    assert "Collecting" in image[1] or "CACHED" in image[1] or "Using cache" in image[1]
    assert "Collecting" not in said
    assert "Downloading" not in said
    with running(engine, f"{IMAGES}:own-2", *HARDENED, env=ONE_THREAD) as container:
        container.wait_until_serving()
        found = container.invoke(BODY)["predictions"]
    assert [row["embedding"] for row in found] == answers(saved_minilm / "retrained", monkeypatch)


def test_hashes_are_checked_while_it_is_built(engine, image, saved_minilm, tmp_path):
    folder = tmp_path / "context"
    shutil.copytree(saved_minilm / "context", folder)
    requirements = folder / "environment" / "requirements.txt"
    text = requirements.read_text()
    assert text.count("--hash=sha256:") >= text.count("==") > 50
    requirements.write_text(re.sub("sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", text))
    with pytest.raises(AssertionError, match="DO NOT MATCH THE HASHES"):
        engine.docker("build", folder, timeout=900)


def _flip_weights(model):
    flip(model / "safeflavor" / "model.safetensors")


def _other_answers(model):
    def change(content):
        content["answers"][0]["embedding"][0] += 0.5

    edit_json(model / "safeflavor" / "parity-onnx.json", change)
    reseal(model)


def _other_python(model):
    edit_json(
        model / "safeflavor" / "environment.json", lambda content: content.update(python="3.99.0")
    )
    reseal(model)


def _lost_file(model):
    (model / "safeflavor" / "tensors.json").unlink()


def _later_format(model):
    edit_mlmodel(model, lambda content: content["flavors"]["safeflavor"].update(format_version=99))


@pytest.mark.parametrize(("damage", "error"), [
    (_flip_weights, "IntegrityError"), (_other_answers, "ParityError"),
    (_other_python, "EnvironmentMismatchError"),
    (_lost_file, "IntegrityError"), (_later_format, "FormatVersionError"),
])  # fmt: skip
def test_a_damaged_model_fails_the_build(engine, image, saved_minilm, tmp_path, damage, error):
    folder = tmp_path / "context"
    shutil.copytree(saved_minilm / "context", folder)
    damage(folder / "model")
    with pytest.raises(AssertionError, match=error):
        engine.docker("build", folder, timeout=900)
