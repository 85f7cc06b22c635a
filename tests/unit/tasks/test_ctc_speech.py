"""Frames of sounds: cut to the sound and to the window, whatever is beside them in a batch."""

import numpy as np
import pytest

from mlflow_safeflavor.errors import InputError, IntegrityError, StructureError
from mlflow_safeflavor.tasks.inputs.ctc_decoder import ARGUMENTS, CtcDecoder
from mlflow_safeflavor.tasks.speech_recognition import SpeechRecognition

STEP = 20  # samples of a frame
LETTERS = ["_", "|", "A", "B", "C"]
CONFIG = {
    "way": "ctc",
    "arguments": None,
    "min_samples": 20,
    "pads": True,
    "convolutions": [[5, 5], [4, 4]],
    "align": STEP,
}
SPOKEN = {
    **dict.fromkeys(ARGUMENTS),
    "pad_token": "_",
    "word_delimiter_token": "|",
    "replace_word_delimiter_char": " ",
}


class Extractor:
    sampling_rate = 1000

    def __call__(self, value, sampling_rate, return_tensors):
        return {"input_values": value[None]}


def engine(inputs):
    """Logits of a model that hears samples as numbers of letters, padding as C."""
    heard = inputs["input_values"][:, : inputs["input_values"].shape[1] // STEP * STEP : STEP]
    mask = inputs.get("attention_mask", np.ones_like(inputs["input_values"]))
    heard = np.where(mask[:, : heard.shape[1] * STEP : STEP], heard, LETTERS.index("C"))
    return {"logits": np.eye(len(LETTERS), dtype=np.float32)[heard.astype(int)]}


def task(decoder=None, **changes):
    config = {**CONFIG, **changes}
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    decoder = decoder or CtcDecoder(vocabulary, SPOKEN, "here")
    return SpeechRecognition.of(config)(config, {"audio": None}, Extractor(), lambda: decoder)


def said(text):
    return np.repeat([float(LETTERS.index(letter)) for letter in text], STEP)


def answers(made, texts, params=None, change=None):
    rows = [{"audio": said(text)} for text in texts]
    checked = made.check_params(params)
    features = made.encoded(rows, checked)
    pieces = [piece for row in features for piece in made.pieces(row)]
    outputs = iter(made.forward(change or engine, pieces, checked))
    joined = [made.join([next(outputs) for _ in made.pieces(row)]) for row in features]
    return made.decoded(rows, features, joined, checked)


TEXTS = ["AAB|_BC", "A", "_A_A|||B_" * 5]


@pytest.mark.parametrize("pads", [True, False])
def test_frames_of_padding_are_cut(pads):
    found = [answer["text"] for answer in answers(task(pads=pads), TEXTS)]
    assert found == ["AB BC", "A", "AA BAA BAA BAA BAA B"]


@pytest.mark.parametrize("chunk", [0.06, 0.1, 0.16, 2.0])
def test_windows_give_the_same_frames(chunk):
    params = {"chunk_length_s": chunk, "stride_length_s": [0.02, 0.02], "return_timestamps": "char"}
    whole = answers(task(), TEXTS, {"return_timestamps": "char"})
    assert answers(task(), TEXTS, params) == whole


def test_times_are_those_of_frames():
    (answer,) = answers(task(), ["_AAB||C"], {"return_timestamps": "word"})
    assert answer == {
        "text": "AB C",
        "chunks": [
            {"text": "AB", "timestamp": [0.02, 0.08]},
            {"text": "C", "timestamp": [0.12, 0.14]},
        ],
    }


def test_what_differs_at_a_near_tie_is_compared_by_logits_alone():
    made, best = task(), np.ones(2, np.float32)
    recorded, found = {"ids": np.array([2, 3]), "best": best}, {"ids": np.array([2, 4])}
    assert made.comparable(recorded, recorded) is None
    assert made.comparable(recorded, {**found, "best": best}) == ({"best": best}, {"best": best})


def test_rows_and_params_are_refused_by_name():
    with pytest.raises(InputError, match="too short for the model"):
        list(task().encode([{"audio": [0.0] * 19}], task().check_params({})))
    with pytest.raises(InputError, match="at least 60 samples"):
        task(min_samples=60).check_params({"chunk_length_s": 0.04})
    for params in ({"return_timestamps": "line"}, {"chunk_length_s": -1}, {"language": "en"}):
        with pytest.raises(InputError, match=next(iter(params))):
            task().check_params(params)
    with pytest.raises(InputError, match=r"not a number[\s\S]*row 0"):
        answers(task(), ["A"], change=lambda inputs: {"logits": engine(inputs)["logits"] * np.nan})


def test_parts_of_another_kind_are_refused():
    with pytest.raises(StructureError, match="Wav2Vec2CTCTokenizer"):
        answers(task(object()), ["A"])
    with pytest.raises(IntegrityError, match=r"ctc \| whisper"):
        SpeechRecognition.of({"way": "other"})
