"""Ranking of passages: the scores and the order of sentence-transformers' CrossEncoder."""

import io
import json

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import tiny_model
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.table import infer_task

LONG = "the cat ran on the mat and the dog sat under a tree " * 8
QUERIES = ["the cat sat on the mat", "red dog", LONG]
PASSAGES = [
    ["a dog ran", "the cat sat", LONG, "", "trees under reds", "x = y"],
    ["the 😀 dog 日本語"],
    ["green", LONG + "green"],
]
ROWS = pd.DataFrame({"query": QUERIES, "passages": PASSAGES})
PAIRS = {"query": "question", "passage": "answer"}
IDENTITY = "torch.nn.modules.linear.Identity"


def classifier(architecture="Bert", **config):
    return tiny_model(architecture, "ForSequenceClassification", **{"num_labels": 1, **config})


@pytest.fixture
def save(tmp_path, tiny_tokenizer):
    def make(model, **given):
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        given = {"task": "text-ranking", "rehearse": False, "graph": "no", **given}
        if isinstance(model, torch.nn.Module) and not hasattr(model, "predict"):
            given.setdefault("tokenizer", tiny_tokenizer)
        mlflow_safeflavor.save_model(model, path, **given)
        return path

    return make


@pytest.fixture
def cross_encoder(tmp_path, tiny_tokenizer):
    """A ``CrossEncoder`` of a model, which has the tiny tokenizer."""
    package = pytest.importorskip("sentence_transformers")

    def make(model, **given):
        folder = tmp_path / f"encoder-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return package.CrossEncoder(str(folder), device="cpu", **given)

    return make


def rankings(model, rows=ROWS, **params):
    return model.predict(rows, params).to_dict("list")["ranking"]


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DebertaV2", "ModernBert", "XLNet"])
def test_passages_are_ranked_as_by_a_cross_encoder(save, cross_encoder, architecture):
    encoder = cross_encoder(classifier(architecture))
    model = mlflow_safeflavor.load_model(save(encoder.model, tokenizer=encoder.tokenizer))
    for given, params in (
        ({}, {}),
        ({"top_k": 2}, {"top_k": 2}),
        ({"activation_fn": torch.nn.Identity()}, {"function_to_apply": "none"}),
    ):
        for query, passages, found in zip(
            QUERIES, PASSAGES, rankings(model, **params), strict=True
        ):
            # One by one: padding on the right is what XLNet reads of the package's batches.
            wanted = encoder.rank(query, passages, batch_size=1, **given)
            assert [one["score"] for one in found] == pytest.approx(
                [one["score"] for one in wanted], abs=1e-5
            )
            assert [one["index"] for one in found] == [one["corpus_id"] for one in wanted]


def test_of_equal_passages_the_first_comes_first_and_texts_come_back_when_asked_for(save):
    model = mlflow_safeflavor.load_model(save(classifier(), graph="require"))
    rows = [{"query": "red dog", "passages": ["a dog ran", "the cat sat"] * 3}]
    (plain,), (told,) = rankings(model, rows), rankings(model, rows, return_passages=True, top_k=4)
    assert all(one.keys() == {"index", "score"} for one in plain)
    order = [one["index"] for one in plain]
    assert order in ([0, 2, 4, 1, 3, 5], [1, 3, 5, 0, 2, 4])
    assert [rows[0]["passages"][i] for i in order[:4]] == [one["passage"] for one in told]
    assert [{"index": one["index"], "score": one["score"]} for one in told] == plain[:4]


def test_pairs_are_scored_one_a_row(save, cross_encoder):
    encoder = cross_encoder(classifier())
    path = save(encoder, input_columns=PAIRS)
    rows = pd.DataFrame({"question": QUERIES, "answer": [group[0] for group in PASSAGES]})
    wanted = encoder.predict([tuple(row) for row in rows.to_numpy()])
    served = mlflow.pyfunc.load_model(str(path))
    assert list(served.predict(rows)["score"]) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert [spec.name for spec in served.metadata.get_output_schema()] == ["score"]
    declared = {param.name for param in served.metadata.get_params_schema().params}
    assert declared == {"function_to_apply", "max_length", "truncation"}
    model = mlflow_safeflavor.load_model(path)
    with pytest.raises(InputError, match=r"Unknown param[\s\S]*'top_k'"):
        model.predict(rows, {"top_k": 1})
    with pytest.raises(InputError, match=r"row 1, column 'answer'"):
        model.predict([{"question": "a", "answer": "b"}, {"question": "a"}])


def test_of_several_labels_one_tells_relevance(save, cross_encoder):
    names = {0: "no", 1: "so so", 2: "yes"}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model = classifier(num_labels=3, **labels)
    encoder = cross_encoder(model)
    pairs = [(QUERIES[0], passage) for passage in PASSAGES[0]]
    for said, column in (("yes", 2), (0, 0)):
        loaded = mlflow_safeflavor.load_model(save(model, model_config={"label": said}))
        for soft, params in ((True, {}), (False, {"function_to_apply": "none"})):
            wanted = encoder.predict(pairs, apply_softmax=soft)[:, column]
            (found,) = rankings(loaded, ROWS[:1], **params)
            assert {one["index"]: one["score"] for one in found} == pytest.approx(
                dict(enumerate(wanted.tolist())), abs=1e-5
            )
    # Those of the package itself say logits.
    loaded = mlflow_safeflavor.load_model(save(encoder, model_config={"label": "yes"}))
    (found,) = rankings(loaded, ROWS[:1])
    assert found[0]["score"] == pytest.approx(encoder.predict(pairs)[:, 2].max().item(), abs=1e-5)


@pytest.mark.parametrize("key", ["sentence_transformers", "sbert_ce_default_activation_function"])
def test_the_activation_that_a_config_names(save, cross_encoder, key):
    model = classifier()
    setattr(model.config, key, {"activation_fn": IDENTITY} if key[1] == "e" else IDENTITY)
    encoder = cross_encoder(model)
    wanted = [one["score"] for one in encoder.rank(QUERIES[0], PASSAGES[0])]
    for given in (model, encoder):
        (found,) = rankings(mlflow_safeflavor.load_model(save(given)), ROWS[:1])
        assert [one["score"] for one in found] == pytest.approx(wanted, abs=1e-5)
    assert min(wanted) < 0
    setattr(model.config, key, {"activation_fn": "torch.nn.Tanh"} if key[1] == "e" else "Tanh")
    with pytest.raises(StructureError, match=r"not known here[\s\S]*torch.nn.Sigmoid"):
        save(model)


def test_a_folder_of_a_cross_encoder(save, cross_encoder, tmp_path):
    encoder = cross_encoder(classifier())
    encoder.save(str(tmp_path / "folder"))
    (found,) = rankings(mlflow_safeflavor.load_model(save(tmp_path / "folder")), ROWS[:1])
    wanted = encoder.rank(QUERIES[0], PASSAGES[0])
    assert [one["index"] for one in found] == [one["corpus_id"] for one in wanted]


def test_what_rows_may_look_like(save):
    model = mlflow_safeflavor.load_model(save(classifier()))
    wanted = rankings(model)
    forms = {
        "dicts": ROWS.to_dict("records"),
        "a dict of columns": ROWS.to_dict("list"),
        "lists": [[query, passages] for query, passages in ROWS.to_numpy()],
        "arrays in cells": pd.DataFrame(
            {"query": QUERIES, "passages": [np.array(cell, object) for cell in PASSAGES]}
        ),
        "tuples in cells": [
            {"query": query, "passages": tuple(cell)}
            for query, cell in zip(QUERIES, PASSAGES, strict=True)
        ],
    }
    for name, rows in forms.items():
        assert rankings(model, rows) == wanted, name
    one = rankings(model, {"query": QUERIES[0], "passages": PASSAGES[0]})
    assert [each["index"] for each in one[0]] == [each["index"] for each in wanted[0]]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ([], "list of passages"),
        ("the cat", "list of passages"),
        (["the cat", None], "list of passages"),
        ([["the cat"]], "list of passages"),
        (3, "list of passages"),
        (["the cat", "\ud800"], "passage 1"),
    ],
    ids=str,
)
def test_what_is_no_list_of_passages_names_its_row(save, cell, words):
    model = mlflow_safeflavor.load_model(save(classifier()))
    with pytest.raises(InputError, match=words) as caught:
        model.predict([{"query": "a", "passages": ["b"]}, {"query": "a", "passages": cell}])
    assert "row 1, column 'passages'" in str(caught.value)
    with pytest.raises(InputError, match=r"not a text[\s\S]*row 0, column 'query'"):
        model.predict([{"query": 3, "passages": ["b"]}])


def test_bounds_of_a_request(save):
    path = save(classifier())
    model = mlflow_safeflavor.load_model(path, model_config={"max_pieces": 20})
    few = {"query": "a", "passages": ["b"] * 20}
    assert len(rankings(model, [few])[0]) == 20
    with pytest.raises(InputError, match=r"at most 20 pieces[\s\S]*21"):
        model.predict([{"query": "a", "passages": ["b"] * 21}])
    # Of each passage, not of a cell of them.
    model = mlflow_safeflavor.load_model(path, model_config={"max_characters": 50})
    assert len(rankings(model, [{"query": "a", "passages": ["the cat " * 6] * 3}])[0]) == 3
    with pytest.raises(InputError, match=r"column 'passages', passage 1"):
        model.predict([{"query": "a", "passages": ["b", "the cat " * 7]}])
    with pytest.raises(InputError, match="truncation is off"):
        mlflow_safeflavor.load_model(path).predict(
            [{"query": "the " * 10, "passages": ["cat " * 20] * 2}], {"truncation": False}
        )


def test_an_answer_that_is_no_number_names_the_row(save):
    model = mlflow_safeflavor.load_model(save(classifier()))
    task, rows = model.task, model.task.rows(ROWS)
    logits = [np.zeros((len(row["passages"]), 1), np.float32) for row in rows]
    logits[2][1] = np.nan
    with pytest.raises(InputError, match=r"not a number[\s\S]*row 2"):
        task.decoded(rows, rows, [{"logits": one} for one in logits], task.check_params({}))


def test_what_is_refused_when_a_model_is_saved(save):
    several = classifier(num_labels=2)
    for given in ({}, {"label": "relevant"}, {"label": 2}, {"label": True}):
        with pytest.raises(InputError, match=r"cannot be told[\s\S]*'LABEL_1'"):
            save(several, model_config=given)
    for columns in ({"query": "a"}, {"query": "a", "passage": "b", "passages": "c"}):
        with pytest.raises(InputError, match="ranks lists of passages, or scores pairs"):
            save(classifier(), input_columns=columns)
    assert infer_task("BertForSequenceClassification") == "text-classification"


def test_through_mlflow_and_as_a_graph(save):
    path = save(classifier(), graph="require", params={"top_k": 3})
    served = mlflow.pyfunc.load_model(str(path))
    assert served._model_impl.model.engine.name == "onnx"
    found = served.predict(ROWS)
    module = mlflow.pyfunc.load_model(str(path), model_config={"engine": "module"})
    for one, other in zip(found["ranking"], module.predict(ROWS)["ranking"], strict=True):
        assert [each["index"] for each in one] == [each["index"] for each in other]
        scores = [each["score"] for each in other]
        assert [each["score"] for each in one] == pytest.approx(scores, abs=1e-5)
    answer = served.metadata.get_output_schema()
    assert [known.name for known in answer.input_types()[0].properties] == ["ranking"]
    inputs = served.metadata.get_input_schema()
    assert len(_enforce_schema(ROWS, inputs)) == 3
    buffer = io.StringIO()
    predictions_to_json(found, buffer)
    wanted = json.loads(buffer.getvalue())["predictions"]
    for body in (
        {"dataframe_split": ROWS.to_dict("split")},
        {"dataframe_records": ROWS.to_dict("records")},
        {"inputs": ROWS.to_dict("records")},
    ):
        asked = infer_and_parse_data(body, inputs)
        assert served.predict(asked).to_dict("records") == wanted, list(body)
    one = infer_and_parse_data({"inputs": ROWS.to_dict("records")[0]}, inputs)
    assert served.predict(one).to_dict("records") == wanted[:1]


@pytest.mark.serve
def test_a_server_ranks_and_is_the_same_as_here(serve, save):
    path = save(classifier())
    wanted = rankings(mlflow_safeflavor.load_model(path))
    with serve(path) as server:
        answer = server.invoke({"dataframe_records": ROWS.to_dict("records")})
        assert answer.status == 200, answer.text
        found = [row["ranking"] for row in answer.json()["predictions"]]
        for one, other in zip(found, wanted, strict=True):
            assert [each["index"] for each in one] == [each["index"] for each in other]
        refused = server.invoke({"dataframe_records": [{"query": "a", "passages": []}]})
        assert refused.status == 400
        assert "row 0, column 'passages'" in refused.text
        assert mlflow_safeflavor.verify_model(str(path), endpoint=server.url).ok
