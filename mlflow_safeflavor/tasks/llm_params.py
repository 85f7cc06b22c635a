"""Params of OpenAI's API, of the tasks that answer as it does."""

from __future__ import annotations

from mlflow_safeflavor.tasks.generation_params import MAX_NEW_TOKENS, TEMPERATURE
from mlflow_safeflavor.tasks.params import Param

__all__ = ["MODEL_AND_USER", "OPENAI_PARAMS"]

MODEL_AND_USER = (
    Param("model", "string", default="", wanted="a text, which the answer repeats", none_is=""),
    Param("user", "string", default="", wanted="a text, which is not read", none_is=""),
)


def _refused(name: str) -> Param:
    return Param(
        name,
        "double",
        default=0.0,
        wanted="0; repetition_penalty and no_repeat_ngram_size are what this model has",
        allows=lambda value: value == 0,
    )


# Of a request that writes. What is not done is declared, and refused, so that MLflow does not drop
# it without an error.
OPENAI_PARAMS = (
    *MODEL_AND_USER,
    Param(
        "max_tokens",
        "long",
        default=MAX_NEW_TOKENS.default,
        wanted=MAX_NEW_TOKENS.wanted,
        allows=MAX_NEW_TOKENS.allows,
    ),
    Param(
        "max_completion_tokens",
        "long",
        default=0,
        wanted=f"{MAX_NEW_TOKENS.wanted}, or 0 for max_tokens",
        allows=lambda value: value == 0 or MAX_NEW_TOKENS.allows(value),
    ),
    Param(
        "temperature",
        "double",
        default=0.0,
        wanted=f"{TEMPERATURE.wanted}, or 0 for the most likely text",
        allows=lambda value: value == 0 or TEMPERATURE.allows(value),
    ),
    Param(
        "n",
        "long",
        default=1,
        wanted="a whole number from 1 to 64",
        allows=lambda value: 1 <= value <= 64,
    ),
    Param(
        "stream",
        "boolean",
        default=False,
        wanted="false: predict, and MLflow's server, answer in one piece; predict_stream streams",
        allows=lambda value: not value,
    ),
    _refused("frequency_penalty"),
    _refused("presence_penalty"),
)
