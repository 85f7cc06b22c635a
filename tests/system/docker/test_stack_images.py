"""`make stack` with containers.

Docker compose runs the compose file, and the app answers as this process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import requests
import stack
from artifacts import changes
from parts import MissingPartError
from servers import free_port
from system.docker.base_image import TAG
from system.docker.engine import IMAGES, NoEngineError

import mlflow_safeflavor

pytestmark = [pytest.mark.docker, pytest.mark.slow]

POSTGRES = "postgres:17-alpine"
PYTHON = "python:3.11-slim"
OURS = ("codebuggy-parts", "codebuggy-model")
# Not the name of a stack which somebody has running.
SETTINGS = {"COMPOSE_PROJECT_NAME": IMAGES}


@pytest.fixture
def images(engine, torch_index):
    """The two images that the stack builds on: pulled, or where no hub can be reached stand-ins."""
    stands_in = torch_index != "auto"
    if stands_in:
        folder = Path(__file__).with_name("postgres")
        # The name goes with the tests.
        engine.docker("build", "--build-arg", f"BASE={TAG}", "--tag", POSTGRES, folder, timeout=600)
        engine.docker("tag", TAG, PYTHON)
    yield
    for name in OURS + ((POSTGRES, PYTHON) if stands_in else ()):
        engine.remove_images(name)


@pytest.fixture
def environ(engine, images, tmp_path, monkeypatch):
    """Variables of the compose file and of the engine, also of this process.

    What is started with them is removed.
    """
    for name, value in {
        **engine.environ,
        **SETTINGS,
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        compose = stack.compose()
    except MissingPartError as error:
        raise NoEngineError(str(error)) from None
    environ = stack.environment(stack.container_settings(tmp_path))
    yield environ
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([*compose, "down", "--volumes"], env=environ, timeout=120)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # takes it off the environment, too
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]  # which "" would not
    os.environ.pop("MLFLOW_REGISTRY_URI", None)


def log_champion(uri, model, tokenizer, torch_index):
    """A tiny classifier of two texts, in the registry of the stack."""
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = mlflow.MlflowClient()
    with mlflow.start_run(experiment_id=client.create_experiment("codebuggy")):
        info = mlflow_safeflavor.log_model(
            model,
            "model",
            tokenizer=tokenizer,
            input_columns={"text": "buggy_code", "text_pair": "fixed_code"},
            model_config={"deterministic": True, "num_threads": 1},
            registered_model_name=stack.MODEL,
            torch_index=torch_index,
            rehearse=False,
        )
    client.set_registered_model_alias(stack.MODEL, "champion", str(info.registered_model_version))


def test_the_whole_stack(engine, environ, tiny_bert, tiny_tokenizer, torch_index, tmp_path):
    stack.run([*stack.compose(), "up", "--detach", "--wait", "postgres", "s3", "mlflow"], environ)
    uri = f"http://127.0.0.1:{environ['MLFLOW_PORT']}"
    log_champion(uri, tiny_bert(initializer_range=0.5), tiny_tokenizer, torch_index)
    wanted = (
        mlflow_safeflavor.load_model(stack.CHAMPION)
        .predict(pd.DataFrame(changes(50)))
        .to_dict(orient="records")
    )

    # What runs is left as it is, and there is a champion: this builds the model's image, and starts
    # it and the app.
    port = free_port()
    command = [sys.executable, stack.__file__, "--folder", tmp_path]
    done = subprocess.run(
        [*command, "up", "--port", str(port)], stdout=subprocess.PIPE, text=True, timeout=1500
    )
    assert done.returncode == 0
    (printed,) = done.stdout.splitlines()
    assert json.loads(printed)["label"] in {row["label"] for row in wanted}

    url = f"http://127.0.0.1:{port}/predict"
    asked = [requests.post(url, json=row, timeout=60).json() for row in changes(50)]
    assert [{"label": answer["label"], "score": answer["score"]} for answer in asked] == wanted
    assert len({row["score"] for row in wanted}) > 35, "answers that are all alike prove nothing"
    refused = requests.post(url, json={"buggy_code": "x"}, timeout=60)
    assert refused.status_code == 422
    assert "Traceback" not in refused.text

    subprocess.run([*command, "down"], check=True, timeout=120)
    running = engine.docker(
        "ps", "--quiet", "--filter", f"label=com.docker.compose.project={IMAGES}"
    )
    assert not running.split()
