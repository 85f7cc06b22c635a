"""``mlflow.models.evaluate``, as far as MLflow lets a flavor."""

from __future__ import annotations

import re

import mlflow
import pandas as pd
import pytest
from artifacts import TEXTS
from coming_page import table as page
from mlflow.metrics import MetricValue, make_metric

from mlflow_safeflavor import load_model, save_model

pytest_plugins = "saved_models"
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, and scikit-learn's

PLAIN = {"log_explainer": False, "log_model_explainability": False}
"""No explanations, for which MLflow needs shap."""


@pytest.fixture
def table(saved):
    """Texts, and as labels what the model says of all but the last."""
    answers = load_model(saved).predict(TEXTS)
    other = {"LABEL_0": "LABEL_1", "LABEL_1": "LABEL_0"}
    labels = [*answers["label"]]
    return pd.DataFrame({"text": TEXTS, "target": [*labels[:-1], other[labels[-1]]]})


def right(predictions, targets, metrics=None):
    same = [a == b for a, b in zip(predictions, targets, strict=True)]
    return MetricValue(aggregate_results={"share": sum(same) / len(same)})


def test_a_metric_of_ones_own_on_a_column(tracking, saved, table):
    found = mlflow.models.evaluate(
        str(saved),
        table,
        targets="target",
        predictions="label",
        extra_metrics=[make_metric(eval_fn=right, greater_is_better=True, name="right")],
    )
    assert found.metrics["right/share"] == pytest.approx(2 / 3)


def test_a_classifier_behind_a_function(tracking, saved, table):
    """MLflow's evaluator of classifiers reads no column of a model's answer; the page says so."""
    given = {
        "targets": "target",
        "model_type": "classifier",
        "evaluator_config": {**PLAIN, "label_list": ["LABEL_0", "LABEL_1"]},
    }
    with pytest.raises((TypeError, ValueError), match=r"not supported|dimension"):
        mlflow.models.evaluate(str(saved), table, predictions="label", **given)
    (row,) = [how for call, _, how in page("Calls") if 'model_type="classifier"' in call]
    hinted = re.findall("`([^`]+)`", row)
    model = eval(hinted[1], {"mlflow": mlflow, "uri": str(saved)})
    found = mlflow.models.evaluate(eval(hinted[0], {"model": model}), table, **given)
    assert found.metrics["accuracy_score"] == pytest.approx(2 / 3)


def test_a_regressor_by_its_uri(tracking, tiny_bert, tiny_tokenizer, tmp_path):
    given = {"tokenizer": tiny_tokenizer, "rehearse": False, "graph": "no"}
    save_model(tiny_bert(num_labels=1), tmp_path / "m", **given)
    scores = load_model(tmp_path / "m").predict(TEXTS)["score"]
    table = pd.DataFrame({"text": TEXTS, "target": scores + 0.5})
    found = mlflow.models.evaluate(
        str(tmp_path / "m"),
        table,
        targets="target",
        predictions="score",
        model_type="regressor",
        evaluator_config=PLAIN,
    )
    assert found.metrics["mean_absolute_error"] == pytest.approx(0.5)
