"""Hints of ``mlflow_safeflavor.spark.score``, followed."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hints.hint_rows import follows

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.spark import score

pytest_plugins = ("saved_models", "spark_fixtures")
pytestmark = [
    pytest.mark.slow,
    # pyspark leaves its sockets to the collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def spark(session):
    """Spark with one worker: what each imports takes longer than these rows."""
    made = session("local[1]")
    yield made
    made.stop()


@pytest.fixture
def table(spark):
    return spark.createDataFrame(
        pd.DataFrame({"words": ["the cat", "a mat"], "prediction": [1, 2]})
    )


def refused(*given, **options):
    with pytest.raises(InputError) as error:
        score(*given, **options)
    return error.value.hint


@follows(
    "spark",
    "The table has a column of that name",
    "choose another: score(df, model_uri, output=...)",
)
@follows(
    "spark",
    "The table does not have the columns that the model reads",
    "name the table's, in this order: score(df, model_uri, columns=[...])",
)
def test_names(table, saved):
    assert "output=" in refused(table, saved)
    assert "columns=" in refused(table, saved, output="answer")
    scored = score(table, saved, output="answer", columns=["words"])
    assert [row["answer"]["label"] for row in scored.collect()]


@follows(
    "spark",
    "The model gives one answer for all rows of a request, and a table needs one for each",
    "save it with the task that answers row by row, such as feature-extraction for "
    "llm/v1/embeddings",
)
def test_one_answer_for_all(table, tmp_path, tiny_bert, tiny_tokenizer):
    for task in ("llm/v1/embeddings", "feature-extraction"):
        mlflow_safeflavor.save_model(
            tiny_bert(None),
            tmp_path / task,
            task=task,
            tokenizer=tiny_tokenizer,
            rehearse=False,
            graph="no",
        )
    given: dict[str, Any] = {"output": "answer", "columns": ["words"]}
    assert "feature-extraction" in refused(table, tmp_path / "llm/v1/embeddings", **given)
    scored = score(table, tmp_path / "feature-extraction", **given)
    assert len(scored.collect()[0]["answer"]["embedding"]) == 32


@follows(
    "mlflow_compat",
    "The signature of the model does not say what an answer is",
    "say it as Spark writes types: score(df, model_uri, result_type='label string')",
)
def test_no_signature(table, tmp_path, tiny_bert, tiny_tokenizer):
    mlflow_safeflavor.save_model(
        tiny_bert(),
        tmp_path / "model",
        tokenizer=tiny_tokenizer,
        rehearse=False,
        graph="no",
        signature=False,
    )
    given: dict[str, Any] = {"output": "answer", "columns": ["words"]}
    hint = refused(table, tmp_path / "model", **given)
    kind = hint.partition("result_type='")[2].rstrip("')")
    scored = score(table, tmp_path / "model", result_type=kind, **given)
    assert scored.collect()[0]["answer"]["label"].startswith("LABEL")
