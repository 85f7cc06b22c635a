"""Tasks and calls of ``docs/coming-from-mlflow.md``: those of the peers have rows; each is run."""

from __future__ import annotations

import ast
import base64
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
import transformers
from architectures import tiny_model
from coming_page import table
from integration import (
    test_audio,
    test_image_features,
    test_images,
    test_object_detection,
    test_zero_shot_images,
)
from mlflow.transformers import signature as peer
from speakers import (
    ctc_model,
    ctc_tokenizer,
    whisper_extractor,
    whisper_model,
    whisper_tokenizer,
)
from writers import byte_tokenizer, writer

from mlflow_safeflavor import load_model, save_model
from mlflow_safeflavor.errors import InputError, StructureError

TASKS = {
    name: (verdict, how)
    for names, verdict, how in table("Tasks and schemas")
    for name in re.findall("`([^`]+)`", names)
}
# Row of the table of calls → the tests that run it.
CALLS = {
    "mlflow.pyfunc.load_model(uri).get_raw_model()": [
        "mlflow_habits::the_raw_model_is_what_native_loading_returns"
    ],
    "pickle.dumps(model)": [
        "mlflow_habits::a_loaded_model_is_pickled_as_where_it_lies",
        "mlflow_habits::a_model_whose_folder_changed_is_not_pickled_or_loaded_again",
    ],
    "get_default_pip_requirements(model)": [
        "mlflow_habits::default_requirements_know_where_a_model_is_from"
    ],
    "mlflow.pyfunc.load_model(uri).predict_stream(row)": ["predict_stream::through_pyfunc"],
    "autolog()": [
        "autolog::the_training_is_the_same_and_the_model_loads_in_a_clean_process",
        "autolog::a_trainer_of_sentence_transformers",
    ],
    "log_model(…, example_no_conversion=True)": ["mlflow_habits::an_example_may_come_with_params"],
    "mlflow.models.set_signature(uri, signature)": [
        "edits::a_signature_that_changes_no_answer_is_tolerated_and_told",
        "edits::a_signature_that_may_change_answers_names_the_call",
    ],
    'mlflow.models.update_model_requirements(uri, "add", […])': [
        "edits::edited_requirements_name_the_call"
    ],
    "mlflow.models.add_libraries_to_model(uri)": ["edits::added_libraries_name_the_call"],
    'mlflow.models.evaluate(uri, predictions="label", extra_metrics=[…])': [
        "evaluate::a_metric_of_ones_own_on_a_column"
    ],
    'mlflow.models.evaluate(uri, predictions="score", model_type="regressor")': [
        "evaluate::a_regressor_by_its_uri"
    ],
    'mlflow.models.evaluate(uri, predictions="label", model_type="classifier")': [
        "evaluate::a_classifier_behind_a_function"
    ],
}


class Asked(NamedTuple):
    """What is saved, and what is asked of it through pyfunc."""

    model: Any
    rows: Any
    params: dict[str, Any] | None = None
    tokenizer: Any = None
    processor: Any = None


def _reads(head: str, rows: Any, params: Any = None, **config: Any) -> Any:
    return lambda tokenizer: Asked(
        tiny_model("Bert", head, **config), rows, params or {}, tokenizer
    )


def _writes(name: str, rows: Any, params: Any = None, **tokens: Any) -> Any:
    params = {"max_new_tokens": 3} if params is None else params
    return lambda _: Asked(writer(name), rows, params, byte_tokenizer(**tokens))


def _sees(module: Any, name: str = "ViT", *, size: Any = None, params: Any = None) -> Any:
    rows = [base64.b64encode(test_images.encoded(test_images.pixels())).decode()]
    seen = test_images.make_processor(name, size=size or test_images.SMALL)
    return lambda _: Asked(module(), rows, params, processor=seen)


def _picks(tokenizer: Any) -> Asked:
    asked = _sees(test_zero_shot_images.make, params={"candidate_labels": ["cat", "dog"]})
    return asked(None)._replace(tokenizer=tokenizer)


SOUND = [test_audio.wav(test_audio.sound())]
TEXT, T5 = ["the cat sat"], "T5ForConditionalGeneration"
NLI: dict[str, Any] = {
    "id2label": {0: "no", 1: "entailment"},
    "label2id": {"no": 0, "entailment": 1},
}
CHAT = {"messages": [{"role": "user", "content": "why?"}], "max_tokens": 3}
# Task → what is asked, given the tiny tokenizer.
ASKED: dict[str, Any] = {
    "text-classification": _reads("ForSequenceClassification", TEXT),
    "fill-mask": _reads("ForMaskedLM", ["the [MASK] sat"]),
    "question-answering": _reads("ForQuestionAnswering", [{"question": "who", "context": "a cat"}]),
    "text-generation": _writes("GPT2LMHeadModel", TEXT),
    "text2text-generation": _writes(T5, TEXT),
    "image-classification": _sees(test_images.make_model),
    "audio-classification": lambda _: Asked(
        test_audio.make_model(), SOUND, processor=test_audio.masked
    ),
    "object-detection": _sees(
        lambda: test_object_detection.make("Yolos"), "Yolos", size=test_object_detection.SIDE
    ),
    "zero-shot-image-classification": _picks,
    "text-ranking": _reads(
        "ForSequenceClassification", [{"query": "a", "passages": ["b", "c"]}], num_labels=1
    ),
    "llm/v1/embeddings": _reads("Model", {"input": TEXT}),
    "token-classification": _reads("ForTokenClassification", TEXT),
    "zero-shot-classification": _reads(
        "ForSequenceClassification", TEXT, {"candidate_labels": ["cat"]}, **NLI
    ),
    "feature-extraction": _reads("Model", TEXT),
    "image-feature-extraction": _sees(lambda: test_image_features.make("ViTModel")),
    "automatic-speech-recognition": lambda _: Asked(
        ctc_model(),
        SOUND,
        {"return_timestamps": "word"},
        ctc_tokenizer(),
        test_audio.masked,
    ),
    "llm/v1/chat": _writes("LlamaForCausalLM", CHAT, {}, bos=True, chat=True),
    "llm/v1/completions": _writes("LlamaForCausalLM", {"prompt": "why?", "max_tokens": 3}, {}),
}
ALIASES = {
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
}


def test_every_task_of_the_peers_has_a_row():
    theirs = {
        *transformers.pipelines.get_supported_tasks(),
        *peer._DEFAULT_SIGNATURE_FOR_TASK,
        *mlflow.transformers.llm_inference_utils._SIGNATURE_FOR_LLM_INFERENCE_TASK,
    }
    # "translation_xx_to_yy" is how transformers 4 writes that such names are meant.
    assert {name for name in theirs if not name.startswith("translation_")} - TASKS.keys() == set()
    assert {verdict for verdict, _ in TASKS.values()} == {"works", "differs", "refused"}
    done = {name for name, (verdict, _) in TASKS.items() if verdict != "refused"}
    assert done == ASKED.keys() | ALIASES.keys()


def answer_of(task, tokenizer, folder):
    model, rows, params, *parts = ASKED[ALIASES.get(task, task)](tokenizer)
    given = {"tokenizer": parts[0], "processor": parts[1]}
    save_model(model, folder, task=task, rehearse=False, graph="no", **given)
    return mlflow.pyfunc.load_model(str(folder)).predict(rows, params)


@pytest.mark.parametrize("task", [*ASKED, *ALIASES])
def test_a_task_answers_with_the_columns_of_its_row(task, tiny_tokenizer, tmp_path):
    answer = answer_of(task, tiny_tokenizer, tmp_path / "model")
    if task.startswith("llm/"):
        assert answer["object"] in ("list", "chat.completion", "text_completion")
        return
    assert {*answer} <= {*re.findall(r"`(\w+)`", TASKS[task][1])}
    assert len(answer) == 1


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row[0] == "refused"])
def test_a_task_that_is_not_there_is_refused_by_name(task, tmp_path, tiny_bert, tiny_tokenizer):
    with pytest.raises(StructureError, match="Unknown task") as refused:
        save_model(tiny_bert(), tmp_path / "model", tokenizer=tiny_tokenizer, task=task)
    assert refused.value.where == task
    assert {"raw", "custom"} <= set(str(refused.value.wanted).split(" | "))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_reads_tables_cannot_be_stored(tmp_path, tiny_bert):
    """Why the task of tables is refused."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n[EMPTY]\na\n")
    tokenizer = transformers.TapasTokenizer(str(tmp_path / "vocab.txt"))
    with pytest.raises(StructureError, match="fast"):
        save_model(tiny_bert(), tmp_path / "model", tokenizer=tokenizer)


def test_what_speech_differs_in(tmp_path):
    model = whisper_model()
    parts = {"tokenizer": whisper_tokenizer(), "processor": whisper_extractor()}
    save_model(model, tmp_path / "model", rehearse=False, graph="no", **parts)
    with pytest.raises(InputError, match="times of words are not supported"):
        load_model(tmp_path / "model").predict(SOUND, {"return_timestamps": "word"})


def test_every_call_of_the_page_is_run_by_a_test():
    rows = {re.findall("`([^`]+)`", call)[0]: verdict for call, verdict, _ in table("Calls")}
    assert rows.keys() == CALLS.keys()
    assert {*rows.values()} == {"works", "differs", "refused"}
    for file, _, name in (test.partition("::") for tests in CALLS.values() for test in tests):
        body = ast.parse((Path(__file__).parent / f"test_{file}.py").read_text()).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert f"test_{name}" in defined
