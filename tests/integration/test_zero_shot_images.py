"""Images and candidate labels: the answers of transformers' pipeline, of models of many kinds."""

import base64
import io
import json
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from integration.test_images import SMALL, TRANSFORMER, encoded, make_processor, pixels
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json
from PIL import Image
from transformers import pipeline

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, StructureError

LAYER = {**TRANSFORMER, "num_hidden_layers": 1}  # each takes seconds to trace
READS = {
    **LAYER, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
SEES = {**LAYER, "image_size": 32, "patch_size": 8}
# Class prefix → config of its text part.
MODELS = {
    "CLIP": READS,
    "Siglip": {**READS, "max_position_embeddings": 64},
    "AltCLIP": {**READS, "project_dim": 16, "max_position_embeddings": 34, "pad_token_id": 1},
    "ChineseCLIP": READS,
}
LABELS = ["cat", "a dog on the mat", "red tree"]
IMAGES = [pixels(), pixels(40, 40, seed=1), pixels(90, 30, seed=2)]
TASK = "zero-shot-image-classification"


def make(name="CLIP"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config=MODELS[name], vision_config=SEES, projection_dim=16
    )
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():  # far from each other, so that no change drowns in the tolerance
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.fixture
def save(tmp_path, tiny_tokenizer):
    def save(model, **given):
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        parts = {"processor": make_processor(size=SMALL), "tokenizer": tiny_tokenizer, "task": TASK}
        given = {"rehearse": False, "graph": "no", **parts, **given}
        mlflow_safeflavor.save_model(model, path, **given)
        return path

    return save


def scores(answer):
    return dict(zip(answer["labels"], answer["scores"], strict=True))


def told(reference, image, labels=LABELS, **params):
    return {
        one["label"]: one["score"]
        for one in reference(Image.fromarray(image), candidate_labels=labels, **params)
    }


@pytest.fixture
def reference(tiny_tokenizer):
    def reference(model, **given):
        return pipeline(
            TASK, model=model, tokenizer=tiny_tokenizer, image_processor=make_processor(size=SMALL),
            **given,
        )  # fmt: skip

    # What the models here take; the pipeline hands over all there is.
    tiny_tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return reference


@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_of_the_pipeline(save, reference, name):
    module = make(name)
    pipe = reference(module)
    model = mlflow_safeflavor.load_model(save(module))
    for params in ({}, {"hypothesis_template": "the {} sat"}):
        answers = model.predict(IMAGES, {"candidate_labels": LABELS, **params})
        for image, answer in zip(IMAGES, answers.to_dict("records"), strict=True):
            wanted = told(pipe, image, **params)
            assert scores(answer) == pytest.approx(wanted, abs=1e-5)
            assert answer["labels"] == [*wanted]
            assert (answer["label"], answer["score"]) == (answer["labels"][0], answer["scores"][0])
    total = sum(answers["scores"][0])
    assert (total == pytest.approx(1)) == (name != "Siglip")


def test_a_pipeline_brings_its_arguments(save, reference):
    given = {"candidate_labels": LABELS, "hypothesis_template": "{} dog"}
    pipe = reference(make(), **given)
    path = save(pipe, processor=None, tokenizer=None, task=None)
    model = mlflow_safeflavor.load_model(path)
    assert model.spec.task == TASK
    (answer,) = model.predict(IMAGES[:1]).to_dict("records")
    wanted = told(pipe, IMAGES[0], hypothesis_template="{} dog")
    assert scores(answer) == pytest.approx(wanted, abs=1e-5)


def test_a_checkpoint_folder_brings_both_its_parts(save, tmp_path, tiny_tokenizer):
    module = make()
    for part in (module, tiny_tokenizer, make_processor(size=SMALL)):
        part.save_pretrained(tmp_path / "checkpoint")
    path = save(tmp_path / "checkpoint", processor=None, tokenizer=None)
    params = {"candidate_labels": LABELS}
    wanted = mlflow_safeflavor.load_model(save(module)).predict(IMAGES, params)
    found = mlflow_safeflavor.load_model(path).predict(IMAGES, params)
    assert [scores(row) for row in found.to_dict("records")] == [
        pytest.approx(scores(row), abs=1e-6) for row in wanted.to_dict("records")
    ]


COLUMNS = {"image": "photo", "candidate_labels": "labels"}


def test_labels_of_its_own_for_each_row(save, reference):
    module = make()
    pipe = reference(module)
    path = save(module, input_columns=COLUMNS, params={"candidate_labels": ["tree", "mat"]})
    lists = [LABELS, ["dog", "cat"], []]
    frame = pd.DataFrame({"photo": [encoded(image) for image in IMAGES], "labels": lists})
    served = mlflow.pyfunc.load_model(str(path))
    answers = served.predict(frame).to_dict("records")
    for image, labels, answer in zip(IMAGES, lists, answers, strict=True):
        wanted = told(pipe, image, labels or ["tree", "mat"])
        assert scores(answer) == pytest.approx(wanted, abs=1e-5)
    model = mlflow_safeflavor.load_model(path)
    for cell in ("cat", ["cat", ""], ["cat", 3], None, 3):
        rows = [{"photo": pixels(), "labels": ["a"]}, {"photo": pixels(), "labels": cell}]
        with pytest.raises(InputError, match=r"list of labels|value is missing") as caught:
            model.predict(rows)
        assert "row 1, column 'labels'" in str(caught.value)
    bare = mlflow_safeflavor.load_model(save(module, input_columns=COLUMNS))
    with pytest.raises(InputError, match=r"no labels to choose from[\s\S]*row 1, column 'labels'"):
        bare.predict([{"photo": pixels(), "labels": ["a"]}, {"photo": pixels(), "labels": []}])


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_many_labels_go_in_several_forwards(save, name):
    model = mlflow_safeflavor.load_model(save(make(name)))
    labels = [f"{'cat ' * (i % 7)}x = {i}" for i in range(300)]
    (answer,) = model.predict(IMAGES[:1], {"candidate_labels": labels}).to_dict("records")
    assert sorted(answer["labels"]) == sorted(labels)
    task, params = model.task, model.task.check_params({"candidate_labels": labels})
    (features,) = task.encoded([{"image": pixels()}], params)
    assert len(task.pieces(features)) > 1
    two = model.predict(IMAGES[:1], {"candidate_labels": labels[:2]}).to_dict("records")[0]
    ratio = [scores(given)[labels[1]] / scores(given)[labels[0]] for given in (answer, two)]
    assert ratio[0] == pytest.approx(ratio[1], rel=1e-3)


def test_images_with_the_same_labels_share_a_forward(save):
    model = mlflow_safeflavor.load_model(save(make()))
    task = model.task
    asked = []

    def run(inputs):
        asked.append({name: array.shape for name, array in inputs.items()})
        return {"logits_per_image": np.zeros((len(inputs["pixel_values"]), 3), np.float32)}

    engine: Any = run
    params = task.check_params({"candidate_labels": LABELS})
    batch = [piece for row in task.encoded([{"image": i} for i in IMAGES], params)
             for piece in task.pieces(row)]  # fmt: skip
    assert len(task.forward(engine, batch, params)) == 3
    assert [(shapes["pixel_values"][0], shapes["input_ids"][0]) for shapes in asked] == [(3, 3)]


def test_what_a_request_may_not_ask(save):
    path = save(make())
    model = mlflow_safeflavor.load_model(path)
    with pytest.raises(InputError, match="no labels to choose from"):
        model.predict(IMAGES)
    for labels in (["cat " * 40], ["cat", "dog " * 31]):
        with pytest.raises(InputError, match=r"longer than the model takes[\s\S]*32 tokens"):
            model.predict(IMAGES, {"candidate_labels": labels})
    with pytest.raises(InputError, match="where the label goes"):
        model.predict(IMAGES, {"candidate_labels": LABELS, "hypothesis_template": "a cat"})
    capped = mlflow_safeflavor.load_model(path, model_config={"max_pieces": 50})
    with pytest.raises(InputError, match=r"at most 50 pieces[\s\S]*60"):
        capped.predict(IMAGES[:2], {"candidate_labels": [f"cat {i}" for i in range(30)]})
    with pytest.raises(InputError, match=r"not an image[\s\S]*row 1"):
        model.predict([pixels(), 3], {"candidate_labels": LABELS})
    params = model.task.check_params({"candidate_labels": LABELS})
    outputs = [{"logits": np.array([1, n, 1], np.float32)} for n in (0, np.nan)]
    with pytest.raises(InputError, match=r"not a number[\s\S]*row 1"):
        model.task.decoded([{}, {}], [{}, {}], outputs, params)


def test_what_is_refused_when_a_model_is_saved(save, tiny_bert, tiny_tokenizer):
    with pytest.raises(StructureError, match="does not see images"):
        save(tiny_bert())
    with pytest.raises(StructureError, match="does not read text"):
        save(make().vision_model)
    with pytest.raises(StructureError, match="needs a tokenizer"):
        save(make(), tokenizer=None)
    with pytest.raises(StructureError, match="needs a processor"):
        save(make(), processor=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_as_a_graph_and_through_mlflow(save, name):
    path = save(make(name), graph="auto", params={"candidate_labels": LABELS})
    served = mlflow.pyfunc.load_model(str(path))
    assert served._model_impl.model.engine.name == "onnx"
    module = mlflow_safeflavor.load_model(path, model_config={"engine": "module"})
    wanted = module.predict(IMAGES).to_dict("records")
    texts = [base64.b64encode(encoded(image)).decode() for image in IMAGES]
    for body in ({"inputs": texts}, {"dataframe_records": [{"image": text} for text in texts]}):
        found = served.predict(infer_and_parse_data(body, served.metadata.get_input_schema()))
        buffer = io.StringIO()
        predictions_to_json(found, buffer)
        for row, other in zip(json.loads(buffer.getvalue())["predictions"], wanted, strict=True):
            assert scores(row) == pytest.approx(scores(other), abs=1e-5)


@pytest.mark.serve
def test_a_server_answers_the_same(serve, save):
    path = save(make(), input_columns=COLUMNS)
    wanted = mlflow_safeflavor.load_model(path).predict([{"photo": IMAGES[0], "labels": LABELS}])
    text = base64.b64encode(encoded(IMAGES[0])).decode()
    with serve(path) as server:
        answer = server.invoke({"dataframe_records": [{"photo": text, "labels": LABELS}]})
        assert answer.status == 200, answer.text
        (found,) = answer.json()["predictions"]
        assert scores(found) == pytest.approx(scores(wanted.iloc[0]), abs=1e-6)
        refused = server.invoke({"dataframe_records": [{"photo": text, "labels": [""]}]})
        assert refused.status == 400
        assert "row 0, column 'labels'" in refused.text
        assert mlflow_safeflavor.verify_model(str(path), endpoint=server.url).ok
