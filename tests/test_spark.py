"""Spark itself, once: a column of lists and one of texts, with the types that MLflow infers from the signature."""

from __future__ import annotations

import shutil
import sys

import mlflow
import numpy as np
import pytest
import torch
from architectures import tiny_model

import mlflow_safeflavor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
    pytest.mark.filterwarnings("ignore"),  # Spark's and pandas' own
]
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def test_models_answer_in_spark_as_they_do_here(tmp_path, tiny_tokenizer, monkeypatch):
    sql = pytest.importorskip("pyspark.sql")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    save = {"rehearse": False, "structure": "module"}
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    mlflow_safeflavor.save_model(net, tmp_path / "raw", task="raw", input_example={"input": X[:2]}, **save)
    model = tiny_model("Bert", "ForSequenceClassification", num_labels=3)
    mlflow_safeflavor.save_model(model, tmp_path / "text", tokenizer=tiny_tokenizer, **save)
    spark = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        frames = {
            "raw": spark.createDataFrame([([float(x) for x in row],) for row in X], "input array<float>"),
            "text": spark.createDataFrame([("a cat",), ("the dog ran on the mat",)], "text string"),
        }
        found = {}
        for name, frame in frames.items():
            udf = mlflow.pyfunc.spark_udf(spark, str(tmp_path / name), env_manager="local")
            found[name] = [row[0].asDict() for row in frame.select(udf(*frame.columns)).collect()]
    finally:
        spark.stop()
    with torch.inference_mode():
        assert np.allclose([row["output_0"] for row in found["raw"]], net(torch.tensor(X)), atol=1e-6)
    here = mlflow_safeflavor.load_model(tmp_path / "text").predict(["a cat", "the dog ran on the mat"])
    assert [row["label"] for row in found["text"]] == list(here["label"])
    assert np.allclose([row["score"] for row in found["text"]], here["score"], atol=1e-6)
