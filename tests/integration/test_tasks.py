"""Tasks: the answers of transformers' pipelines, whatever rows are beside a row.

Refusals that name row and column.
"""

import copy
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.module.engine import ModuleEngine
from mlflow_safeflavor.predict.answers import predict_rows
from mlflow_safeflavor.predict.scheduler import Scheduler
from mlflow_safeflavor.tasks.feature_extraction import FeatureExtraction
from mlflow_safeflavor.tasks.fill_mask import FillMask
from mlflow_safeflavor.tasks.inputs.rows import rows_of
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder
from mlflow_safeflavor.tasks.inputs.tokenizer import write_tokenizer
from mlflow_safeflavor.tasks.table import TASKS, infer_task, task_class
from mlflow_safeflavor.tasks.text_classification import TextClassification

TEXTS = [
    "the cat sat on the mat",
    "",
    "red tree",
    "return x + y",
    "def ran ( x ) = y - x if the dog sat under a tree else the cat ran on the mat ( x + y ) and "
    "the rest is cut",
    "dog",
    "the 😀 is unknown",
]
PAIRS = [*TEXTS[1:], TEXTS[0]]
COLUMNS = {"text_pair": "after", "text": "before"}


class Bound:
    """A task with everything it needs; ``ask`` predicts."""

    def __init__(self, folder, cls, model, tokenizer, columns=None, **options):
        config = json.loads(json.dumps(cls.describe(model, options)))
        encoder = TextEncoder(folder, write_tokenizer(tokenizer, folder))
        self.task = cls(config, cls.columns_for(columns), encoder)
        self.engine = ModuleEngine(model, torch.device("cpu"), torch.float32)
        self.batches = []

    def __call__(self, inputs):
        self.batches.append({name: array.copy() for name, array in inputs.items()})
        return self.engine(inputs)

    def rows(self, *columns):
        return [
            dict(zip(self.task.columns, values, strict=True))
            for values in zip(*columns, strict=True)
        ]

    def ask(self, *columns, budget=512, **params):
        # Calls so dear that all rows share one, as far as the budget goes.
        engine: Any = self
        scheduler = Scheduler(self.task, engine, max_batch_tokens=budget, forward_cost=10_000)
        return predict_rows(self.task, scheduler, self.rows(*columns), params)

    def answers(self, *columns, **params):
        return self.ask(*columns, **params)[0]


@pytest.fixture
def bound(tmp_path):
    def make(cls, model, tokenizer, columns=None, **options):
        return Bound(tmp_path / "tokenizer", cls, model, tokenizer, columns, **options)

    return make


@pytest.fixture
def classifier(bound, tiny_bert, tiny_tokenizer):
    return bound(TextClassification, tiny_bert(num_labels=3), tiny_tokenizer)


@pytest.fixture
def pair_classifier(bound, tiny_bert, tiny_tokenizer):
    return bound(TextClassification, tiny_bert(num_labels=3), tiny_tokenizer, COLUMNS)


def _close(found, wanted):
    assert np.abs(np.asarray(found) - np.asarray(wanted)).max() < 1e-5


# Text classification, against transformers.pipeline.


HEADS: dict[str, dict[str, Any]] = {
    "softmax": {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}},
    "one label": {"num_labels": 1},
    "multi-label": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "vector regression": {"num_labels": 3, "problem_type": "regression"},
}


@pytest.mark.parametrize("top_k", [1, 2, 100, None])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("head", HEADS)
def test_labels_and_scores_are_those_of_the_pipeline(
    bound, tiny_bert, tiny_tokenizer, head, pair, top_k
):
    model = tiny_bert(initializer_range=0.2, **HEADS[head])
    reference = pipeline(
        "text-classification", model=model, tokenizer=copy.deepcopy(tiny_tokenizer)
    )
    inputs: list[Any] = [
        {"text": a, "text_pair": b} if pair else a for a, b in zip(TEXTS, PAIRS, strict=True)
    ]
    # transformers drops an empty second text of a single row; see test_an_empty_pair_is_a_pair
    if pair:
        inputs = [row for row in inputs if row["text_pair"]]
    wanted = [reference(row, top_k=top_k, truncation=True, max_length=32) for row in inputs]
    wanted = [row[0] if pair and isinstance(row[0], list) else row for row in wanted]

    columns = (
        [[row["text"] for row in inputs], [row["text_pair"] for row in inputs]]
        if pair
        else [inputs]
    )
    task = bound(TextClassification, model, tiny_tokenizer, COLUMNS if pair else None)
    answers = task.answers(*columns, top_k=top_k)

    keys = {"label", "score"} if top_k == 1 else {"label", "score", "labels", "scores"}
    for answer, ranked in zip(answers, wanted, strict=True):
        assert set(answer) == keys
        assert answer["label"] == ranked[0]["label"]
        _close(answer["score"], ranked[0]["score"])
        if top_k != 1:
            assert answer["labels"] == [entry["label"] for entry in ranked]
            _close(answer["scores"], [entry["score"] for entry in ranked])
    assert len({answer["score"] for answer in answers}) > 1


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_function_to_apply_is_that_of_the_pipeline(classifier, tiny_tokenizer, function):
    reference = pipeline(
        "text-classification", model=classifier.engine.module, tokenizer=tiny_tokenizer
    )
    wanted = reference(TEXTS[0], function_to_apply=function, top_k=None)
    answer = classifier.answers(TEXTS[:1], function_to_apply=function, top_k=-1)[0]
    assert answer["labels"] == [entry["label"] for entry in wanted]
    _close(answer["scores"], [entry["score"] for entry in wanted])
    assert answer != classifier.answers(TEXTS[:1], top_k=-1)[0] or function == "softmax"


def test_sigmoid_and_softmax_of_large_logits_do_not_overflow(classifier):
    logits = [{"logits": np.array([800.0, -800.0, 0.0], np.float32)}]
    for function in ("sigmoid", "softmax"):
        params = classifier.task.check_params({"function_to_apply": function})
        assert classifier.task.decoded([{}], [{}], logits, params) == [
            {"label": "LABEL_0", "score": 1.0}
        ]


def test_equal_scores_go_to_the_first_label(classifier):
    params = classifier.task.check_params({"top_k": -1})
    answer = classifier.task.decoded([{}], [{}], [{"logits": np.zeros(3, np.float32)}], params)[0]
    assert answer["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_an_empty_pair_is_a_pair(pair_classifier, tiny_tokenizer):
    (features,) = pair_classifier.task.encoded(
        pair_classifier.rows(["dog"], [""]), pair_classifier.task.check_params({})
    )
    assert features == {k: v[0] for k, v in tiny_tokenizer(["dog"], [""]).items()}
    assert len(features["input_ids"]) == 4


def test_columns_may_have_any_names_and_any_order(pair_classifier):
    frame = {"after": PAIRS, "before": TEXTS}
    rows = rows_of(frame, pair_classifier.task.columns)
    assert rows == pair_classifier.rows(TEXTS, PAIRS)
    assert pair_classifier.task.columns == {"text": "before", "text_pair": "after"}
    swapped = pair_classifier.answers(PAIRS, TEXTS)
    assert pair_classifier.answers(TEXTS, PAIRS) != swapped


# Feature extraction, against a reference without padding.


@pytest.fixture(scope="module")
def minilm(minilm_folder, tmp_path_factory):
    """Model, tokenizer and a maker of tasks on the real weights."""
    model = AutoModel.from_pretrained(
        minilm_folder, local_files_only=True, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)

    def make(**options):
        folder = tmp_path_factory.mktemp("minilm")
        return Bound(folder, FeatureExtraction, model, tokenizer, None, **options)

    return model, copy.deepcopy(tokenizer), make


SENTENCES = [
    "A man is eating food.",
    "",
    "Someone eats a meal 🍲.",
    "word " * 700,
    "The stock market fell. " * 9,
    "x",
]


def _reference(minilm, pooling, normalize):
    model, tokenizer, _ = minilm
    with torch.inference_mode():
        for text in SENTENCES:
            hidden = model(
                **tokenizer([text], truncation=True, max_length=512, return_tensors="pt")
            )[0][0]
            vector = {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            yield (vector / vector.norm() if normalize else vector).numpy()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings_of_real_weights(minilm, pooling, normalize):
    answers, outputs = minilm[2](pooling=pooling, normalize=normalize).ask(SENTENCES, budget=4000)
    wanted = np.stack(list(_reference(minilm, pooling, normalize)))
    _close([answer["embedding"] for answer in answers], wanted)
    assert all(
        output["embedding"].dtype == np.float32 and output["embedding"].shape == (384,)
        for output in outputs
    )


def test_mean_of_unnormalised_vectors_is_the_default(minilm):
    assert minilm[2]().answers(SENTENCES) == minilm[2](pooling="mean", normalize=False).answers(
        SENTENCES
    )


def test_near_sentences_have_near_embeddings(minilm):
    vectors = np.array(
        [answer["embedding"] for answer in minilm[2](normalize=True).answers(SENTENCES)]
    )
    similar, different = vectors[0] @ vectors[2], vectors[0] @ vectors[4]
    assert similar > 0.6 > 0.3 > different


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pooled_in_float32(bound, tiny_bert, tiny_tokenizer, dtype):
    model = tiny_bert(None).to(dtype)
    _, outputs = bound(FeatureExtraction, model, tiny_tokenizer).ask(TEXTS)
    with torch.inference_mode():
        hidden = model(**tiny_tokenizer([TEXTS[0]], return_tensors="pt")).last_hidden_state[0]
    assert hidden.dtype == dtype
    assert outputs[0]["embedding"].dtype == np.float32
    # Exact in float32; the same mean rounded to half precision is not.
    alone = bound(FeatureExtraction, model, tiny_tokenizer).ask(TEXTS[:1])[1][0]["embedding"]
    assert np.array_equal(alone, hidden.float().mean(dim=0).numpy())
    assert not np.array_equal(alone, hidden.mean(dim=0).float().numpy())


# Nothing of one row depends on the rows beside it.


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_answers_as_each_row_alone(bound, tiny_tokenizer, architecture, head, side):
    tiny_tokenizer.padding_side = side
    model = tiny_model(architecture, head)
    task = bound(TASKS[infer_task(type(model).__name__)], model, tiny_tokenizer)
    (name,) = task.ask(TEXTS[:1])[1][0]
    together = [output[name] for output in task.ask(TEXTS, budget=10_000)[1]]
    for text, output in zip(TEXTS, together, strict=True):
        (inputs,) = [tiny_tokenizer([text], truncation=True, max_length=32, return_tensors="pt")]
        (alone,) = task.ask([text])[1]
        _close(output, alone[name])
        if head != "Model":
            taken = {
                name: inputs[name] for name in task.task.config["input_names"] if name in inputs
            }
            with torch.inference_mode():
                _close(output, model(**taken).logits[0])
    assert np.abs(together[0] - together[2]).max() > 1e-3  # else the comparison above says nothing


def test_padding_is_put_where_the_model_does_not_read_it(bound, tiny_tokenizer):
    """The side belongs to the model.

    The tokenizer's own is a habit of training or of generation.
    """
    for tokenizers_side in ("left", "right"):
        tiny_tokenizer.padding_side = tokenizers_side
        for architecture, wanted in (
            ("Bert", [1, 1, 1, 0, 0]),
            ("Llama", [1, 1, 1, 0, 0]),
            ("XLNet", [0, 0, 1, 1, 1]),
        ):
            task = bound(
                TextClassification,
                tiny_model(architecture, "ForSequenceClassification"),
                tiny_tokenizer,
            )
            task.ask(["dog", "the cat sat"])
            (batch,) = task.batches
            assert batch["attention_mask"].tolist() == [[1] * 5, wanted], architecture
            short = batch["input_ids"][1].tolist()
            assert [token for token in short if token] == tiny_tokenizer("dog")["input_ids"]
            assert [token > 0 for token in short] == [bool(real) for real in wanted]


def test_rows_are_filled_up_with_the_models_padding_token(bound, tiny_tokenizer):
    for cls, head in (
        (TextClassification, "ForSequenceClassification"),
        (FeatureExtraction, "Model"),
    ):
        task = bound(cls, tiny_model("GPT2", head, pad_token_id=7), tiny_tokenizer)
        task.ask(["dog", "the cat sat"])
        (batch,) = task.batches
        assert batch["input_ids"][1].tolist()[-2:] == [7, 7]
        assert batch["input_ids"].dtype == np.int64


def test_a_classifier_without_padding_token_runs_row_by_row(bound, tiny_tokenizer):
    task = bound(
        TextClassification,
        tiny_model("GPT2", "ForSequenceClassification", pad_token_id=None),
        tiny_tokenizer,
    )
    answers = task.answers(TEXTS)
    assert [len(batch["input_ids"]) for batch in task.batches] == [1] * len(TEXTS)
    assert answers == [task.answers([text])[0] for text in TEXTS]
    # Behind a mask the tokenizer's padding token does as well.
    task = bound(FeatureExtraction, tiny_model("Llama", "Model", pad_token_id=None), tiny_tokenizer)
    task.ask(TEXTS)
    assert [len(batch["input_ids"]) for batch in task.batches] == [len(TEXTS)]


def test_a_model_is_given_only_what_its_forward_takes(bound, tiny_tokenizer):
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for architecture, wanted in (
        ("DistilBert", {"input_ids", "attention_mask"}),
        ("FNet", {"input_ids", "token_type_ids"}),
    ):
        task = bound(FeatureExtraction, tiny_model(architecture, "Model"), tiny_tokenizer)
        task.ask(TEXTS)
        assert set(task.batches[0]) == wanted


POOLED = {"normalize": False, "prompts": {}, "include_prompt": True}


@pytest.mark.parametrize(("pooling", "wanted"), [("cls", [[1.0], [5.0]]), ("last", [[2.0], [6.0]])])
def test_the_first_and_last_real_token_on_either_side_of_padding(pooling, wanted):
    task = FeatureExtraction({**POOLED, "pooling": [pooling]}, {"text": "text"})
    hidden = np.array([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    mask = np.array([[True, True, False], [False, True, True]])
    assert [
        output["embedding"].tolist() for output in task.read({"last_hidden_state": hidden}, mask)
    ] == wanted


def test_nan_at_padding_positions_does_not_reach_the_mean(classifier):
    task = FeatureExtraction({**POOLED, "pooling": ["mean"]}, {"text": "text"})
    hidden = np.array([[[1.0, 2.0], [3.0, 4.0], [float("nan")] * 2]])
    (output,) = task.read({"last_hidden_state": hidden}, np.array([[True, True, False]]))
    assert output["embedding"].tolist() == [2.0, 3.0]


def test_scores_of_a_whole_vocabulary_bound_a_batch(bound, tiny_tokenizer, monkeypatch):
    task = bound(FillMask, tiny_model("Bert", "ForMaskedLM"), tiny_tokenizer)
    rows = [
        f"the {tiny_tokenizer.mask_token} {text}" for text in ("dog", "cat", "dog ran", "cat sat")
    ]
    wanted = task.answers(rows)
    assert len(task.batches) == 1
    monkeypatch.setattr("mlflow_safeflavor.tasks.fill_mask._SCORES", 12 * task.task.encoder.size)
    again = task.answers(rows)
    assert max(batch["input_ids"].size for batch in task.batches[1:]) == 12
    assert [answer["token"] for answer in again] == [answer["token"] for answer in wanted]


# Length.


@pytest.mark.parametrize(
    ("architecture", "limit"),
    [("Bert", 34), ("Roberta", 33), ("MPNet", 33), ("GPT2", 34), ("XLNet", None), ("Llama", 34)],
)
def test_the_longest_text_a_model_takes(bound, tiny_tokenizer, architecture, limit):
    # Positions of RoBERTa and MPNet start behind their padding index, here 0; MPNet's is always 1.
    limit = 32 if architecture == "MPNet" else limit
    tiny_tokenizer.model_max_length = 10**30
    task = bound(FeatureExtraction, tiny_model(architecture, "Model"), tiny_tokenizer)
    assert task.task.limit == limit
    task.ask(["dog " * 50])
    assert task.batches[0]["input_ids"].shape == (1, limit or 52)


def test_a_roberta_of_usual_shape_takes_512_tokens():
    with torch.device("meta"):
        model = transformers.RobertaModel(
            transformers.RobertaConfig(max_position_embeddings=514, num_hidden_layers=1)
        )
    assert FeatureExtraction.describe(model, {})["max_length"] == 512


def test_the_tokenizers_limit_counts_too(bound, tiny_bert, tiny_tokenizer):
    tiny_tokenizer.model_max_length = 9
    assert bound(FeatureExtraction, tiny_bert(None), tiny_tokenizer).task.limit == 9


def test_max_length_cuts(pair_classifier, tiny_tokenizer):
    pair_classifier.ask(TEXTS, PAIRS, max_length=6)
    assert max(batch["input_ids"].shape[1] for batch in pair_classifier.batches) == 6
    wanted = tiny_tokenizer(TEXTS[:1], PAIRS[-1:], truncation=True, max_length=6)
    (features,) = pair_classifier.task.encoded(
        pair_classifier.rows(TEXTS[:1], PAIRS[-1:]),
        pair_classifier.task.check_params({"max_length": 6}),
    )
    assert features["input_ids"] == wanted["input_ids"][0]


def test_a_text_that_is_too_long_without_truncation_names_row_and_columns(
    classifier, pair_classifier
):
    texts = ["dog", "the " * 40]
    with pytest.raises(
        InputError, match=r"where: row 1\n[\s\S]*at most 32 tokens[\s\S]*42 tokens[\s\S]*hint"
    ):
        classifier.ask(texts, truncation=False)
    with pytest.raises(InputError, match=r"where: row 0\n[\s\S]*at most 4 tokens"):
        classifier.ask(["the cat sat on", "dog"], truncation=False, max_length=4)
    with pytest.raises(
        InputError, match=r"row 1, columns 'before' and 'after'[\s\S]*at most 32 tokens"
    ):
        pair_classifier.ask(texts, texts, truncation=False)
    assert classifier.answers(["the " * 30], truncation=False) == classifier.answers(["the " * 30])


def test_a_text_without_any_token_names_its_row(bound, tiny_bert):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    task = bound(FeatureExtraction, tiny_bert(None), bare)
    with pytest.raises(InputError, match=r"no tokens[\s\S]*where: row 1\n"):
        task.ask(["a", ""])


# Rows and params that are refused.


@pytest.mark.parametrize("value", [None, float("nan"), 5, b"a", ["a"], True])
def test_a_bad_value_names_row_and_column(pair_classifier, value):
    rows = [{"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": value}]
    with pytest.raises(InputError, match=r"not a text[\s\S]*where: row 1, column 'after'"):
        predict_rows(pair_classifier.task, Scheduler(pair_classifier.task, pair_classifier), rows)
    assert not pair_classifier.batches


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"top_k": 0}, r"'top_k'[\s\S]*at least 1, or -1[\s\S]*found: int 0"),
        ({"top_k": -2}, r"'top_k'[\s\S]*found: int -2"),
        ({"top_k": True}, r"'top_k'[\s\S]*found: bool True"),
        ({"top_k": np.True_}, r"'top_k'[\s\S]*found: bool"),
        ({"top_k": 2.0}, r"'top_k'[\s\S]*found: float 2.0"),
        ({"top_k": "2"}, r"'top_k'[\s\S]*found: str '2'"),
        ({"top_k": [1]}, r"'top_k'[\s\S]*found: list"),
        ({"max_length": -1}, r"'max_length'[\s\S]*found: int -1"),
        ({"max_length": 2}, r"'max_length'[\s\S]*3 to 32 tokens[\s\S]*found: 2"),
        ({"max_length": 33}, r"'max_length'[\s\S]*3 to 32 tokens[\s\S]*found: 33"),
        ({"truncation": 1}, r"'truncation'[\s\S]*true or false[\s\S]*found: int 1"),
        ({"truncation": None}, r"'truncation'[\s\S]*found: NoneType"),
        (
            {"function_to_apply": "tanh"},
            r"'function_to_apply'[\s\S]*default \| softmax[\s\S]*found: str 'tanh'",
        ),
        ({"function_to_apply": 1}, r"'function_to_apply'[\s\S]*found: int 1"),
        (
            {"topk": 1, 5: 1},
            r"Unknown param[\s\S]*'topk', 5[\s\S]*top_k, function_to_apply, max_length, truncation",
        ),
        ([1], r"params is no dict[\s\S]*found: list"),
    ],
    ids=str,
)
def test_a_bad_param_is_named(classifier, params, message):
    with pytest.raises(InputError, match=message):
        classifier.task.check_params(params)


def test_good_params_in_plain_python_types(classifier):
    defaults = {"top_k": 1, "function_to_apply": "default", "max_length": 0, "truncation": True}
    assert classifier.task.check_params(None) == classifier.task.check_params({}) == defaults
    given = {
        "top_k": np.int64(2),
        "max_length": np.int32(5),
        "truncation": np.False_,
        "function_to_apply": None,
    }
    checked = classifier.task.check_params(given)
    assert checked == {
        "top_k": 2,
        "max_length": 5,
        "truncation": False,
        "function_to_apply": "default",
    }
    assert {type(value) for value in checked.values()} == {int, bool, str}
    assert classifier.task.check_params({"top_k": None, "max_length": None}) == {
        **defaults,
        "top_k": -1,
    }
    assert classifier.task.check_params(checked) == checked


def test_max_length_leaves_room_for_special_tokens_and_both_texts(pair_classifier):
    with pytest.raises(InputError, match="5 to 32 tokens"):
        pair_classifier.task.check_params({"max_length": 4})
    assert pair_classifier.task.check_params({"max_length": 5})["max_length"] == 5


def test_an_answer_that_is_no_number_names_the_row(classifier):
    outputs = [
        {"logits": np.array([0, 1, 2], np.float32)},
        {"logits": np.array([0, np.nan, 2], np.float32)},
    ]
    with pytest.raises(
        InputError, match=r"not a number[\s\S]*row 1[\s\S]*1 of 2 rows[\s\S]*float32"
    ):
        classifier.task.decoded([{}, {}], [{}, {}], outputs, classifier.task.check_params({}))


@pytest.mark.parametrize(
    "outputs",
    [
        {"last_hidden_state": np.zeros((1, 3, 3))},
        {"logits": np.zeros((1, 2))},
        {"logits": np.zeros((2, 3))},
        {},
    ],
    ids=["another name", "another label count", "another row count", "nothing"],
)
def test_a_model_that_returns_something_else(classifier, outputs):
    with pytest.raises(StructureError, match=r"does not return[\s\S]*logits, shape \(1, 3\)"):
        classifier.task.forward(
            lambda inputs: outputs,
            classifier.task.encoded([{"text": "a"}], classifier.task.check_params({})),
            {},
        )


def test_a_module_that_names_no_outputs_is_read_by_position(classifier):
    features = classifier.task.encoded([{"text": "a"}], classifier.task.check_params({}))
    (output,) = classifier.task.forward(lambda inputs: {"output_0": np.ones((1, 3))}, features, {})
    assert output["logits"].tolist() == [1, 1, 1]


# What is recorded at save.


def test_what_a_classifier_records(tiny_bert):
    model = tiny_bert(id2label={0: "no", 1: "yes"}, problem_type="single_label_classification")
    assert TextClassification.describe(model, {}) == {
        "input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "max_length": 32,
        "pad_token_id": 0,
        "padding_side": "right",
        "labels": ["no", "yes"],
        "problem_type": "single_label_classification",
        "function_to_apply": "softmax",
    }


def test_labels_that_are_no_numbering_are_refused(tiny_bert):
    for labels in ({}, {1: "a", 2: "b"}):
        model = tiny_bert()
        model.config.__dict__["id2label"] = labels
        with pytest.raises(StructureError, match="id2label"):
            TextClassification.describe(model, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "median"}, r"'pooling'[\s\S]*mean \| cls \| last \| max[\s\S]*'median'"),
        ({"normalize": 1}, r"'normalize'[\s\S]*True \| False[\s\S]*1"),
        (
            {"pool": "cls"},
            r"'pool'[\s\S]*include_prompt \| normalize \| pooling \| prompts \| similarity",
        ),
    ],
)
def test_an_option_that_is_not_allowed(tiny_bert, options, message):
    with pytest.raises(InputError, match=message):
        FeatureExtraction.describe(tiny_bert(None), options)


def test_models_that_do_not_read_text_are_refused():
    with pytest.raises(
        StructureError, match=r"does not read text[\s\S]*Linear\.forward[\s\S]*input_ids"
    ):
        FeatureExtraction.describe(torch.nn.Linear(2, 2), {})
    with torch.device("meta"):
        model = transformers.BartModel(
            transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1)
        )
    with pytest.raises(StructureError, match=r"encoder-decoder[\s\S]*BartModel[\s\S]*hint"):
        FeatureExtraction.describe(model, {})


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("GPT2ForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("GPT2LMHeadModel", "text-generation"),
        ("XLMWithLMHeadModel", None),
        ("GPT2DoubleHeadsModel", None),
        ("EncoderDecoderModel", None),
        ("BertForTokenClassification", "token-classification"),
        ("DistilBertForQuestionAnswering", "question-answering"),
        ("XLNetForQuestionAnsweringSimple", "question-answering"),
        ("RobertaForMaskedLM", "fill-mask"),
        ("BertForMultipleChoice", None),
        ("Linear", None),
    ],
)
def test_the_task_of_a_model_class(name, task):
    if task:
        assert infer_task(name) == task
    else:
        with pytest.raises(StructureError, match=rf"{name}[\s\S]*task="):
            infer_task(name)


def test_tasks_by_name():
    assert all(cls.name == name for name, cls in TASKS.items())
    assert task_class("sentiment-analysis").name == "text-classification"
    assert task_class("ner").name == "token-classification"
    with pytest.raises(
        StructureError, match=r"Unknown task[\s\S]*feature-extraction \| [\s\S]*text-classification"
    ):
        task_class("chess")


def test_signatures(classifier, pair_classifier, minilm):
    assert [spec["name"] for spec in pair_classifier.task.signature().inputs.to_dict()] == [
        "before",
        "after",
    ]
    signature = classifier.task.signature()
    assert signature.inputs.to_dict() == [{"type": "string", "required": True}]
    assert [(s["name"], s["type"]) for s in signature.outputs.to_dict()] == [
        ("label", "string"),
        ("score", "double"),
    ]
    assert {
        param.name: param.default for param in signature.params
    } == classifier.task.check_params({})
    # One column of lists is said as an object: Spark takes that for the columns that come back.
    (output,) = minilm[2]().task.signature().outputs.to_dict()
    assert output["properties"] == {
        "embedding": {"type": "array", "items": {"type": "double"}, "required": True}
    }


def test_golden_rows_have_clearly_different_lengths(minilm, pair_classifier):
    task = minilm[2]().task
    lengths = sorted(
        task.cost(features) for features in task.encoded(task.golden_rows(), task.check_params({}))
    )
    assert len(lengths) == 4
    assert min(np.diff(lengths)) >= 5
    assert 50 <= lengths[-1] <= 80
    rows = pair_classifier.task.golden_rows()
    assert [set(row) for row in rows] == [{"text", "text_pair"}] * 4
    assert any(not row["text"].isascii() for row in rows)


def test_answers_are_json(classifier, minilm):
    for answers in (classifier.answers(TEXTS, top_k=-1), minilm[2]().answers(SENTENCES[:2])):
        assert json.loads(json.dumps(answers, allow_nan=False)) == answers


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"text_pair": "a"},
        {"text": "a", "other": "b"},
        {"text": "a", "text_pair": "a"},
        {"text": ""},
        {"text": 1},
        {"text": None, "text_pair": "a"},
        {"text_pair": None},
    ],
    ids=str,
)
def test_input_columns_that_do_not_fit(columns):
    with pytest.raises(InputError, match=r"text-classification[\s\S]*text \(required\), text_pair"):
        TextClassification.columns_for(columns)


def test_feature_extraction_takes_one_text():
    assert (
        FeatureExtraction.columns_for(None)
        == FeatureExtraction.columns_for({"text": None})
        == {"text": None}
    )
    with pytest.raises(InputError, match=r"fields: text \(required\)"):
        FeatureExtraction.columns_for({"text": "a", "text_pair": "b"})


# Threads.


def test_many_threads_with_mixed_lengths_and_params_get_single_threaded_answers(pair_classifier):
    draw = random.Random(0)
    words = "the a cat dog sat ran on under mat tree red green return x y".split()

    def text():
        return " ".join(draw.choices(words, k=draw.randint(0, 40)))

    jobs = [
        (
            [[text() for _ in range(count)], [text() for _ in range(count)]],
            {"top_k": draw.choice([1, 2, -1]), "max_length": draw.choice([0, 5, 9, 20])},
        )
        for count in draw.choices(range(1, 6), k=200)
    ]
    task = pair_classifier.task

    def encode(job):
        return task.encoded(pair_classifier.rows(*job[0]), task.check_params(job[1]))

    wanted = [(encode(job), pair_classifier.answers(*job[0], **job[1])) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda job: (encode(job), pair_classifier.answers(*job[0], **job[1])), jobs)
        )
    for (found_features, found_answers), (features, answers) in zip(found, wanted, strict=True):
        assert found_features == features
        for one, other in zip(found_answers, answers, strict=True):
            assert (one.keys(), one["label"], one.get("labels")) == (
                other.keys(),
                other["label"],
                other.get("labels"),
            )
            _close(one["score"], other["score"])
            _close(one.get("scores", [0]), other.get("scores", [0]))


def test_a_text_of_many_characters_is_cut_and_an_empty_one_is_a_text(classifier):
    long = "the cat sat on the mat 😀 " * 7_000
    answers = classifier.answers([long, "", long[:200]])
    assert len(long) >= 170_000
    assert answers[0] == pytest.approx(answers[2])
    with pytest.raises(
        InputError, match=r"row 1[\s\S]*longer than the model takes|longer than[\s\S]*row 1"
    ):
        classifier.answers(["dog", long], truncation=False)
