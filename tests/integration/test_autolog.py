"""``autolog``: the models of trainers, logged without changing the training."""

from __future__ import annotations

import logging
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from architectures import tiny_model

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.save import autolog
from mlflow_safeflavor.save.save import log_model

pytest.importorskip("accelerate")
TEXTS = ["the cat sat on the mat", "a dog", "red mat", "x = y"] * 4


@pytest.fixture(autouse=True)
def _off(tracking):
    yield
    mlflow_safeflavor.autolog(disable=True)


def train(tmp_path, tokenizer, model=None, **options):
    """A real ``Trainer``, four steps of it, with dropout; the trained model."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = model or tiny_model("Bert", "ForSequenceClassification", hidden_dropout_prob=0.3)
    rows = [
        {**tokenizer(text, padding="max_length", max_length=12, truncation=True), "labels": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    given: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
    }
    given |= {"learning_rate": 0.01, "report_to": "none", "disable_tqdm": True, "seed": 3}
    arguments = TrainingArguments(tmp_path / "checkpoints", **{**given, **options})
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return model


def logged(run_id):
    """Name → URI of the logged models of a run, the last of each name."""
    return {model.name: model for model in mlflow.search_logged_models(output_format="list")[::-1]}


SAVES = {"save_steps": 2, "save_strategy": "steps"}


def test_the_training_is_the_same_and_the_model_loads_in_a_clean_process(
    tmp_path, tiny_tokenizer, clean_process, monkeypatch
):
    def drawing(*args, **options):
        torch.rand(3)  # as a model's own code may
        return log_model(*args, **options)

    monkeypatch.setattr(autolog, "log_model", drawing)
    before = train(tmp_path, tiny_tokenizer, **SAVES).state_dict()
    mlflow_safeflavor.autolog(every_save=True, graph="no", rehearse=False)
    with mlflow.start_run() as run:
        model = train(tmp_path, tiny_tokenizer, **SAVES)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    models = logged(run.info.run_id)
    assert sorted(models) == ["model", "model-2", "model-4"]
    assert {one.source_run_id for one in models.values()} == {run.info.run_id}
    # metrics are linked to the model, and those of a checkpoint are of its step
    found = {metric.key: metric for metric in models["model"].metrics}
    assert {"loss", "learning_rate", "train_loss"} <= found.keys()
    assert [metric.step for metric in models["model-2"].metrics if metric.key == "loss"] == [2]
    code = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
answers = mlflow.pyfunc.load_model(sys.argv[2]).predict(["the cat sat on the mat"])
print(json.dumps(answers["score"].tolist()))
"""
    uri = mlflow.get_tracking_uri()
    said = clean_process(code, uri, models["model"].model_uri).stdout.split()[-1]
    with torch.no_grad():
        logits = model.eval()(**tiny_tokenizer(TEXTS[0], return_tensors="pt")).logits
    assert float(said.strip("[]")) == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    module: Any = mlflow_safeflavor.load_model(models["model-2"].model_uri).module
    assert not torch.equal(module.classifier.weight, model.classifier.weight)


def test_without_a_run_one_is_made_and_ended(tmp_path, tiny_tokenizer):
    mlflow_safeflavor.autolog(name="mine", every_save=True, graph="no", rehearse=False)
    train(tmp_path, tiny_tokenizer, **SAVES)
    assert mlflow.active_run() is None
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    assert sorted(logged(run.info.run_id)) == ["mine", "mine-2", "mine-4"]
    mlflow_safeflavor.autolog(disable=True)
    train(tmp_path, tiny_tokenizer)
    assert len(mlflow.search_runs(output_format="list")) == 1


def test_what_cannot_be_logged_is_said_and_the_training_goes_on(tmp_path, tiny_tokenizer, caplog):
    class Own(torch.nn.Module):
        """Cannot be imported anywhere else."""

        def __init__(self):
            super().__init__()
            self.inner = tiny_model("Bert", "ForSequenceClassification")

        def forward(self, input_ids, attention_mask=None, labels=None, **more):
            return self.inner(input_ids, attention_mask=attention_mask, labels=labels)

    mlflow_safeflavor.autolog(graph="no", rehearse=False)
    with mlflow.start_run() as run, caplog.at_level(logging.WARNING, "mlflow.safeflavor"):
        train(tmp_path, tiny_tokenizer, Own(), save_strategy="no")
    assert "autolog did not log the model 'model' of step 4" in caplog.text
    assert "Own" in caplog.text
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"
    with pytest.raises(InputError, match="rehears"):
        mlflow_safeflavor.autolog(rehears=False)


@pytest.mark.filterwarnings("ignore")  # deprecations of the imports
def test_a_trainer_of_sentence_transformers(tmp_path, tiny_tokenizer):
    pytest.importorskip("sentence_transformers", minversion="6")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CosineSimilarityLoss
    from sentence_transformers.models import Pooling, Transformer

    tiny_model("Bert", "Model").save_pretrained(tmp_path / "bare")
    tiny_tokenizer.save_pretrained(tmp_path / "bare")
    modules = [Transformer(str(tmp_path / "bare")), Pooling(32, pooling_mode="cls")]
    model = SentenceTransformer(modules=modules, device="cpu")
    table = {"a": TEXTS, "b": TEXTS[::-1], "score": [0.5] * len(TEXTS)}
    options: dict[str, Any] = {
        "max_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = SentenceTransformerTrainingArguments(tmp_path / "checkpoints", **options)
    mlflow_safeflavor.autolog(graph="no", rehearse=False)
    with mlflow.start_run() as run:
        SentenceTransformerTrainer(
            model,
            arguments,
            train_dataset=datasets.Dataset.from_dict(table),
            loss=CosineSimilarityLoss(model),
        ).train()
    found = mlflow_safeflavor.load_model(logged(run.info.run_id)["model"].model_uri)
    assert found.spec.task == "feature-extraction"
    vectors = np.array(found.predict(TEXTS[:4])["embedding"].tolist())
    assert vectors == pytest.approx(model.encode(TEXTS[:4]), abs=1e-5)
