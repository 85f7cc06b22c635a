"""Image classification.

The answers of transformers' pipelines, however an image is handed over, and nothing worse.
"""

import base64
import io
import json
import shutil
import struct
import zlib
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from artifacts import edit_json, flip, reseal
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from PIL import Image
from transformers import pipeline

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import (
    InputError,
    IntegrityError,
    ParityError,
    StructureError,
    TrustError,
)
from mlflow_safeflavor.predict.golden import read_golden
from mlflow_safeflavor.tasks.inputs import files, processor
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.images import read_image
from mlflow_safeflavor.tasks.table import infer_task

SINCE_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="pipelines of transformers 4 disregard the problem type",
)
SMALL = {"height": 32, "width": 32}
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2}
# Class prefix → config, processor, its settings.
ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    "ViT": ({**TRANSFORMER, "image_size": 32, "patch_size": 8}, "ViT", {"size": SMALL}),
    "DeiT": (
        {**TRANSFORMER, "image_size": 32, "patch_size": 8},
        "DeiT",
        {"size": SMALL, "crop_size": SMALL},
    ),
    "Swin": (
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "ViT",
        {"size": SMALL},
    ),
    "ConvNext": (STAGES, "ConvNext", {"size": {"shortest_edge": 48}}),
    "ResNet": (
        {**STAGES, "embedding_size": 8},
        "ConvNext",
        {"size": {"shortest_edge": 48}, "crop_pct": 0.875},
    ),
    "MobileNetV2": (
        {"depth_multiplier": 0.25, "image_size": 32},
        "MobileNetV2",
        {"size": {"shortest_edge": 40}},
    ),
}


def make_processor(name="ViT", **settings):
    """transformers' processor that uses Pillow; release 5 has a name of its own for it."""
    new = getattr(transformers, f"{name}ImageProcessorPil", None)
    return (new or getattr(transformers, f"{name}ImageProcessor"))(**settings)


def make_model(name="ViT", **config):
    torch.manual_seed(0)
    settings = {**ARCHITECTURES[name][0], "num_labels": 5, **config}
    model = getattr(transformers, f"{name}ForImageClassification")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    with torch.no_grad():  # far from each other, so that no change drowns in the tolerance
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def pixels(height=50, width=70, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, format, **options
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved ViT, which nobody may change."""
    path = tmp_path_factory.mktemp("vit") / "model"
    mlflow_safeflavor.save_model(
        make_model(), path, processor=make_processor(size=SMALL), rehearse=False, graph="no"
    )
    return path


@pytest.fixture(scope="module")
def model(saved):
    return mlflow_safeflavor.load_model(str(saved))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_labels_and_scores_are_those_of_the_pipeline(tmp_path, name):
    module, images = (
        make_model(name),
        make_processor(ARCHITECTURES[name][1], **ARCHITECTURES[name][2]),
    )
    reference = pipeline("image-classification", model=module, image_processor=images)
    cells = [
        Image.fromarray(pixels(h, w, seed=h)) for h, w in ((50, 70), (32, 32), (20, 90), (200, 31))
    ]
    cells += [cells[0].convert("L"), cells[0].convert("RGBA"), cells[0].convert("CMYK")]
    wanted = [reference(cell, top_k=5) for cell in cells]

    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    answers = loaded.predict(cells, {"top_k": -1})

    for (_, answer), ranked in zip(answers.iterrows(), wanted, strict=True):
        assert answer["labels"] == [entry["label"] for entry in ranked]
        assert answer["scores"] == pytest.approx([entry["score"] for entry in ranked], abs=1e-5)
    assert len({tuple(scores) for scores in answers["scores"]}) > 4
    # Whatever is beside it.
    alone = loaded.predict([cells[2]], {"top_k": -1}).iloc[0]
    assert alone["scores"] == pytest.approx(answers["scores"][2], abs=1e-6)


@pytest.mark.parametrize(
    ("config", "function"),
    [
        ({"num_labels": 1}, None),
        ({"problem_type": "multi_label_classification"}, None),
        pytest.param({"problem_type": "regression"}, None, marks=SINCE_5),
        ({}, "none"),
        ({}, "sigmoid"),
    ],
)
def test_functions_are_those_of_the_pipeline(tmp_path, config, function):
    module, images = make_model(**config), make_processor(size=SMALL)
    reference = pipeline("image-classification", model=module, image_processor=images)
    (wanted,) = reference(Image.fromarray(pixels()), top_k=1, function_to_apply=function)
    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    answer = loaded.predict([pixels()], {"function_to_apply": function}).iloc[0]
    assert answer["label"] == wanted["label"]
    assert answer["score"] == pytest.approx(wanted["score"], abs=1e-5)


# Forms of a cell.


def forms(folder):
    array = pixels()
    png = encoded(array)
    (folder / "image.png").write_bytes(png)
    text = base64.b64encode(png).decode()
    return {
        "bytes": png,
        "bytearray": bytearray(png),
        "another lossless format": encoded(array, "BMP"),
        "base64": text,
        "base64 in lines": base64.encodebytes(png).decode(),
        "base64 as bytes": text.encode(),
        "data URL": f"data:image/png;base64,{text}",
        "path": folder / "image.png",
        "array": array,
        "lists": array.tolist(),
        "PIL": Image.fromarray(array),
    }


def test_all_forms_are_one_image(tmp_path, model):
    cells = forms(tmp_path)
    answers = model.predict(list(cells.values()), {"top_k": -1})
    for name, scores in zip(cells, answers["scores"], strict=True):
        assert scores == pytest.approx(answers["scores"][0], abs=1e-6), name
    assert model.predict(cells["bytes"])["score"][0] == pytest.approx(answers["score"][0], abs=1e-6)


def test_the_same_under_pyfunc_with_the_index_of_the_rows(tmp_path, saved, model):
    cells = forms(tmp_path)
    frame = pd.DataFrame({"image": pd.Series(list(cells.values()), dtype=object)})
    frame.index = [f"row {i}" for i in range(len(frame))]
    answers = mlflow.pyfunc.load_model(str(saved)).predict(frame, params={"top_k": 2})
    assert list(answers.index) == list(frame.index)
    wanted = model.predict([cells["PIL"]], {"top_k": 2}).iloc[0]
    for _, answer in answers.iterrows():
        assert answer["labels"] == wanted["labels"]
        assert answer["scores"] == pytest.approx(wanted["scores"], abs=1e-6)


def test_grey_is_grey(model):
    grey = pixels()[:, :, 0]
    two, three = model.predict([grey, np.stack([grey] * 3, axis=-1)])["score"]
    assert two == pytest.approx(three, abs=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_by_the_pipeline(orientation):
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "JPEG", exif=exif.tobytes())
    wanted = transformers.image_utils.load_image(base64.b64encode(content).decode())
    found = read_image(content, "row 0", Caps())
    assert found.size == ((70, 50) if orientation < 5 else (50, 70))
    assert np.array_equal(np.array(found), np.array(wanted))


def test_an_image_three_pixels_high_is_not_taken_for_three_channels(model):
    tall = pixels(3, 50)
    shown = processor.apply(model.processor, Image.fromarray(tall))["pixel_values"]
    wanted = Image.fromarray(tall).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.allclose(shown.transpose(1, 2, 0), (np.array(wanted) / 255 - 0.5) / 0.5, atol=1e-5)


# What is no image.


def bomb(width, height):
    """A PNG of some bytes that claims to have any size."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


BAD = {
    "no bytes": (b"", "empty"),
    "no text": ("", "empty"),
    "other bytes": (b"\x00\x01\x02 not an image", "not an image that can be read"),
    "half a PNG": (encoded(pixels())[:2000], "not an image that can be read"),
    "half a JPEG": (encoded(pixels(), "JPEG")[:900], "not an image that can be read"),
    "a flipped byte": (
        bytes(b ^ (i == 3000) for i, b in enumerate(encoded(pixels()))),
        "not an image that can be read",
    ),
    "a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not an image that can be read",
    ),
    "a decompression bomb": (bomb(60_000, 60_000), "not an image|too large"),
    "just too many pixels": (bomb(7_072, 7_072), "too large"),
    "long and narrow": (encoded(pixels(2, 101)), "long and narrow"),
    "a path as text": ("/etc/passwd", "never taken for a path"),
    "a path as bytes": (b"/etc/passwd", "no file in base64"),
    "an address": ("http://127.0.0.1/cat.png", "no file in base64"),
    "a file address": ("file:///etc/passwd", "no file in base64"),
    "base64 of a text": (base64.b64encode(b"hello").decode(), "not an image that can be read"),
    "a data URL of MLflow's making": (
        base64.b64decode("dataimage/pngbase64" + "A" * 41),
        "without a data: prefix",
    ),
    "a number": (3, "not an image"),
    "floats": (np.zeros((4, 4, 3)), "float64 array"),
    "four channels": (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
    "channels first": (np.zeros((3, 4, 4), np.uint8), r"shape \(3, 4, 4\)"),
    "nothing in it": (np.zeros((0, 4, 3), np.uint8), "not an image"),
    "large whole numbers": ([[256, 0], [0, 0]], "not an image"),
    "negative ones": ([[-1, 0], [0, 0]], "not an image"),
    "int64": (np.zeros((4, 4), np.int64), "int64 array"),
    "ragged lists": ([[1, 2], [3]], "not an image"),
    "a dict": ({"bytes": b""}, "not an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_refused_with_row_and_column(model, case):
    value, words = BAD[case]
    with pytest.raises(InputError, match=words) as caught:
        model.predict(pd.DataFrame({"image": pd.Series([pixels(), value], dtype=object)}))
    assert "where: row 1\n" in str(caught.value)


def test_only_plain_files_of_bounded_size_are_read(tmp_path, model, monkeypatch):
    for path in (tmp_path, tmp_path / "missing.png", "/dev/zero"):
        with pytest.raises(InputError, match=r"cannot be read[\s\S]*row 0"):
            model.predict([type(tmp_path)(path)])
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    large = encoded(pixels())
    (tmp_path / "large.png").write_bytes(large)
    for value in (large, base64.b64encode(large).decode(), tmp_path / "large.png"):
        with pytest.raises(InputError, match="too large"):
            model.predict([value])


# Processors.


def test_only_json_is_written_and_the_manifest_guards_it(saved, tmp_path):
    folder = Layout(saved).processor
    assert [path.name for path in folder.iterdir()] == ["preprocessor_config.json"]
    assert (
        json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
        == "ViTImageProcessor"
    )
    assert any(
        line.startswith("pillow==")
        for line in (saved / "requirements.txt").read_text().splitlines()
    )


CHANGES = {
    "code of others": ({"auto_map": {"AutoImageProcessor": "code.Mine"}}, TrustError, "names code"),
    "a class of something else": (
        {"image_processor_type": "BertModel"},
        IntegrityError,
        "none of transformers'",
    ),
    "no class": ({"image_processor_type": "os.system"}, IntegrityError, "none of transformers'"),
    "no name": ({"image_processor_type": 3}, IntegrityError, "something else"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_damaged_processor_is_refused(saved, tmp_path, case):
    change, error, words = CHANGES[case]
    root = shutil.copytree(saved, tmp_path / "copy")
    edit_json(
        Layout(root).processor / "preprocessor_config.json", lambda content: content.update(change)
    )
    with pytest.raises(IntegrityError, match=r"preprocessor_config\.json"):
        mlflow_safeflavor.load_model(str(root))
    reseal(root)
    with pytest.raises(error, match=words):
        mlflow_safeflavor.load_model(str(root))


def test_a_flipped_bit_of_a_processor_is_refused(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "copy")
    flip(Layout(root).processor / "preprocessor_config.json")
    with pytest.raises(IntegrityError, match=r"preprocessor_config\.json"):
        mlflow_safeflavor.load_model(str(root))


def test_golden_rows_hold_no_pixels(saved):
    golden = read_golden(Layout(saved), "module")
    assert [golden.inputs(i) for i in range(len(golden.rows))] == [{}] * len(golden.rows)
    assert all(golden.outputs(i) for i in range(len(golden.rows)))


def test_another_mean_shows_in_the_golden_rows(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "copy")
    edit_json(
        Layout(root).processor / "preprocessor_config.json",
        lambda config: config.update(image_mean=[0.4] * 3),
    )
    reseal(root)
    with pytest.raises(ParityError):
        mlflow_safeflavor.load_model(str(root))


class TorchvisionBackend:
    """Stands for transformers' class of that name, which needs torchvision, not installed here."""


def other_processor(step, *bases):
    """One of the user's own, whose numbers are off by up to ``step``."""

    class Other(*bases, type(make_processor())):  # type: ignore[misc]  # whose class depends on both
        def preprocess(self, *args, **kwargs):
            made = super().preprocess(*args, **kwargs)
            made["pixel_values"] = made["pixel_values"] + step * torch.rand(
                made["pixel_values"].shape
            )
            return made

    return Other(size=SMALL)


def test_a_class_of_the_users_own_must_do_the_same_as_transformers(tmp_path):
    processor.write_processor(other_processor(0.0), tmp_path)
    assert type(processor.load_processor(tmp_path)).__name__.startswith("ViTImageProcessor")
    with pytest.raises(StructureError, match=r"other numbers[\s\S]*allowed 0\b"):
        processor.write_processor(other_processor(1e-6), tmp_path)


def test_torchvision_may_round_differently(tmp_path):
    processor.write_processor(other_processor(0.02, TorchvisionBackend), tmp_path)
    with pytest.raises(StructureError, match=r"nearly the same[\s\S]*allowed 0\.04"):
        processor.write_processor(other_processor(0.1, TorchvisionBackend), tmp_path)


def test_what_is_no_processor_is_refused(tmp_path, tiny_tokenizer):
    for value in (tiny_tokenizer, object()):
        with pytest.raises(StructureError, match="no processor that can be saved"):
            processor.write_processor(value, tmp_path)
    with pytest.raises(StructureError, match=r"needs a processor[\s\S]*NoneType"):
        mlflow_safeflavor.save_model(make_model(), tmp_path / "model")


def test_a_processor_of_another_model_is_refused(tmp_path):
    sounds = transformers.Wav2Vec2FeatureExtractor()
    with pytest.raises(
        StructureError, match=r"wanted: one for images[\s\S]*Wav2Vec2FeatureExtractor"
    ):
        mlflow_safeflavor.save_model(make_model(), tmp_path / "model", processor=sounds)
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_folder_brings_its_processor(tmp_path):
    module, images = make_model(), make_processor(size=SMALL, image_mean=[0.1, 0.2, 0.3])
    module.save_pretrained(tmp_path / "checkpoint")
    images.save_pretrained(tmp_path / "checkpoint")
    mlflow_safeflavor.save_model(
        tmp_path / "checkpoint", tmp_path / "model", rehearse=False, graph="no"
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert loaded.spec.task == "image-classification"
    wanted = images(images=Image.fromarray(pixels()), return_tensors="pt")["pixel_values"][
        0
    ].numpy()
    found = processor.apply(loaded.processor, Image.fromarray(pixels()))["pixel_values"]
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)


def test_the_task_of_a_class():
    assert infer_task("ViTForImageClassification", "pixel_values") == "image-classification"
    assert (
        infer_task("DeiTForImageClassificationWithTeacher", "pixel_values")
        == "image-classification"
    )


# Over the wire.


def test_an_example_is_stored_as_a_server_takes_it(tmp_path, saved):
    """Whatever form it has, and also in those requests that MLflow does not decode."""
    example = pd.DataFrame(
        {"photo": pd.Series([Image.fromarray(pixels()), pixels(40, 40)], dtype=object)}
    )
    mlflow_safeflavor.save_model(
        make_model(),
        tmp_path / "model",
        processor=make_processor(size=SMALL),
        input_columns={"image": "photo"},
        input_example=example,
        rehearse=False,
        graph="no",
    )
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    wanted = served.predict(example)
    request = json.loads((tmp_path / "model" / "serving_input_example.json").read_text())
    texts = [row[0] for row in request["dataframe_split"]["data"]]
    for body in (
        request,
        {"dataframe_records": [{"photo": text} for text in texts]},
        {"inputs": {"photo": texts}},
        {"inputs": [{"photo": text} for text in texts]},
        {"instances": [{"photo": text} for text in texts]},
    ):
        found = served.predict(infer_and_parse_data(body, served.metadata.get_input_schema()))
        assert list(found["label"]) == list(wanted["label"])
        assert list(found["score"]) == pytest.approx(list(wanted["score"]), abs=1e-6)


@pytest.mark.serve
def test_a_server_answers_the_same_and_refuses_what_is_no_image(serve, saved, model):
    settings = {"OMP_NUM_THREADS": "1", "MLFLOW_SAFEFLAVOR_NUM_THREADS": "1"}
    text = base64.b64encode(encoded(pixels())).decode()
    wanted = model.predict([pixels()])
    with serve(saved, env=settings) as server:
        answer = server.invoke({"dataframe_records": [{"image": text}]})
        assert answer.status == 200, answer.text
        assert answer.json()["predictions"][0]["score"] == pytest.approx(
            wanted["score"][0], abs=1e-6
        )
        for body in (
            {"inputs": text},
            {"instances": [text]},
            {"dataframe_split": {"data": [[text]]}},
        ):
            assert server.invoke(body).json() == answer.json()
        for value in (
            "/etc/passwd",
            "file:///etc/passwd",
            "aGVsbG8=",
            f"data:image/png;base64,{text}",
            "",
            3,
            [1],
        ):
            refused = server.invoke({"dataframe_records": [{"image": value}]})
            assert refused.status == 400, f"{value}: {refused.text}"
            assert "root:" not in refused.text
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=server.url)
    assert report.ok
    assert len(report.rows) == 3
