"""Hints about rows and params, followed.

What a request may hold, and what a model must be saved with for it.
"""

from __future__ import annotations

import importlib.metadata
import io
import subprocess
import sys
import wave

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import tiny_model
from hints.hint_rows import follows, refused
from integration.test_caps import GAPS, IMAGES, QUESTIONS, TEXTS, TOKENS, WRITES, ZERO_SHOT, models  # noqa: F401  (a fixture)
from PIL import Image
from speakers import ctc_pipeline, whisper_pipeline
from writers import byte_tokenizer, writer

from mlflow_safeflavor import load_model
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.module.generation import Generation
from mlflow_safeflavor.tasks.inputs.files import content_of
from mlflow_safeflavor.tasks.inputs.images import read_image
from mlflow_safeflavor.tasks.inputs.sounds import read_sound, to_wav

pytest_plugins = "saved_models"


def bad(model, data, params=None):
    with pytest.raises(InputError) as error:
        model.predict(data, params)
    return error.value


# Rows.


@follows("tasks/inputs/tables", "Rows cannot be read from this type", "pass a DataFrame with …")
@follows(
    "tasks/inputs/columns",
    "A column is missing",
    "rename the columns of the data, or log the model with input_columns=... as the data has them",
)
@follows(
    "tasks/inputs/columns",
    "There are columns that the model does not know",
    "select the columns first: data[…]",
)
@follows(
    "tasks/inputs/columns",
    "There are several columns, and the model takes one",
    "select it first: data[[…]], or log the model with input_columns=…",
)
@follows(
    "tasks/inputs/texts",
    "A text holds half of a surrogate pair, which nothing can read",
    'clean it first, for example text.encode("utf-8", "replace").decode()',
)
@follows(
    "tasks/inputs/rows",
    "A value is missing",
    "drop the row or fill the value, for example data.dropna()",
)
@follows(
    "tasks/inputs/texts",
    "A value is not a text",
    "convert it first, for example data[column].astype(str); drop or fill missing values",
)
def test_rows(models, saved, save, tiny_bert, tiny_tokenizer):  # noqa: F811
    model = load_model(saved)
    data = pd.DataFrame({"review": ["the cat"], "stars": [1]})
    select, log = (
        bad(model, data).hint.removeprefix("select it first: ").split(", or log the model with ")
    )
    assert len(model.predict(eval(select, {"data": data}))) == 1
    named = load_model(save(tiny_bert(), tokenizer=tiny_tokenizer, **eval(f"dict({log})")))
    assert "one column" in bad(model, 3).hint
    assert "'review'" in bad(named, 3).hint
    assert len(named.predict(data[["review"]])) == 1
    bad(named, pd.DataFrame({"text": ["the cat"]}))
    assert (
        len(named.predict(pd.DataFrame({"text": ["the cat"]}).rename(columns={"text": "review"})))
        == 1
    )
    error = bad(named, data)
    assert len(named.predict(eval(error.hint.partition(": ")[2], {"data": data}))) == 1
    text = "the \ud800 cat"
    error = bad(model, [text])
    assert len(model.predict([eval(error.hint.partition("example ")[2], {"text": text})])) == 1
    data = pd.DataFrame({"text": ["the cat", None]})
    error = bad(model, data)
    assert len(model.predict(eval(error.hint.partition("example ")[2], {"data": data}))) == 1
    data = pd.DataFrame({"text": [1, 2]})
    error = bad(model, data)
    line = error.hint.partition("example ")[2].partition(";")[0]
    assert len(model.predict(eval(line, {"data": data, "column": "text"}).to_frame())) == 2


@follows("tasks/inputs/texts", "require", "cut or split it")
@follows("tasks/text", "require", "cut or split it")
@follows(
    "tasks/base",
    "require",
    "predict them in chunks: over HTTP in several requests, natively from an iterator of "
    "DataFrames",
)
@follows(
    "tasks/inputs/caps",
    "…",
    "…, or raise the cap: model_config={…: …} where the model is saved or loaded, or the variable "
    "MLFLOW_SAFEFLAVOR_…; 0 for no bound",
)
@follows("tasks/classification", "require_answers", "ask for fewer labels of fewer rows at once")
def test_too_much_text(models, monkeypatch):  # noqa: F811
    long = "the cat " * 40
    model = models(TEXTS, max_characters=100)
    error = bad(model, [long])
    assert len(model.predict([long[:90]])) == 1
    assert len(models(TEXTS, max_characters=1000).predict([long])) == 1
    assert len(models(TEXTS, max_characters=0).predict([long])) == 1
    monkeypatch.setenv(error.hint.partition("variable ")[2].partition(";")[0], "1000")
    assert len(models(TEXTS, max_rows=99).predict([long])) == 1
    model = models(TEXTS, max_tokens=10)
    object.__setattr__(model.task, "config", {**model.task.config, "max_length": None})
    model.task.encoder.max_length = None
    bad(model, ["the cat " * 10])
    assert len(model.predict(["the cat"])) == 1
    model = models(TEXTS, max_rows=2)
    rows = pd.DataFrame({"text": ["the cat"] * 5})
    bad(model, rows)
    assert sum(map(len, model.predict(rows[i : i + 2] for i in range(0, 5, 2)))) == 5
    monkeypatch.setattr("mlflow_safeflavor.tasks.inputs.caps.ANSWERS_A_ROW", 1)
    model = models(TEXTS, max_answers=10)
    bad(model, ["a"] * 9, {"top_k": -1})
    assert len(model.predict(["a"] * 3, {"top_k": 2})) == 3


@follows(
    "tasks/text",
    "A text is longer than the model takes, and truncation is off",
    "shorten or split the text, or let it be cut: params={'truncation': True}",
)
@follows(
    "tasks/text",
    "A text has no tokens, and this tokenizer adds none",
    "drop the row, or put a text in it",
)
def test_texts_of_no_or_many_tokens(models, save):  # noqa: F811
    model, long = models(TEXTS), ["the cat " * 40]
    error = bad(model, long, {"truncation": False})
    assert len(model.predict(["the cat"], {"truncation": False})) == 1
    assert len(model.predict(long, **eval(f"dict({error.hint.partition('cut: ')[2]})"))) == 1
    written = writer("GPT2LMHeadModel", bos_token_id=None, generation={"bos_token_id": None})
    path = save(written, tokenizer=byte_tokenizer(), task="text-generation")
    model, few = load_model(path), {"max_new_tokens": 1}
    bad(model, ["", "the cat"], few)
    assert len(model.predict(["the cat"], few)) == 1
    assert len(model.predict(["a", "the cat"], few)) == 2


# Params.


@follows(
    "tasks/params",
    "The task … does not know a param",
    "leave it out, or choose the task that knows it: task=…",
)
def test_a_param_of_another_task(save, tiny_tokenizer, tiny_bert):
    given = {"tokenizer": tiny_tokenizer}
    refused(InputError, save, tiny_bert(), **given, params={"pooling_of_rows": 1})
    save(tiny_bert(), **given)
    save(
        tiny_model("Bert", "ForTokenClassification"),
        **given,
        params={"aggregation_strategy": "simple"},
    )
    refused(InputError, save, tiny_bert(), **given, params={"aggregation_strategy": "simple"})


@follows(
    "tasks/fill_mask",
    "A text has a gap beyond what the model reads | A text has no gap to fill",
    "shorten the text before the gap",
)
@follows(
    "tasks/fill_mask",
    "A text has a gap beyond what the model reads | A text has no gap to fill",
    "write … into the text",
)
@follows("tasks/fill_mask", "require_answers", "ask for fewer tokens, or fewer rows at once")
@follows("tasks/base", "require", "shorten the list")
def test_gaps(models):  # noqa: F811
    model = models(GAPS)
    bad(model, ["the cat " * 40 + "[MASK]"])
    assert len(model.predict(["the cat [MASK]"])) == 1
    error = bad(model, ["the cat"])
    assert len(model.predict([f"the cat {eval(error.hint.split()[1])}"])) == 1
    model = models(GAPS, max_answers=1000)
    bad(model, ["[MASK] " * 20], {"top_k": 10**6})
    assert len(model.predict(["[MASK] " * 20], {"top_k": 3})) == 1
    bad(model, ["[MASK]"], {"targets": ["cat"] * 9999})
    assert len(model.predict(["[MASK]"], {"targets": ["cat"] * 3})) == 1


@follows(
    "tasks/candidates",
    "There are no labels to choose from",
    "pass params={'candidate_labels': […]}, with the request or when the model is saved",
)
@follows(
    "tasks/zero_shot_classification",
    "A label leaves no room for the text",
    "shorten the label or the template: texts are cut, hypotheses are not",
)
@follows("tasks/zero_shot_classification", "require_pieces", "send fewer rows or labels at once")
@follows("tasks/candidates", "require", "shorten it, or name fewer labels")
def test_labels(models, save, tiny_tokenizer):  # noqa: F811
    model = models(ZERO_SHOT)
    bad(model, ["a cat"])
    assert len(model.predict(["a cat"], {"candidate_labels": ["cat"]})) == 1
    config = {"id2label": {0: "no", 1: "entailment"}, "label2id": {"no": 0, "entailment": 1}}
    nli = tiny_model("Bert", "ForSequenceClassification", **config)
    given = {
        "tokenizer": tiny_tokenizer,
        "task": ZERO_SHOT,
        "params": {"candidate_labels": ["cat"]},
    }
    assert len(load_model(save(nli, **given)).predict(["a cat"])) == 1
    bad(model, ["a cat"], {"candidate_labels": ["cat " * 40]})
    bad(model, ["a cat"], {"candidate_labels": ["cat"], "hypothesis_template": "the " * 40 + "{}"})
    assert (
        len(
            model.predict(["a cat"], {"candidate_labels": ["cat"], "hypothesis_template": "the {}"})
        )
        == 1
    )
    labels = [f"cat {i}" for i in range(200)]
    bad(model, ["a cat"] * 200, {"candidate_labels": labels})
    assert len(model.predict(["a cat"] * 2, {"candidate_labels": labels[:3]})) == 2
    bad(model, ["a"], {"candidate_labels": labels, "hypothesis_template": "{}" * 9999})
    assert (
        len(model.predict(["a"], {"candidate_labels": labels[:2], "hypothesis_template": "{}"}))
        == 1
    )


@follows(
    "tasks/text_ranking",
    "A value is not a list of passages",
    'pass all passages of a query in one cell, {"query": text, "passages": [text, …]}, '
    "and drop queries that have none",
)
@follows(
    "tasks/text_ranking",
    "The label that tells how relevant a passage is cannot be told",
    "say it where the model is saved: model_config={'label': …}",
)
@follows("tasks/text_ranking", "require_pieces", "send fewer passages at once")
def test_passages(save, tiny_tokenizer):
    several = tiny_model("Bert", "ForSequenceClassification", num_labels=2)
    given = {"tokenizer": tiny_tokenizer, "task": "text-ranking"}
    error = refused(InputError, save, several, **given)
    config = eval(error.hint.partition("model_config=")[2])
    model = load_model(save(several, model_config={**config, "max_pieces": 20}, **given))
    bad(model, [{"query": "a cat", "passages": []}, {"query": "a cat", "passages": ["a"]}])
    assert len(model.predict([{"query": "a cat", "passages": ["a"]}])) == 1
    bad(model, [{"query": "a cat", "passages": ["a"] * 21}])
    assert len(model.predict([{"query": "a cat", "passages": ["a"] * 11}])) == 1


@follows(
    "tasks/zero_shot_image_classification",
    "A label is longer than the model takes",
    "shorten the label or the template",
)
@follows(
    "tasks/zero_shot_image_classification", "require_pieces", "send fewer rows or labels at once"
)
def test_labels_of_images(save, tiny_tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts = {**shape, "vocab_size": 40, "max_position_embeddings": 32, "eos_token_id": 3}
    images = {**shape, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=texts, vision_config=images)
    ).eval()
    sees = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    given = {"tokenizer": tiny_tokenizer, "processor": sees}
    task = {"task": "zero-shot-image-classification", "model_config": {"max_pieces": 32}}
    model = load_model(save(clip, **given, **task))
    image = np.zeros((8, 8, 3), np.uint8)
    bad(model, [image], {"candidate_labels": ["cat " * 40]})
    assert len(model.predict([image], {"candidate_labels": ["cat"]})) == 1
    bad(model, [image] * 2, {"candidate_labels": [f"cat {i}" for i in range(20)]})
    assert len(model.predict([image], {"candidate_labels": [f"cat {i}" for i in range(20)]})) == 1


@follows(
    "tasks/object_detection",
    "The processor does not say what the outputs of a detector mean",
    "pass the processor the model was trained with: processor=…",
)
def test_detectors(save):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    detector = transformers.YolosForObjectDetection(
        transformers.YolosConfig(**shape, intermediate_size=16, image_size=[32, 32], patch_size=16)
    ).eval()
    side = {"height": 32, "width": 32}
    refused(StructureError, save, detector, processor=transformers.ViTImageProcessor(size=side))
    right = getattr(transformers, "YolosImageProcessorPil", transformers.YolosImageProcessor)
    save(detector, processor=right(size=side))


@follows(
    "tasks/image_feature_extraction",
    "The model reads a text beside each image",
    "save the part that sees, for example model.vision_model or CLIPVisionModelWithProjection",
)
def test_models_of_images_and_texts(save):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = {**shape, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**shape, "vocab_size": 40}, vision_config=seen)
    ).eval()
    given = {
        "task": "image-feature-extraction",
        "processor": transformers.ViTImageProcessor(size={"height": 8, "width": 8}),
    }
    refused(StructureError, save, model, **given)
    save(model.vision_model, **given)
    save(transformers.CLIPVisionModelWithProjection(model.config.vision_config).eval(), **given)


@follows(
    "tasks/question_answering",
    "A question leaves no room for its context",
    "shorten the question, or raise max_seq_len if the model takes more",
)
@follows(
    "tasks/question_answering", "require_pieces", "send less text at once, or lower doc_stride"
)
@follows(
    "tasks/question_answering", "require_few_windows", "send less text at once, or lower doc_stride"
)
@follows(
    "tasks/question_answering",
    "require_answers",
    "lower top_k or max_answer_len, or send less text at once",
)
@follows("tasks/token_classification", "require_pieces", "send less text at once, or lower stride")
@follows(
    "tasks/token_classification", "require_few_windows", "send less text at once, or lower stride"
)
def test_windows(models):  # noqa: F811
    model = models(QUESTIONS)
    row = {"question": "the cat " * 8, "context": "a dog"}
    bad(model, [row], {"max_seq_len": 12})
    assert len(model.predict([{**row, "question": "the cat"}], {"max_seq_len": 12})) == 1
    assert len(model.predict([row], {"max_seq_len": 32})) == 1
    long = [{"question": "a", "context": "the cat " * 5000}]
    bad(model, long, {"doc_stride": 26})
    assert len(model.predict([{**long[0], "context": "the cat " * 50}], {"doc_stride": 26})) == 1
    few = models(QUESTIONS, max_pieces=100)
    middle = [{"question": "a", "context": "the cat " * 400}]
    bad(few, middle, {"doc_stride": 26})
    assert len(few.predict(middle, {"doc_stride": 2})) == 1
    spans = [{"question": "a", "context": "the cat " * 2000}]
    bad(model, spans, {"top_k": 9999, "max_answer_len": 30})
    assert len(model.predict(spans, {"top_k": 9, "max_answer_len": 3})) >= 1
    model, params = models(TOKENS), {"aggregation_strategy": "simple"}
    bad(model, ["the cat " * 5000], {"stride": 29, **params})
    assert len(model.predict(["the cat " * 50], {"stride": 29, **params})) == 1
    few = models(TOKENS, max_pieces=200)
    bad(few, ["the cat " * 400], {"stride": 29, **params})
    assert len(few.predict(["the cat " * 400], {"stride": 2, **params})) == 1


@follows("tasks/feature_extraction", "require", "shorten it, or send fewer rows at once")
def test_prompts(save, tiny_bert, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.tasks.feature_extraction._PROMPTED", 1)

    def model(prompt):
        options = {"prompts": {"query": prompt}, "max_characters": 100}
        path = save(tiny_bert(None), tokenizer=tiny_tokenizer, model_config=options)
        return load_model(path)

    long, names = model("the cat " * 8), {"prompt_name": "query"}
    known = {param.name for param in long.task.asked}
    params = names if "prompt_name" in known else {"prompt": "the cat " * 8}
    bad(long, ["a"] * 9, params)
    assert len(long.predict(["a"], params)) == 1
    short = params if "prompt_name" in known else {"prompt": "the"}
    assert len(model("the ").predict(["a"] * 9, short)) == 9


# Writing.


@follows("tasks/generation", "require_written", "lower them, or send fewer rows at once")
@follows(
    "tasks/generation_config",
    "Not a setting of a generation config",
    "leave it out, also where a pipeline was made with it",
)
@follows(
    "tasks/generation_config",
    "The generation config asks for what this task does not do",
    "set it to None in model.generation_config before saving",
)
@follows(
    "tasks/generation_config",
    "The model is not of the kind that its task writes with",
    'choose task="text-generation" for decoders, "text2text-generation" for encoder-decoders',
)
@follows(
    "module/engine",
    "The model cannot write text",
    "choose the task this model was made for: task=...",
)
@follows(
    "tasks/text_generation",
    "The tokenizer has no chat template",
    'set tokenizer.chat_template, or save the model with input_columns={"text": …}',
)
@follows(
    "tasks/text_generation",
    "A chat has the template of its tokenizer",
    "leave it out, or change tokenizer.chat_template",
)
def test_writing(models, save, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mlflow_safeflavor.tasks.inputs.caps._WRITTEN_A_ROW", 1)
    model = models(WRITES, max_answers=100)
    bad(model, ["a"], {"num_beams": 9, "max_new_tokens": 20})
    assert len(model.predict(["a"], {"num_beams": 1, "max_new_tokens": 3})) == 1
    given = {"tokenizer": byte_tokenizer(), "task": "text-generation"}
    gpt = writer("GPT2LMHeadModel")
    refused(InputError, save, gpt, **given, model_config={"generation": {"temprature": 1}})
    gpt.generation_config.penalty_alpha = 0.6
    refused(StructureError, save, gpt, **given)
    gpt.generation_config.penalty_alpha = None
    path = save(gpt, **given)
    refused(StructureError, save, gpt, **{**given, "task": "text2text-generation"})
    with pytest.raises(StructureError):
        models(TEXTS).engine.generate({}, Generation({}))
    assert len(load_model(path).predict(["a"], {"max_new_tokens": 2})) == 1
    tokenizer = byte_tokenizer()
    chat = {
        "tokenizer": tokenizer,
        "task": "text-generation",
        "input_columns": {"messages": "messages"},
    }
    refused(StructureError, save, gpt, **chat)
    save(gpt, **{**chat, "input_columns": {"text": "text"}})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    refused(InputError, save, gpt, **chat, prompt_template="Q: {prompt} A:")
    save(gpt, **chat)


# Images and sounds.


@follows("tasks/inputs/images", "require", "scale or cut it first")
@follows(
    "tasks/inputs/images", "An image is empty, or too long and narrow", "scale or cut it first"
)
@follows(
    "tasks/inputs/images",
    "A file is not an image that can be read",
    "pass an image file as bytes or base64, a pathlib.Path, a PIL image, or a uint8 array of shape "
    "(H, W, 3) or (H, W); over HTTP, base64 without a data: prefix",
)
@follows(
    "tasks/inputs/files",
    "A text is no file in base64",
    "pass the file's bytes, or pathlib.Path(…) for its path: a text is never taken for a path",
)
@follows(
    "tasks/processed",
    "The processor does not belong to the model",
    "pass the processor the model was trained with: processor=…",
)
def test_images(models, tmp_path):  # noqa: F811
    model = models(IMAGES, max_pixels=400)

    def image(width, height):
        return Image.new("RGB", (width, height))

    bad(model, [image(99, 99)])
    assert len(model.predict([image(99, 99).resize((20, 20))])) == 1
    with pytest.raises(InputError):
        read_image(image(1, 300), "row 0", models(IMAGES).task.caps)
    assert len(model.predict([image(1, 300).crop((0, 0, 1, 10))])) == 1
    file = io.BytesIO()
    image(8, 8).save(file, "PNG")
    bad(model, [b"\x89PNG nothing"])
    (tmp_path / "a.png").write_bytes(file.getvalue())
    for value in (file.getvalue(), tmp_path / "a.png", image(8, 8), np.zeros((8, 8, 3), np.uint8)):
        assert len(model.predict([value])) == 1
    text = str(tmp_path / "a.png")
    with pytest.raises(InputError):
        content_of(text, "row 0")
    assert (
        content_of(tmp_path / "a.png", "row 0")
        == content_of(file.getvalue(), "row 0")
        == file.getvalue()
    )
    other, own = models(IMAGES), model.task.processor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mlflow_safeflavor.tasks.processed.apply",
            lambda processor, value: {"input_values": torch.zeros(1)},
        )
        with pytest.raises(StructureError):
            list(other.task.encode(other.task.rows([image(8, 8)]), {"top_k": 1}))
    assert own is not None
    assert len(other.predict([image(8, 8)])) == 1


@follows("tasks/speech", "require_pieces", "ask for longer windows (chunk_length_s)")
def test_windows_of_sounds(save):
    model = load_model(save(ctc_pipeline(), graph="no", model_config={"max_pieces": 2}))
    sound = np.zeros(16_000, np.float32)
    bad(model, [sound], {"chunk_length_s": 0.02})
    assert len(model.predict([sound], {"chunk_length_s": 0.5})) == 1


@follows(
    "tasks/whisper_speech",
    "require_written",
    "lower them, or send fewer or shorter sounds at once",
)
def test_writing_of_sounds(save, monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.tasks.inputs.caps._WRITTEN_A_ROW", 1)
    model = load_model(save(whisper_pipeline(), graph="no", model_config={"max_answers": 700}))
    sound, params = np.zeros(16_000, np.float32), {"num_beams": 1, "max_new_tokens": 9}
    bad(model, [sound, sound, sound], params)
    for sounds, fewer in (
        ([sound, sound], params),
        ([sound[:9000]], params),
        ([sound] * 3, {**params, "max_new_tokens": 7}),
    ):
        assert len(model.predict(sounds, fewer)) == len(sounds)


@follows("tasks/inputs/sounds", "require", "cut it first")
@follows(
    "tasks/inputs/sounds",
    "A value is not a sound",
    "divide whole numbers by their range, 32768 for int16; average channels",
)
@follows(
    "tasks/inputs/sounds",
    "A file is not a sound that can be read",
    "convert it, for example with ffmpeg -i FILE -c:a pcm_s16le sound.wav",
)
@follows(
    "tasks/inputs/sounds",
    "Sounds in files need soundfile",
    "pip install 'mlflow-safeflavor[sound]'",
)
def test_sounds(models, tmp_path, monkeypatch):  # noqa: F811
    caps = models(TEXTS, max_seconds=1.0).task.caps
    rate = 8000
    read = lambda value: read_sound(value, rate, "row 0", caps)  # noqa: E731
    long = np.zeros(2 * rate, "float32")
    with pytest.raises(InputError):
        read(long)
    read(long[: rate // 2])
    pcm = np.full((100, 2), 16384, "int16")
    with pytest.raises(InputError):
        read(pcm)
    assert np.allclose(read((pcm / 32768).mean(axis=1).astype("float32")), 0.5)
    (tmp_path / "sound.mp3").write_bytes(b"ID3 nothing")
    with pytest.raises(InputError) as error:
        read(tmp_path / "sound.mp3")
    command = str(error.value.hint).partition("with ")[2].split()
    assert command[0] == "ffmpeg"
    try:
        subprocess.run(["ffmpeg", "-version"], capture_output=True, check=True)
    except FileNotFoundError:  # what it would write: PCM of 16 bits
        with wave.open(str(tmp_path / command[-1]), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(b"\0\0" * 100)
        read(tmp_path / command[-1])
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "soundfile", None)
        with pytest.raises(StructureError) as missing:
            read(to_wav(np.zeros(100, "int16"), rate))
    extra = str(missing.value.hint).partition("[")[2].partition("]")[0]
    needed = importlib.metadata.requires("mlflow-safeflavor") or []
    assert any(
        line.startswith("soundfile") and line.endswith(f'extra == "{extra}"') for line in needed
    )
    read(to_wav(np.zeros(100, "int16"), rate))


# Tables of raw models, and answers that are no numbers.


@follows(
    "tasks/raw",
    "The columns of the table are not those of the example",
    "rename or select the columns first, as in data[[…]]",
)
@follows(
    "tasks/raw",
    "A table cannot hold an output that is not one a row",
    "save the model with a dict of arrays as input_example",
)
def test_tables_of_raw_models(save, user_code):
    source = """
        import torch

        class Sums(torch.nn.Linear):
            def __init__(self, single=False):
                super().__init__(2, 1)
                self.single = single

            def forward(self, x):
                return {"y": super().forward(x).sum() if self.single else super().forward(x)}
    """
    sums, file = user_code("sums_code", source)
    table, given = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}), {"code_paths": [file]}
    model = load_model(save(sums.Sums(), **given, input_example=table), trust={"code"})
    data = table.assign(c=1.0)
    bad(model, data)
    assert len(model.predict(data[["a", "b"]])) == 2
    refused(StructureError, save, sums.Sums(single=True), **given, input_example=table)
    save(sums.Sums(single=True), **given, input_example={"x": table.to_numpy("float32")})


@follows(
    "tasks/outputs",
    "The model's answer to a row is not a number",
    "ask without that row; half precision overflows where float32 does not: save the model with "
    "dtype='float32'",
)
def test_an_answer_that_is_no_number(save, tiny_bert, tiny_tokenizer):
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias[0] = 60000.0
    halves = load_model(save(model, tokenizer=tiny_tokenizer, dtype="float16"))
    forward = type(halves.engine).__call__

    def overflows(self, inputs):
        made = forward(self, inputs)
        cat = tiny_tokenizer.convert_tokens_to_ids("cat")
        rows = (inputs["input_ids"] == cat).any(-1, keepdims=True)
        doubled = torch.tensor(np.where(rows, made["logits"] * 2, made["logits"]))
        return {**made, "logits": doubled.to(self.dtype).float().numpy()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(halves.engine), "__call__", overflows)
        bad(halves, ["the cat"])
        assert len(halves.predict(["a dog"])) == 1
        whole = load_model(save(model, tokenizer=tiny_tokenizer, dtype="float32"))
        assert len(whole.predict(["the cat"])) == 1


# Embeddings.


@follows(
    "tasks/feature_extraction",
    "The ranges of a model saved with calibration texts are those of other embeddings",
    "save the model with params={…: …}, or ask for float32, binary or ubinary",
)
def test_ranges_of_other_embeddings(save, tiny_tokenizer):
    calibrated = {"calibration": ["the cat", "a red mat"]}
    given = {"tokenizer": tiny_tokenizer, "model_config": calibrated}
    model, texts = load_model(save(tiny_model("Bert", "Model"), **given)), ["a dog"]
    asked = {"truncate_dim": 8, "precision": "int8"}
    error = bad(model, texts, asked)
    assert len(model.predict(texts, {**asked, "precision": "binary"})["embedding"][0]) == 1
    params = eval(error.hint.partition("params=")[2].partition(", or")[0])
    model = load_model(save(tiny_model("Bert", "Model"), **given, params=params))
    assert len(model.predict(texts, asked)["embedding"][0]) == 8


@follows(
    "tasks/llm_requests",
    "Numbers of tokens belong to another tokenizer, so that they cannot be read here",
    "send texts; LangChain does with OpenAIEmbeddings(check_embedding_ctx_length=False)",
)
def test_numbers_of_tokens(save, tiny_tokenizer):
    path = save(tiny_model("Bert", "Model"), tokenizer=tiny_tokenizer, task="llm/v1/embeddings")
    model = load_model(path)
    bad(model, {"input": [[5, 6], [7]]})
    # what LangChain then sends is read from a server in test_llm_embeddings.py
    assert len(model.predict({"input": ["a cat", "a"]})["data"]) == 2


@follows(
    "tasks/llm_requests",
    "Rows of one request ask for different params",
    "send one request for each",
)
@follows("predict/deltas", "The task answers in one piece", "call predict")
@follows(
    "predict/deltas",
    "A stream is the answer to one row",
    "call predict_stream for each, or predict",
)
def test_requests_and_streams(save, models):  # noqa: F811
    path = save(writer("GPT2LMHeadModel"), tokenizer=byte_tokenizer(), task="llm/v1/completions")
    model = load_model(path)
    rows = [{"prompt": "a", "max_tokens": 2}, {"prompt": "a", "max_tokens": 3}]
    bad(model, rows)
    assert [len(model.predict(row)["choices"]) for row in rows] == [1, 1]
    with pytest.raises(InputError):
        model.predict_stream({"prompt": ["a", "b"]}, {"max_tokens": 2})
    assert all(list(model.predict_stream(prompt, {"max_tokens": 2})) for prompt in ("a", "b"))
    assert len(model.predict({"prompt": ["a", "b"]}, {"max_tokens": 2})["choices"]) == 2
    classifier = models(TEXTS)
    with pytest.raises(InputError):
        classifier.predict_stream("a")
    assert len(classifier.predict("a")) == 1
