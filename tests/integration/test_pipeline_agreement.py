"""The answers of every text task are those of transformers' pipelines.

Tiny models of all kinds, and real weights.
"""

import copy
import inspect
import io
import json
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, tiny_model
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc.scoring_server import predictions_to_json
from other_tokenizers import byte_level, unigram, wrapped
from transformers import AutoTokenizer, pipeline

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.module.engine import ModuleEngine
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder
from mlflow_safeflavor.tasks.inputs.tokenizer import write_tokenizer
from mlflow_safeflavor.tasks.table import task_class

# Said by the reference about tokenizers that do not mark subwords.
pytestmark = pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")

LONG = "the cat ran on the mat and the dog sat under a tree " * 8
TEXTS = [
    "the cat sat on the mat",
    "",
    "cats sating trees under reds",
    "the 😀 dog 👩‍👩‍👧 sat on a café e\u0301 naïve tree 日本語",
    "return x + y if dog else cat",
    LONG,
    "dog",
]
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
NER = {0: "O", 1: "B-PER", 2: "I-PER", 3: "I-LOC", 4: "misc"}


class Asked:
    """A task bound to a model; all rows that are asked together share one padded batch."""

    def __init__(self, folder, name, model, tokenizer, columns=None, params=None, **options):
        cls = task_class(name)
        config = json.loads(json.dumps(cls.with_params(cls.describe(model, options), params or {})))
        encoder = TextEncoder(folder, write_tokenizer(tokenizer, folder))
        self.task = cls(config, cls.columns_for(columns), encoder)
        self.engine = ModuleEngine(model, torch.device("cpu"), torch.float32)

    def __call__(self, rows, **params):
        checked = self.task.check_params(params)
        features = self.task.encoded(rows, checked)
        pieces = [list(self.task.pieces(row)) for row in features]
        found = iter(
            self.task.forward(self.engine, [piece for row in pieces for piece in row], checked)
        )
        outputs = [self.task.join([next(found) for _ in row]) for row in pieces]
        answers = self.task.decoded(rows, features, outputs, checked)
        assert json.loads(json.dumps(answers, allow_nan=False)) == answers
        assert len({tuple(answer) for answer in answers}) == 1
        assert all(value.dtype == np.float32 for output in outputs for value in output.values())
        return answers

    def texts(self, texts, **params):
        return self([{"text": text} for text in texts], **params)


@pytest.fixture
def asked(tmp_path):
    def make(name, model, tokenizer, columns=None, **options):
        return Asked(
            tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}",
            name,
            model,
            tokenizer,
            columns,
            **options,
        )

    return make


def _named_for(model, tokenizer):
    """A copy that makes only what the model takes.

    Transformers' pipelines hand over all there is.
    """
    tokenizer = copy.deepcopy(tokenizer)
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    return tokenizer


def _reference(name, model, tokenizer):
    return pipeline(name, model=model, tokenizer=_named_for(model, tokenizer), device="cpu")


def _same(found, wanted, tolerance=1e-5):
    """Equal, with numbers near each other."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for key in wanted:
            _same(found[key], wanted[key], tolerance)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), (found, wanted)
        for one, other in zip(found, wanted, strict=True):
            _same(one, other, tolerance)
    elif isinstance(wanted, (float, np.floating)):
        assert abs(found - wanted) < tolerance, (found, wanted)
    else:
        assert found == wanted


@pytest.fixture(scope="module")
def minilm(minilm_folder):
    """``make(head, **config)``: the real weights under a seeded head; and the tokenizer."""

    def make(head, **config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            cls = getattr(transformers, f"Bert{head}")
            model = cls.from_pretrained(
                minilm_folder, local_files_only=True, dtype=torch.float32, **config
            )
            for name, parameter in model.named_parameters():
                if name.endswith("weight") and name.split(".")[0] in ("classifier", "qa_outputs"):
                    torch.nn.init.normal_(parameter)  # far apart, as those of a trained head
        return model.eval(), AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)

    return make


@pytest.fixture(scope="module")
def other_tokenizers():
    """Tokenizers of other kinds than WordPiece.

    Bytes, where an emoji is several tokens, and sentence pieces.
    """
    return {
        "byte-level": wrapped(
            byte_level(), model_max_length=33, model_input_names=["input_ids", "attention_mask"]
        ),
        "unigram": wrapped(
            unigram(), model_max_length=33, model_input_names=["input_ids", "attention_mask"]
        ),
    }


REAL = [
    "Angela Merkel met Barack Obama 🤝 in Zürich, Switzerland.",
    "",
    "Unbelievable: naïve café-owners' e\u0301clairs cost 3€!",
    "東京 Tōkyō 😀👩‍👩‍👧 … antidisestablishmentarianism",
    "The parliament of Luxembourg is in the city of Luxembourg. " * 60,
]


# Text classification and feature extraction.


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_classification(asked, tiny_tokenizer, architecture, problem):
    model = tiny_model(
        architecture, "ForSequenceClassification", num_labels=3, problem_type=problem
    )
    reference = _reference("text-classification", model, tiny_tokenizer)
    wanted = [reference(text, top_k=None, truncation=True) for text in TEXTS]
    found = asked("text-classification", model, tiny_tokenizer).texts(TEXTS, top_k=-1)
    for answer, ranked in zip(found, wanted, strict=True):
        assert answer["labels"] == [entry["label"] for entry in ranked]
        _same(answer["scores"], [entry["score"] for entry in ranked])
    assert (
        len({answer["label"] for answer in found}) > 1
        or np.ptp([answer["score"] for answer in found]) > 1e-3
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_classification_of_pairs(asked, tiny_tokenizer, architecture):
    model = tiny_model(architecture, "ForSequenceClassification", num_labels=3)
    reference = _reference("text-classification", model, tiny_tokenizer)
    rows = [
        {"text": a, "text_pair": b} for a, b in zip(TEXTS, [*TEXTS[2:], "red", "mat"], strict=True)
    ]
    wanted = [reference(dict(row), truncation=True) for row in rows]
    found = asked(
        "text-classification", model, tiny_tokenizer, {"text": "text", "text_pair": "text_pair"}
    )(rows)
    _same(found, [row[0] if isinstance(row, list) else row for row in wanted])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_feature_extraction(asked, tiny_tokenizer, architecture, pooling):
    model = tiny_model(architecture, "Model")
    reference = _reference("feature-extraction", model, tiny_tokenizer)
    found = asked("feature-extraction", model, tiny_tokenizer, pooling=pooling).texts(TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        (hidden,) = np.array(reference(text, tokenize_kwargs={"truncation": True}))
        _same(
            answer["embedding"],
            list({"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}[pooling]),
        )


# Token classification.


STRATEGIES = ["none", "simple", "first", "average", "max"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_classification(asked, tiny_tokenizer, architecture):
    model = tiny_model(architecture, "ForTokenClassification", id2label=NER)
    reference = _reference("token-classification", model, tiny_tokenizer)
    ner = asked("ner", model, tiny_tokenizer)
    for strategy in STRATEGIES:
        wanted = [{"entities": reference(text, aggregation_strategy=strategy)} for text in TEXTS]
        _same(ner.texts(TEXTS, aggregation_strategy=strategy), wanted)
    wanted = [{"entities": reference(text, ignore_labels=["I-LOC", "PER"])} for text in TEXTS]
    _same(ner.texts(TEXTS, ignore_labels=["I-LOC", "PER"]), wanted)
    assert {entity["entity"] for row in wanted for entity in row["entities"]} - {"I-LOC"}


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_token_classification_where_subwords_are_not_marked(asked, other_tokenizers, kind):
    tokenizer = other_tokenizers[kind]
    model = tiny_model("Roberta", "ForTokenClassification", id2label=NER, vocab_size=2600)
    reference = _reference("token-classification", model, tokenizer)
    ner = asked("ner", model, tokenizer)
    texts = [*TEXTS, "the cat☃dog☃"]  # an unknown token is a word of its own, also without a space
    for strategy in STRATEGIES:
        wanted = [{"entities": reference(text, aggregation_strategy=strategy)} for text in texts]
        _same(ner.texts(texts, aggregation_strategy=strategy), wanted)


def test_token_classification_of_real_weights(asked, minilm):
    model, tokenizer = minilm("ForTokenClassification", id2label=NER)
    tokenizer.model_max_length = 128
    reference = _reference("token-classification", model, tokenizer)
    ner = asked("ner", model, tokenizer)
    for strategy in STRATEGIES:
        wanted = [{"entities": reference(text, aggregation_strategy=strategy)} for text in REAL]
        found = ner.texts(REAL, aggregation_strategy=strategy)
        _same(found, wanted)
        key = "entity" if strategy == "none" else "entity_group"
        assert len({entity[key] for row in found for entity in row["entities"]}) > 1


@pytest.mark.parametrize("stride", [0, 3, 20])
def test_token_classification_in_windows(asked, tiny_tokenizer, stride):
    model = tiny_model("Bert", "ForTokenClassification", id2label=NER)
    reference = _reference("token-classification", model, tiny_tokenizer)
    texts = [text for text in TEXTS if text]
    for strategy in STRATEGIES[1:]:
        wanted = [
            {"entities": reference(text, aggregation_strategy=strategy, stride=stride)}
            for text in texts
        ]
        found = asked("ner", model, tiny_tokenizer).texts(
            texts, aggregation_strategy=strategy, stride=stride
        )
        _same(found, wanted)
    assert max(entity["end"] for row in found for entity in row["entities"]) > 300


@pytest.mark.parametrize(
    "params",
    [
        {"stride": 3},
        {"stride": 30, "aggregation_strategy": "first"},
        {"aggregation_strategy": "mean"},
    ],
    ids=str,
)
def test_params_of_token_classification_that_do_not_fit(asked, tiny_tokenizer, params):
    ner = asked("ner", tiny_model("Bert", "ForTokenClassification"), tiny_tokenizer)
    with pytest.raises(InputError, match=f"params, '{next(iter(params))}'[\\s\\S]*wanted"):
        ner.texts(["the cat"], **params)


# Fill-mask.


MASKED_LM = [name for name in ARCHITECTURES if hasattr(transformers, f"{name}ForMaskedLM")]
GAPS = [
    "the [MASK] sat on the mat",
    "[MASK]",
    "the 😀 e\u0301 [MASK] ran , 👩‍👩‍👧 .",
    "a [MASK] and [MASK] [MASK] tree",
    "[MASK] " + LONG,
]


def _filled(reference, text, **params):
    gaps = reference(text, tokenizer_kwargs={"truncation": True}, **params)
    gaps = gaps if isinstance(gaps[0], list) else [gaps]
    return {**gaps[0][0], "predictions": gaps}


@pytest.mark.parametrize("architecture", MASKED_LM)
def test_fill_mask(asked, tiny_tokenizer, architecture):
    model = tiny_model(architecture, "ForMaskedLM")
    reference = _reference("fill-mask", model, tiny_tokenizer)
    fill = asked("fill-mask", model, tiny_tokenizer)
    _same(fill.texts(GAPS), [_filled(reference, text) for text in GAPS])
    params = {"top_k": 2, "targets": ["cat", "dog", "##ing", "cat"]}
    found = fill.texts(GAPS, **params)
    _same(found, [_filled(reference, text, **params) for text in GAPS])
    assert {entry["token_str"] for row in found for gap in row["predictions"] for entry in gap} <= {
        "cat",
        "dog",
        "##ing",
    }


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_fill_mask_of_other_tokenizers(asked, other_tokenizers, kind):
    tokenizer = other_tokenizers[kind]
    model = tiny_model("Roberta", "ForMaskedLM", vocab_size=2600)
    texts = [text.replace("[MASK]", "<mask>") for text in GAPS]
    reference = _reference("fill-mask", model, tokenizer)
    _same(
        asked("fill-mask", model, tokenizer).texts(texts, top_k=3),
        [_filled(reference, t, top_k=3) for t in texts],
    )


def test_fill_mask_of_real_weights(asked, minilm):
    model, tokenizer = minilm("ForMaskedLM")
    texts = [
        "Paris is the [MASK] of France.",
        "Good [MASK], Mr. [MASK] 😀!",
        "[MASK] isn't 3 € , ' café '",
    ]
    reference = _reference("fill-mask", model, tokenizer)
    _same(
        asked("fill-mask", model, tokenizer).texts(texts),
        [_filled(reference, text) for text in texts],
    )


def test_texts_without_gaps_are_refused(asked, tiny_tokenizer):
    fill = asked("fill-mask", tiny_model("Bert", "ForMaskedLM"), tiny_tokenizer)
    with pytest.raises(InputError, match=r"no gap[\s\S]*where: row 1\n[\s\S]*\[MASK\][\s\S]*hint"):
        fill.texts(["a [MASK]", "a cat"])
    with pytest.raises(
        InputError, match=r"beyond[\s\S]*where: row 0\n[\s\S]*1 of 2 within 32 tokens"
    ):
        fill.texts(["[MASK] " + LONG + "[MASK]"])
    with pytest.raises(
        InputError, match=r"'targets', 'cats dog'[\s\S]*one token each[\s\S]*cat ##s dog"
    ):
        fill.texts(["a [MASK]"], targets=["cat", "cats dog"])
    tiny_tokenizer.mask_token = None
    with pytest.raises(StructureError, match="no mask token"):
        asked("fill-mask", tiny_model("Bert", "ForMaskedLM"), tiny_tokenizer).task.golden_rows()


# Zero-shot classification.


TEMPLATE = "the {} on a mat"
CANDIDATES = ["dog sat", "red tree", "cat", "a 😀"]


def _labelled(answer):
    found = {"labels": answer["labels"], "scores": answer["scores"]}
    return {"label": found["labels"][0], "score": found["scores"][0], **found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zero_shot_classification(asked, tiny_tokenizer, architecture):
    model = tiny_model(
        architecture,
        "ForSequenceClassification",
        id2label=NLI,
        label2id={v: k for k, v in NLI.items()},
    )
    reference = _reference("zero-shot-classification", model, tiny_tokenizer)
    zero_shot = asked(
        "zero-shot-classification", model, tiny_tokenizer, params={"candidate_labels": CANDIDATES}
    )
    texts = [text for text in TEXTS if text]  # the pipeline takes no empty text
    for labels, multi in ((CANDIDATES, False), (CANDIDATES, True), (CANDIDATES[:1], False)):
        params = {"hypothesis_template": TEMPLATE, "multi_label": multi}
        wanted = [_labelled(reference(text, candidate_labels=labels, **params)) for text in texts]
        _same(zero_shot.texts(texts, candidate_labels=labels, **params), wanted)
    stored = zero_shot.texts(["", *texts], hypothesis_template=TEMPLATE)
    _same(
        stored[1:],
        zero_shot.texts(texts, candidate_labels=CANDIDATES, hypothesis_template=TEMPLATE),
    )
    assert len({tuple(answer["scores"]) for answer in stored}) > 1


@pytest.mark.parametrize("entailment", [0, 2])
def test_zero_shot_classification_of_real_weights(asked, minilm, entailment):
    names = {0: "ENTAILMENT", 1: "neutral", 2: "contradiction"} if entailment == 0 else NLI
    model, tokenizer = minilm(
        "ForSequenceClassification", id2label=names, label2id={v: k for k, v in names.items()}
    )
    tokenizer.model_max_length = 128
    reference = _reference("zero-shot-classification", model, tokenizer)
    zero_shot = asked("zero-shot-classification", model, tokenizer)
    texts = [text for text in REAL if text]
    labels = ["politics", "cooking 🍲", "travel, or something of the kind " * 9]
    for multi in (False, True):
        wanted = [
            _labelled(reference(text, candidate_labels=labels, multi_label=multi)) for text in texts
        ]
        _same(zero_shot.texts(texts, candidate_labels=labels, multi_label=multi), wanted)


def test_what_zero_shot_classification_refuses(asked, tiny_tokenizer):
    model = tiny_model("Bert", "ForSequenceClassification", num_labels=3)
    with pytest.raises(StructureError, match=r"entailment[\s\S]*label2id[\s\S]*LABEL_0"):
        asked("zero-shot-classification", model, tiny_tokenizer)
    model = tiny_model(
        "Bert", "ForSequenceClassification", id2label=NLI, label2id={v: k for k, v in NLI.items()}
    )
    for labels in (["a", ""], "a", [1]):
        with pytest.raises(InputError, match="candidate_labels"):
            asked(
                "zero-shot-classification",
                model,
                tiny_tokenizer,
                params={"candidate_labels": labels},
            )
    zero_shot = asked("zero-shot-classification", model, tiny_tokenizer)
    with pytest.raises(
        InputError, match=r"no labels[\s\S]*candidate_labels[\s\S]*when the model is saved"
    ):
        zero_shot.texts(["a"])
    with pytest.raises(InputError, match=r"'hypothesis_template'[\s\S]*\{\}"):
        zero_shot.texts(["a"], candidate_labels=["a"], hypothesis_template="about it")
    with pytest.raises(
        InputError, match=r"label leaves no room[\s\S]*within 32 tokens[\s\S]*'red red"
    ):
        zero_shot.texts(["", "a"], candidate_labels=["cat", "red " * 40])
    with pytest.raises(
        InputError, match=r"truncation is off[\s\S]*where: row 1\n[\s\S]*at most 32 tokens"
    ):
        zero_shot.texts(["", LONG], candidate_labels=["cat"], truncation=False)
    # A template is filled in and never run.
    assert zero_shot.texts(
        ["a"], candidate_labels=["cat"], hypothesis_template="{} {0.__class__} {:99999999999}"
    )


# Question answering.


QUESTIONS = [
    {"question": "the cat", "context": TEXTS[0]},
    {"question": "red ?", "context": TEXTS[3]},
    {"question": "cats sating", "context": LONG},
    {"question": "a 😀 e\u0301", "context": "👩‍👩‍👧 e\u0301 dogs , 日本語 café reds " * 5},
    {"question": "dog", "context": "tree"},
]
QA_PARAMS = [
    {},
    {"top_k": 4},
    {"handle_impossible_answer": True, "top_k": 3},
    {"max_answer_len": 2, "align_to_words": False, "top_k": 2},
    {"doc_stride": 5, "max_seq_len": 20},
]


class PlainAnswers:
    """The answers of transformers 4.57's pipeline, in plain loops for releases that have none."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self,
        question,
        context,
        top_k=1,
        max_answer_len=15,
        doc_stride=None,
        max_seq_len=None,
        handle_impossible_answer=False,
        align_to_words=True,
    ):
        limit = max_seq_len or min(self.tokenizer.model_max_length, 384)
        stride = doc_stride or min(limit // 2, 128)
        batch = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=limit,
            stride=stride,
            return_overflowing_tokens=True,
        )
        kept = top_k * 2 + 10 if align_to_words else top_k
        found, impossible = [], []
        for encoding in batch.encodings:
            spans, null = self.spans(encoding, max_answer_len)
            impossible.append(null)
            for score, a, b in spans[:kept]:
                first, last = encoding.offsets[a][0], encoding.offsets[b][1]
                if align_to_words:
                    first = encoding.word_to_chars(encoding.token_to_word(a), 1)[0]
                    last = encoding.word_to_chars(encoding.token_to_word(b), 1)[1]
                text = context[first:last]
                twin = next(
                    (entry for entry in found if entry["answer"].lower() == text.lower()), None
                )
                if twin:
                    twin["score"] += score
                else:
                    found.append({"score": score, "start": first, "end": last, "answer": text})
        if handle_impossible_answer:
            found.append({"score": min(impossible), "start": 0, "end": 0, "answer": ""})
        best = sorted(found, key=lambda entry: -entry["score"])[:top_k]
        return best[0] if len(best) == 1 else best

    def spans(self, encoding, max_answer_len):
        context = [i for i, text in enumerate(encoding.sequence_ids) if text == 1]
        read = [
            *context,
            *(i for i, token in enumerate(encoding.ids) if token == self.tokenizer.cls_token_id),
        ]
        made = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        made["attention_mask"] = [1] * len(encoding.ids)
        with torch.inference_mode():
            output = self.model(
                **{name: torch.tensor([made[name]]) for name in self.tokenizer.model_input_names}
            )
        start, end = (
            dict(zip(read, logits[0, read].softmax(0).tolist(), strict=True))
            for logits in (output.start_logits, output.end_logits)
        )
        spans = [
            (start[a] * end[b], a, b)
            for a in context
            for b in context
            if 0 <= b - a < max_answer_len
        ]
        return sorted(spans, reverse=True), start.get(0, 0.0) * end.get(0, 0.0)


def _answered(model, tokenizer, rows, **params):
    """The pipeline's answers, where this transformers has one, in the shape of ours."""
    tokenizer = _named_for(model, tokenizer)
    if "question-answering" in transformers.pipelines.SUPPORTED_TASKS:
        reference = pipeline("question-answering", model=model, tokenizer=tokenizer, device="cpu")
    else:
        reference = PlainAnswers(model, tokenizer)
    for row in rows:
        found = reference(**row, **params)
        found = found if isinstance(found, list) else [found]
        if params.get("top_k", 1) == 1:
            yield found[0]
            continue
        yield from _likely(
            [{**found[0], **{f"{name}s": [entry[name] for entry in found] for name in found[0]}}]
        )


def _likely(answers):
    """Without scores of nothing: the pipeline fills up with spans that end before they start."""
    for answer in answers:
        likely = np.asarray(answer.get("scores", [])) > 1e-9
        for name in [name for name in answer if f"{name}s" in answer]:
            answer[f"{name}s"] = [
                value for value, kept in zip(answer[f"{name}s"], likely, strict=True) if kept
            ]
    return answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_question_answering(asked, tiny_tokenizer, architecture):
    head = "ForQuestionAnsweringSimple" if architecture == "XLNet" else "ForQuestionAnswering"
    model = tiny_model(architecture, head)
    answer = asked("question-answering", model, tiny_tokenizer)
    for params in QA_PARAMS:
        wanted = list(_answered(model, tiny_tokenizer, QUESTIONS, **params))
        found = _likely(answer(QUESTIONS, **params))
        _same(found, wanted)
        assert all(
            row["context"][a["start"] : a["end"]] == a["answer"]
            for row, a in zip(QUESTIONS, found, strict=True)
        )
    assert len({(entry["start"], entry["end"]) for entry in found}) > 2


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_question_answering_of_other_tokenizers(asked, other_tokenizers, kind):
    tokenizer = other_tokenizers[kind]
    model = tiny_model("Roberta", "ForQuestionAnswering", vocab_size=2600)
    answer = asked("question-answering", model, tokenizer)
    for params in QA_PARAMS[:4]:
        # Steps at which no window starts with a space: transformers counts that space in, there and
        # nowhere else.
        params = {"doc_stride": 7, **params}
        _same(
            _likely(answer(QUESTIONS, **params)),
            list(_answered(model, tokenizer, QUESTIONS, **params)),
        )


def test_question_answering_of_real_weights(asked, minilm):
    model, tokenizer = minilm("ForQuestionAnswering")
    rows = [{"question": "Who met whom 🤝?", "context": text} for text in REAL if text]
    answer = asked("question-answering", model, tokenizer)
    for params in (
        {"top_k": 3, "handle_impossible_answer": True},
        {"max_seq_len": 100, "doc_stride": 40, "top_k": 2},
    ):
        _same(_likely(answer(rows, **params)), list(_answered(model, tokenizer, rows, **params)))


def test_logits_of_a_module_that_names_no_outputs_are_read_by_position(asked, tiny_tokenizer):
    answer = asked("question-answering", tiny_model("Bert", "ForQuestionAnswering"), tiny_tokenizer)
    named = answer(QUESTIONS)
    module = answer.engine
    answer.engine = lambda inputs: {
        f"output_{i}": value for i, value in enumerate(module(inputs).values())
    }
    assert answer(QUESTIONS) == named


def test_an_answer_is_found_in_the_last_of_many_windows(asked, tiny_tokenizer):
    """Offsets count from the start of the whole context, wherever the window is."""
    model = tiny_model("Bert", "ForQuestionAnswering")
    answer = asked("question-answering", model, tiny_tokenizer)
    context = "😀 e\u0301 " + "the cat ran " * 40 + "green"
    (features,) = answer.task.encoded(
        [{"question": "dog", "context": context}], answer.task.check_params({})
    )
    pieces = answer.task.pieces(features)
    logits = np.zeros(sum(answer.task.cost(piece) for piece in pieces), np.float32)
    logits[-2] = 50  # before the last [SEP]
    output = {"start_logits": logits, "end_logits": logits}
    params = answer.task.check_params({})
    (found,) = answer.task.decoded(
        [{"question": "dog", "context": context}], [features], [output], params
    )
    assert len(pieces) > 5
    assert (found["answer"], found["start"], found["end"]) == (
        "green",
        len(context) - 5,
        len(context),
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_context_comes_first_where_the_tokenizer_pads_on_the_left(asked, tiny_tokenizer, side):
    tiny_tokenizer.padding_side = side
    answer = asked("question-answering", tiny_model("GPT2", "ForQuestionAnswering"), tiny_tokenizer)
    row = {"question": "dog dog", "context": "the cat"}
    (features,) = answer.task.encoded([row], answer.task.check_params({}))
    texts = (
        [row["question"], row["context"]] if side == "right" else [row["context"], row["question"]]
    )
    assert answer.task.pieces(features)[0]["input_ids"] == tiny_tokenizer(*texts)["input_ids"]
    assert answer([row])[0]["answer"] in ("the", "cat", "the cat")


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        ({"question": "", "context": "a"}, {}, r"no tokens[\s\S]*row 1, column 'question'"),
        ({"question": "a", "context": " "}, {}, r"no tokens[\s\S]*row 1, column 'context'"),
        (
            {"question": "cat " * 40, "context": "a"},
            {},
            r"no room[\s\S]*row 1, column 'question'[\s\S]*32[\s\S]*43 tok",
        ),
        (
            {"question": "a", "context": LONG},
            {"doc_stride": 28},
            r"'doc_stride'[\s\S]*row 1[\s\S]*less than the 28",
        ),
        ({"question": 1, "context": "a"}, {}, r"not a text[\s\S]*row 1, column 'question'"),
        ({"question": "a", "context": "a"}, {"top_k": 0}, "'top_k'"),
        ({"question": "a", "context": "a"}, {"max_answer_len": 0}, "'max_answer_len'"),
        (
            {"question": "a", "context": "a"},
            {"max_seq_len": 33},
            r"'max_seq_len'[\s\S]*5 to 32 tokens",
        ),
    ],
    ids=range(8),
)
def test_what_question_answering_refuses(asked, tiny_tokenizer, row, params, message):
    answer = asked("question-answering", tiny_model("Bert", "ForQuestionAnswering"), tiny_tokenizer)
    with pytest.raises(InputError, match=message):
        answer([{"question": "a", "context": "dog"}, row], **params)


def test_a_question_that_takes_most_of_the_room(asked, tiny_tokenizer):
    """The usual overlap is more than a window then, where the pipeline fails."""
    answer = asked("question-answering", tiny_model("Bert", "ForQuestionAnswering"), tiny_tokenizer)
    for length in (15, 27, 28):
        (found,) = answer([{"question": "cat " * length, "context": LONG}])
        assert found["answer"] == LONG[found["start"] : found["end"]] != ""


# Saved, loaded, and asked through MLflow.


PER_TASK: dict[str, tuple[Any, ...]] = {
    "token-classification": (
        "ForTokenClassification",
        ["text"],
        {"aggregation_strategy": "first", "ignore_labels": []},
    ),
    "fill-mask": ("ForMaskedLM", ["text"], {"top_k": 2, "targets": ["cat", "dog"]}),
    "zero-shot-classification": (
        "ForSequenceClassification",
        ["text"],
        {"candidate_labels": ["cat", "dog"]},
    ),
    "question-answering": ("ForQuestionAnswering", ["question", "context"], {"top_k": 2}),
}


@pytest.mark.parametrize("name", PER_TASK)
def test_saved_loaded_and_asked_through_mlflow(name, tiny_tokenizer, tmp_path):
    head, columns, params = PER_TASK[name]
    config = {"id2label": NLI, "label2id": {v: k for k, v in NLI.items()}} if "zero" in name else {}
    model = tiny_model("Bert", head, **config)
    defaults = {"candidate_labels": ["tree", "mat", "x"]} if "zero" in name else {}
    mlflow_safeflavor.save_model(
        model,
        tmp_path / "model",
        tokenizer=tiny_tokenizer,
        task=name,
        params=defaults,
        rehearse=False,
        graph="no",
    )
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    rows = pd.DataFrame(
        {column: ["the [MASK] sat on a tree", "a 😀 [MASK]", "[MASK] [MASK]"] for column in columns}
    )
    asked = Asked(tmp_path / "tokenizer", name, model, tiny_tokenizer, params=defaults)
    fields = rows.to_dict(orient="records")
    outputs = loaded.metadata.get_output_schema()
    for given in ({}, params):
        found = loaded.predict(rows, params=given)
        _same(found.to_dict(orient="records"), asked(fields, **given))
        if outputs.has_input_names():
            declared = found[outputs.input_names()]
            _same(
                _enforce_schema(declared, outputs).to_dict(orient="records"),
                declared.to_dict(orient="records"),
            )
        else:  # one column of lists is said as an object, for Spark
            assert [known.name for known in outputs.input_types()[0].properties] == [*found.columns]
        buffer = io.StringIO()
        predictions_to_json(found, buffer)
        _same(json.loads(buffer.getvalue())["predictions"], found.to_dict(orient="records"))
    for param in loaded.metadata.get_params_schema().params:
        assert param.name in asked.task.check_params(params)


def test_golden_rows_suit_any_tokenizer(asked, tiny_tokenizer, other_tokenizers):
    for name, (head, _, _) in PER_TASK.items():
        for tokenizer in (tiny_tokenizer, *other_tokenizers.values()):
            config = (
                {"id2label": NLI, "label2id": {v: k for k, v in NLI.items()}}
                if "zero" in name
                else {}
            )
            task = asked(name, tiny_model("Bert", head, vocab_size=2600, **config), tokenizer)
            assert len(task(task.task.golden_rows(), **task.task.golden(task.task.config))) >= 3


@pytest.mark.parametrize("name", PER_TASK)
def test_an_answer_that_is_no_number_names_the_row(asked, tiny_tokenizer, name):
    head, columns, params = PER_TASK[name]
    config = {"id2label": NLI, "label2id": {v: k for k, v in NLI.items()}} if "zero" in name else {}
    answer = asked(name, tiny_model("Bert", head, **config), tiny_tokenizer)
    task, rows = answer.task, [dict.fromkeys(columns, text) for text in ("[MASK]", "a [MASK]")]
    checked = task.check_params(params)
    features = task.encoded(rows, checked)
    pieces = [list(task.pieces(row)) for row in features]
    good, bad = (task.join(task.forward(answer.engine, row, checked)) for row in pieces)
    bad = {key: np.full_like(array, np.nan) for key, array in bad.items()}
    with pytest.raises(InputError, match=r"not a number[\s\S]*row 1"):
        task.decoded(rows, features, [good, bad], checked)


@pytest.mark.parametrize("name", [name for name in PER_TASK if name != "zero-shot-classification"])
def test_options_nobody_reads_are_refused(name):
    with pytest.raises(InputError, match=f"{name} has no options"):
        task_class(name).describe(tiny_model("Bert", PER_TASK[name][0]), {"pooling": "cls"})
