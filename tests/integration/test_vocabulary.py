"""A token without an embedding is found at save or load, and not by whoever writes it."""

from typing import Any

import pytest
import torch
from artifacts import edit_mlmodel, reseal

import mlflow_safeflavor
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.tasks.inputs.vocabulary import find_table

pytest_plugins = "saved_models"

TASKS = ["text-classification", "feature-extraction", "custom"]


@pytest.mark.parametrize("task", TASKS)
def test_a_tokenizer_with_more_tokens_than_rows_is_refused_at_save(
    tiny_bert, tiny_tokenizer, tmp_path, task
):
    tiny_tokenizer.add_tokens(["zebra", "okapi"])
    model = tiny_bert(None if task == "feature-extraction" else "classifier")
    rows = model.config.vocab_size
    hooks: dict[str, Any] = {
        "preprocess": print,
        "postprocess": print,
        "input_example": [{"text": "a"}],
        "allow_pickle": True,
    }
    with pytest.raises(StructureError, match="no embedding") as caught:
        mlflow_safeflavor.save_model(
            model,
            tmp_path / "model",
            tokenizer=tiny_tokenizer,
            task=task,
            **(hooks if task == "custom" else {}),
        )
    assert f"'zebra', id {rows}" in str(caught.value.where)
    assert "1 more" in str(caught.value.where)
    assert f"below {rows}" in str(caught.value.wanted)
    assert not (tmp_path / "model").exists()
    model.resize_token_embeddings(len(tiny_tokenizer))  # the hint, followed literally
    if task == "text-classification":
        mlflow_safeflavor.save_model(
            model,
            tmp_path / "model",
            tokenizer=tiny_tokenizer,
            task=task,
            rehearse=False,
            graph="no",
        )


def test_more_rows_than_tokens_are_as_they_should_be(tiny_bert, tiny_tokenizer):
    assert find_table(tiny_bert(vocab_size=64)) == ("bert.embeddings.word_embeddings.weight", 64)


def test_a_table_inside_a_module_of_the_users(tiny_bert):
    class Two(torch.nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.parts = torch.nn.ModuleList(parts)

    name = "parts.0.embeddings.word_embeddings.weight"
    assert find_table(Two(tiny_bert(None), torch.nn.Linear(2, 2))) == (
        name,
        tiny_bert().config.vocab_size,
    )
    assert find_table(Two(tiny_bert(None), tiny_bert(None))) is None, "two tokenizers, or one"


def test_tables_of_other_modules():
    class Net(torch.nn.Module):
        def __init__(self, tables):
            super().__init__()
            self.tables = torch.nn.ModuleList(torch.nn.Embedding(7, 2) for _ in range(tables))

    assert find_table(Net(1)) == ("tables.0.weight", 7)
    assert find_table(Net(0)) is None
    assert find_table(Net(2)) is None, "one may be of positions"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(pad_token_id=10**6), "task_config, pad_token_id"),
        (lambda config: config.update(pad_token_id=-1), "task_config, pad_token_id"),
        (lambda config: config["encoder"].update(mask_token_id=99), "encoder, mask_token_id"),
        (
            lambda config: config["encoder"].update(table="classifier.weight"),
            "encoder, mask_token_id",
        ),
        (lambda config: config["encoder"].update(table="nothing"), "encoder, table"),
    ],
    ids=["pad", "negative", "mask", "other table", "no table"],
)
def test_a_changed_token_is_refused_at_load(copied, change, named):
    edit_mlmodel(copied, lambda content: change(content["flavors"]["safeflavor"]["task_config"]))
    reseal(copied)
    with pytest.raises(IntegrityError) as caught:
        mlflow_safeflavor.load_model(str(copied))
    assert caught.value.where == named
