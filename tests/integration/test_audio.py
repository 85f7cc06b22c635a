"""Audio classification.

The answers of transformers' pipelines, whatever the file and whatever is beside a row.
"""

import base64
import io
import json
import struct
import sys
import wave
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import transformers
from artifacts import edit_json, reseal
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from transformers import (
    ASTFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    pipeline,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES as AUDIO_MODELS,
)

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import InputError, ParityError, StructureError
from mlflow_safeflavor.tasks.audio_classification import AudioClassification
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.sounds import read_sound, to_wav
from mlflow_safeflavor.tasks.table import infer_task

RATE = 16_000
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
}
WAVES = {
    **TRANSFORMER,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
STEPWISE = {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 20,
}
plain, masked = Wav2Vec2FeatureExtractor(), Wav2Vec2FeatureExtractor(return_attention_mask=True)
# Name → class, config, extractor, whether rows of different lengths share a forward.
ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    "Wav2Vec2, whole length": ("Wav2Vec2ForSequenceClassification", WAVES, plain, False),
    "Wav2Vec2, step by step": ("Wav2Vec2ForSequenceClassification", STEPWISE, masked, True),
    "Wav2Vec2, without mask": ("Wav2Vec2ForSequenceClassification", STEPWISE, plain, True),
    "Hubert": ("HubertForSequenceClassification", STEPWISE, masked, True),
    "WavLM, whole length": ("WavLMForSequenceClassification", WAVES, masked, False),
    "WavLM": ("WavLMForSequenceClassification", STEPWISE, masked, True),
    "UniSpeechSat": ("UniSpeechSatForSequenceClassification", STEPWISE, masked, True),
    # Seen to change under padding although it normalises step by step.
    "Data2VecAudio": (
        "Data2VecAudioForSequenceClassification",
        {**STEPWISE, "num_conv_pos_embeddings": 2},
        masked,
        False,
    ),
    # A fixed length: always one forward.
    "AST": (
        "ASTForAudioClassification",
        {
            **TRANSFORMER,
            "max_length": 64,
            "num_mel_bins": 40,
            "patch_size": 8,
            "time_stride": 8,
            "frequency_stride": 8,
        },
        ASTFeatureExtractor(max_length=64, num_mel_bins=40),
        True,
    ),
    "Whisper": (
        "WhisperForAudioClassification",
        {**WHISPER, "max_source_positions": 50, "classifier_proj_size": 16},
        WhisperFeatureExtractor(feature_size=20, chunk_length=1),
        True,
    ),
}


def make_model(name="Wav2Vec2, step by step", **settings):
    cls = getattr(transformers, ARCHITECTURES[name][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**ARCHITECTURES[name][1], "num_labels": 4, **settings}))
    with torch.no_grad():  # far from each other, so that no change drowns in the tolerance
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        (getattr(model, "classifier", None) or model.projector).apply(_spread)
    return model.eval()


def _spread(layer):
    for parameter in layer.parameters(recurse=False):
        parameter.normal_(0, 0.7)


def sound(samples=4000, seed=0):
    rng = np.random.default_rng(seed)
    tone = np.sin(np.arange(samples) * rng.uniform(0.05, 0.5))
    return (0.3 * tone + rng.normal(0, 0.05, samples)).astype(np.float32)


LENGTHS = (4000, 2513, 6001, 2513, 3200)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("wav2vec2") / "model"
    mlflow_safeflavor.save_model(make_model(), path, processor=masked, rehearse=False, graph="no")
    return path


@pytest.fixture(scope="module")
def model(saved):
    return mlflow_safeflavor.load_model(str(saved))


# transformers' own WavLM hands torch a mask of another type than its position biases.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_labels_and_scores_are_those_of_the_pipeline_for_each_alone(tmp_path, name):
    *_, extractor, together = ARCHITECTURES[name]
    reference = pipeline(
        "audio-classification", model=make_model(name), feature_extractor=extractor
    )
    cells = [sound(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = [reference(cell.copy(), top_k=4) for cell in cells]

    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    calls = []
    loaded.module.register_forward_pre_hook(lambda *given: calls.append(given), with_kwargs=True)
    answers = loaded.predict(cells, {"top_k": -1})

    for (_, answer), ranked in zip(answers.iterrows(), wanted, strict=True):
        assert answer["labels"] == [entry["label"] for entry in ranked]
        assert answer["scores"] == pytest.approx([entry["score"] for entry in ranked], abs=2e-5)
    assert len({tuple(np.round(scores, 4)) for scores in answers["scores"]}) > 3, (
        "the answers say nothing"
    )
    if not together:
        assert all(tensor.shape[0] <= 2 for _, _, given in calls for tensor in given.values())


def test_rows_of_different_lengths_share_a_forward_where_that_changes_nothing(model):
    task = model.task
    params = task.check_params({})
    batch = task.encoded([{"audio": sound(length)} for length in LENGTHS], params)
    assert task.groups(batch) == [[0, 1, 2, 3, 4]]
    inputs = task.collate(batch)
    assert inputs["input_values"].shape == inputs["attention_mask"].shape == (5, 6001)
    assert inputs["attention_mask"].sum(axis=1).tolist() == list(LENGTHS)
    together = task.forward(model.engine, batch, params)
    for features, output in zip(batch, together, strict=True):
        (alone,) = task.forward(model.engine, [features], params)
        assert output["logits"] == pytest.approx(alone["logits"], abs=1e-4)


SINCE_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="pipelines of transformers 4 disregard the problem type",
)


@pytest.mark.parametrize(
    "config",
    [
        {"num_labels": 1},
        pytest.param({"problem_type": "multi_label_classification"}, marks=SINCE_5),
        pytest.param({"problem_type": "regression"}, marks=SINCE_5),
    ],
)
def test_functions_are_those_of_the_pipeline(tmp_path, config):
    reference = pipeline(
        "audio-classification", model=make_model(**config), feature_extractor=masked
    )
    wanted = reference(sound(), top_k=1)[0]
    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    answer = mlflow_safeflavor.load_model(str(tmp_path / "model")).predict([sound()]).iloc[0]
    assert answer["label"] == wanted["label"]
    assert answer["score"] == pytest.approx(wanted["score"], abs=1e-5)


# Forms of a cell.


def wav(samples, width=2, rate=RATE):
    """As Python's own writer makes it; ``samples`` of shape (samples,) or (samples, channels)."""
    whole = np.round(np.asarray(samples, np.float64) * (2.0 ** (8 * width - 1))).astype(np.int64)
    if width == 1:
        whole += 128
    data = b"".join(
        int(value).to_bytes(width, "little", signed=width > 1) for value in whole.ravel()
    )
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1 if whole.ndim == 1 else whole.shape[1])
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(data)
    return file.getvalue()


def extensible(content):
    """The same file with the longer header that many programs write for 24 bits."""
    fmt = struct.pack("<H", 0xFFFE) + content[22:36]
    fmt += (
        struct.pack("<HHI", 22, 8 * content[32] // content[22], 0)
        + struct.pack("<H", 1)
        + bytes.fromhex("000000001000800000aa00389b71")
    )
    body = (
        b"WAVE"
        + b"fmt "
        + struct.pack("<I", len(fmt))
        + fmt
        + b"LIST"
        + struct.pack("<I", 3)
        + b"abc\0"
        + content[36:]
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encoded(samples, kind, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def forms(folder):
    exact = np.round(sound() * 128) / 128  # which 8 bits hold, too
    (folder / "sound.wav").write_bytes(wav(exact))
    text = base64.b64encode(wav(exact)).decode()
    return {
        "array": exact.astype(np.float32),
        "float64": exact.astype(np.float64),
        "list": exact.tolist(),
        "dict": {"path": None, "array": exact, "sampling_rate": RATE},
        "16 bits": wav(exact),
        "8 bits": wav(exact, 1),
        "24 bits": wav(exact, 3),
        "32 bits": wav(exact, 4),
        "extensible": extensible(wav(exact, 3)),
        "floating point": to_wav(exact.astype(np.float32), RATE),
        "two channels": wav(np.stack([exact / 2, exact * 1.5], axis=1).clip(-1, 0.9999), 4),
        "base64": text,
        "base64 as bytes": text.encode(),
        "data URL": f"data:audio/wav;base64,{text}",
        "path": folder / "sound.wav",
        "FLAC": encoded(exact, "FLAC"),
        "FLAC, two channels": encoded(np.stack([exact, exact], axis=1), "FLAC"),
        "FLAC in base64": base64.b64encode(encoded(exact, "FLAC")).decode(),
    }


def test_all_forms_are_one_sound(tmp_path, saved, model):
    cells = forms(tmp_path)
    wanted = read_sound(cells["array"], RATE, "", Caps())
    for name, cell in cells.items():
        assert np.allclose(read_sound(cell, RATE, name, Caps()), wanted, atol=1e-6), name
    answers = model.predict(list(cells.values()), {"top_k": -1})
    frame = pd.DataFrame({"audio": pd.Series(list(cells.values()), dtype=object)})
    served = mlflow.pyfunc.load_model(str(saved)).predict(frame, params={"top_k": -1})
    for name, scores, others in zip(cells, answers["scores"], served["scores"], strict=True):
        assert scores == pytest.approx(answers["scores"][0], abs=1e-5), name
        assert others == pytest.approx(answers["scores"][0], abs=1e-5), name


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_a_compressed_file_is_one_sound_in_all_its_forms(tmp_path, saved, model, kind):
    tone = (0.3 * np.sin(np.arange(RATE) * 0.1)).astype(np.float32)
    content = encoded(tone, kind)
    (tmp_path / "sound").write_bytes(content)
    text = base64.b64encode(content).decode()
    cells = [content, tmp_path / "sound", text, text.encode(), f"data:audio/x;base64,{text}"]
    found = [read_sound(cell, RATE, "", Caps()) for cell in cells]
    assert all(np.array_equal(samples, found[0]) for samples in found)
    assert np.abs(found[0] - tone)[:-200].max() < 0.02
    assert len(found[0]) == len(tone)
    scores = model.predict(cells)["score"]
    frame = pd.DataFrame({"audio": pd.Series(cells, dtype=object)})
    served = mlflow.pyfunc.load_model(str(saved)).predict(frame)["score"]
    assert [*scores, *served] == pytest.approx([scores[0]] * 10, abs=1e-5)


def test_a_file_needs_soundfile(monkeypatch):
    content = wav(sound())
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(StructureError, match=r"pip install 'mlflow-safeflavor\[sound\]'"):
        read_sound(content, RATE, "", Caps())
    assert len(read_sound(sound(), RATE, "", Caps())) == 4000


def test_silence_in_json_is_whole_numbers():
    assert read_sound([0, 0, 1, 0], RATE, "", Caps()).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_another_rate_is_resampled(rate):
    def tone(rate):
        time = np.arange(rate // 2) / rate
        return (
            0.5 * np.sin(2 * np.pi * 440 * time) + 0.25 * np.sin(2 * np.pi * 1000 * time)
        ).astype(np.float32)

    found = read_sound(to_wav(tone(rate), rate), RATE, "", Caps())
    assert abs(len(found) - RATE // 2) <= 2
    inner = slice(200, 7800)
    assert np.abs(found[inner] - tone(RATE)[inner]).max() < 5e-3
    same = read_sound({"raw": tone(rate), "sampling_rate": rate}, RATE, "", Caps())
    assert np.array_equal(found, same)


def test_resampling_is_interpolation_by_a_windowed_sinc(monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.tasks.inputs.sounds._WINDOWED", 2000)  # several parts
    samples, old, new = sound(6000), 441, 160
    found = read_sound({"array": samples, "sampling_rate": 44_100}, RATE, "", Caps())
    cutoff = new * 0.99
    for place in (0, 1, 159, 160, 777, len(found) - 1):
        times = ((np.arange(len(samples)) * new - place * old) / (old * new) * cutoff).clip(-6, 6)
        kernel = np.sinc(times) * np.cos(times * np.pi / 12) ** 2 * cutoff / old
        assert found[place] == pytest.approx(kernel @ samples.astype(float), abs=2e-6)


def test_what_the_new_rate_cannot_hold_is_filtered_out():
    high = np.sin(2 * np.pi * 15_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(read_sound(to_wav(high, 48_000), RATE, "", Caps())[200:-200]).max() < 0.02


# What is no sound.


def with_header(offset, format, value):
    content = bytearray(wav(sound()))
    struct.pack_into(format, content, offset, value)
    return bytes(content)


BAD = {
    "no bytes": (b"", "empty"),
    "no samples": (np.zeros(0), "A sound is empty"),
    "an empty list": ([], "A sound is empty"),
    "a file without samples": (wav(np.zeros(0)), "A sound is empty"),
    "other bytes": (b"\x00\x01 no sound", "not a sound that can be read"),
    "no MP3": (b"ID3\x04" + bytes(100), "not a sound that can be read"),
    "half a file": (wav(sound())[:3000], "it is cut off"),
    "half a header": (wav(sound())[:30], "it is cut off"),
    "a compressed file": (with_header(20, "<H", 17), "Invalid bit width"),
    "no channels": (with_header(22, "<H", 0), "Channel count is zero"),
    "33 channels": (wav(np.zeros((100, 33))), "33 channels"),
    "AIFF": (encoded(sound(), "AIFF"), "it begins with b'FORM"),
    "half a FLAC file": (encoded(sound(), "FLAC")[:3000], "lost sync"),
    "half an MP3 file": (encoded(sound(16000), "MP3")[:1000], "of 16000 samples"),
    "half an OGG file": (encoded(sound(), "OGG")[:3000], "not a sound that can be read"),
    "no rate": (with_header(24, "<I", 0), "not a sound that can be read"),
    "a rate without end": (with_header(24, "<I", 2**32 - 1), "not a sound that can be read"),
    "an odd rate": (with_header(24, "<I", 15_999), "odd sampling rate"),
    "a path as text": ("/etc/passwd", "never taken for a path"),
    "text": ("hello there", "no file in base64"),
    "too short": (sound(60), "too short for the model"),
    "too long": (np.zeros(RATE * 61, np.float32), "too long"),
    "not a number": (np.array([0.1, np.nan] * 200), "no number"),
    "infinite": (np.array([0.1, np.inf] * 200), "no number"),
    "beyond float32": (np.array([0.1, 1e300] * 200), "no number"),
    "whole numbers": (np.zeros(4000, np.int16), "divide whole numbers"),
    "two channels": (np.zeros((4000, 2), np.float32), r"shape \(4000, 2\)"),
    "ragged lists": ([[0.1], [0.1, 0.2]], "not a sound"),
    "texts": (["a", "b"], "not a sound"),
    "a number": (0.5, "not a sound"),
    "a dict without samples": ({"sampling_rate": RATE}, "not a sound"),
    "a dict with a bad rate": ({"array": sound(), "sampling_rate": "16k"}, "sampling rate"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_sound_is_refused_with_row_and_column(model, case):
    value, words = BAD[case]
    with pytest.raises(InputError, match=words) as caught:
        model.predict(pd.DataFrame({"audio": pd.Series([sound(), value], dtype=object)}))
    assert "where: row 1\n" in str(caught.value)


def test_the_shortest_sound_is_told_by_the_convolutions(model):
    fewest = model.spec.task_config["min_samples"]
    with pytest.raises(InputError, match=f"at least {fewest} samples"):
        model.predict([sound(fewest - 1)])
    assert len(model.predict([sound(fewest)])) == 1


def test_how_long_a_sound_may_be_is_stored_at_save(tmp_path):
    settings = {"processor": masked, "rehearse": False}
    for wrong in (-1, True, "many", float("inf")):
        with pytest.raises(InputError, match="max_seconds"):
            mlflow_safeflavor.save_model(
                make_model(), tmp_path / "model", model_config={"max_seconds": wrong}, **settings
            )
    mlflow_safeflavor.save_model(
        make_model(),
        tmp_path / "model",
        model_config={"max_seconds": 0.3},
        graph="no",
        **settings,
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert len(loaded.predict([sound(4800)])) == 1
    with pytest.raises(InputError, match=r"too long[\s\S]*at most 0\.3 seconds"):
        loaded.predict([sound(4801)])


# Saved models.


# SEW-D of transformers 4, when imported
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_task_of_every_audio_class_of_transformers():
    for name in set(AUDIO_MODELS.values()):
        cls = getattr(transformers, name)
        assert infer_task(name, cls.main_input_name) == "audio-classification", name
    assert (
        infer_task("BertForSequenceClassification", transformers.BertModel.main_input_name)
        == "text-classification"
    )
    with pytest.raises(StructureError):
        infer_task("Wav2Vec2Model", "input_values")


def test_a_checkpoint_folder_brings_its_extractor(tmp_path):
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False)
    make_model().save_pretrained(tmp_path / "checkpoint")
    extractor.save_pretrained(tmp_path / "checkpoint")
    mlflow_safeflavor.save_model(
        tmp_path / "checkpoint", tmp_path / "model", rehearse=False, graph="no"
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert loaded.spec.task == "audio-classification"
    assert isinstance(loaded.task, AudioClassification)
    assert loaded.task.rate == 8000
    assert loaded.processor.do_normalize is False


def test_another_extractor_shows_in_the_golden_rows(tmp_path):
    mlflow_safeflavor.save_model(
        make_model(), tmp_path / "model", processor=masked, rehearse=False, graph="no"
    )
    edit_json(
        Layout(tmp_path / "model").processor / "preprocessor_config.json",
        lambda config: config.update(do_normalize=False),
    )
    reseal(tmp_path / "model")
    with pytest.raises(ParityError):
        mlflow_safeflavor.load_model(str(tmp_path / "model"))


def test_an_example_is_stored_as_a_server_takes_it(tmp_path):
    example = pd.DataFrame({"call": pd.Series([sound(), sound(3000).tolist()], dtype=object)})
    mlflow_safeflavor.save_model(
        make_model(),
        tmp_path / "model",
        processor=masked,
        input_columns={"audio": "call"},
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
        {"inputs": {"call": texts}},
        {"instances": [{"call": text} for text in texts]},
    ):
        found = served.predict(infer_and_parse_data(body, served.metadata.get_input_schema()))
        assert list(found["label"]) == list(wanted["label"])
        assert list(found["score"]) == pytest.approx(list(wanted["score"]), abs=1e-6)


@pytest.mark.serve
def test_a_server_answers_the_same_and_refuses_what_is_no_sound(serve, saved, model):
    settings = {"OMP_NUM_THREADS": "1", "MLFLOW_SAFEFLAVOR_NUM_THREADS": "1"}
    text = base64.b64encode(wav(sound())).decode()
    wanted = model.predict([wav(sound())])
    with serve(saved, env=settings) as server:
        answer = server.invoke({"dataframe_records": [{"audio": text}]})
        assert answer.status == 200, answer.text
        assert answer.json()["predictions"][0]["score"] == pytest.approx(
            wanted["score"][0], abs=1e-5
        )
        for body in (
            {"inputs": text},
            {"instances": [text]},
            {"dataframe_split": {"data": [[text]]}},
        ):
            assert server.invoke(body).json() == answer.json()
        for value in ("/etc/passwd", "aGVsbG8=", text[:2000], "", 3, [0.1, 0.2]):
            refused = server.invoke({"dataframe_records": [{"audio": value}]})
            assert refused.status == 400, f"{value}: {refused.text}"
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=server.url)
    assert report.ok
