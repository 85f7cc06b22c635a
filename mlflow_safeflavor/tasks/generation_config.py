"""The generation config of a model that writes text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow_safeflavor.errors import InputError, StructureError

__all__ = ["REPLACED", "read_generation_config"]

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
        *(
            "num_return_sequences",
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
    odd += [name for name in ("num_beam_groups", "num_return_sequences") if said.get(name, 1) != 1]
    if odd:
        raise StructureError(
            "The generation config asks for what this task does not do",
            where=f"generation_config, {', '.join(odd)}",
            wanted="greedy decoding, beams or sampling",
            hint="set it to None in model.generation_config before saving",
        )
    return said
