"""Whisper: the texts and times of transformers' pipeline, in one window and in several."""

import base64
import json

import mlflow
import numpy as np
import pandas as pd
import pytest
import transformers
from artifacts import edit_json, reseal
from integration.test_audio import RATE, sound, wav
from speakers import (
    ctc_tokenizer,
    whisper_extractor,
    whisper_model,
    whisper_pipeline,
    whisper_tokenizer,
)
from transformers import WhisperProcessor

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, ParityError, StructureError
from mlflow_safeflavor.tasks.inputs.sounds import to_wav

TASK = "automatic-speech-recognition"
SHORT, LONG = (4000, 15_000, 9000, 16_000), (50_000, 4000, 37_000)
GREEDY = {"num_beams": 1, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def reference():
    return whisper_pipeline(ignore_warning=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper") / "model"
    mlflow_safeflavor.save_model(
        whisper_model(),
        path,
        processor=WhisperProcessor(whisper_extractor(), whisper_tokenizer()),
        rehearse=False,
    )
    return path


@pytest.fixture(scope="module")
def model(saved):
    return mlflow_safeflavor.load_model(str(saved))


def require_same(answers, wanted):
    assert list(answers["text"]) == [entry["text"] for entry in wanted]
    if "chunks" in wanted[0]:
        assert list(answers["chunks"]) == [
            [{"text": c["text"], "timestamp": list(c["timestamp"])} for c in entry["chunks"]]
            for entry in wanted
        ]


@pytest.mark.parametrize(
    ("lengths", "params"),
    [
        (SHORT, {}),
        (SHORT, {"return_timestamps": True}),
        (SHORT, {"num_beams": 3}),
        (LONG, {}),
        (LONG, {"return_timestamps": True}),
        (LONG, {"stride_length_s": [0.25, 0.125], "return_timestamps": True}),
        (LONG, {"chunk_length_s": 0.75, "task": "translate", "language": "german"}),
        (SHORT, {"language": "<|en|>", "task": "transcribe", "return_timestamps": True}),
        (SHORT, {"num_beams": 2, "return_timestamps": True}),
    ],
)
def test_answers_are_those_of_the_pipeline_alone_and_in_a_batch(reference, model, lengths, params):
    cells = [sound(length, seed) for seed, length in enumerate(lengths)]
    said = {"chunk_length_s": 1.0, **params} if lengths is LONG else dict(params)
    generate = {name: said.pop(name) for name in ("num_beams", "language", "task") if name in said}
    generate = {**GREEDY, **generate}
    wanted = [reference(cell.copy(), **said, generate_kwargs=generate) for cell in cells]
    answers = model.predict(cells, {**GREEDY, **params})
    require_same(answers, wanted)
    require_same(model.predict(cells[:1], {**GREEDY, **params}), wanted[:1])
    assert len(set(answers["text"])) == len(cells), "the answers say nothing"


def test_windows_of_many_sounds_share_a_forward(model):
    params = model.task.check_params(GREEDY)
    rows = model.task.encoded([{"audio": sound(n)} for n in LONG], params)
    pieces = [piece for row in rows for piece in model.task.pieces(row)]
    together = model.task.forward(model.engine, pieces, params)
    assert len(together) == 5 + 1 + 3
    for piece, output in zip(pieces, together, strict=True):
        (alone,) = model.task.forward(model.engine, [piece], params)
        assert output["ids"].tolist() == alone["ids"].tolist()


def test_a_pipeline_brings_its_arguments(tmp_path):
    said = {"language": "de", "task": "translate", "num_beams": 2, "max_new_tokens": 9}
    reference = whisper_pipeline(generate_kwargs=said, return_timestamps=True, chunk_length_s=0.5)
    wanted = reference(sound(15_000))
    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    params = {param.name: param.default for param in served.metadata.signature.params.params}
    assert params == {
        **said,
        "chunk_length_s": 0.5,
        "stride_length_s": [],
        "return_timestamps": True,
    }
    require_same(served.predict(pd.DataFrame({"audio": [to_wav(sound(15_000), RATE)]})), [wanted])


def test_a_pipeline_answers_with_the_beams_that_it_has_by_default(tmp_path, reference):
    wanted = reference(sound(9000))
    mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    require_same(loaded.predict([sound(9000)]), [wanted])


def test_a_checkpoint_folder_brings_tokenizer_extractor_and_generation_config(tmp_path):
    folder = tmp_path / "checkpoint"
    whisper_model().save_pretrained(folder)
    WhisperProcessor(whisper_extractor(), whisper_tokenizer()).save_pretrained(folder)
    mlflow_safeflavor.save_model(folder, tmp_path / "model", rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert loaded.spec.task == TASK
    wanted = whisper_pipeline()(sound(), generate_kwargs=GREEDY)
    require_same(loaded.predict([sound()], GREEDY), [wanted])


def test_another_rate_is_resampled(reference, model):
    frame = pd.DataFrame(
        {"audio": [{"array": np.repeat(sound(8000), 2), "sampling_rate": 2 * RATE}]}
    )
    halved = model.task.read(frame["audio"][0], "row 0")
    assert len(halved) == 8000
    require_same(model.predict(frame, GREEDY), [reference(halved, generate_kwargs=GREEDY)])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"language": "klingon"}, "english, german"),
        ({"task": "summarize"}, "translate"),
        ({"return_timestamps": "word"}, "times of words are not supported"),
        ({"chunk_length_s": 1.5}, "at most 1 seconds"),
        ({"chunk_length_s": 0.5, "stride_length_s": [0.25]}, "longer than its overlaps"),
        ({"max_new_tokens": 37}, "at most 36"),
        ({"num_beams": 0}, "num_beams"),
        ({"temperature": 0.2}, "temperature"),
    ],
)
def test_params_out_of_range_are_refused_by_name(model, params, words):
    with pytest.raises(InputError, match=words):
        model.predict([sound()], params)


def test_a_model_of_one_language_refuses_to_be_told_one(tmp_path):
    tokenizer = whisper_tokenizer()
    mlflow_safeflavor.save_model(
        whisper_model(tokenizer, multilingual=False),
        tmp_path / "model",
        tokenizer=tokenizer,
        processor=whisper_extractor(),
        rehearse=False,
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "model"))
    assert len(loaded.predict([sound()], GREEDY)) == 1
    for params in ({"language": "en"}, {"task": "transcribe"}):
        with pytest.raises(InputError, match="the model knows one"):
            loaded.predict([sound()], params)


def test_sampling_and_other_tokenizers_are_refused_at_save(tmp_path):
    parts = {"processor": whisper_extractor(), "rehearse": False, "graph": "no"}
    with pytest.raises(StructureError, match="do_sample"):
        mlflow_safeflavor.save_model(
            whisper_model(do_sample=True), tmp_path / "a", tokenizer=whisper_tokenizer(), **parts
        )
    other = {**parts, "processor": transformers.Wav2Vec2FeatureExtractor()}
    with pytest.raises(StructureError, match="such as WhisperFeatureExtractor"):
        mlflow_safeflavor.save_model(
            whisper_model(), tmp_path / "c", tokenizer=whisper_tokenizer(), **other
        )
    with pytest.raises(StructureError, match="tokenizer of Whisper"):
        mlflow_safeflavor.save_model(
            whisper_model(), tmp_path / "b", tokenizer=ctc_tokenizer(), **parts
        )


SHAPE = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "vocab_size": 60}  # fmt: skip
OTHERS = {
    "Speech2Text": SHAPE,
    "Moonshine": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "vocab_size": 60,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_encoder_decoders_are_refused_by_name(tmp_path, name):
    config = getattr(transformers, f"{name}Config")(**OTHERS[name])
    other = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    parts = {"tokenizer": whisper_tokenizer(), "processor": whisper_extractor()}
    with pytest.raises(StructureError, match="cannot be told") as caught:
        mlflow_safeflavor.save_model(other, tmp_path / "model", **parts)
    assert caught.value.where == type(other).__name__
    with pytest.raises(StructureError, match="cannot do this task") as caught:
        mlflow_safeflavor.save_model(other, tmp_path / "model", task=TASK, **parts)
    assert type(other).__name__ in str(caught.value.where)
    assert "WhisperForConditionalGeneration" in str(caught.value.wanted)


def test_a_pipeline_that_asks_for_times_of_words_is_refused_by_name(tmp_path):
    reference = whisper_pipeline(return_timestamps="word")
    with pytest.raises(InputError, match="times of words are not supported"):
        mlflow_safeflavor.save_model(reference, tmp_path / "model", rehearse=False, graph="no")


def test_what_is_no_sound_is_refused_with_its_row(model):
    with pytest.raises(InputError, match="no file in base64") as caught:
        model.predict([sound(), b"no sound"])
    assert "where: row 1\n" in str(caught.value)


def test_golden_rows_have_logits_and_show_another_generation(tmp_path, saved):
    model = mlflow_safeflavor.load_model(str(saved))
    rows = model.task.golden_rows()
    params = model.task.check_params(model.task.golden(model.task.config))
    pieces = [p for row in model.task.encoded(rows, params) for p in model.task.pieces(row)]
    for output in model.task.forward(model.engine, pieces, params):
        assert len(output["first"]) == len(output["logits"]) <= 4
    mlflow_safeflavor.save_model(whisper_pipeline(), tmp_path / "model", rehearse=False, graph="no")
    edit_json(
        tmp_path / "model" / "safeflavor" / "processor" / "preprocessor_config.json",
        lambda config: config.update(hop_length=159),
    )
    reseal(tmp_path / "model")
    with pytest.raises(ParityError):
        mlflow_safeflavor.load_model(str(tmp_path / "model"))


def test_a_rehearsed_model_is_served_by_the_module(tmp_path, reference, clean_process):
    wanted = reference(sound(20_000), chunk_length_s=1.0, generate_kwargs=GREEDY)["text"]
    mlflow_safeflavor.save_model(whisper_pipeline(), tmp_path / "model")
    (tmp_path / "sound.wav").write_bytes(to_wav(sound(20_000), RATE))
    found = clean_process(_SERVES, str(tmp_path / "model"), str(tmp_path / "sound.wav"))
    assert json.loads(found.stdout) == {"engine": "module", "text": wanted}


_SERVES = """
import json, pathlib, sys
import mlflow_safeflavor

model = mlflow_safeflavor.load_model(sys.argv[1])
params = {"num_beams": 1, "max_new_tokens": 20}
(text,) = model.predict([pathlib.Path(sys.argv[2])], params)["text"]
print(json.dumps({"engine": model.engine.name, "text": text}))
"""


@pytest.mark.serve
def test_a_server_answers_the_same_and_refuses_what_is_no_sound(serve, saved, model):
    text = base64.b64encode(wav(sound(20_000))).decode()
    params = {**GREEDY, "return_timestamps": True, "language": "de"}
    (wanted,) = model.predict([wav(sound(20_000))], params).to_dict("records")
    with serve(saved) as server:
        answer = server.invoke({"dataframe_records": [{"audio": text}], "params": params})
        assert answer.json()["predictions"] == [wanted]
        for value in ("aGVsbG8=", text[:2000], "", 3):
            refused = server.invoke({"dataframe_records": [{"audio": value}]})
            assert refused.status == 400, f"{value}: {refused.text}"
        refused = server.invoke({"inputs": [text], "params": {"language": "klingon"}})
        assert refused.status == 400
        assert "language" in refused.text
        report = mlflow_safeflavor.verify_model(str(saved), endpoint=server.url)
    assert report.ok
