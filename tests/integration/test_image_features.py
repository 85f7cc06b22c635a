"""Embeddings of images: what transformers' pipeline gives, and what a model makes of an image."""

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
from integration.test_images import SMALL, STAGES, TRANSFORMER, encoded, make_processor, pixels
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json
from PIL import Image
from transformers import pipeline

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.graph.file import read_graph
from mlflow_safeflavor.tasks.table import infer_task

SEEN = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
# Class → config.
MODELS: dict[str, dict[str, Any]] = {
    "ViTModel": SEEN,
    "Dinov2Model": {**SEEN, "mlp_ratio": 2},
    "CLIPVisionModel": SEEN,
    "ConvNextModel": STAGES,
    "ResNetModel": {**STAGES, "embedding_size": 8},
    "SwinModel": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 4,
    },
}  # fmt: skip
IMAGES = [pixels(), pixels(40, 40, seed=1), pixels(90, 30, seed=2)]


def make(name, **changes):
    config = {"CLIPVisionModel": "CLIPVision", "CLIPVisionModelWithProjection": "CLIPVision"}
    prefix = config.get(name, name.removesuffix("Model"))
    torch.manual_seed(0)
    settings = getattr(transformers, f"{prefix}Config")(**{**MODELS.get(name, SEEN), **changes})
    model = getattr(transformers, name)(settings)
    with torch.no_grad():  # far from each other, so that no change drowns in the tolerance
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def tensors(images):
    processor = make_processor(size=SMALL)
    return processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")


@pytest.fixture
def save(tmp_path):
    def save(model, **given):
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        given = {"processor": make_processor(size=SMALL), "graph": "no", **given}
        mlflow_safeflavor.save_model(model, path, rehearse=False, **given)
        return path

    return save


def embeddings(model, images=IMAGES, **params):
    return np.array(model.predict(list(images), params)["embedding"].tolist())


@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_of_the_pipeline(save, name):
    module = make(name)
    reference = pipeline(
        "image-feature-extraction", model=module, image_processor=make_processor(size=SMALL)
    )
    model = mlflow_safeflavor.load_model(save(module))
    assert model.spec.task == "image-feature-extraction"
    shown = [Image.fromarray(image) for image in IMAGES]
    pooled = np.array([reference(image, pool=True)[0] for image in shown]).reshape(len(shown), -1)
    assert embeddings(model) == pytest.approx(pooled, abs=1e-4)
    tokens = np.array([reference(image)[0] for image in shown])
    if tokens.ndim == 4:  # a map, (images, channels, height, width)
        tokens = np.moveaxis(tokens.reshape(*tokens.shape[:2], -1), 1, 2)
    assert embeddings(model, pool=False) == pytest.approx(tokens, abs=1e-4)
    scaled = embeddings(model, normalize_embeddings=True)
    assert scaled == pytest.approx(pooled / np.linalg.norm(pooled, axis=1)[:, None], abs=1e-4)
    assert np.linalg.norm(embeddings(model, pool=False, normalize_embeddings=True), axis=-1) == (
        pytest.approx(1)
    )


def test_a_pipeline_brings_its_arguments(save):
    for pooled, shape in ((True, (3, 32)), (False, (3, 17, 32))):
        reference = pipeline(
            "image-feature-extraction", model=make("ViTModel"), pool=pooled,
            image_processor=make_processor(size=SMALL),
        )  # fmt: skip
        path = save(reference, processor=None)
        assert embeddings(mlflow_safeflavor.load_model(path)).shape == shape
        (known,) = mlflow.pyfunc.load_model(str(path)).metadata.get_output_schema().input_types()
        assert str(known).count("Array") == len(shape) - 1


def test_poolings_fixed_when_a_model_is_saved(save):
    module = make("Dinov2Model")
    with torch.no_grad():
        hidden = module(**tensors(IMAGES)).last_hidden_state.numpy()
    sides = {
        "cls": hidden[:, 0],
        "mean": hidden.mean(1),
        "max": hidden.max(1),
        ("cls", "mean"): np.concatenate([hidden[:, 0], hidden.mean(1)], axis=1),
    }
    for pooling, wanted in sides.items():
        kinds = pooling if isinstance(pooling, str) else [*pooling]
        model = mlflow_safeflavor.load_model(save(module, model_config={"pooling": kinds}))
        assert embeddings(model) == pytest.approx(wanted, abs=1e-4)
    # A map has no first place.
    with pytest.raises(StructureError, match=r"last_hidden_state[\s\S]*shape"):
        save(make("ConvNextModel"), model_config={"pooling": "cls"})
    for wrong in ("first", [], ["mean", 3], 3):
        with pytest.raises(InputError, match=r"'pooling'[\s\S]*model \| mean"):
            save(module, model_config={"pooling": wrong})


@pytest.mark.parametrize("name", ["ViTMSNModel", "SegformerModel"])
def test_without_a_pooler_it_is_the_mean(save, name):
    """Of tokens, and of the places of a map."""
    stages = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "strides": [4, 2],
        "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "patch_sizes": [7, 3],
        "mlp_ratios": [2, 2]}  # fmt: skip
    module = make(name, **(stages if name[0] == "S" else {}))
    with torch.no_grad():
        hidden = module(**tensors(IMAGES)).last_hidden_state.numpy()
    wanted = hidden.mean((2, 3) if hidden.ndim == 4 else 1)
    assert embeddings(mlflow_safeflavor.load_model(save(module))) == pytest.approx(wanted, abs=1e-4)


def test_a_projection_to_the_space_of_texts(save):
    module = make("CLIPVisionModelWithProjection", projection_dim=12)
    with torch.no_grad():
        wanted = module(**tensors(IMAGES)).image_embeds.numpy()
    model = mlflow_safeflavor.load_model(save(module))
    assert embeddings(model) == pytest.approx(wanted, abs=1e-4)


def test_the_task_of_a_class():
    for name in (*MODELS, "CLIPVisionModelWithProjection"):
        main_input = getattr(transformers, name).main_input_name
        assert infer_task(name, main_input) == "image-feature-extraction"
    assert infer_task("BertModel", "input_ids") == "feature-extraction"
    assert infer_task("ViTForImageClassification", "pixel_values") == "image-classification"


def test_what_sees_no_image_alone_is_refused(save, tiny_bert):
    task = {"task": "image-feature-extraction"}
    with pytest.raises(StructureError, match=r"does not see images[\s\S]*pixel_values"):
        save(tiny_bert(None), **task)
    both = transformers.CLIPModel(transformers.CLIPConfig(
        text_config={**TRANSFORMER, "vocab_size": 40}, vision_config=SEEN, projection_dim=12
    )).eval()  # fmt: skip
    with pytest.raises(StructureError, match=r"a text beside each image[\s\S]*vision_model"):
        save(both, **task)
    assert embeddings(mlflow_safeflavor.load_model(save(both.vision_model))).shape == (3, 32)


def test_an_answer_that_is_no_number_names_the_row(save):
    model = mlflow_safeflavor.load_model(save(make("ViTModel")))
    task, found = (
        model.task,
        [{"embedding": np.array(v, np.float32)} for v in ([1, 2], [1, np.nan])],
    )
    with pytest.raises(InputError, match=r"not a number[\s\S]*row 1"):
        task.decoded([{}, {}], [{}, {}], found, task.check_params({}))
    with pytest.raises(InputError, match=r"not an image[\s\S]*row 1"):
        model.predict([pixels(), 3])


KEEPS_SHAPE = {"size": {"shortest_edge": 32}, "do_center_crop": False}


@pytest.mark.parametrize(("processor", "free"), [
    (("ViT", {"size": SMALL}), False), (("CLIP", KEEPS_SHAPE), True),
], ids=["one size", "any size"])  # fmt: skip
def test_a_graph_takes_the_sizes_that_the_processor_makes(save, processor, free):
    name, settings = processor
    given = {"processor": make_processor(name, **settings), "input_example": IMAGES[1:2]}
    graph = read_graph(Layout(save(make("ResNetModel"), graph="require", **given)))
    [pixel_values] = graph.inputs
    assert [isinstance(size, str) for size in pixel_values.shape] == [True, False, free, free]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_as_a_graph_and_through_mlflow(save, name):
    path = save(make(name), graph="require")
    served = mlflow.pyfunc.load_model(str(path))
    assert served._model_impl.model.engine.name == "onnx"
    module = mlflow_safeflavor.load_model(path, model_config={"engine": "module"})
    texts = [base64.b64encode(encoded(image)).decode() for image in IMAGES]
    inputs = served.metadata.get_input_schema()
    for body in (
        {"inputs": texts},
        {"dataframe_records": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
    ):
        found = served.predict(infer_and_parse_data(body, inputs))
        buffer = io.StringIO()
        predictions_to_json(found, buffer)
        rows = [row["embedding"] for row in json.loads(buffer.getvalue())["predictions"]]
        assert np.array(rows) == pytest.approx(embeddings(module), abs=1e-4)
    frame = pd.DataFrame({"image": pd.Series([encoded(image) for image in IMAGES], dtype=object)})
    found = served.predict(frame, params={"pool": False})
    tokens = np.array(found["embedding"].tolist())
    assert tokens == pytest.approx(embeddings(module, pool=False), abs=1e-4)
