"""Generation config and defaults of a model that writes text, as a save records them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.generation_params import GENERATION_PARAMS, require_one_way
from mlflow_safeflavor.tasks.padding import ignores_padding
from mlflow_safeflavor.tasks.params import check_params
from mlflow_safeflavor.tasks.prompt_template import split_template
from mlflow_safeflavor.tasks.text_model import describe_text_model

if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.tasks.generation import GenerationTask

__all__ = ["REPLACED", "describe_generation", "read_generation_config"]

# Settings of a generation config that params replace, and those of speed and shape, which change no
# answer.
REPLACED = frozenset(
    (
        *(
            "max_length",
            "max_new_tokens",
            "stop_strings",
            "do_sample",
            "num_beams",
            "repetition_penalty",
        ),
        *("min_new_tokens", "no_repeat_ngram_size", "num_return_sequences"),
        *(
            "return_dict_in_generate",
            "output_scores",
            "output_logits",
            "output_attentions",
        ),
        *("output_hidden_states", "transformers_version", "_from_model_config", "pad_token_id"),
        *(
            "cache_implementation",
            "cache_config",
            "max_cache_len",
            "compile_config",
            "disable_compile",
        ),
        *("continuous_batching_config", "max_time"),
    )
)

# Settings that are not supported: other ways of decoding, some of which (contrastive search, DoLa,
# constraints) are code that transformers would download.
_REFUSED = frozenset(
    (
        *(
            "assistant_early_exit",
            "constraints",
            "dola_layers",
            "eta_cutoff",
            "force_words_ids",
            "penalty_alpha",
        ),
        *("prompt_lookup_num_tokens", "token_healing", "top_h", "use_mtp", "watermarking_config"),
    )
)


def describe_generation(
    cls: type[GenerationTask],
    model: torch.nn.Module,
    options: Mapping[str, Any],
    specific: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Facts of a model that generates text; JSON only.

    Args:
        cls: The task that it does.
        model: The module being saved.
        options: ``generation``, settings over those of the model's own generation config, and
            ``prompt_template``.
        specific: Settings between these two.

    Returns:
        The facts of ``describe_text_model``; ``generation``, settings of the generation config that
        are no params; its values of ``params``; ``prompt_template``, the texts around a prompt; and
        ``pads``, whether rows of different lengths may share a batch.

    Raises:
        InputError: The generation config has a value that its param does not allow, ``generation``
            a key that no generation config has, or the template is none.
        StructureError: The model cannot write, or not as its generation config says.
    """
    text = describe_text_model(model)
    if bool(getattr(model.config, "is_encoder_decoder", False)) is not cls.encoder_decoder:
        raise StructureError(
            "The model is not of the kind that its task writes with",
            where=f"task {cls.name!r}, {type(model).__name__}",
            wanted="an encoder-decoder model" if cls.encoder_decoder else "a decoder alone",
            hint='choose task="text-generation" for decoders, "text2text-generation" for '
            "encoder-decoders",
        )
    said = read_generation_config(model, {**(specific or {}), **options.get("generation", {})})
    config = {
        **text,
        "input_names": [name for name in text["input_names"] if name != "token_type_ids"],
        # A decoder goes on behind its last token, which must not be padding.
        "padding_side": "right" if cls.encoder_decoder else "left",
        "generation": {name: value for name, value in said.items() if name not in REPLACED},
        "params": cls.as_asked(_defaults(said, text["max_length"], cls.encoder_decoder)),
        "prompt_template": split_template(options.get("prompt_template", "{prompt}")),
        "pads": True,
    }
    masked = "attention_mask" in text["input_names"]
    return {**config, "pads": masked and ignores_padding(cls, model, config)}


def _defaults(
    said: Mapping[str, Any], positions: int | None, encoder_decoder: bool
) -> dict[str, Any]:
    """Defaults of params, from the generation config."""
    kinds = {
        param.name: float if param.kind == "double" else lambda value: value
        for param in GENERATION_PARAMS
    }
    known = {
        name: kinds[name](value)
        for name, value in said.items()
        if name in kinds and name != "max_length"
    }
    if said.get("stop_strings"):
        stop = said["stop_strings"]
        known["stop"] = [stop] if isinstance(stop, str) else list(stop)
    if "max_new_tokens" not in known:
        # A decoder's max_length counts the prompt, too, so it bounds no number of new tokens; an
        # encoder-decoder's counts the start token.
        length = said.get("max_length") if encoder_decoder else None
        known["max_new_tokens"] = length - 1 if length and length > 1 else 64
    if positions:
        # Half of a decoder's positions are left to the prompt.
        most = positions if encoder_decoder else positions // 2
        known["max_new_tokens"] = max(1, min(known["max_new_tokens"], most))
    require_one_way(check_params(GENERATION_PARAMS, known))
    return known


def read_generation_config(model: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model's generation config after some changes, JSON only."""
    config = getattr(model, "generation_config", None)
    if config is None or not callable(getattr(model, "generate", None)):
        raise StructureError(
            "The model cannot write text",
            where=type(model).__name__,
            wanted="a transformers model with generate() and a generation_config",
        )
    if unknown := sorted(changes.keys() - vars(type(config)()).keys()):
        raise InputError(
            "Not a setting of a generation config",
            where=f"model_config, 'generation', {', '.join(map(repr, unknown))}",
            wanted="an attribute of transformers.GenerationConfig",
            hint="leave it out, also where a pipeline was made with it",
        )
    said = {**json.loads(config.to_json_string()), **changes}
    said = {name: value for name, value in said.items() if value is not None}
    odd = sorted(name for name in said.keys() & _REFUSED if said[name])
    odd += ["num_beam_groups"] if said.get("num_beam_groups", 1) != 1 else []
    if odd:
        raise StructureError(
            "The generation config asks for what this task does not do",
            where=f"generation_config, {', '.join(odd)}",
            wanted="greedy decoding, beams or sampling",
            hint="set it to None in model.generation_config before saving",
        )
    return said
