"""The image of `generate_dockerfile`: built, run as strictly as can be, and asked."""

from __future__ import annotations

import re
import shutil
import time

import mlflow
import pandas as pd
import pytest
from artifacts import edit_json, edit_mlmodel, flip, reseal
from containers import running
from engine import IMAGES
from transformers import AutoModel, AutoTokenizer

import mlflow_safeflavor

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.graphs]

TEXTS = ["", "a cat on the mat", "naïve Straße 你好 🙂", "def f(x): return x + 1 " * 90]
BODY = {"dataframe_records": [{"text": text} for text in TEXTS]}
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
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
                rehearse=False,
            )
            model.embeddings.LayerNorm.bias.data.add_(0.5)
        _made["saved"] = folder
    return _made["saved"]


@pytest.fixture
def image(engine, saved_minilm):
    """Built once; the tag, and what the build printed."""
    if "image" not in _made:
        path = mlflow_safeflavor.generate_dockerfile(str(saved_minilm / "model"), saved_minilm / "context")
        _made["image"] = f"{IMAGES}:own", engine.docker("build", "--tag", f"{IMAGES}:own", path.parent, timeout=900)
    return _made["image"]


def answers(path, monkeypatch):
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    found = mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame({"text": TEXTS}))
    return found["embedding"].tolist()


def test_it_answers_as_this_machine_without_root_network_or_a_writable_disk(engine, image, saved_minilm, monkeypatch):
    expected = answers(saved_minilm / "model", monkeypatch)
    with running(engine, image[0], *HARDENED, "--network", "none", env=ONE_THREAD) as container:
        container.wait_until_serving(inside=True)
        found = container.invoke_inside(BODY)["predictions"]
        assert engine.docker("exec", container.name, "id", "--user").strip() == "10001"
        log = container.log()
    assert [row["embedding"] for row in found] == expected, "bit for bit, as JSON holds all digits"
    assert "safeflavor: feature-extraction" in log


def test_a_graph_is_served_without_transformers(engine, image, saved_minilm, monkeypatch):
    """The lean image: the same bits from a container in which transformers is not installed."""
    path = mlflow_safeflavor.generate_dockerfile(
        str(saved_minilm / "model"), saved_minilm / "lean", engine="onnx", hashes=False
    )
    pins = (path.parent / "environment" / "requirements.txt").read_text()
    assert "transformers" not in pins
    assert "tokenizers" in pins
    tag = f"{IMAGES}:lean"
    assert ", onnx, " in engine.docker("build", "--tag", tag, path.parent, timeout=900)
    with running(engine, tag, *HARDENED, env=ONE_THREAD) as container:
        container.wait_until_serving()
        found = container.invoke(BODY)["predictions"]
        looked = engine.docker(
            "exec", container.name, "python", "-c", "import importlib.util as u; print(u.find_spec('transformers'))"
        )
    assert [row["embedding"] for row in found] == answers(saved_minilm / "model", monkeypatch)
    assert looked.strip() == "None"
    size = {name: int(engine.docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (tag, image[0])}
    print(size)
    assert size[tag] < size[image[0]]


def test_workers_are_as_many_as_the_quota_allows(engine, image):
    with running(engine, image[0], *HARDENED, "--cpus=1") as container:
        container.wait_until_serving()
        assert "a quota of 1, 1 workers: 1 threads" in container.log()
        assert engine.docker("exec", container.name, "cat", "/proc/1/cmdline").split("\0")[-4:-2] == ["--workers", "1"]
    with running(engine, image[0], *HARDENED, env={"MLFLOW_MODELS_WORKERS": "2"}) as container:
        container.wait_until_serving()
        assert "2 workers: " in container.log()


def test_it_becomes_healthy_and_stops_at_once(engine, image):
    with running(engine, image[0], *HARDENED, "--health-interval=1s") as container:
        container.wait_until_serving()
        deadline = time.monotonic() + 60
        while container.state()["Health"]["Status"] != "healthy" and time.monotonic() < deadline:
            time.sleep(0.5)
        assert container.state()["Health"]["Status"] == "healthy"
        started = time.monotonic()
        engine.docker("stop", "--time", "30", container.name)
        assert time.monotonic() - started < 25, "the server gets the signal itself"
        assert not container.state()["OOMKilled"]


def test_a_change_of_weights_installs_nothing(engine, image, saved_minilm, monkeypatch):
    path = mlflow_safeflavor.generate_dockerfile(str(saved_minilm / "retrained"), saved_minilm / "context-2")
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

    edit_json(model / "safeflavor" / "parity.json", change)
    reseal(model)


def _other_python(model):
    edit_json(model / "safeflavor" / "environment.json", lambda content: content.update(python="3.99.0"))
    reseal(model)


def _lost_file(model):
    (model / "safeflavor" / "tensors.json").unlink()


def _later_format(model):
    edit_mlmodel(model, lambda content: content["flavors"]["safeflavor"].update(format_version=99))


@pytest.mark.parametrize(("damage", "error"), [
    (_flip_weights, "IntegrityError"), (_other_answers, "ParityError"), (_other_python, "EnvironmentMismatchError"),
    (_lost_file, "IntegrityError"), (_later_format, "FormatVersionError"),
])  # fmt: skip
def test_a_damaged_model_fails_the_build(engine, image, saved_minilm, tmp_path, damage, error):
    folder = tmp_path / "context"
    shutil.copytree(saved_minilm / "context", folder)
    damage(folder / "model")
    with pytest.raises(AssertionError, match=error):
        engine.docker("build", folder, timeout=900)
