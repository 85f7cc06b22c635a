"""Whisper's windows, settings of generation and tokens, without a model."""

import numpy as np
import pytest

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.speech_recognition import SpeechRecognition

END = 9
CONFIG = {
    "way": "whisper",
    "arguments": None,
    "min_samples": 1,
    "pads": False,
    "align": 1,
    "generation": {"eos_token_id": END, "pad_token_id": END, "task_to_id": {"transcribe": 5}},
    "params": {"num_beams": 2},
    "positions": 20,
    "max_length": 18,
    "heard_positions": 50,
    "languages": {"en": "<|en|>", "english": "<|en|>"},
}


class Extractor:
    sampling_rate, chunk_length = 100, 1

    def __call__(self, value, sampling_rate, return_tensors):
        return {"input_features": np.zeros((1, 4, 100), np.float32)}


class Tokenizer:
    def _decode_asr(self, outputs, *, return_timestamps, return_language, time_precision):
        self.outputs, self.precision = outputs, time_precision
        chunks = [{"text": "a", "timestamp": (0.0, None)}]
        return "a", {"chunks": chunks} if return_timestamps else {}


class Engine:
    """Writes three tokens for the first row, and one for each other."""

    def generate(self, inputs, generation):
        self.generation = generation
        rows = len(inputs["input_features"])
        new = np.array([[1, 2, 3, END], *[[4, END, END, END]] * (rows - 1)])
        if not generation.keep_logits:
            return {"sequences": new[:, :3]}
        start = np.full((rows, 2), 7)
        logits = np.zeros((rows, 4, 10), np.float32)
        return {"sequences": np.concatenate([start, new], axis=1), "logits": logits}


def made(tokenizer=None, **changes):
    config = {**CONFIG, **changes}
    decoder = tokenizer or Tokenizer()
    return SpeechRecognition.of(config)(config, {"audio": None}, Extractor(), lambda: decoder)


def run(task, engine, params):
    rows = [{"audio": np.zeros(250, np.float32)}]
    checked = task.check_params(params)
    features = task.encoded(rows, checked)
    joined = task.join(task.forward(engine, task.pieces(features[0]), checked))
    return task.decoded(rows, features, [joined], checked)


def test_windows_are_what_the_model_hears_at_once():
    tokenizer, engine = Tokenizer(), Engine()
    assert run(made(tokenizer), engine, {}) == [{"text": "a"}]
    assert [output["stride"] for output in tokenizer.outputs] == [
        (1.0, 0.0, 0.17),
        (1.0, 0.17, 0.17),
        (1.0, 0.17, 0.17),
        (0.52, 0.17, 0.0),
    ]
    assert [output["tokens"].tolist() for output in tokenizer.outputs] == [
        [[1, 2, 3]],
        *[[[4]]] * 3,
    ]
    assert tokenizer.precision == 0.02


def test_settings_are_those_of_the_request_over_those_of_the_model():
    engine = Engine()
    run(made(), engine, {"language": "English", "task": "transcribe"})
    said = engine.generation
    assert said.arguments == {
        "language": "<|en|>",
        "task": "transcribe",
        "return_timestamps": False,
    }
    assert (said.settings["max_length"], said.settings["num_beams"]) == (18, 2)
    assert "max_new_tokens" not in said.settings
    (answer,) = run(made(), engine, {"max_new_tokens": 7, "return_timestamps": True})
    assert engine.generation.settings["max_new_tokens"] == 7
    assert "max_length" not in engine.generation.settings
    assert answer["chunks"] == [{"text": "a", "timestamp": [0.0, None]}]


@pytest.mark.parametrize("ends", [END, [END, 8]])
def test_golden_rows_keep_logits_up_to_the_first_end(ends):
    generation = {"eos_token_id": ends, "pad_token_id": END}
    task, engine = made(generation=generation), Engine()
    params = task.check_params(task.golden(task.config))
    (features,) = task.encoded([{"audio": np.zeros(90, np.float32)}], params)
    first, second = task.forward(engine, [*task.pieces(features)] * 2, params)
    assert engine.generation.arguments["force_unique_generate_call"]
    assert (first["ids"].tolist(), second["ids"].tolist()) == ([1, 2, 3], [4])
    assert (first["first"].tolist(), second["first"].tolist()) == ([1, 2, 3, END], [4, END])
    assert [len(output["logits"]) for output in (first, second)] == [4, 2]
    assert task.comparable(first, first) is None
    parted = {**first, "ids": np.array([1, 8]), "first": np.array([1, 8, 8, END])}
    assert [len(part["logits"]) for part in task.comparable(first, parted)] == [2, 2]
    late = {**first, "ids": np.array([1, 2, 3, 8])}
    assert [len(part["logits"]) for part in task.comparable(first, late)] == [4, 4]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"language": "klingon"}, "english"),
        ({"chunk_length_s": 1.5}, "at most 1 seconds"),
        ({"max_new_tokens": 17}, "at most 16"),
        ({"return_timestamps": "word"}, "times of words are not supported"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_params_are_refused_by_name(params, words):
    with pytest.raises(InputError, match=words):
        made().check_params(params)


def test_a_model_of_one_language_and_other_tokenizers_are_told():
    alone = made(languages={}, generation={"eos_token_id": [END]})
    for params in ({"language": "en"}, {"task": "transcribe"}):
        with pytest.raises(InputError, match="the model knows one"):
            alone.check_params(params)
    with pytest.raises(StructureError, match="tokenizer of Whisper"):
        run(made(object()), Engine(), {})


def test_more_text_than_a_cap_allows_is_refused():
    task = made()
    task.caps = type(task.caps)(max_answers=100)
    params = task.check_params({"num_beams": 60, "max_new_tokens": 16})
    with pytest.raises(InputError, match="too much text"):
        task.encoded([{"audio": np.zeros(250, np.float32)}], params)
