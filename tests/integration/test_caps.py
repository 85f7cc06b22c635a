"""Costly requests of a few bytes are refused before they run, and long ones let others in."""

import base64
import copy
import functools
import io
import itertools
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from integration.test_images import make_processor
from PIL import Image
from speakers import (
    CTC,
    ctc_model,
    ctc_tokenizer,
    whisper_extractor,
    whisper_model,
    whisper_tokenizer,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)

import mlflow_safeflavor
from mlflow_safeflavor import machine
from mlflow_safeflavor.errors import DeadlineError, InputError
from mlflow_safeflavor.machine import give_back
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.options import run_time_options
from mlflow_safeflavor.predict.permits import Permits
from mlflow_safeflavor.tasks import processed
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.sounds import read_sound, to_wav
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder
from mlflow_safeflavor.tasks.inputs.texts import require_clean
from mlflow_safeflavor.tasks.outputs import own

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
SEES = {**SMALL, "image_size": 8, "patch_size": 4}
TEXTS, GAPS, ZERO_SHOT = "text-classification", "fill-mask", "zero-shot-classification"
TOKENS, QUESTIONS = "token-classification", "question-answering"
WRITES, IMAGES = "text-generation", "image-classification"
DETECTS, EMBEDS = "object-detection", "image-feature-extraction"
PICKS, RANKS = "zero-shot-image-classification", "text-ranking"
SPEECH, WHISPER = "automatic-speech-recognition", "Whisper"
EMBEDDINGS, COMPLETIONS, CHAT = "llm/v1/embeddings", "llm/v1/completions", "llm/v1/chat"
# Models of a task that another one has, too.
TASK_OF = {WHISPER: SPEECH}


class Models:
    """A loaded tiny model a task, each made once."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer, self.made = folder, tokenizer, {}

    def __call__(self, task, **options):
        if task not in self.made:
            made, given = self._made(task), {"tokenizer": self._tokenizer(task)}
            if task in self._processors():
                given["processor"] = self._processors()[task]
            if task in (IMAGES, EMBEDS, DETECTS):
                del given["tokenizer"]
            path = self.folder / task.replace("/", "-")
            mlflow_safeflavor.save_model(
                made.eval(), path, task=TASK_OF.get(task, task), rehearse=False, graph="no", **given
            )
            self.made[task] = path, mlflow_safeflavor.load_model(path)
        path, model = self.made[task]
        return mlflow_safeflavor.load_model(path, model_config=options) if options else model

    def _tokenizer(self, task):
        own = {SPEECH: ctc_tokenizer, WHISPER: whisper_tokenizer}
        if task in own:
            return own[task]()
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        return tokenizer

    def _processors(self):
        size = {"height": 8, "width": 8}
        return {
            **dict.fromkeys((IMAGES, EMBEDS, PICKS), ViTImageProcessor(size=size)),
            DETECTS: make_processor("Yolos", size=size),
            SPEECH: CTC["Wav2Vec2, step by step"][2],
            WHISPER: whisper_extractor(),
        }

    def _made(self, task):
        torch.manual_seed(0)
        inference = {
            "id2label": {0: "contradiction", 1: "entailment"},
            "label2id": {"contradiction": 0, "entailment": 1},
        }
        writes = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2,
            eos_token_id=3)  # fmt: skip
        make = {
            "fill-mask": lambda: BertForMaskedLM(BertConfig(**SMALL)),
            "text-classification": lambda: BertForSequenceClassification(BertConfig(**SMALL,
                num_labels=40)),
            "zero-shot-classification": lambda: BertForSequenceClassification(BertConfig(**SMALL,
                **inference)),
            "token-classification": lambda: BertForTokenClassification(BertConfig(**SMALL)),
            "question-answering": lambda: BertForQuestionAnswering(BertConfig(**SMALL)),
            **dict.fromkeys((WRITES, COMPLETIONS, CHAT), lambda: GPT2LMHeadModel(writes)),
            IMAGES: lambda: ViTForImageClassification(ViTConfig(**SEES)),
            EMBEDS: lambda: ViTModel(ViTConfig(**SEES)),
            DETECTS: lambda: YolosForObjectDetection(YolosConfig(**{**SEES, "image_size": [8, 8]},
                num_detection_tokens=3)),
            PICKS: lambda: CLIPModel(CLIPConfig(text_config={**SMALL, "eos_token_id": 3},
                vision_config=SEES, projection_dim=8)),
            RANKS: lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=1)),
            SPEECH: ctc_model,
            WHISPER: whisper_model,
            EMBEDDINGS: lambda: BertModel(BertConfig(**SMALL)),
        }  # fmt: skip
        return make[task]()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = "the a cat dog sat ran on under mat tree red green return x y".split()
    vocabulary = {
        token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=32,
        **{f"{name}_token": token for name, token in names.items()},
    )
    return Models(tmp_path_factory.mktemp("caps"), tokenizer)


@functools.cache  # a large one takes half a second, while tests are collected
def image_file(width, height, format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format)
    return base64.b64encode(file.getvalue()).decode()


LABELS = [f"label {i}" for i in range(200)]
MINUTE = to_wav(np.zeros(59 * 16_000, np.int16), 16_000)
# name: task, options, data, params, cap
TOO_MUCH: dict[str, tuple[Any, ...]] = {
    "all tokens in many "
    "gaps": (GAPS, {"max_answers": 1000}, ["[MASK] " * 20], {"top_k": 10**6}, "max_answers"),
    "many rows of "
    "gaps": (GAPS, {"max_answers": 1000}, ["[MASK] " * 20] * 9, {"top_k": 20}, "max_answers"),
    "rows times "
    "labels": (ZERO_SHOT, {}, ["a cat"] * 200, {"candidate_labels": LABELS}, "max_pieces"),
    "one row, a list of "
    "labels": (ZERO_SHOT, {}, ["a"], {"candidate_labels": ["x"] * 5000}, "max_pieces"),
    "a template times labels": (
        ZERO_SHOT, {}, ["a"], {"candidate_labels": LABELS, "hypothesis_template": "{}" * 9999},
        "max_characters",
    ),
    "one long "
    "label": (ZERO_SHOT, {}, ["a"], {"candidate_labels": ["x" * 300_000]}, "max_characters"),
    "windows that share nearly all": (
        TOKENS, {}, ["the cat " * 5000], {"stride": 29, "aggregation_strategy": "simple"},
        "max_pieces",
    ),
    "windows of a question": (
        QUESTIONS, {}, [{"question": "a", "context": "the cat " * 5000}], {"doc_stride": 26},
        "max_pieces",
    ),
    "all spans of a context": (
        QUESTIONS,
        {},
        [{"question": "a", "context": "the cat " * 2000}],
        {"top_k": 9999, "max_answer_len": 30},
        "max_answers",
    ),
    "a text of megabytes": (TEXTS, {}, ["x" * 9_000_000], {}, "max_characters"),
    "more rows than the cap": (TEXTS, {"max_rows": 5}, ["a"] * 6, {}, "max_rows"),
    "all labels of many rows": (TEXTS, {"max_answers": 10}, ["a"] * 9, {"top_k": -1}, None),
    "many targets": (GAPS, {}, ["[MASK]"], {"targets": ["cat"] * 9999}, "max_pieces"),
    "texts to stop at": (WRITES, {}, ["a"], {"stop": ["x"] * 9999}, "max_pieces"),
    "one of megabytes": (WRITES, {}, ["a"], {"stop": ["x" * 300_000]}, "max_characters"),
    "writing with "
    "beams": (WRITES, {"max_answers": 1}, ["a"], {"num_beams": 64, "max_new_tokens": 20},
        "max_answers"),
    "many texts of a "
    "prompt": (COMPLETIONS, {"max_answers": 1}, {"prompt": "a", "n": 64, "temperature": 1.0,
        "max_tokens": 20}, {}, "max_answers"),
    "texts to stop a "
    "completion at": (COMPLETIONS, {}, {"prompt": "a", "stop": ["x"] * 9999}, {}, "max_pieces"),
    "more prompts than "
    "rows": (COMPLETIONS, {"max_rows": 5}, {"prompt": ["a"] * 6}, {}, "max_rows"),
    "a message of megabytes": (CHAT, {}, {"messages": [{"role": "user",
        "content": "x" * 9_000_000}]}, {}, "max_characters"),
    "more texts than rows": (EMBEDDINGS, {"max_rows": 5}, {"input": ["a"] * 6}, {}, "max_rows"),
    "a prompt of "
    "megabytes": (EMBEDDINGS, {}, {"input": "a"}, {"prompt": "x" * 300_000}, "max_characters"),
    "many passages": (RANKS, {}, [{"query": "a", "passages": ["x"] * 5000}], {}, "max_pieces"),
    "passages of many "
    "rows": (RANKS, {}, [{"query": "a", "passages": ["x"] * 50}] * 100, {}, "max_pieces"),
    "a passage of "
    "megabytes": (RANKS, {}, [{"query": "a", "passages": ["a", "x" * 9_000_000]}], {},
        "max_characters"),
    "images times "
    "labels": (PICKS, {}, [image_file(8, 8)] * 200, {"candidate_labels": LABELS}, "max_pieces"),
    "a template times labels of an image": (
        PICKS, {}, [image_file(8, 8)],
        {"candidate_labels": LABELS, "hypothesis_template": "{}" * 9999}, "max_characters",
    ),
    **{
        f"an image's header, {task}": (task, {}, [image_file(6000, 6000)], params, "max_pixels")
        for task, params in ((DETECTS, {}), (EMBEDS, {"pool": False}),
            (PICKS, {"candidate_labels": ["a"]}))
    },
    **{
        f"a sound by its header, {task}": (task, {"max_seconds": 9}, [MINUTE], {}, "max_seconds")
        for task in (SPEECH, WHISPER)
    },
    "windows of a sound": (SPEECH, {}, [MINUTE], {"chunk_length_s": 0.1,
        "stride_length_s": [0.04, 0.04]}, "max_pieces"),
    "windows of speech": (WHISPER, {"max_pieces": 20}, [MINUTE], {"chunk_length_s": 0.5},
        "max_pieces"),
    "writing down with "
    "beams": (WHISPER, {"max_answers": 1}, [MINUTE], {"num_beams": 64, "max_new_tokens": 36},
        "max_answers"),
    "labels to ignore": (TOKENS, {}, ["a"], {"ignore_labels": ["x"] * 9999}, "max_pieces"),
    "an image by its header": (IMAGES, {}, [image_file(6000, 6000)], {}, "max_pixels"),
    "a TIFF by its "
    "header": (IMAGES, {"max_pixels": 99}, [image_file(10, 10, "TIFF")], {}, "max_pixels"),
    "an array of "
    "pixels": (IMAGES, {"max_pixels": 99}, [np.zeros((10, 10, 3), np.uint8)], {}, "max_pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused_by_the_name_of_its_cap_in_no_time(models, name):
    task, options, data, params, cap = TOO_MUCH[name]
    model = models(task, **options)
    if cap is None:  # 40 labels a row are what a table may have anyway
        assert len(model.predict(data, params)) == len(data)
        return
    begun = time.process_time()
    with pytest.raises(InputError) as raised:
        model.predict(data, params)
    # seconds of CPU, of all threads; benchmarks/hostile.py times it
    assert time.process_time() - begun < 0.5
    assert f"'{cap}'" in str(raised.value.hint)
    assert f"MLFLOW_SAFEFLAVOR_{cap.upper()}" in str(raised.value.hint)
    assert raised.value.found
    assert raised.value.where
    if name in RAISED:
        opened = models(task, **{**options, cap: 0})
        assert len(opened.predict(data, params)) == len(data)


RAISED = {
    "all tokens in many gaps",
    "many rows of gaps",
    "more rows than the cap",
    "a TIFF by its header",
    "one long label",
}


_CATS = "the cat " * 20_000
FAR_TOO_LONG = {
    "windows": (TOKENS, {}, [_CATS], {"stride": 29, "aggregation_strategy": "simple"}),
    "windows of a "
    "question": (QUESTIONS, {}, [{"question": "a", "context": _CATS}], {"doc_stride": 26}),
    "a question": (QUESTIONS, {}, [{"question": _CATS, "context": "a"}], {}),
    "not to be cut": (TEXTS, {}, [_CATS], {"truncation": False}),
    "not to be cut for each "
    "label": (ZERO_SHOT, {}, [_CATS], {"candidate_labels": ["a"], "truncation": False}),
    "not to be cut for writing": (WRITES, {}, [_CATS], {"truncation": False}),
    "a prompt not to be cut": (COMPLETIONS, {}, {"prompt": _CATS}, {"truncation": False}),
    "a chat": (CHAT, {}, {"messages": [{"role": "user", "content": _CATS}]}, {}),
    "an embedding not to be cut": (EMBEDDINGS, {}, {"input": _CATS}, {"truncation": False}),
    "a query": (RANKS, {}, [{"query": _CATS, "passages": ["a"]}], {"truncation": False}),
    "a passage not to be "
    "cut": (RANKS, {}, [{"query": "a", "passages": ["a", _CATS]}], {"truncation": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAR_TOO_LONG)
def test_what_has_far_too_many_tokens_is_refused_by_its_beginning(models, monkeypatch, name):
    task, options, data, params = FAR_TOO_LONG[name]
    model, encode = models(task, **options), TextEncoder.encode

    def watched(self, texts, *others, **options):
        assert max(map(len, texts)) < 1000
        return encode(self, texts, *others, **options)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    with pytest.raises(InputError, match=r"or more|more than 32"):
        model.predict(data, params)


def test_a_table_may_ask_for_as_much_as_its_rows_are_worth(models):
    labels = LABELS[:16]
    answers = models("zero-shot-classification", max_pieces=17).predict(
        ["a", "the"], {"candidate_labels": labels}
    )
    assert len(answers) == 2
    with pytest.raises(InputError, match="max_pieces"):
        models("zero-shot-classification", max_pieces=17).predict(
            ["a"], {"candidate_labels": LABELS[:18]}
        )


def test_caps_are_stored_and_raised_like_every_option(models, tmp_path, monkeypatch):
    model = models("fill-mask")
    assert {**model.spec.model_config, **vars(Caps())} == model.spec.model_config
    path = models.made["fill-mask"][0]
    assert mlflow_safeflavor.load_model(path, model_config={"max_rows": 1}).task.caps.max_rows == 1
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_MAX_ROWS", "2")
    loaded = mlflow_safeflavor.load_model(path, model_config={"max_rows": 1})
    with pytest.raises(InputError, match=r"at most 2 rows[\s\S]*found: 3"):
        loaded.predict(["[MASK]"] * 3)
    for wrong in (-1, "many", 1.5, True):
        with pytest.raises(InputError, match="max_rows"):
            run_time_options({"max_rows": wrong})
    assert run_time_options({"max_seconds": "1.5"})["max_seconds"] == 1.5


def test_a_text_without_any_limit_has_one(models):
    model = models("text-classification", max_tokens=10)
    object.__setattr__(model.task, "config", {**model.task.config, "max_length": None})
    model.task.encoder.max_length = None
    assert len(model.predict(["the cat"])) == 1
    with pytest.raises(InputError, match="max_tokens"):
        model.predict(["the cat " * 10])


@pytest.mark.parametrize(("side", "times"), [(1900, 0), (2100, 1)])
def test_what_a_large_image_took_is_given_back(models, monkeypatch, side, times):
    model, given = models(IMAGES), []
    monkeypatch.setattr(processed, "give_back", lambda: given.append(1))
    model.predict([image_file(side, side)])
    assert len(given) == times


def test_giving_back_is_safe_anywhere(monkeypatch):
    give_back()
    monkeypatch.setattr(machine, "_malloc_trim", lambda: None)
    give_back()


def test_silence_of_some_kilobytes_is_refused_before_it_is_decoded():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(600 * 8000, np.float32), 8000, format="FLAC")
    content = file.getvalue()
    assert len(content) < 100_000
    tracemalloc.start()
    with pytest.raises(InputError, match="max_seconds"):
        read_sound(content, 16000, "row 0", Caps())
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert len(read_sound(content, 8000, "row 0", Caps(max_seconds=0))) == 600 * 8000


def test_a_sound_is_refused_by_its_header():
    wav = to_wav(np.zeros(61 * 8000, np.int16), 8000)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"max_seconds"):
        read_sound(wav, 16000, "row 0", Caps())
    assert tracemalloc.get_traced_memory()[1] < 4 * len(wav)
    tracemalloc.stop()
    assert len(read_sound(wav, 8000, "row 0", Caps(max_seconds=0))) == 61 * 8000


# Texts.


SURROGATES = {
    "a row": (TEXTS, ["fine", "\ud800"], {}, "row 1"),
    "a context": (QUESTIONS, [{"question": "a", "context": "\udfff"}], {}, "row 0, column "
                                                                           "'context'"),
    "targets": (GAPS, ["the [MASK]"], {"targets": ["cat", "\ud800"]}, "params, 'targets'"),
    "labels": (ZERO_SHOT, ["a"], {"candidate_labels": ["\ud800"]}, "params, 'candidate_labels'"),
    "a template": (
        ZERO_SHOT,
        ["a"],
        {"candidate_labels": ["a"], "hypothesis_template": "\ud800{}"},
        "params, 'hypothesis_template'",
    ),
    "stop": (WRITES, ["a"], {"stop": ["\ud800"]}, "params, 'stop'"),
    "a label to ignore": (TOKENS, ["a"], {"ignore_labels": ["\ud800"]}, "params, 'ignore_labels'"),
    "a strategy": (TOKENS, ["a"], {"aggregation_strategy": "\ud800"}, "params, "
                                                                      "'aggregation_strategy'"),
    "base64": (IMAGES, ["\ud800"], {}, "row 0"),
    "base64 of a sound": (SPEECH, ["\ud800"], {}, "row 0"),
    "times of a sound": (SPEECH, [MINUTE], {"return_timestamps": "\ud800"}, "params, "
                                                                          "'return_timestamps'"),
    "a language": (WHISPER, [MINUTE], {"language": "\ud800"}, "params, 'language'"),
    "labels of an "
    "image": (PICKS, [image_file(8, 8)], {"candidate_labels": ["\ud800"]}, "params, "
                                                                           "'candidate_labels'"),
    "a query": (RANKS, [{"query": "\ud800", "passages": ["a"]}], {}, "row 0, column 'query'"),
    "a passage": (
        RANKS, [{"query": "a", "passages": ["a", "\ud800"]}], {},
        "row 0, column 'passages', passage 1",
    ),
    "an input": (EMBEDDINGS, {"input": ["a", "\ud800"]}, {}, "row 1, column 'input'"),
    "a prompt": (COMPLETIONS, {"prompt": ["a", "\ud800"]}, {}, "row 1, column 'prompt'"),
    "a chat": (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, {}, "row 0, column "
                                                                                "'messages'"),
    "stop of a completion": (COMPLETIONS, {"prompt": "a", "stop": "\ud800"}, {}, "params, 'stop'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SURROGATES)
def test_half_a_surrogate_pair_is_named_wherever_it_is(models, name):
    task, data, params, where = SURROGATES[name]
    with pytest.raises(InputError, match="surrogate") as raised:
        models(task).predict(data, params)
    assert raised.value.where == where
    str(raised.value).encode()


def test_texts_are_looked_at_at_any_depth():
    nested: Any = "\ud800"
    for i in range(3000):  # deeper than Python recurses
        nested = {"x": nested} if i % 2 else [nested]
    for value in (
        nested,
        {"\ud800": 1},
        np.array(["\ud800"]),
        np.array([["a", "\ud800"]], object),
        ("a", ["\ud800"]),
    ):
        with pytest.raises(InputError, match="surrogate"):
            require_clean(value, "row 0")
    with pytest.raises(InputError, match="max_characters"):
        require_clean([["abc"], {"d": "ef"}], "row 0", Caps(max_characters=5))
    require_clean(
        [["abc"], {"d": "ef"}, 1, None, b"\xff", np.zeros(3)], "row 0", Caps(max_characters=6)
    )


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p"])
@pytest.mark.parametrize("value", [1e-46, 1e-320, 1e300, 5e-10])
def test_what_is_nothing_in_float32_is_no_value(models, name, value):
    with pytest.raises(InputError, match=name):
        models("text-generation").predict(
            ["a cat"], {"do_sample": True, "max_new_tokens": 2, name: value}
        )


@pytest.mark.parametrize("least", [1e-9, 1e9])
def test_the_smallest_and_largest_values_still_write(models, least):
    params = {
        "do_sample": True,
        "seed": 1,
        "max_new_tokens": 4,
        "temperature": least,
        "repetition_penalty": least,
    }
    (text,) = models("text-generation").predict(["a cat"], params)["generated_text"]
    assert text.startswith("a cat")


# Turns.


def test_pairs_made_of_two_texts_are_those_of_the_tokenizer(models):
    encoder = models("zero-shot-classification").task.encoder
    texts = ["", "the cat", "the cat sat on the mat under a red tree " * 3, "x"]
    alone = encoder.encode(texts, truncation=False, special=False)
    for (a, first), (b, second) in itertools.product(zip(texts, alone, strict=True), repeat=2):
        for limit, only in ((None, None), (9, None), (12, 0), (12, 1), (200, 0)):
            given = {"max_length": limit, "only": only}
            (wanted,) = encoder.encode([a], [b], truncation=limit is not None, **given)
            assert encoder.pair(first, second, **given) == wanted, (a, b, limit, only)


def test_places_are_given_in_the_order_of_arrival_and_turns_are_short():
    permits, order = Permits(1), []

    def slow(name, steps):
        for i in range(steps):
            time.sleep(0.02)
            yield f"{name}{i}"

    def ask(name, steps):
        order.extend(permits.in_turns(slow(name, steps), Deadline()))

    permits.take(Deadline())
    threads = []
    for name, steps in (("long", 5), ("b", 1), ("c", 1)):
        threads.append(threading.Thread(target=ask, args=(name, steps)))
        threads[-1].start()
        while len(permits._waiting) < len(threads):
            time.sleep(0.001)
    permits.give()
    for thread in threads:
        thread.join(20)
    assert order.index("b0") < order.index("long1")
    assert order.index("c0") < order.index("long1")
    assert [step for step in order if step.startswith("long")] == [f"long{i}" for i in range(5)]
    assert permits._free == 1


def test_a_deadline_counts_the_wait_for_a_place():
    permits = Permits(1)
    permits.take(Deadline())
    with pytest.raises(DeadlineError, match=r"within 0\.05 seconds"):
        permits.take(Deadline(0.05))
    assert not permits._waiting
    permits.give()
    permits.take(Deadline(5))


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_deadline_counts_encoding_and_decoding(models, monkeypatch, part):
    model = models("text-classification")
    made = getattr(model.task, part)

    def slowly(*args, **options):
        for item in made(*args, **options):
            time.sleep(0.02)
            yield item

    monkeypatch.setattr(model.task, part, slowly, raising=False)
    begun = time.monotonic()
    with pytest.raises(DeadlineError):
        model.predict(["the cat"] * 1000, timeout=0.3)
    assert time.monotonic() - begun < 5
    monkeypatch.undo()
    assert len(model.predict(["the cat"] * 3, timeout=60)) == 3


def test_a_text_nobody_waits_for_is_written_no_further(models, monkeypatch):
    model = models("text-generation")
    steps = []

    class Slow:
        def __call__(self, ids, scores):
            steps.append(ids.shape[1])
            time.sleep(0.05)
            scores[:, 3] = -torch.inf  # nor is it ended
            return scores

    monkeypatch.setattr("mlflow_safeflavor.tasks.decoding.sampler", lambda *_: [Slow()])
    with pytest.raises(DeadlineError):
        model.predict(["a cat"], {"max_new_tokens": 28, "do_sample": True}, timeout=0.2)
    time.sleep(0.3)
    monkeypatch.undo()
    done = len(steps)
    # the model's thread is free again
    assert len(model.predict(["a cat"], {"max_new_tokens": 2})) == 1
    assert done < 15


def test_a_long_table_is_held_in_parts(models, monkeypatch):
    from mlflow_safeflavor.predict import answers

    model = models("text-classification")
    texts = ["the cat sat", "a dog", "x", "red tree under the mat"] * 50
    wanted = model.predict(texts)
    held = []
    monkeypatch.setattr(answers, "_HELD", 2000)
    submit = model.scheduler.submit
    monkeypatch.setattr(
        model.scheduler,
        "submit",
        lambda pieces, *others, **named: (
            held.append(len(pieces)) or submit(pieces, *others, **named)
        ),
    )
    found = model.predict(texts)
    assert found["label"].tolist() == wanted["label"].tolist()
    assert np.allclose(found["score"], wanted["score"], atol=1e-5)
    assert len(held) > 10
    assert sum(held) == len(texts)
    with pytest.raises(InputError, match="row 199"):
        model.predict([*texts[:-1], "the " * 99], {"truncation": False})


# Memory.


class Leaky(torch.nn.Module):
    """Gives away a weight, its input and one tensor twice."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        y = x @ self.w
        return {"y": y, "again": y, "w": self.w, "x": x}


@pytest.mark.parametrize("graph", ["only", "no"])
def test_answers_share_no_memory_with_the_model(tmp_path, graph):
    x = {"x": np.ones((2, 2), "float32")}
    pickled: dict[str, Any] = {"allow_pickle": True} if graph == "no" else {}
    mlflow_safeflavor.save_model(
        Leaky(), tmp_path / "m", task="raw", input_example=x, graph=graph, rehearse=False, **pickled
    )
    model = mlflow_safeflavor.load_model(tmp_path / "m", trust={"code", "pickle"})
    wanted = model.predict(x)
    answer = model.predict(x)
    for name in answer:
        answer[name] *= 7
    assert np.array_equal(answer["y"], wanted["y"] * 7)
    assert np.array_equal(answer["again"], wanted["again"] * 7), "two names, one memory"
    for name, array in model.predict(x).items():
        assert np.array_equal(array, wanted[name]), name
    assert np.array_equal(x["x"], np.ones((2, 2)))


def test_custom_answers_share_no_memory_with_the_model_or_each_other(tmp_path):
    constant = [1.0, 2.0]

    def pre(rows, tokenizer):
        return {"x": torch.tensor([[row["a"], 1.0] for row in rows])}

    def post(outputs, rows):
        outputs["w"] *= 7  # its own copy
        return [
            {"y": outputs["y"][i].tolist(), "c": constant, "d": {"c": constant}}
            for i in range(len(rows))
        ]

    mlflow_safeflavor.save_model(
        Leaky(), tmp_path / "m", task="custom", preprocess=pre, postprocess=post, rehearse=False,
        input_example=[{"a": 1.0}, {"a": 2.0}], allow_pickle=True, graph="no",
    )  # fmt: skip
    model = mlflow_safeflavor.load_model(tmp_path / "m", trust={"code", "pickle"})

    def ask():
        return model.predict([{"a": 1.0}, {"a": 2.0}]).to_dict("records")

    wanted, answers = ask(), ask()
    answers[0]["c"][0] = answers[0]["d"]["c"][1] = 7
    assert answers[1] == wanted[1]
    assert ask() == wanted


def test_own_copies_at_any_depth():
    array, tensor, inner = np.ones(2), torch.ones(2), [1]
    made = own({"a": [array, {"t": tensor}], "b": (inner,), "s": "text"})
    array[0] = tensor[0] = inner[0] = 7
    assert made["a"][0].tolist() == [1, 1]
    assert made["a"][1]["t"].tolist() == [1, 1]
    assert made["b"] == ([1],)
    assert made["s"] == "text"
