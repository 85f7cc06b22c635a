"""Boxes around objects: the answers of transformers' pipeline, of detectors of both kinds."""

import base64
import io
import json

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
from mlflow_safeflavor.tasks.table import infer_task

SIDE = {"height": 64, "width": 64}
SHAPE = {"d_model": 16, "num_queries": 7, "num_labels": 4, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2}  # fmt: skip
OWN_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
IMAGES = [pixels(), pixels(40, 48, seed=1), pixels(90, 33, seed=2)]


def resnet():
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )


def rt_detr():
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16], depths=[1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3"],
    )  # fmt: skip
    # Two levels, so one step up and one down between them; each more takes seconds to trace.
    return {**SHAPE, "backbone_config": backbone, "backbone": None, "encoder_hidden_dim": 16,
        "use_pretrained_backbone": False, "encoder_in_channels": [8, 16], "num_denoising": 0,
        "feat_strides": [8, 16], "encode_proj_layers": [1], "decoder_in_channels": [16, 16],
        "num_feature_levels": 2, "decoder_n_points": 2}  # fmt: skip


# Class prefix → config.
MODELS = {
    "Detr": lambda: {**SHAPE, **OWN_BACKBONE, "backbone_config": resnet()},
    "ConditionalDetr": lambda: {**SHAPE, **OWN_BACKBONE, "backbone_config": resnet()},
    "DeformableDetr": lambda: {**SHAPE, **OWN_BACKBONE, "backbone_config": resnet(), "d_model": 32,
        "decoder_layers": 2, "num_feature_levels": 1, "encoder_n_points": 2,
        "decoder_n_points": 2},
    "Yolos": lambda: {**TRANSFORMER, "image_size": [64, 64], "patch_size": 16,
        "num_detection_tokens": 7, "num_labels": 4},
    "RTDetr": rt_detr,
    # Whose heads are tied to that of the first layer.
    "RTDetrV2": lambda: {**rt_detr(), "decoder_layers": 2, "decoder_n_levels": 2},
}  # fmt: skip
# Those whose processor has another's name.
PROCESSORS = {"RTDetrV2": "RTDetr"}


def make(name):
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}Config")
    # As a checkpoint has it: release 5 takes what it says of backbones, and keeps no attribute.
    config = cls.from_dict(cls(**MODELS[name]()).to_dict())
    config.id2label = dict(enumerate(["cat", "dog", "tree", "mat"]))
    config.label2id = {label: i for i, label in config.id2label.items()}
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    with torch.no_grad():  # far from each other, so that no change drowns in the tolerance
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def processor(name):
    return make_processor(PROCESSORS.get(name, name), size=SIDE)


@pytest.fixture
def save(tmp_path):
    def save(name, model=None, **given):
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        given = {"processor": processor(name), "rehearse": False, "graph": "no", **given}
        mlflow_safeflavor.save_model(model or make(name), path, **given)
        return path

    return save


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert (one["label"], one["box"]) == (other["label"], other["box"])


@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_of_the_pipeline(save, name):
    module = make(name)
    reference = pipeline("object-detection", model=module, image_processor=processor(name))
    model = mlflow_safeflavor.load_model(save(name, module))
    assert model.spec.task == "object-detection"
    found = 0
    for threshold in (0.0, 0.3, 0.5, 1.0):
        answers = model.predict(IMAGES, {"threshold": threshold})["objects"]
        for image, objects in zip(IMAGES, answers, strict=True):
            same(objects, reference(Image.fromarray(image), threshold=threshold))
            found += len(objects)
        if threshold == 1.0:
            assert [*answers] == [[], [], []]
    assert found > 20


def test_boxes_are_in_pixels_of_the_image_that_was_sent(save):
    model = mlflow_safeflavor.load_model(save("Yolos"))
    task, size = model.task, np.array([200, 100])
    boxes = np.array([[0.5, 0.5, 1, 1], [0.25, 0.75, 0.1, 0.2]], np.float32)
    logits = np.full((2, 5), -9, np.float32)
    logits[0, 2] = logits[1, 1] = 9
    output = {"logits": logits, "pred_boxes": boxes}
    (answer,) = task.decoded([{}], [{"original_size": size}], [output], task.check_params({}))
    places = [(one["label"], *one["box"].values()) for one in answer["objects"]]
    assert places == [("tree", 0, 0, 200, 100), ("dog", 40, 65, 60, 85)]
    for name in output:
        bad = {**output, name: np.full_like(output[name], np.nan)}
        with pytest.raises(InputError, match=r"not a number[\s\S]*row 1"):
            task.decoded([{}, {}], [{"original_size": size}] * 2, [output, bad],
                task.check_params({}))  # fmt: skip


def test_a_pipeline_brings_its_threshold(save):
    module = make("Yolos")
    pipe = pipeline(
        "object-detection", model=module, image_processor=processor("Yolos"), threshold=0.3
    )
    model = mlflow_safeflavor.load_model(save("Yolos", pipe, processor=None))
    (objects,) = model.predict(IMAGES[:1])["objects"]
    same(objects, pipe(Image.fromarray(IMAGES[0])))
    for wrong in (-0.1, 1.1, "half"):
        with pytest.raises(InputError, match=r"'threshold'[\s\S]*from 0 to 1"):
            model.predict(IMAGES, {"threshold": wrong})


def test_images_of_any_size_that_the_processor_makes(save):
    """Scaled by their short side, each is an array of another shape, and runs by itself."""
    reference = make_processor("Yolos", size={"shortest_edge": 48, "longest_edge": 96})
    model = mlflow_safeflavor.load_model(save("Yolos", processor=reference))
    together = model.predict(IMAGES, {"threshold": 0.2})["objects"]
    for image, objects in zip(IMAGES, together, strict=True):
        (alone,) = model.predict([image], {"threshold": 0.2})["objects"]
        same(alone, objects)


def test_what_is_refused(save, tiny_bert):
    with pytest.raises(StructureError, match=r"outputs of a detector[\s\S]*YolosImageProcessor"):
        save("Yolos", processor=make_processor(size=SMALL))
    with pytest.raises(StructureError, match=r"logits, shape \(3, any, 4\)|logits"):
        save("Yolos", processor=processor("ConditionalDetr"))
    with pytest.raises(StructureError, match="does not see images"):
        save("Yolos", tiny_bert(), task="object-detection")
    shape = {**TRANSFORMER, "vocab_size": 40}
    owl = transformers.OwlViTForObjectDetection(transformers.OwlViTConfig(
        text_config=shape, vision_config={**TRANSFORMER, "image_size": 32, "patch_size": 8}
    ))  # fmt: skip
    with pytest.raises(StructureError, match="reads what to look for"):
        save("Yolos", owl.eval())
    with pytest.raises(InputError, match=r"not an image[\s\S]*row 1"):
        mlflow_safeflavor.load_model(save("Yolos")).predict([pixels(), 3])


def test_the_task_of_a_class():
    for name in MODELS:
        assert infer_task(f"{name}ForObjectDetection", "pixel_values") == "object-detection"


# One of each kind: detectors take long to trace.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Detr", "Yolos", "RTDetr"])
def test_through_mlflow_as_a_graph(save, name):
    path = save(name, graph="require", params={"threshold": 0.3})
    served = mlflow.pyfunc.load_model(str(path))
    assert served._model_impl.model.engine.name == "onnx"
    module = mlflow_safeflavor.load_model(path, model_config={"engine": "module"})
    wanted = [*module.predict(IMAGES)["objects"]]
    texts = [base64.b64encode(encoded(image)).decode() for image in IMAGES]
    for body in ({"inputs": texts}, {"dataframe_records": [{"image": text} for text in texts]}):
        found = served.predict(infer_and_parse_data(body, served.metadata.get_input_schema()))
        buffer = io.StringIO()
        predictions_to_json(found, buffer)
        for row, other in zip(json.loads(buffer.getvalue())["predictions"], wanted, strict=True):
            same(row["objects"], other)
    frame = pd.DataFrame({"image": pd.Series([encoded(image) for image in IMAGES], dtype=object)})
    assert len(served.predict(frame, params={"threshold": 1.0})) == 3


@pytest.mark.serve
def test_a_server_answers_the_same(serve, save):
    path = save("Yolos", params={"threshold": 0.3})
    (wanted,) = mlflow_safeflavor.load_model(path).predict(IMAGES[:1])["objects"]
    text = base64.b64encode(encoded(IMAGES[0])).decode()
    with serve(path) as server:
        answer = server.invoke({"inputs": [text]})
        assert answer.status == 200, answer.text
        same(answer.json()["predictions"][0]["objects"], wanted)
        assert server.invoke({"inputs": ["aGVsbG8="]}).status == 400
        assert mlflow_safeflavor.verify_model(str(path), endpoint=server.url).ok
