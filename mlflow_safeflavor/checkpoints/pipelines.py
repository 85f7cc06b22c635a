"""transformers' pipelines: model, tokenizer, processor, and arguments that become defaults."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlflow_safeflavor.checkpoints.given import Source, library_class, require_unchanged
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.generation_params import GENERATION_PARAMS
from mlflow_safeflavor.tasks.whisper_speech import WHISPER_PARAMS

__all__ = ["is_pipeline", "take_apart"]

_PACKAGE = "transformers.pipelines"
_HINT = (
    "make the pipeline without it, and do that before or after predict; or save the model as a "
    "custom task"
)
_HINT_OWN = (
    "save the model as a custom task: save_model(pipeline.model, tokenizer=pipeline.tokenizer, "
    'task="custom", '
    "preprocess=…, postprocess=…)"
)

# Arguments that hold arguments of the tokenizer.
_NESTED = ("tokenizer_kwargs", "tokenizer_params", "tokenizer_encode_kwargs", "tokenize_kwargs")
# Arguments about speed, about slow tokenizers, or about the form of a pipeline's answers.
_NO_MATTER = frozenset(
    (
        *(
            "_legacy",
            "max_question_len",
            "padding",
            "return_overflowing_tokens",
            "return_tensors",
            "timeout",
        ),
        "tokenizer",
    )
)
# Arguments that no param stands for, and the value with which they change nothing.
_AS_USUAL: Mapping[str, Any] = {
    "add_special_tokens": True,
    "is_split_into_words": False,
    "prefix": "",
    "skip_special_tokens": True,
}
_TRUNCATION = {"longest_first": True, "only_first": True, "do_not_truncate": False}
_RETURN_TYPES = {"FULL_TEXT": True, "NEW_TEXT": False}


def is_pipeline(model: object) -> bool:
    """Whether it is a ``transformers.Pipeline`` of any task."""
    return library_class(model, _PACKAGE, ("Pipeline",)) is not None


def take_apart(pipeline: Any) -> Source:
    """Model, tokenizer and processor of a pipeline, and its arguments as defaults of params.

    Arguments that mean nothing to a param are left in ``params`` under the pipeline's name, where
    the task refuses them by that name.

    Raises:
        InputError: An argument has a value that is not supported; names it.
        StructureError: The pipeline has methods of the user's own, or a language model.
    """
    cls = library_class(pipeline, _PACKAGE)
    assert cls is not None  # noqa: S101  (for mypy; is_pipeline says so)
    require_unchanged(pipeline, cls, _HINT_OWN)
    # Beams scored by a language model: greedy decoding would answer otherwise, without a word.
    if getattr(pipeline, "type", None) == "ctc_with_lm":
        raise StructureError(
            "The pipeline decodes with a language model",
            where=f"{type(pipeline).__name__}.decoder",
            wanted="decoder=None",
            found=type(pipeline.decoder).__name__,
        )
    params: dict[str, Any] = {}
    # Private, but the one place where a pipeline keeps its user's arguments, in transformers 4.57
    # and 5.
    for name, value in {**pipeline._preprocess_params, **pipeline._postprocess_params}.items():
        if name not in pipeline._forward_params:
            params |= _param_of(name, value, pipeline)
    options: dict[str, Any] = {}
    if getattr(pipeline.model, "can_generate", bool)() and getattr(
        cls, "_pipeline_calls_generate", True
    ):
        settings, written = _generation(pipeline)
        params |= written
        options = {"generation": settings} if settings else {}
        if getattr(pipeline.model.config, "is_encoder_decoder", False) and getattr(
            pipeline, "prefix", None
        ):
            options["prefix"] = pipeline.prefix
    else:
        params |= pipeline._forward_params
    processors = (
        getattr(pipeline, name, None) for name in ("image_processor", "feature_extractor")
    )
    return Source(
        pipeline.model,
        pipeline.task or "",
        pipeline.tokenizer,
        next((processor for processor in processors if processor is not None), None),
        options=options,
        params=params,
    )


def _param_of(name: str, value: Any, pipeline: Any) -> dict[str, Any]:
    """An argument of a pipeline as params: none, one, or several of a dict."""
    if name in _NESTED:
        return {
            key: item
            for part in value
            for key, item in _param_of(part, value[part], pipeline).items()
        }
    # None is "as usual", but of top_k it is all labels.
    if name in _NO_MATTER or (value is None and name != "top_k"):
        return {}
    if name == "truncation" and value in _TRUNCATION:
        return {name: _TRUNCATION[value]}
    if name == "target_ids":
        return {"targets": pipeline.tokenizer.convert_ids_to_tokens(np.asarray(value).tolist())}
    if name == "return_type" and value.name in _RETURN_TYPES:
        return {"return_full_text": _RETURN_TYPES[value.name]}
    if name == "stride_length_s":
        return {name: np.atleast_1d(value).tolist()}
    if name in _AS_USUAL or name == "return_type":
        if name in _AS_USUAL and value == _AS_USUAL[name]:
            return {}
        raise InputError(
            "An argument of the pipeline is not supported",
            where=f"{type(pipeline).__name__}, {name}",
            wanted=repr(_AS_USUAL[name]) if name in _AS_USUAL else "return_full_text true or false",
            found=repr(value),
            hint=_HINT,
        )
    return {name: value.name.lower() if isinstance(value, enum.Enum) else value}


def _generation(pipeline: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pipeline's changes of its model's generation config, and its user's as params."""
    own = _config_to_json(pipeline.model.generation_config)
    said = {
        name: value for name, value in pipeline._forward_params.items() if name not in _NO_MATTER
    }
    usual = _config_to_json(pipeline._default_generation_config)
    if hasattr(pipeline, "_prepare_generate_kwargs"):
        said = {**pipeline._generate_kwargs, **said}
        given = said.pop("generation_config", None)
        said = {**({} if given is None else given.to_diff_dict()), **said}
        settings = pipeline._prepare_generate_kwargs(dict(pipeline._forward_params))
        settings = {**_config_to_json(settings.pop("generation_config", None)), **settings}
    else:  # transformers before 5 keep one config, of the model, the pipeline and the user
        given = said.pop("generation_config", pipeline.generation_config)
        settings = {**_config_to_json(given), **said}
        said = {
            name: value
            for name, value in settings.items()
            if value not in (own.get(name), usual.get(name))
        }
    said.pop("transformers_version", None)
    known = {param.name for param in (*GENERATION_PARAMS, *WHISPER_PARAMS)}
    params = {name: value for name, value in said.items() if name in known and value is not None}
    if "stop_strings" in said:
        params["stop"] = (
            [said["stop_strings"]]
            if isinstance(said["stop_strings"], str)
            else said["stop_strings"]
        )
    if "max_length" in params and getattr(pipeline.model.config, "is_encoder_decoder", False):
        # There it counts the token that the decoder starts with, and nothing of the text.
        params.setdefault("max_new_tokens", params.pop("max_length") - 1)
    changed = {name: value for name, value in settings.items() if value != own.get(name)}
    left_out = {*params, *_NO_MATTER, "max_length", "stop_strings", "transformers_version"}
    return {name: value for name, value in changed.items() if name not in left_out}, params


def _config_to_json(config: Any) -> dict[str, Any]:
    return (
        {}
        if config is None
        else {k: v for k, v in json.loads(config.to_json_string()).items() if v is not None}
    )
