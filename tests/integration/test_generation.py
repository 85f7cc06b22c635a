"""Tasks that write text.

What the live model writes, alone or in a batch, greedily or by seed, and after loading.
"""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GenerationConfig, T5ForConditionalGeneration, pipeline
from writers import ALL, DECODERS, ENCODER_DECODERS, ODD_DECODERS, byte_tokenizer, writer

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, ParityError, StructureError
from mlflow_safeflavor.module.engine import ModuleEngine
from mlflow_safeflavor.module.generation import Generation
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder
from mlflow_safeflavor.tasks.inputs.tokenizer import load_tokenizer, write_tokenizer
from mlflow_safeflavor.tasks.sampling import seed_of
from mlflow_safeflavor.tasks.table import infer_task, task_class
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.text2text_generation import Text2TextGeneration
from mlflow_safeflavor.tasks.text_generation import TextGeneration

TEXTS = [
    "the cat",
    "a",
    "on the other hand, the cat sat in the tree and ran",
    "Zürich 😀",
    "in her",
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the cat? 😀"},
]


class Bound:
    """A task with everything it needs; ``answers`` predicts in one batch, ``alone`` row by row."""

    def __init__(self, folder, model, tokenizer, columns=None, cls=None, **options):
        cls = cls or task_class(infer_task(type(model).__name__))
        self.model, self.tokenizer = model, tokenizer
        config = json.loads(json.dumps(cls.describe(model, options)))
        encoder = TextEncoder(folder, write_tokenizer(tokenizer, folder))
        more = {"tokenizer": lambda: load_tokenizer(folder)} if "tokenizer" in cls.reads else {}
        self.task = cls(config, cls.columns_for(columns), encoder, **more)
        self.engine = ModuleEngine(model, torch.device("cpu"), torch.float32)

    def run(self, data, **params):
        rows = self.task.rows(data)
        self.task.require_clean(rows, params)
        checked = self.task.check_params(params)
        features = self.task.encoded(rows, checked)
        pieces = [self.task.pieces(row) for row in features]
        flat = self.task.forward(self.engine, [piece for row in pieces for piece in row], checked)
        answered = iter(flat)
        outputs = [self.task.join([next(answered) for _ in row]) for row in pieces]
        return self.task.decoded(rows, features, outputs, checked), features, outputs

    def answers(self, data, **params):
        return self.run(data, **params)[0]

    def texts(self, data, **params):
        return [answer["generated_text"] for answer in self.answers(data, **params)]

    def alone(self, data, **params):
        return [self.texts([row], **params)[0] for row in data]


@pytest.fixture
def bound(tmp_path):
    def make(model, tokenizer=None, columns=None, **options):
        if isinstance(model, str):
            model = writer(model)
        tokenizer = tokenizer or byte_tokenizer(eos=model.config.is_encoder_decoder)
        return Bound(tmp_path / "tokenizer", model, tokenizer, columns, **options)

    return make


def _trimmed(text):
    """Without the character that the last token left unfinished."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


# As transformers, one row at a time.


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_texts_are_those_of_the_pipeline(bound, name, bos, full):
    task = bound(name, byte_tokenizer(bos=bos))
    reference = pipeline(
        "text-generation", model=copy.deepcopy(task.model), tokenizer=byte_tokenizer(bos=bos)
    )
    asked = {"max_new_tokens": 12, "return_full_text": full}
    wanted = [
        _trimmed(reference(text, do_sample=False, **asked)[0]["generated_text"]) for text in TEXTS
    ]
    assert task.texts(TEXTS, **asked) == wanted
    assert len(set(wanted)) > 3


# RWKV in transformers mixes up the rows of a batch, and with them the beams.
@pytest.mark.parametrize(
    ("name", "beams"), [(name, n) for name in ALL for n in (1, 3) if (name[:4], n) != ("Rwkv", 3)]
)
def test_tokens_are_those_of_the_live_model_whatever_is_beside_a_row(bound, name, beams):
    task = bound(name)
    answers, features, outputs = task.run(TEXTS, max_new_tokens=12, num_beams=beams)
    for row, output in zip(features, outputs, strict=True):
        ids = torch.tensor([row["input_ids"]])
        live = task.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            num_beams=beams,
            pad_token_id=2,
        )
        start = 1 if task.task.encoder_decoder else ids.shape[1]
        assert output["ids"].tolist() == task.task._until_end(live[0, start:].numpy()).tolist()
    assert [answer["generated_text"] for answer in answers] == task.alone(
        TEXTS, max_new_tokens=12, num_beams=beams
    )
    assert len({tuple(output["ids"]) for output in outputs}) > 2


@pytest.mark.parametrize("name", ALL)
def test_rows_share_a_batch_where_the_model_ignores_padding(bound, name):
    task = bound(name)
    shapes = []
    generate = task.engine.generate
    task.engine.generate = lambda inputs, generation: (
        shapes.append(len(inputs["input_ids"])),
        generate(inputs, generation),
    )[1]
    task.answers(TEXTS, max_new_tokens=2)
    assert shapes == ([1] * len(TEXTS) if name in ODD_DECODERS else [len(TEXTS)])


_PENALTIES = [
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2},
    {"min_length": 18, "eos_token_id": list(range(2, 200))},
    {"min_new_tokens": 3, "eos_token_id": list(range(2, 200))},
]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartForConditionalGeneration"])
@pytest.mark.parametrize("setting", _PENALTIES, ids=lambda setting: next(iter(setting)))
def test_penalties_do_not_count_padding(bound, name, setting):
    task = bound(writer(name, generation=setting))
    plain = bound(name)
    texts = task.texts(TEXTS, max_new_tokens=20)
    assert texts == task.alone(TEXTS, max_new_tokens=20)
    assert texts != plain.texts(TEXTS, max_new_tokens=20)
    ids = torch.tensor([task.run(TEXTS)[1][0]["input_ids"]])
    live = task.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, pad_token_id=2
    )
    start = 1 if task.task.encoder_decoder else ids.shape[1]
    wanted = _trimmed(task.tokenizer.decode(live[0, start:], skip_special_tokens=True))
    assert _trimmed(texts[0]) == (wanted if task.task.encoder_decoder else TEXTS[0] + wanted)


# As transformers' generate of one row, by the params of a request.


_PER_REQUEST = [
    {"min_new_tokens": 12},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 3, "min_new_tokens": 3, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("asked", _PER_REQUEST, ids=str)
@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_what_a_request_asks_for_is_what_transformers_generates(bound, name, asked):
    ends = {"eos_token_id": [2, *range(70, 200)]}  # or hardly any text would end early
    task = bound(writer(name, generation=ends))
    asked = {"max_new_tokens": 14, **asked}
    answers, features, outputs = task.run(TEXTS, **asked)
    for row, answer, output in zip(features, answers, outputs, strict=True):
        ids = torch.tensor([row["input_ids"]])
        live = task.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **asked
        )
        start = 1 if task.task.encoder_decoder else ids.shape[1]
        wanted = [task.task._until_end(line[start:].numpy()).tolist() for line in live]
        assert [found.tolist() for found in output.values()] == wanted
        assert len(wanted) == asked.get("num_return_sequences", 1)
        assert all(len(tokens) >= asked.get("min_new_tokens", 0) for tokens in wanted)
        if len(wanted) > 1:
            assert answer["generated_texts"][0] == answer["generated_text"]
            assert answer["finish_reasons"][0] == answer["finish_reason"]
            assert len(answer["generated_texts"]) == len(wanted)
    assert answers == [task.answers([text], **asked)[0] for text in TEXTS]
    assert {len(output["ids"]) for output in outputs} != {14}


def test_the_generation_config_tells_the_new_defaults_too(bound):
    said = {
        "num_beams": 2, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 5
    }  # fmt: skip
    task = bound(writer("GPT2LMHeadModel", generation=said))
    params = task.task.check_params({"max_new_tokens": 3})  # shorter than the model's own least
    assert {name: params[name] for name in said} == said
    assert len(task.answers(["the cat"], max_new_tokens=3)[0]["generated_texts"]) == 2
    golden = task.task.check_params(task.task.golden(task.task.config))
    assert (golden["num_return_sequences"], golden["num_beams"]) == (1, 1)
    off = {"no_repeat_ngram_size": 0, "num_return_sequences": None, "min_new_tokens": None}
    assert task.texts(TEXTS, **off) == bound(
        writer("GPT2LMHeadModel", generation={"num_beams": 2})
    ).texts(TEXTS)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_several_draws_of_a_prompt_depend_on_row_and_seed_alone(bound, name):
    task = bound(name)
    asked = {"do_sample": True, "max_new_tokens": 10, "seed": 7}
    found = task.answers(TEXTS, num_return_sequences=4, **asked)
    assert found[::-1] == task.answers(TEXTS[::-1], num_return_sequences=4, **asked)
    for text, answer in zip(TEXTS, found, strict=True):
        assert answer["generated_text"] == task.texts([text], **asked)[0]
        (fewer,) = task.answers([text], num_return_sequences=2, **asked)
        assert fewer["generated_texts"] == answer["generated_texts"][:2]
    assert sum(len(set(answer["generated_texts"])) for answer in found) > 2 * len(TEXTS)
    # The second text of a seed is not the first of another.
    assert len({seed_of(seed, draw) for seed in range(50) for draw in range(9)}) == 450
    drawn = task.answers(["the cat"] * 2, **{**asked, "seed": -1}, num_return_sequences=3)
    assert len({text for answer in drawn for text in answer["generated_texts"]}) > 3


def test_draws_without_a_seed_share_a_batch(bound):
    task = bound("LlamaForCausalLM")
    shapes = []
    generate = task.engine.generate
    task.engine.generate = lambda inputs, generation: (
        shapes.append(len(inputs["input_ids"])) or generate(inputs, generation)
    )
    task.answers(TEXTS[:2], max_new_tokens=2, do_sample=True, num_return_sequences=3)
    task.answers(TEXTS[:2], max_new_tokens=2, no_repeat_ngram_size=2)  # of two lengths
    assert shapes == [6, 1, 1]
    t5 = bound("T5ForConditionalGeneration")
    shapes.clear()
    generate = t5.engine.generate
    t5.engine.generate = task.engine.generate
    t5.answers(TEXTS, max_new_tokens=2, no_repeat_ngram_size=2, repetition_penalty=2.0)
    assert shapes == [len(TEXTS)]  # a decoder behind an encoder begins without padding


# Prompt templates.


def test_a_template_is_put_around_each_prompt(bound):
    template = 'Q: {prompt} "{{}}"\nA:'
    plain = bound("LlamaForCausalLM")
    task = bound("LlamaForCausalLM", prompt_template=template)
    around = [template.format(prompt=text) for text in TEXTS]
    wanted = plain.texts(around, max_new_tokens=6, return_full_text=False)
    assert task.texts(TEXTS, max_new_tokens=6) == wanted
    full = task.texts(TEXTS, max_new_tokens=6, return_full_text=True)
    assert full == plain.texts(around, max_new_tokens=6)
    assert task.task.metadata(task.task.config) == {"prompt_template": template}
    assert plain.task.metadata(plain.task.config) == {}
    t5 = bound("T5ForConditionalGeneration", prompt_template="{prompt} =", prefix="sum: ")
    assert t5.run(["a"])[1][0]["input_ids"] == t5.tokenizer("sum: a =")["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        *("", "no field", "{prompt} {prompt}", "{}", "{0}", "{prompt", "{prompt:9999999999}"),
        *("{prompt!r}", "{prompt.x}", "{prompt}{other}", 3),
    ],
    ids=str,
)
def test_what_is_no_template_is_refused_at_save(template):
    with pytest.raises(InputError, match="prompt_template"):
        TextGeneration.describe(writer("GPT2LMHeadModel"), {"prompt_template": template})


def test_a_tokenizer_without_padding_token_is_enough(bound):
    task = bound("GPT2LMHeadModel", byte_tokenizer(pad=None))
    assert task.texts(TEXTS, max_new_tokens=8) == task.alone(TEXTS, max_new_tokens=8)


# The generation config is part of the model.


def test_the_generation_config_tells_the_defaults(bound):
    said = {
        "num_beams": 3,
        "max_length": 9,
        "length_penalty": 2.0,
        "forced_bos_token_id": 77,
        "eos_token_id": [2, 80],
    }
    task = bound(writer("BartForConditionalGeneration", generation=said))
    params = task.task.check_params({})
    assert (params["num_beams"], params["max_new_tokens"]) == (3, 8)
    declared = {param.name: param.default for param in task.task.signature().params}
    assert (declared["num_beams"], declared["max_new_tokens"], declared["seed"]) == (3, 8, -1)
    _, features, outputs = task.run(TEXTS)
    for row, output in zip(features, outputs, strict=True):
        live = task.model.generate(input_ids=torch.tensor([row["input_ids"]]))
        assert output["ids"].tolist() == task.task._until_end(live[0, 1:].numpy()).tolist()
        assert output["ids"][0] == 77


def test_what_the_module_says_later_does_not_count(bound):
    task = bound("BartForConditionalGeneration")
    before = task.texts(TEXTS, max_new_tokens=8)
    task.model.generation_config = GenerationConfig(
        forced_bos_token_id=77, num_beams=2, decoder_start_token_id=2
    )
    assert task.texts(TEXTS, max_new_tokens=8) == before
    assert task.model.generation_config.num_beams == 2


def test_stop_texts_of_the_generation_config_are_the_default(bound):
    assert bound(writer("GPT2LMHeadModel", generation={"stop_strings": "x"})).task.check_params({})[
        "stop"
    ] == ["x"]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, StructureError),
        ({"prompt_lookup_num_tokens": 3}, StructureError),
        ({"temperature": 0.0}, InputError),
        ({"do_sample": True, "num_beams": 2}, InputError),
    ],
)
def test_generation_configs_that_cannot_be_followed_are_refused_at_save(said, error):
    with pytest.raises(error, match=next(iter(said))):
        TextGeneration.describe(writer("GPT2LMHeadModel", generation=said), {})


# Sampling.

_SAMPLED = {"do_sample": True, "max_new_tokens": 10}


def test_a_seed_gives_a_row_its_text_whatever_is_beside_it(bound):
    task = bound("LlamaForCausalLM")
    texts = task.texts(TEXTS, seed=7, **_SAMPLED)
    assert texts == task.texts(TEXTS, seed=7, **_SAMPLED) == task.alone(TEXTS, seed=7, **_SAMPLED)
    assert texts[::-1] == task.texts(TEXTS[::-1], seed=7, **_SAMPLED)
    assert texts != task.texts(TEXTS, seed=8, **_SAMPLED)
    assert texts != task.texts(TEXTS, seed=7, **{**_SAMPLED, "temperature": 0.1})


def test_without_a_seed_each_request_and_each_row_is_drawn_anew(bound):
    task = bound("LlamaForCausalLM")
    rows = task.texts(["the cat"] * 4, **_SAMPLED)
    assert len(set(rows)) > 1
    assert rows != task.texts(["the cat"] * 4, **_SAMPLED)


def test_sampling_leaves_torchs_random_state_alone(bound):
    task = bound("LlamaForCausalLM")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = task.texts(TEXTS, seed=7, **_SAMPLED)
    task.texts(TEXTS, **_SAMPLED)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert task.texts(TEXTS, seed=7, **_SAMPLED) == first


@pytest.mark.parametrize(
    "warped", [{"top_k": 0}, {"top_k": 3, "temperature": 0.7}, {"top_k": 0, "top_p": 0.5}]
)
def test_tokens_are_drawn_with_the_probabilities_that_transformers_draws_with(bound, warped):
    task = bound("LlamaForCausalLM")
    asked = {"do_sample": True, "max_new_tokens": 1}
    count = 2000
    _, features, outputs = task.run(["the cat"] * count, **asked, **warped)
    drawn = np.bincount([output["ids"][0] for output in outputs], minlength=300)[:300] / count
    ids = torch.tensor([features[0]["input_ids"]])
    processed = task.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=2,
        return_dict_in_generate=True,
        output_scores=True, **asked, **warped,
    )  # fmt: skip
    wanted = processed.scores[0].softmax(-1)[0].numpy()
    wanted = np.pad(wanted, (0, 300 - len(wanted)))
    assert np.abs(drawn - wanted).max() < 0.05
    assert drawn[wanted == 0].sum() == 0


def test_threads_do_not_disturb_each_other(bound):
    task = bound("GPT2LMHeadModel")
    asked = [{"max_new_tokens": 8}, {"seed": 3, **_SAMPLED}, {"max_new_tokens": 8, "num_beams": 2}]
    wanted = [task.texts(TEXTS, **params) for params in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda params: task.texts(TEXTS, **params), asked * 4))
    assert found == wanted * 4


# Where texts end.


def test_texts_end_before_a_stop_text_that_spans_tokens(bound):
    task = bound("LlamaForCausalLM")
    whole = task.texts(["the cat"], max_new_tokens=30, return_full_text=False)[0]
    start = next(i for i in range(5, len(whole) - 3) if whole.find(whole[i : i + 3]) == i)
    stop = whole[start : start + 3]
    assert len(task.tokenizer(stop)["input_ids"]) > 1
    texts = ["the cat", "a", "in her"]
    answers, _, outputs = task.run(
        texts, max_new_tokens=30, return_full_text=False, stop=["never there", stop]
    )
    assert answers[0] == {"generated_text": whole[:start], "finish_reason": "stop"}
    assert len(outputs[0]["ids"]) <= 30
    others = task.answers(texts, max_new_tokens=30, return_full_text=False)
    assert [a for a in answers[1:] if stop not in a["generated_text"]]
    for answer, other in zip(answers, others, strict=True):
        assert answer["generated_text"] == other["generated_text"].split(stop)[0]
    alone = task.run(texts[:1], max_new_tokens=30, stop=[stop])[2][0]["ids"]
    assert len(alone) < 30  # it did not go on writing


def test_the_models_own_end_is_a_stop(bound):
    model = writer("GPT2LMHeadModel")
    third = bound(model).run(["the cat"], max_new_tokens=3)[2][0]["ids"][2]
    task = bound(writer("GPT2LMHeadModel", generation={"eos_token_id": [2, int(third)]}))
    answers, _, outputs = task.run(TEXTS[:2], max_new_tokens=9)
    assert answers[0]["finish_reason"] == "stop"
    assert outputs[0]["ids"][-1] == third
    assert task.answers(TEXTS[:1], max_new_tokens=1)[0]["finish_reason"] == "length"


def test_a_character_cut_by_the_length_is_dropped(bound):
    task = bound("LlamaForCausalLM")
    ids = np.array(task.tokenizer("cat 😀")["input_ids"])
    params = task.task.check_params({"return_full_text": False})
    texts = []
    for length in range(1, len(ids) + 1):
        (answer,) = task.task.decoded([{"text": ""}], [{}], [{"ids": ids[:length]}], params)
        texts.append(answer["generated_text"])
    assert texts[-5:] == ["cat ", "cat ", "cat ", "cat ", "cat 😀"]
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


# Prompts.


def test_a_prompt_that_is_too_long_keeps_its_end(bound):
    task = bound("GPT2LMHeadModel", byte_tokenizer(bos=True))
    long = "x" * 500 + "the cat sat"
    _, (features,), _ = task.run([long], max_new_tokens=40)
    ids = task.tokenizer(long)["input_ids"]
    assert features["input_ids"] == [1, *ids[-55:]]
    assert task.texts([long], max_new_tokens=40)[0].startswith(long)
    with pytest.raises(InputError, match="where: row 1\n"):
        task.answers(["a", long], max_new_tokens=40, truncation=False)
    # In transformers it counts what is read and what is written together; here it would have cut
    # the prompt.
    with pytest.raises(InputError, match=r"'max_length'[\s\S]*max_new_tokens"):
        task.answers([long], max_length=10)


def test_an_encoder_keeps_the_beginning(bound):
    task = bound("BartForConditionalGeneration")
    _, (features,), _ = task.run(["the cat" + "x" * 500], max_new_tokens=5)
    assert len(features["input_ids"]) == 96
    assert features["input_ids"][:2] == task.tokenizer("the cat")["input_ids"][:2]


def test_an_empty_text_needs_a_token_to_begin_with(bound):
    model = writer("GPT2LMHeadModel", bos_token_id=None, generation={"bos_token_id": None})
    with pytest.raises(InputError, match=r"no tokens[\s\S]*row 1"):
        bound(model).answers(["a", ""])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_new_tokens": value} for value in (0, -1, 1.5, 96, 10**9, True)),
        *(
            {"temperature": 0.0},
            {"top_p": 1.1},
            {"top_p": 0.0},
            {"top_k": -1},
            {"num_beams": 0},
            {"num_beams": 1000},
        ),
        *(
            {"repetition_penalty": 0.0},
            {"seed": -2},
            {"seed": 2**63},
            {"stop": ["a", ""]},
            {"stop": "a"},
        ),
        *(
            {"do_sample": 1},
            {"do_sample": True, "num_beams": 2},
            {"max_length": 200},
            {"unknown": 1},
        ),
        *(
            {"num_return_sequences": 2},
            {"num_return_sequences": 3, "num_beams": 2},
            {"num_return_sequences": 0},
            {"no_repeat_ngram_size": -1},
            {"min_new_tokens": 5, "max_new_tokens": 4},
            {"min_new_tokens": -1},
        ),
    ],
    ids=str,
)
def test_params_out_of_range_are_named(bound, wrong):
    with pytest.raises(InputError, match=f"params, .*{next(iter(wrong))}"):
        bound("GPT2LMHeadModel").answers(["a"], **wrong)


def test_as_many_tokens_as_there_are_positions(bound):
    assert bound("GPT2LMHeadModel").answers(["the cat"], max_new_tokens=95)
    task = bound("BartForConditionalGeneration")
    assert task.answers(["the cat"], max_new_tokens=96)
    with pytest.raises(InputError, match="96 positions"):
        task.answers(["the cat"], max_new_tokens=97)


def test_cost_counts_what_may_be_written(bound):
    task = bound("GPT2LMHeadModel")
    params = task.task.check_params({"max_new_tokens": 10, "num_beams": 2})
    (features,) = task.task.encoded([{"text": "in"}], params)
    assert task.task.cost(features) == (1 + 10) * 2


# Chats.


@pytest.fixture
def chat(bound):
    return bound(
        "LlamaForCausalLM", byte_tokenizer(bos=True, chat=True), {"messages": "conversation"}
    )


def test_chats_are_those_of_the_pipeline(chat):
    reference = pipeline(
        "text-generation",
        model=copy.deepcopy(chat.model),
        tokenizer=byte_tokenizer(bos=True, chat=True),
    )
    begun = [CHAT[1], {"role": "assistant", "content": "In the"}]
    for messages in (CHAT, CHAT[1:], begun):
        wanted = reference([messages], max_new_tokens=8, do_sample=False, return_full_text=False)[
            0
        ][0]["generated_text"]
        (answer,) = chat.answers(pd.DataFrame({"conversation": [messages]}), max_new_tokens=8)
        assert answer["generated_text"] == _trimmed(wanted)
    (full,) = chat.texts({"conversation": [CHAT]}, max_new_tokens=8, return_full_text=True)
    assert full.startswith("<s>system: Be brief.\nuser: Where is the cat? 😀\nassistant: ")
    assert chat.texts({"conversation": CHAT}, max_new_tokens=8) == chat.texts(
        [{"conversation": CHAT}], max_new_tokens=8
    )


def test_chats_that_are_too_long_are_refused_unless_asked_to_be_cut(chat):
    long = [{"role": "user", "content": "x" * 200}]
    with pytest.raises(InputError, match="row 0, column 'conversation'"):
        chat.answers({"conversation": [long]})
    assert chat.answers({"conversation": [long]}, truncation=True)


@pytest.mark.parametrize(
    "wrong",
    [
        "hello",
        [],
        ["hello"],
        [{"role": "user"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": "\ud800"}],
    ],
    ids=ascii,
)
def test_what_is_no_chat_is_named(chat, wrong):
    with pytest.raises(InputError, match="row 1, column 'conversation'"):
        chat.answers([{"conversation": CHAT}, {"conversation": wrong}])


def test_a_chat_that_the_template_refuses_is_named(bound):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    task = bound("LlamaForCausalLM", tokenizer, {"messages": "messages"})
    with pytest.raises(InputError, match=r"row 0, column 'messages'[\s\S]*no"):
        task.answers({"messages": [CHAT]})


def test_a_model_reads_texts_or_chats(bound):
    with pytest.raises(InputError, match="not both"):
        TextGeneration.columns_for({"text": "a", "messages": "b"})
    with pytest.raises(StructureError, match="chat template"):
        bound("LlamaForCausalLM", byte_tokenizer(), {"messages": "messages"}).answers(
            {"messages": [CHAT]}
        )


# Which task.


def test_tasks_are_told_from_class_names():
    assert {infer_task(name) for name in (*DECODERS, *ODD_DECODERS)} == {"text-generation"}
    assert {infer_task(name) for name in ENCODER_DECODERS} == {"text2text-generation"}
    with pytest.raises(StructureError, match="cannot be told"):
        infer_task("XLMWithLMHeadModel")


def test_each_kind_is_refused_under_the_others_task(tiny_bert):
    with pytest.raises(StructureError, match="text2text-generation"):
        TextGeneration.describe(writer("T5ForConditionalGeneration"), {})
    with pytest.raises(StructureError, match="text-generation"):
        Text2TextGeneration.describe(writer("GPT2LMHeadModel"), {})
    with pytest.raises(StructureError, match="encoder"):
        task_class("feature-extraction").describe(writer("MarianMTModel"), {})


def test_an_engine_that_cannot_write_says_so():
    engine = ModuleEngine(torch.nn.Linear(1, 1), torch.device("cpu"), torch.float32)
    with pytest.raises(StructureError, match="cannot write text"):
        engine.generate({"input_ids": np.ones((1, 1))}, Generation({}))


@pytest.mark.parametrize("alias", ["summarization", "translation_en_to_de", "translation"])
def test_names_of_specific_tasks_bring_prefix_and_settings(bound, alias):
    specific: dict[str, dict[str, Any]] = {
        "summarization": {
            "prefix": "summarize: ",
            "num_beams": 2,
            "max_length": 9,
            "no_repeat_ngram_size": 2,
        },
        "translation_en_to_de": {"prefix": "translate English to German: "},
    }
    model = writer("T5ForConditionalGeneration", task_specific_params=specific)
    task = bound(model, cls=task_class(alias))
    prefix = specific.get(alias, {}).get("prefix", "")
    assert task_class(alias).name == alias
    _, (features,), _ = task.run(["the cat"])
    assert features["input_ids"] == task.tokenizer(prefix + "the cat")["input_ids"]
    beams, new = (2, 8) if alias == "summarization" else (1, 64)
    params = task.task.check_params({})
    assert (params["num_beams"], params["max_new_tokens"]) == (beams, new)
    assert (params["no_repeat_ngram_size"] == 2) == (alias == "summarization")


def test_a_prefix_can_be_an_option(bound):
    task = bound("T5ForConditionalGeneration", prefix="a ")
    assert task.run(["cat"])[1][0]["input_ids"] == task.tokenizer("a cat")["input_ids"]
    with pytest.raises(InputError, match="prefix"):
        Text2TextGeneration.describe(task.model, {"prefix": 1})


# Saved and loaded.


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BartForConditionalGeneration"])
def test_loaded_models_write_what_the_live_one_writes(tmp_path, name):
    said = (
        {"num_beams": 2, "forced_bos_token_id": 77}
        if name in ENCODER_DECODERS
        else {"repetition_penalty": 1.7}
    )
    model, tokenizer = writer(name, generation=said), byte_tokenizer(eos=name in ENCODER_DECODERS)
    path = tmp_path / "model"
    mlflow_safeflavor.save_model(model, path, tokenizer=tokenizer, rehearse=False, graph="no")
    loaded = mlflow_safeflavor.load_model(path)
    assert loaded.report.bit_identical
    params = {"max_new_tokens": 9}
    found = loaded.predict(TEXTS[:4], params=params)["generated_text"].tolist()
    for text, answer in zip(TEXTS, found, strict=False):
        inputs = tokenizer([text], return_tensors="pt")
        live = model.generate(**inputs, **params, pad_token_id=2)
        start = 1 if name in ENCODER_DECODERS else inputs["input_ids"].shape[1]
        wanted = _trimmed(tokenizer.decode(live[0, start:], skip_special_tokens=True))
        assert answer == (wanted if name in ENCODER_DECODERS else text + wanted)

    served = mlflow.pyfunc.load_model(str(path))
    frame = pd.DataFrame({"text": TEXTS[:4]})
    assert served.predict(frame, params=params)["generated_text"].tolist() == found
    stopped = served.predict(frame, params={**params, "stop": [found[0][-1]], "seed": 3})
    assert stopped["finish_reason"][0] == "stop"
    assert (
        served.predict({"text": TEXTS[:2]}, params=params)["generated_text"].tolist() == found[:2]
    )


def test_a_saved_template_and_several_texts_through_pyfunc(tmp_path):
    path = tmp_path / "model"
    model, tokenizer = writer("LlamaForCausalLM"), byte_tokenizer()
    mlflow_safeflavor.save_model(
        model, path, tokenizer=tokenizer, prompt_template="Q: {prompt} A:", rehearse=False,
        graph="no", params={"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5},
    )  # fmt: skip
    assert mlflow.models.Model.load(str(path)).metadata == {"prompt_template": "Q: {prompt} A:"}
    loaded, served = mlflow_safeflavor.load_model(path), mlflow.pyfunc.load_model(str(path))
    frame = pd.DataFrame({"text": TEXTS[:3]})
    found = served.predict(frame, params={"no_repeat_ngram_size": 2, "min_new_tokens": 2})
    wanted = loaded.predict(frame, {"no_repeat_ngram_size": 2, "min_new_tokens": 2})
    pd.testing.assert_frame_equal(found, wanted)
    inputs = tokenizer(["Q: the cat A:"], return_tensors="pt")
    asked = {"no_repeat_ngram_size": 2, "min_new_tokens": 2, "max_new_tokens": 5, "num_beams": 2}
    live = model.generate(**inputs, num_return_sequences=2, pad_token_id=2, **asked)
    start = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(live[:, start:], skip_special_tokens=True)
    assert found["generated_texts"][0] == [_trimmed(text) for text in texts]
    given = {"tokenizer": byte_tokenizer(chat=True), "input_columns": {"messages": "messages"}}
    with pytest.raises(InputError, match="prompt_template"):
        mlflow_safeflavor.save_model(
            model, tmp_path / "chat", prompt_template="{prompt}.", graph="no", **given
        )


def test_saved_chats_are_asked_through_pyfunc(tmp_path):
    path = tmp_path / "model"
    tokenizer = byte_tokenizer(bos=True, chat=True)
    columns = {"messages": "messages"}
    mlflow_safeflavor.save_model(
        writer("LlamaForCausalLM"),
        path,
        tokenizer=tokenizer,
        input_columns=columns,
        rehearse=False,
        graph="no",
    )
    loaded, served = mlflow_safeflavor.load_model(path), mlflow.pyfunc.load_model(str(path))
    for chats in ([CHAT], [CHAT, CHAT[1:]]):
        frame = pd.DataFrame({"messages": chats})
        wanted = loaded.predict(frame, params={"max_new_tokens": 6})
        pd.testing.assert_frame_equal(served.predict(frame, params={"max_new_tokens": 6}), wanted)
        assert len(wanted) == len(chats)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [{"text": "text"}, {"messages": "chat"}], ids=str)
def test_a_clean_process_replays_them(tmp_path, columns):
    tokenizer = byte_tokenizer(bos=True, chat=True)
    mlflow_safeflavor.save_model(
        writer("GPT2LMHeadModel"),
        tmp_path / "model",
        tokenizer=tokenizer,
        input_columns=columns,
        graph="no",
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    mlflow_safeflavor.save_model(
        writer("LlamaForCausalLM"), path, tokenizer=byte_tokenizer(), rehearse=False, graph="no"
    )
    return path


def _replay(loaded):
    from mlflow_safeflavor.artifact.layout import Layout
    from mlflow_safeflavor.predict.golden import read_golden
    from mlflow_safeflavor.predict.replay import replay

    return replay(loaded, read_golden(Layout(loaded.folder), loaded.engine.name))


def test_a_broken_cache_does_not_pass_the_replay(saved, monkeypatch):
    from transformers.cache_utils import DynamicLayer

    loaded = mlflow_safeflavor.load_model(saved)
    assert _replay(loaded).bit_identical
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer,
        "update",
        lambda self, k, v, *a, **kw: update(self, k, v.roll(1, -1), *a, **kw),
    )
    assert not _replay(loaded).ok


def test_a_near_tie_decided_otherwise_passes_the_replay_and_a_wrong_weight_does_not(saved):
    loaded = mlflow_safeflavor.load_model(saved)
    assert isinstance(loaded.task, TextTask)
    read = type(loaded.task).read

    def other(self, outputs, mask):
        """As if the second token had been a near tie."""
        rows = read(self, outputs, mask)
        return [{**row, "ids": np.array([row["ids"][0], 5, *row["ids"][2:]])} for row in rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(loaded.task), "read", other)
        assert _replay(loaded).ok
        head = loaded.module.get_submodule("lm_head")
        with torch.no_grad():
            head.get_parameter("weight")[7] += 0.1
        assert not _replay(loaded).ok
    assert not _replay(loaded).ok


def test_a_model_that_answers_otherwise_is_not_loaded(saved, monkeypatch):
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x) * 1.01)
    with pytest.raises(ParityError, match="logits"):
        mlflow_safeflavor.load_model(saved)


def test_a_class_of_ones_own_that_writes(bound):
    class Mine(T5ForConditionalGeneration):
        pass

    model = writer("T5ForConditionalGeneration")
    model.__class__ = Mine
    assert bound(model, cls=Text2TextGeneration).texts(TEXTS, max_new_tokens=4)
