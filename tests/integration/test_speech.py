"""Automatic speech recognition: the texts of transformers' pipeline, short, long and in batches."""

import base64
import json
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import transformers
from artifacts import edit_json, reseal
from integration.test_audio import RATE, masked, sound, wav
from speakers import CTC, LETTERS, ctc_model, ctc_pipeline, ctc_tokenizer
from transformers import Wav2Vec2Processor
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES as CTC_MODELS

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import InputError, ParityError, StructureError
from mlflow_safeflavor.tasks.table import infer_task

TASK = "automatic-speech-recognition"
LENGTHS = (4000, 2513, 15111, 2513, 3200)
PARAMS: list[dict[str, Any]] = [
    {},
    {"return_timestamps": "char"},
    {"return_timestamps": "word"},
    {"chunk_length_s": 0.3},
    {"chunk_length_s": 0.3, "stride_length_s": [0.05, 0.02], "return_timestamps": "word"},
    {"chunk_length_s": 0.3, "stride_length_s": [0.0, 0.0]},
]


def as_json(chunks):
    return [{**chunk, "timestamp": list(chunk["timestamp"])} for chunk in chunks]


def require_same(answers, wanted):
    assert list(answers["text"]) == [entry["text"] for entry in wanted]
    if "chunks" in wanted[0]:
        assert list(answers["chunks"]) == [as_json(entry["chunks"]) for entry in wanted]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("ctc") / "model"
    mlflow_safeflavor.save_model(ctc_pipeline(), path, rehearse=False, graph="no")
    return path


@pytest.fixture(scope="module")
def model(saved):
    return mlflow_safeflavor.load_model(str(saved))


# transformers' own WavLM hands torch a mask of another type than its position biases.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", CTC)
def test_texts_are_those_of_the_pipeline_alone_and_in_a_batch(tmp_path, name):
    reference = ctc_pipeline(name)
    cells = [sound(length, seed) for seed, length in enumerate(LENGTHS)]
    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert loaded.task.config["pads"] is CTC[name][3]
    texts = set()
    for params in PARAMS:
        wanted = [reference(cell.copy(), **params) for cell in cells]
        answers = loaded.predict(cells, params)
        require_same(answers, wanted)
        require_same(loaded.predict(cells[:1], params), wanted[:1])
        texts.update(answers["text"])
    assert len(texts) == 8, "the answers say nothing"


def test_windows_share_forwards_and_are_cut_where_they_overlap(model):
    params = model.task.check_params({"chunk_length_s": 0.2})
    (features,) = model.task.encoded([{"audio": sound(15111)}], params)
    spans = [piece["span"].tolist() for piece in model.task.pieces(features)]
    # 0.2 s and a sixth of it on both sides, in steps of 80 samples.
    assert spans == [[3200, 0, 560], *[[3200, 560, 560]] * 5, [2631, 560, 0]]
    outputs = model.task.forward(model.engine, model.task.pieces(features), params)
    assert [len(output["ids"]) for output in outputs] == [33, *[26] * 5, 25]


def test_frames_of_a_row_do_not_depend_on_those_beside_it(model):
    task, params = model.task, model.task.check_params({})
    rows = task.encoded([{"audio": sound(length)} for length in LENGTHS], params)
    batch = [piece for row in rows for piece in task.pieces(row)]
    assert task.groups(batch) == [[0, 1, 2, 3, 4]]
    for piece, output in zip(batch, task.forward(model.engine, batch, params), strict=True):
        (alone,) = task.forward(model.engine, [piece], params)
        assert output["ids"].tolist() == alone["ids"].tolist()
        assert output["best"] == pytest.approx(alone["best"], abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True},
        {"word_delimiter_token": "E", "replace_word_delimiter_char": "_"},
        {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": None},
        {"word_delimiter_token": None},
    ],
)
def test_the_tokenizer_decodes_as_it_was_made(tmp_path, settings):
    tokenizer = ctc_tokenizer(**settings)
    reference = transformers.pipeline(
        TASK, model=ctc_model(), tokenizer=tokenizer, feature_extractor=masked
    )
    wanted = reference(sound(9000))["text"]
    mlflow_safeflavor.save_model(
        {"model": ctc_model(), "processor": Wav2Vec2Processor(masked, tokenizer)},
        tmp_path / "model",
        rehearse=False,
        graph="no",
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert loaded.predict([sound(9000)])["text"][0] == wanted
    assert loaded.tokenizer.decode([5, 5, 0, 5, 4, 6]) == tokenizer.decode([5, 5, 0, 5, 4, 6])


def test_a_checkpoint_folder_brings_tokenizer_and_extractor(tmp_path):
    folder = tmp_path / "checkpoint"
    ctc_model().save_pretrained(folder)
    Wav2Vec2Processor(masked, ctc_tokenizer()).save_pretrained(folder)
    mlflow_safeflavor.save_model(folder, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert loaded.spec.task == TASK
    assert loaded.predict([sound()])["text"][0] == ctc_pipeline()(sound())["text"]


def test_arguments_of_the_pipeline_are_defaults(tmp_path):
    reference = ctc_pipeline(chunk_length_s=0.3, stride_length_s=0.02, return_timestamps="word")
    wanted = reference(sound(9000))
    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    require_same(served.predict(pd.DataFrame({"audio": [wav_of(9000)]})), [wanted])
    params = {param.name: param.default for param in served.metadata.signature.params.params}
    assert params["stride_length_s"] == [0.02]
    plain = mlflow_safeflavor.load_model(str(tmp_path / "model")).predict(
        [sound(9000)], {"return_timestamps": "none", "chunk_length_s": 0.0}
    )
    assert list(plain) == ["text"]


def wav_of(samples):
    """A file of the same samples, in floating point."""
    from mlflow_safeflavor.tasks.inputs.sounds import to_wav

    return to_wav(sound(samples), RATE)


def test_another_rate_is_resampled(model):
    whole = sound(8000)
    twice = {"array": np.repeat(whole, 2), "sampling_rate": 2 * RATE}
    answers = model.predict(pd.DataFrame({"audio": [twice]}), {"return_timestamps": "char"})
    assert 0.4 < answers["chunks"][0][-1]["timestamp"][1] <= 0.5


# SEW-D of transformers 4, when imported
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_task_of_every_ctc_class_of_transformers():
    for name in set(CTC_MODELS.values()):
        cls = getattr(transformers, name)
        assert infer_task(name, cls.main_input_name) == TASK, name


# Bad rows and params.


@pytest.mark.parametrize(
    ("value", "words"),
    [(b"no sound", "no file in base64"), (sound(60), "too short"), (sound()[None], "not a sound")],
)
def test_what_is_no_sound_is_refused_with_its_row(model, value, words):
    with pytest.raises(InputError, match=words) as caught:
        model.predict([sound(), value])
    assert "where: row 1\n" in str(caught.value)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"chunk_length_s": 0.3, "stride_length_s": [0.15, 0.15]}, "longer than its overlaps"),
        ({"chunk_length_s": 0.005, "stride_length_s": [0.0]}, "at least 105 samples"),
        ({"chunk_length_s": -1.0}, "chunk_length_s"),
        ({"stride_length_s": [0.1, 0.1, 0.1]}, "stride_length_s"),
        ({"return_timestamps": "words"}, r"none \| char \| word"),
        ({"language": "en"}, "language"),
    ],
)
def test_params_out_of_range_are_refused_by_name(model, params, words):
    with pytest.raises(InputError, match=words):
        model.predict([sound()], params)


def test_windows_of_a_request_are_counted_before_they_are_made(model):
    params = {"chunk_length_s": 0.015, "stride_length_s": [0.0]}
    with pytest.raises(InputError, match="max_pieces") as caught:
        model.predict([sound(4000), np.zeros(59 * RATE, np.float32)], params)
    assert "where: row 1\n" in str(caught.value)


@pytest.mark.parametrize("part", ["tokenizer", "processor"])
def test_a_part_that_is_missing_is_named(tmp_path, part):
    parts = {"tokenizer": ctc_tokenizer(), "processor": masked}
    del parts[part]
    with pytest.raises(StructureError, match=part):
        mlflow_safeflavor.save_model(ctc_model(), tmp_path / "model", rehearse=False, **parts)


def test_a_tokenizer_that_decodes_no_frames_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(StructureError, match="Wav2Vec2CTCTokenizer"):
        mlflow_safeflavor.save_model(
            ctc_model(), tmp_path / "model", tokenizer=tiny_tokenizer, processor=masked, graph="no"
        )


def test_a_pipeline_with_a_language_model_is_refused(tmp_path):
    reference = ctc_pipeline()
    reference.type, reference.decoder = "ctc_with_lm", object()
    with pytest.raises(StructureError, match="decodes with a language model"):
        mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False)


def test_another_vocabulary_shows_in_the_golden_rows(tmp_path):
    mlflow_safeflavor.save_model(ctc_pipeline(), tmp_path / "model", rehearse=False, graph="no")
    swapped = {letter: len(LETTERS) - 1 - i if i > 4 else i for i, letter in enumerate(LETTERS)}
    swapped |= {letter: 5 + len(LETTERS) - 1 - i for i, letter in enumerate(LETTERS) if i > 4}
    edit_json(
        Layout(tmp_path / "model").tokenizer / "vocab.json", lambda found: found.update(swapped)
    )
    reseal(tmp_path / "model")
    with pytest.raises(ParityError):
        mlflow_safeflavor.load_model(str(tmp_path / "model"))


# Served.

_SERVES = """
import json, sys

sys.modules["torch"] = None  # as if it were not installed
import numpy as np
import mlflow_safeflavor

model = mlflow_safeflavor.load_model(sys.argv[1])
sounds = np.load(sys.argv[2])
texts = list(model.predict([sounds[name] for name in sounds.files])["text"])
print(json.dumps({"engine": model.engine.name, "texts": texts}))
"""


def test_a_graph_answers_as_the_module_and_without_torch(tmp_path, clean_process):
    reference = ctc_pipeline()
    wanted = [reference(sound(length))["text"] for length in LENGTHS]
    mlflow_safeflavor.save_model(reference, tmp_path / "model", graph="require")
    np.savez(tmp_path / "sounds.npz", *[sound(length) for length in LENGTHS])
    found = clean_process(_SERVES, str(tmp_path / "model"), str(tmp_path / "sounds.npz"))
    answered = json.loads(found.stdout)
    assert answered == {"engine": "onnx", "texts": wanted}


@pytest.mark.serve
def test_a_server_answers_the_same_and_refuses_what_is_no_sound(serve, saved, model):
    text = base64.b64encode(wav(sound(9000))).decode()
    params = {"return_timestamps": "word", "chunk_length_s": 0.3}
    (wanted,) = model.predict([wav(sound(9000))], params).to_dict("records")
    with serve(saved) as server:
        answer = server.invoke({"dataframe_records": [{"audio": text}], "params": params})
        assert answer.json()["predictions"] == [wanted]
        for value in ("aGVsbG8=", text[:2000], "", 3):
            refused = server.invoke({"dataframe_records": [{"audio": value}]})
            assert refused.status == 400, f"{value}: {refused.text}"
        refused = server.invoke({"inputs": [text], "params": {"return_timestamps": "line"}})
        assert refused.status == 400
        assert "return_timestamps" in refused.text
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=server.url)
    assert report.ok
