"""PostgreSQL, S3 and an MLflow tracking server.

The same answers on every way to a model, and no half models.

Interruptions happen at a byte and not at a time: a proxy cuts, or kills the real server, in the
middle of an upload or a download.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pandas as pd
import pytest
import requests
import stack
from artifacts import changes
from click.testing import CliRunner
from mlflow.exceptions import MlflowException
from parts import stop_everything

import mlflow_safeflavor
from mlflow_safeflavor.errors import DownloadError, IntegrityError, SafeFlavorError

pytest_plugins = "stack_fixtures"
pytestmark = pytest.mark.slow

NAME = "codebuggy"
CHAMPION = f"models:/{NAME}@champion"
COLUMNS = {"text": "buggy_code", "text_pair": "fixed_code"}


# Ways to the artifacts.

PROXIED = {"MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false"}
"""All bytes go through the tracking server."""

PRESIGNED = {"MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true"}
"""Uploads do; downloads are from S3, at an address that the tracking server has signed."""


@pytest.fixture
def client(parts, to_tracking, to_s3, monkeypatch):
    """This process as a client: its requests go through the proxies."""
    for name, value in {**parts.client_environ(), **parts.server_environ, **PROXIED}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(to_tracking.url)
    mlflow.set_registry_uri(to_tracking.url)
    yield mlflow.MlflowClient()
    while mlflow.active_run():
        to_tracking.mend()
        mlflow.end_run("KILLED")
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # takes it off the environment, too
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]  # which "" would not
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


@pytest.fixture
def log(client, parts, tiny_bert, tiny_tokenizer):
    """``log(name, direct=False)``: log and register a tiny classifier of two texts.

    Gives MLflow's info.
    """

    def run(name, *, direct=False):
        experiment = "direct" if direct else "proxied"
        if client.get_experiment_by_name(experiment) is None:
            client.create_experiment(
                experiment, artifact_location=parts.direct_artifacts if direct else None
            )
        mlflow.set_experiment(experiment)
        with mlflow.start_run():
            return mlflow_safeflavor.log_model(
                tiny_bert(initializer_range=0.5),
                "model",
                tokenizer=tiny_tokenizer,
                input_columns=COLUMNS,
                model_config={"deterministic": True},
                registered_model_name=name,
                rehearse=False,
                graph="no",
            )

    return run


@pytest.fixture
def champion(log, client, to_tracking):
    """Ids of two logged models, ``model_id`` and ``direct``, the first being the champion.

    Bytes of its upload.
    """
    if not _made:
        before = to_tracking.passed["upload"]
        info = log(NAME)
        _made["upload"] = to_tracking.passed["upload"] - before
        client.set_registered_model_alias(NAME, "champion", info.registered_model_version)
        _made["model_id"] = info.model_id
        _made["direct"] = log("direct", direct=True).model_id
    return _made


_made: dict[str, Any] = {}


class Download(NamedTuple):
    """Bytes that a whole download of the champion has, and the names at its top."""

    bytes: int
    names: set[str]


@pytest.fixture
def whole(champion, client, to_tracking):
    """A download of the champion through the server; made once, as it has a request a file."""
    if "whole" not in champion:
        before = to_tracking.passed["download"]
        there = Path(mlflow.artifacts.download_artifacts(CHAMPION))
        passed = to_tracking.passed["download"] - before
        champion["whole"] = Download(passed, {path.name for path in there.iterdir()})
    return champion["whole"]


def answers_of(model, table):
    return pd.DataFrame(model.predict(table)).to_dict(orient="records")


# Parity.


def test_every_way_to_the_champion_gives_the_same_bits(champion, parts, client):
    table = pd.DataFrame(changes(200))
    native = mlflow_safeflavor.load_model(CHAMPION)
    assert native.report.bit_identical, "what the module answered when it was logged"
    wanted = answers_of(native, table)
    assert len({row["score"] for row in wanted}) > 150, "answers that are all alike prove nothing"
    assert answers_of(mlflow.pyfunc.load_model(CHAMPION), table) == wanted
    try:
        # What runs is left as it is, and there is a champion: this starts the model's server and
        # the app.
        done = CliRunner().invoke(
            stack.main, ["--folder", str(parts.folder), "up", "--local", "--port", "0"]
        )
        assert done.exit_code == 0, done.output
        urls = json.loads((parts.folder / "stack.json").read_text())
        body = {"dataframe_split": {"columns": list(table.columns), "data": table.values.tolist()}}
        served = requests.post(f"{urls['model']}/invocations", json=body, timeout=60).json()[
            "predictions"
        ]
        report = mlflow_safeflavor.verify_model(CHAMPION, endpoint=urls["model"])
        records = table.to_dict(orient="records")
        asked = [
            requests.post(f"{urls['app']}/predict", json=record, timeout=60).json()
            for record in records
        ]
    finally:
        stop_everything(parts.folder, "app", "model")
    assert served == wanted
    assert report.verdict == "bit-identical"
    assert [{"label": answer["label"], "score": answer["score"]} for answer in asked] == wanted
    (printed,) = done.stdout.splitlines()
    assert json.loads(printed)["label"] in {row["label"] for row in wanted}


@pytest.mark.parametrize("way", ["presigned", "direct"])
def test_other_ways_to_the_artifacts(champion, client, to_tracking, to_s3, monkeypatch, way):
    for name, value in PRESIGNED.items():
        monkeypatch.setenv(name, value)
    before = to_tracking.passed["download"]
    model = mlflow_safeflavor.load_model(
        CHAMPION if way == "presigned" else f"models:/{champion['direct']}"
    )
    assert model.report.bit_identical
    # A few hundred bytes a file, to be told where it is, and not the files.
    assert to_tracking.passed["download"] - before < model.report.hashed_bytes / 3, (
        "the files came past the server"
    )


# Uploads that break off.


def half_models(client):
    """Ids of logged models that are not READY."""
    experiments = [client.get_experiment_by_name(name) for name in ("proxied", "direct")]
    found = client.search_logged_models(
        [experiment.experiment_id for experiment in experiments if experiment]
    )
    return {model.model_id for model in found if model.status != "READY"}


def require_nothing_of(name, client, before):
    """No version of ``name`` is registered, and what was uploaded of the model cannot be loaded."""
    assert list(client.search_model_versions(f"name = '{name}'")) == []
    (half,) = half_models(client) - before
    with pytest.raises(MlflowException) as caught:
        mlflow_safeflavor.load_model(f"models:/{half}")
    assert_named(caught.value)
    return half


def assert_named(error):
    """The error says which file, or that there is no model at all."""
    told = str(error)
    assert any(
        word in told for word in ("safeflavor/", "code/", "MLmodel", "manifest", "No such artifact")
    ), told


@pytest.mark.parametrize("direct", [False, True], ids=["through the server", "to S3"])
def test_an_upload_that_is_cut(champion, log, client, to_tracking, to_s3, direct):
    before = half_models(client)
    (to_s3 if direct else to_tracking).arm(champion["upload"] // 2, upload=True)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever MLflow and boto3 raise
        log("cut", direct=direct)
    assert caught.type is not AssertionError
    to_s3.mend()
    to_tracking.mend()
    half = require_nothing_of("cut", client, before)
    # FAILED, unless the tracking server could not be told.
    assert client.get_logged_model(half).status == ("FAILED" if direct else "PENDING")
    if direct:
        return
    # MLflow itself registers whatever it is told to; the load refuses.
    version = mlflow.register_model(f"models:/{half}", "by-hand")
    with pytest.raises(MlflowException) as caught:
        mlflow_safeflavor.load_model(f"models:/by-hand/{version.version}")
    assert_named(caught.value)
    with pytest.raises(MlflowException):
        mlflow.pyfunc.load_model(f"models:/by-hand/{version.version}")


def test_the_s3_server_is_killed_in_an_upload_and_in_a_download(
    champion, log, client, parts, to_s3
):
    before = half_models(client)
    to_s3.arm(champion["upload"] // 2, upload=True, action=parts.s3.kill)
    with pytest.raises(MlflowException):
        log("killed-s3")
    assert to_s3.triggered.wait(30)
    assert not parts.s3.is_running()
    parts.start()
    to_s3.mend()
    require_nothing_of("killed-s3", client, before)
    to_s3.arm(champion["upload"] // 2, upload=False, action=parts.s3.kill)
    with pytest.raises(MlflowException):
        mlflow_safeflavor.load_model(CHAMPION)
    assert to_s3.triggered.wait(30)
    parts.start()
    to_s3.mend()
    # What it had acknowledged before is whole.
    assert mlflow_safeflavor.load_model(CHAMPION).report.bit_identical


def test_the_tracking_server_is_killed_in_an_upload(champion, log, client, parts, to_tracking):
    before = half_models(client)
    to_tracking.arm(champion["upload"] // 2, upload=True, action=parts.tracking.kill)
    with pytest.raises(MlflowException):
        log("killed-tracking")
    assert to_tracking.triggered.wait(30)
    assert not parts.tracking.is_running()
    parts.postgres.kill()  # and the database with it: what was committed is there again
    parts.start()
    to_tracking.mend()
    require_nothing_of("killed-tracking", client, before)
    assert client.get_model_version_by_alias(NAME, "champion").source.endswith(champion["model_id"])


@pytest.mark.parametrize("killed", ["s3", "tracking"])
def test_an_upload_from_a_folder_goes_on_once_the_server_is_there_again(
    champion, client, parts, to_tracking, to_s3, tiny_bert, tiny_tokenizer, tmp_path, killed
):
    """As the hint says it, in the words that it says it in."""
    mlflow_safeflavor.save_model(
        tiny_bert(initializer_range=0.5), tmp_path / "saved", tokenizer=tiny_tokenizer,
        input_columns=COLUMNS, rehearse=False, graph="no",
    )  # fmt: skip
    mlflow.set_experiment("proxied")
    server, proxy = {"s3": (parts.s3, to_s3), "tracking": (parts.tracking, to_tracking)}[killed]
    before, name = half_models(client), f"folder-{killed}"
    proxy.arm(champion["upload"] // 2, upload=True, action=server.kill)
    with pytest.raises(DownloadError) as caught:
        mlflow_safeflavor.log_model(tmp_path / "saved", "model", registered_model_name=name)
    assert proxy.triggered.wait(30)
    assert not server.is_running()
    parts.start()
    proxy.mend()
    half = require_nothing_of(name, client, before)
    call, _, rest = str(caught.value.hint).partition(" uploads what is missing")
    assert call.startswith("log_model(")
    assert not rest
    info = eval(call, {"log_model": mlflow_safeflavor.log_model})
    assert info.model_id == half
    assert client.get_logged_model(half).status == "READY"
    assert mlflow_safeflavor.load_model(f"models:/{half}").report.bit_identical
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.source.endswith(half)
    assert mlflow_safeflavor.load_model(f"models:/{name}/1").report.bit_identical


LOG = """
import sys, mlflow, mlflow_safeflavor
from transformers import AutoTokenizer, BertForSequenceClassification
mlflow.set_experiment("proxied")
with mlflow.start_run():
    mlflow_safeflavor.log_model(
        sys.argv[1], "model", tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]),
        task="text-classification", registered_model_name="killed-client", rehearse=False,
        graph="no",
    )
"""


def test_the_client_is_killed_in_an_upload(
    champion, client, to_tracking, tiny_bert, tiny_tokenizer, tmp_path
):
    before = half_models(client)
    tiny_bert().save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    environ = {**os.environ, "MLFLOW_TRACKING_URI": to_tracking.url}
    with (tmp_path / "log").open("wb") as output:
        command = [sys.executable, "-c", LOG, str(tmp_path / "checkpoint")]
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        to_tracking.arm(champion["upload"] // 2, upload=True, action=process.kill)
        status = process.wait(timeout=120)
    assert to_tracking.triggered.wait(30), (tmp_path / "log").read_text()
    assert status == -9
    to_tracking.mend()
    require_nothing_of("killed-client", client, before)


# Downloads that break off.


@pytest.mark.parametrize("way", ["through the server", "direct", "of the run"])
def test_a_download_that_is_cut(champion, client, to_tracking, to_s3, tmp_path, way):
    direct = client.get_logged_model(champion["direct"])
    uri = {
        "through the server": CHAMPION,
        "direct": f"models:/{direct.model_id}",
        "of the run": f"runs:/{direct.source_run_id}/model",
    }[way]
    proxy = to_tracking if way == "through the server" else to_s3
    before = proxy.passed["download"]
    whole = Path(mlflow.artifacts.download_artifacts(uri))
    all_bytes = proxy.passed["download"] - before
    proxy.arm(all_bytes // 2, upload=False)
    with pytest.raises(MlflowException) as caught:
        mlflow_safeflavor.load_model(uri, str(tmp_path))
    assert proxy.triggered.wait(30), repr(caught.value)
    proxy.mend()
    # What lies there is not taken for a model by anybody who finds it.
    assert any(tmp_path.rglob("*"))
    there = tmp_path / "model" if way == "of the run" else tmp_path
    for load in (mlflow_safeflavor.load_model, mlflow.pyfunc.load_model):
        with pytest.raises(MlflowException):
            load(str(there))
    with pytest.raises(SafeFlavorError) as refused:
        mlflow_safeflavor.load_model(str(there))
    assert_named(refused.value)
    # Asked again, the rest comes into the same folder.
    before = proxy.passed["download"]
    assert mlflow_safeflavor.load_model(uri, str(tmp_path)).report.bit_identical
    assert proxy.passed["download"] - before < all_bytes * 0.8
    assert {path.name for path in there.iterdir()} == {path.name for path in whole.iterdir()}


def test_the_tracking_server_is_killed_in_a_download(
    champion, client, parts, to_tracking, tmp_path
):
    to_tracking.arm(champion["upload"] // 2, upload=False, action=parts.tracking.kill)
    with pytest.raises(MlflowException) as caught:
        mlflow_safeflavor.load_model(CHAMPION, tmp_path / "to")
    assert to_tracking.triggered.wait(30), repr(caught.value)
    assert not parts.tracking.is_running()
    # What came is not taken for a model.
    with pytest.raises(SafeFlavorError) as refused:
        mlflow_safeflavor.load_model(tmp_path / "to")
    assert_named(refused.value)
    parts.start()
    to_tracking.mend()
    assert mlflow_safeflavor.load_model(CHAMPION, tmp_path / "to").report.bit_identical


GET = """
import sys
from mlflow_safeflavor.load.download import located
with located(sys.argv[1], sys.argv[2]):
    pass
"""


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_the_client_is_killed_in_a_download(whole, client, to_tracking, tmp_path, part):
    command = [sys.executable, "-c", GET, CHAMPION, str(tmp_path / "to")]
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "MLFLOW_TRACKING_URI": to_tracking.url},
            stdout=output, stderr=output,
        )  # fmt: skip
        to_tracking.arm(int(whole.bytes * part), upload=False, action=process.kill)
        assert process.wait(timeout=120) == -9, (tmp_path / "log").read_text()
    to_tracking.mend()
    before = to_tracking.passed["download"]
    assert mlflow_safeflavor.load_model(CHAMPION, tmp_path / "to").report.bit_identical
    # Of what the proxy had passed on some was not yet written, and is lost with its file.
    assert to_tracking.passed["download"] - before < whole.bytes * min(1.2 - part / 2, 0.98)
    assert {path.name for path in (tmp_path / "to").iterdir()} == whole.names


def test_a_download_that_is_cut_once_comes_whole_at_the_second_try(
    champion, client, to_s3, monkeypatch
):
    retries = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    for name, value in {**PRESIGNED, **retries}.items():
        monkeypatch.setenv(name, value)
    to_s3.arm(champion["upload"] // 2, upload=False, once=True)
    assert mlflow_safeflavor.load_model(CHAMPION).report.bit_identical
    assert to_s3.triggered.wait(30)


def test_half_an_object_in_the_store(champion, client, parts):
    uri = f"models:/{champion['direct']}"
    s3 = parts.s3_client()
    listed = [
        entry["Key"]
        for entry in s3.list_objects_v2(Bucket="codebuggy", Prefix="direct/")["Contents"]
    ]
    (key,) = (
        key for key in listed if champion["direct"] in key and key.endswith("/model.safetensors")
    )
    content = s3.get_object(Bucket="codebuggy", Key=key)["Body"].read()
    s3.put_object(Bucket="codebuggy", Key=key, Body=content[: len(content) // 2])
    try:
        with pytest.raises(
            IntegrityError, match=r"safeflavor/model\.safetensors: has \d+ bytes, wanted"
        ):
            mlflow_safeflavor.load_model(uri)
        with pytest.raises(MlflowException, match=r"model\.safetensors"):
            mlflow.pyfunc.load_model(uri)
    finally:
        s3.put_object(Bucket="codebuggy", Key=key, Body=content)
