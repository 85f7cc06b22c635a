"""Defaults of params.

Those a pipeline was made with, and those that are given when a model is saved.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
import transformers
from architectures import tiny_model
from artifacts import SAME_BATCHES
from integration.test_audio import make_model as listener
from integration.test_audio import masked, sound
from integration.test_images import SMALL, make_processor, pixels
from integration.test_images import make_model as viewer
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ParamSchema, ParamSpec
from transformers import GenerationConfig, TextClassificationPipeline, pipeline
from writers import byte_tokenizer, writer

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, StructureError

TEXT = (
    "the cat sat on the mat and the dog ran under a red tree if x = y + x else return the green cat"
)
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}


@pytest.fixture
def save(tmp_path, tiny_tokenizer):
    """Save without a rehearsal.

    Gives what native predict and predict of pyfunc answer to rows without params.
    """

    def run(model, **options):
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        config = {**SAME_BATCHES, **options.pop("model_config", {})}
        given = {"graph": "no", "rehearse": False, "model_config": config, **options}
        mlflow_safeflavor.save_model(model, path, **given)
        return path

    return run


def answers(path, rows):
    """Without params, natively and through MLflow, which must be the same."""
    native = mlflow_safeflavor.load_model(path).predict(rows)
    served = mlflow.pyfunc.load_model(str(path)).predict(rows)
    assert native.to_dict("records") == served.to_dict("records")
    return native.to_dict("records")


def declared(path):
    return {
        param.name: param.default
        for param in mlflow.models.get_model_info(str(path)).signature.params
    }


def classifier(**config):
    return tiny_model("Bert", "ForSequenceClassification", **{"num_labels": 3, **config})


# Pipelines with arguments: what they answer, without saying the arguments again.


def test_a_pipeline_of_text_classification_keeps_its_arguments(save, tiny_tokenizer):
    given = {"top_k": None, "function_to_apply": "sigmoid", "truncation": True, "max_length": 8}
    pipe = pipeline("text-classification", model=classifier(), tokenizer=tiny_tokenizer, **given)
    path = save(pipe)
    (found,) = answers(path, pd.DataFrame({"text": [TEXT]}))
    (wanted,) = pipe([TEXT])
    assert found["labels"] == [answer["label"] for answer in wanted]
    assert found["scores"] == pytest.approx([answer["score"] for answer in wanted], abs=1e-6)
    plain = pipeline(
        "text-classification", model=classifier(), tokenizer=tiny_tokenizer, truncation=True
    )([TEXT])
    assert abs(plain[0]["score"] - found["scores"][0]) > 1e-3, "the arguments change nothing"
    assert declared(path) == {
        "top_k": -1,
        "function_to_apply": "sigmoid",
        "max_length": 8,
        "truncation": True,
    }


@pytest.mark.parametrize(
    "given", [{"aggregation_strategy": "max", "stride": 3}, {"ignore_labels": ["LABEL_1"]}]
)
def test_a_pipeline_of_token_classification_keeps_its_arguments(save, tiny_tokenizer, given):
    model = tiny_model("Bert", "ForTokenClassification", num_labels=3)
    pipe = pipeline("token-classification", model=model, tokenizer=tiny_tokenizer, **given)
    (found,) = answers(save(pipe), pd.DataFrame({"text": [TEXT * 2]}))
    wanted = pipe(TEXT * 2)
    assert [{**entity, "score": 0} for entity in found["entities"]] == [
        {**entity, "score": 0} for entity in wanted
    ]
    assert [entity["score"] for entity in found["entities"]] == pytest.approx(
        [float(entity["score"]) for entity in wanted], abs=1e-6
    )


def test_a_pipeline_of_fill_mask_keeps_its_arguments(save, tiny_tokenizer):
    given = {
        "top_k": 2,
        "targets": ["cat", "dog", "tree"],
        "tokenizer_kwargs": {"truncation": True, "max_length": 9},
    }
    pipe = pipeline(
        "fill-mask", model=tiny_model("Bert", "ForMaskedLM"), tokenizer=tiny_tokenizer, **given
    )
    text = "the [MASK] sat on " + TEXT
    (found,) = answers(save(pipe), pd.DataFrame({"text": [text]}))
    wanted = pipe(text)
    assert [gap["token_str"] for gap in found["predictions"][0]] == [
        answer["token_str"] for answer in wanted
    ]
    assert found["score"] == pytest.approx(wanted[0]["score"], abs=1e-6)


def test_a_pipeline_of_zero_shot_classification_keeps_its_arguments(save, tiny_tokenizer):
    model = classifier(id2label=NLI, label2id={label: i for i, label in NLI.items()})
    given = {
        "candidate_labels": ["cat", "red tree"],
        "hypothesis_template": "the {} ran",
        "multi_label": True,
    }
    pipe = pipeline("zero-shot-classification", model=model, tokenizer=tiny_tokenizer, **given)
    path = save(pipe)
    (found,) = answers(path, pd.DataFrame({"text": ["the dog sat"]}))
    # transformers' own pipeline wants them said again.
    wanted = pipe("the dog sat", **given)
    assert found["labels"] == wanted["labels"]
    assert found["scores"] == pytest.approx(wanted["scores"], abs=1e-6)
    assert mlflow_safeflavor.load_model(path).report.bit_identical


def test_a_pipeline_of_feature_extraction_keeps_its_arguments(save, tiny_tokenizer):
    pipe = pipeline(
        "feature-extraction",
        model=tiny_model("Bert", "Model"),
        tokenizer=tiny_tokenizer,
        tokenize_kwargs={"truncation": True, "max_length": 6},
        return_tensors=True,
    )
    (found,) = answers(save(pipe), pd.DataFrame({"text": [TEXT]}))
    assert found["embedding"] == pytest.approx(pipe(TEXT)[0].mean(dim=0).tolist(), abs=1e-5)


def test_a_pipeline_of_images_keeps_its_arguments(save):
    given = {"top_k": 2, "function_to_apply": "sigmoid"}
    pipe = pipeline(
        "image-classification", model=viewer(), image_processor=make_processor(size=SMALL), **given
    )
    loaded = mlflow_safeflavor.load_model(save(pipe))
    (found,) = loaded.predict([pixels()]).to_dict("records")
    from PIL import Image

    wanted = pipe(Image.fromarray(pixels()))
    assert found["labels"] == [answer["label"] for answer in wanted]
    assert found["scores"] == pytest.approx([answer["score"] for answer in wanted], abs=1e-5)


def test_a_pipeline_of_sounds_keeps_its_arguments(save):
    pipe = pipeline("audio-classification", model=listener(), feature_extractor=masked, top_k=3)
    (found,) = mlflow_safeflavor.load_model(save(pipe)).predict([sound()]).to_dict("records")
    wanted = pipe(sound(), top_k=3)  # transformers' own pipeline forgets it
    assert found["labels"] == [answer["label"] for answer in wanted]
    assert found["scores"] == pytest.approx([answer["score"] for answer in wanted], abs=1e-5)


WRITING: dict[str, Any] = {
    "arguments": {
        "max_new_tokens": 7,
        "do_sample": False,
        "return_full_text": False,
        "repetition_penalty": 1.4,
    },
    "settings": {"max_new_tokens": 9, "do_sample": False, "no_repeat_ngram_size": 2},
    "settings without a param": {
        "max_new_tokens": 9,
        "do_sample": False,
        "suppress_tokens": [20, 30],
    },
    "beams": {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "length_penalty": 2.0},
    "texts": {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 3,
        "num_return_sequences": 2,
        "min_new_tokens": 3,
    },
    "a config": {
        "generation_config": GenerationConfig(
            max_new_tokens=5, do_sample=False, repetition_penalty=1.9
        )
    },
}


@pytest.mark.parametrize("name", WRITING)
def test_a_pipeline_that_writes_keeps_its_arguments(save, name):
    model = writer("GPT2LMHeadModel")
    before = model.generation_config.to_dict()
    pipe = pipeline(
        "text-generation", model=model, tokenizer=byte_tokenizer(), **copy.deepcopy(WRITING[name])
    )
    (found,) = answers(save(pipe), pd.DataFrame({"text": ["the cat"]}))
    texts = [
        wanted["generated_text"].rstrip("\N{REPLACEMENT CHARACTER}") for wanted in pipe("the cat")
    ]
    assert found.get("generated_texts", [found["generated_text"]]) == texts
    assert model.generation_config.to_dict() == before


def test_what_a_pipeline_that_writes_does_by_itself_is_kept(save):
    pipe = pipeline("text-generation", model=writer("GPT2LMHeadModel"), tokenizer=byte_tokenizer())
    found = declared(save(pipe))
    assert (found["do_sample"], found["temperature"]) == (True, 0.7)
    # Of 256, as many as half of the positions.
    assert found["max_new_tokens"] == 48


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_length": 20}, r"'max_length'[\s\S]*max_new_tokens"),
        ({"prefix": "once "}, "prefix"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"handle_long_generation": "hole"}, "'handle_long_generation'"),
        ({"max_new_tokens": 96}, "'max_new_tokens'"),
    ],
    ids=str,
)
def test_what_a_pipeline_that_writes_may_not_carry_is_named(save, given, named):
    pipe = pipeline(
        "text-generation", model=writer("GPT2LMHeadModel"), tokenizer=byte_tokenizer(), **given
    )
    with pytest.raises((InputError, StructureError), match=named):
        save(pipe)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"return_token_type_ids": False}, "'return_token_type_ids'"), ({"top_k": 0}, "'top_k'")],
    ids=str,
)
def test_an_argument_that_no_param_stands_for_is_named(save, tiny_tokenizer, given, named):
    pipe = pipeline("text-classification", model=classifier(), tokenizer=tiny_tokenizer, **given)
    with pytest.raises(InputError, match=named):
        save(pipe)


def test_another_task_does_not_drop_the_arguments_of_a_pipeline(save, tiny_tokenizer):
    pipe = pipeline("text-classification", model=classifier(), tokenizer=tiny_tokenizer, top_k=2)
    with pytest.raises(InputError, match=r"task raw does not know[\s\S]*'top_k'"):
        save(pipe, task="raw", input_example={"input_ids": [[2, 5, 3]]})


class Unsure(TextClassificationPipeline):
    """Overrides a method."""

    def postprocess(self, outputs, **kwargs):
        return {"label": "unsure", "score": 0.0}


class Renamed(TextClassificationPipeline):
    """Changes nothing."""


class Heir(Renamed):
    """Overrides one of ``Pipeline``'s own."""

    def forward(self, inputs, **kwargs):
        return super().forward(inputs, **kwargs)


def test_a_pipeline_with_methods_of_the_users_own_is_refused(save, tiny_tokenizer):
    made = {"model": classifier(), "tokenizer": tiny_tokenizer}
    for cls, method in ((Unsure, "postprocess"), (Heir, "forward")):
        with pytest.raises(
            StructureError, match=rf"{cls.__name__}[\s\S]*{method}[\s\S]*hint[\s\S]*custom"
        ):
            save(cls(**made))
    patched = TextClassificationPipeline(**made)
    patched.preprocess = lambda text: None
    with pytest.raises(StructureError, match="preprocess"):
        save(patched)
    assert answers(save(Renamed(**made)), pd.DataFrame({"text": [TEXT[:20]]}))


# Sources are asked by their type.


class Calibrated(torch.nn.Module):
    """Looks like a pipeline, and is a module."""

    def __init__(self, model, tokenizer, task):
        super().__init__()
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.bias = torch.nn.Parameter(torch.tensor([9.0, -9.0, 0.0]))

    def forward(self, input_ids):
        return {"logits": self.model(input_ids).logits + self.bias}


def test_a_module_is_never_unwrapped_by_its_attributes(save, tiny_tokenizer):
    module = Calibrated(classifier(), tiny_tokenizer, "text-classification").eval()
    example = {"input_ids": torch.tensor([[2, 6, 7, 3]]).numpy()}
    path = save(module, task="raw", input_example=example, allow_pickle=True)
    found = mlflow_safeflavor.load_model(path, trust={"pickle", "code"}).predict(example)
    wanted = module(torch.tensor([[2, 6, 7, 3]]))["logits"]
    assert found["logits"] == pytest.approx(wanted.detach().numpy(), abs=1e-6)


def test_a_dict_of_parts_is_one_model(save, tiny_tokenizer, tmp_path):
    classifier().save_pretrained(tmp_path / "checkpoint")
    rows = pd.DataFrame({"text": [TEXT]})
    wanted = answers(save(classifier(), tokenizer=tiny_tokenizer), rows)
    assert answers(save({"model": classifier(), "tokenizer": tiny_tokenizer}), rows) == wanted
    assert (
        answers(save({"model": tmp_path / "checkpoint", "tokenizer": tiny_tokenizer}), rows)
        == wanted
    )
    parts = {"model": viewer(), "image_processor": make_processor(size=SMALL)}
    assert len(mlflow_safeflavor.load_model(save(parts)).predict([pixels()])) == 1


@pytest.mark.parametrize(
    "made",
    [
        lambda model, tokenizer: (model, tokenizer),
        lambda model, tokenizer: [model, tokenizer],
        lambda model, tokenizer: {"model": model, "tokeniser": tokenizer},
        lambda model, tokenizer: {"model": (model, tokenizer)},
        lambda model, tokenizer: type(
            "Duck", (), {"model": model, "tokenizer": tokenizer, "task": "ner"}
        )(),
    ],
    ids=["tuple", "list", "dict", "nested", "duck"],
)
def test_other_forms_are_refused_with_a_hint(save, tiny_tokenizer, made):
    with pytest.raises(
        StructureError, match=r"cannot be saved as a model[\s\S]*transformers.Pipeline"
    ):
        save(made(classifier(), tiny_tokenizer))


# the pipeline's own, with numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.skipif(
    not hasattr(transformers, "QuestionAnsweringPipeline"), reason="transformers 5 has none"
)
@pytest.mark.parametrize("said", [
    {}, {"top_k": 3, "max_answer_len": 4}, {"handle_impossible_answer": True},
    {"doc_stride": 3, "max_seq_len": 16},
    {"align_to_words": False}, {"max_question_len": 2},
], ids=str)  # fmt: skip
def test_pipelines_of_questions_bring_their_arguments(save, tiny_tokenizer, said):
    model = tiny_model("Bert", "ForQuestionAnswering")
    pipe = pipeline("question-answering", model=model, tokenizer=tiny_tokenizer, **said)
    row = {
        "question": "where is the cat",
        "context": "the cat sat on the mat . a dog ran to the cat . red dogs",
    }
    wanted = pipe(**row)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    (found,) = answers(save(pipe), pd.DataFrame([row]))
    for key in ("answer", "score", "start", "end"):
        one, other = found.get(f"{key}s", [found[key]]), [answer[key] for answer in wanted]
        assert one == (pytest.approx(other, abs=1e-6) if key == "score" else other)


# params= when a model is saved.


TASKS: dict[str, Any] = {
    "text-classification": (
        "ForSequenceClassification",
        {"top_k": None, "max_length": 6},
        {"text": [TEXT]},
    ),
    "token-classification": (
        "ForTokenClassification",
        {"aggregation_strategy": "simple"},
        {"text": [TEXT]},
    ),
    "fill-mask": ("ForMaskedLM", {"top_k": 2, "max_length": 12}, {"text": ["a [MASK]"]}),
    "feature-extraction": ("Model", {"max_length": 5}, {"text": [TEXT]}),
    "zero-shot-classification": (
        "ForSequenceClassification",
        {"candidate_labels": ["cat", "mat"], "multi_label": True},
        {"text": [TEXT]},
    ),
    "question-answering": (
        "ForQuestionAnswering",
        {"top_k": 3, "max_answer_len": 4, "doc_stride": 2, "max_seq_len": 12},
        {"question": ["the cat"], "context": [TEXT]},
    ),
    "text-ranking": (
        "ForSequenceClassification",
        {"top_k": 2, "return_passages": True, "max_length": 6},
        {"query": ["the cat"], "passages": [[TEXT, "a dog", "mat"]]},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_defaults_given_at_save_are_what_requests_leave_out(save, tiny_tokenizer, task):
    head, params, rows = TASKS[task]
    config = (
        {"id2label": NLI, "label2id": {label: i for i, label in NLI.items()}}
        if "zero" in task
        else {"num_labels": 1}
        if "ranking" in task
        else {}
    )
    model = tiny_model("Bert", head, **config)
    path = save(model, tokenizer=tiny_tokenizer, task=task, params=params)
    plain = mlflow_safeflavor.load_model(save(model, tokenizer=tiny_tokenizer, task=task))
    frame = pd.DataFrame(rows)
    assert answers(path, frame) == plain.predict(frame, params=params).to_dict("records")
    assert (
        declared(path).items()
        >= {name: -1 if value is None else value for name, value in params.items()}.items()
    )
    # golden rows are asked with them
    assert mlflow_safeflavor.load_model(path).report.bit_identical
    if "zero" not in task:
        assert answers(path, frame) != plain.predict(frame).to_dict("records")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BartForConditionalGeneration"])
def test_defaults_of_models_that_write(save, name):
    encodes = name.startswith("Bart")
    path = save(
        writer(name),
        tokenizer=byte_tokenizer(eos=encodes),
        params={"max_new_tokens": 3, "num_beams": 2},
    )
    found = mlflow_safeflavor.load_model(path)
    assert found.task.check_params({})["max_new_tokens"] == 3
    answered = found.predict(["the cat"])
    assert answered.equals(found.predict(["the cat"], params={"max_new_tokens": 3, "num_beams": 2}))


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"topk": 3}, r"does not know a param[\s\S]*'topk'[\s\S]*top_k \| function_to_apply"),
        ({"top_k": 0}, r"'top_k'[\s\S]*at least 1"),
        ({"max_length": 33}, r"'max_length'[\s\S]*3 to 32 tokens"),
        ({"truncation": "yes"}, "'truncation'"),
    ],
    ids=str,
)
def test_defaults_that_are_not_allowed_are_refused_at_save(
    save, tiny_tokenizer, params, named, tmp_path
):
    with pytest.raises(InputError, match=named):
        save(classifier(), tokenizer=tiny_tokenizer, params=params)


def test_rows_that_are_too_long_do_not_keep_a_model_from_being_saved_without_truncation(
    save, tiny_tokenizer
):
    path = save(classifier(), tokenizer=tiny_tokenizer, params={"truncation": False})
    with pytest.raises(InputError, match="truncation is off"):
        mlflow_safeflavor.load_model(path).predict([TEXT * 3])


def test_params_beat_those_of_a_pipeline_and_a_request_beats_both(save, tiny_tokenizer):
    pipe = pipeline(
        "text-classification",
        model=classifier(),
        tokenizer=tiny_tokenizer,
        top_k=2,
        truncation=True,
    )
    found = mlflow_safeflavor.load_model(save(pipe, params={"top_k": 3}))
    assert len(found.predict([TEXT])["labels"][0]) == 3
    assert "labels" not in found.predict([TEXT], params={"top_k": 1})


# Params of a signature that the user gives.


def test_params_of_a_signature_are_defaults_everywhere(save, tiny_tokenizer, caplog):
    signature = infer_signature(pd.DataFrame({"text": ["a"]}), params={"top_k": 3, "max_length": 9})
    with caplog.at_level(logging.WARNING, "mlflow.safeflavor"):
        path = save(classifier(), tokenizer=tiny_tokenizer, signature=signature)
    assert "does not declare function_to_apply, truncation, so MLflow drops them" in caplog.text
    assert declared(path) == {"top_k": 3, "max_length": 9}
    assert len(answers(path, pd.DataFrame({"text": [TEXT]}))[0]["labels"]) == 3


def test_params_of_a_signature_that_the_task_does_not_know_are_refused(save, tiny_tokenizer):
    inputs = infer_signature(pd.DataFrame({"text": ["a"]})).inputs
    for spec, named in (
        (ParamSpec("topk", "long", 1), "'topk'"),
        (ParamSpec("top_k", "string", "all"), "'top_k'"),
    ):
        with pytest.raises(InputError, match=named):
            save(
                classifier(),
                tokenizer=tiny_tokenizer,
                signature=ModelSignature(inputs=inputs, params=ParamSchema([spec])),
            )


def test_a_signature_without_params_says_so(save, tiny_tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "mlflow.safeflavor"):
        save(
            classifier(),
            tokenizer=tiny_tokenizer,
            signature=infer_signature(pd.DataFrame({"text": ["a"]})),
        )
    assert "does not declare top_k, function_to_apply, max_length, truncation" in caplog.text
    caplog.clear()
    save(classifier(), tokenizer=tiny_tokenizer)
    assert "does not declare" not in caplog.text
