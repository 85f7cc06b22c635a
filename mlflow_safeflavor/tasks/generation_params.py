"""Params of the tasks that write text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.text_params import TRUNCATION

__all__ = [
    "GENERATION_PARAMS",
    "KEEP_LOGITS",
    "MAX_NEW_TOKENS",
    "TEMPERATURE",
    "require_least",
    "require_one_way",
]

# For models that count no positions: a request cannot ask for hours.
_MOST_NEW_TOKENS = 32768

# Scores are divided by such numbers in float32, one after the other: beyond these bounds they would
# become 0, infinite or NaN.
_LEAST, _MOST = 1e-9, 1e9
_POSITIVE = f"a number from {_LEAST:g} to {_MOST:g}"


def _is_positive(value: float) -> bool:
    return _LEAST <= value <= _MOST


MAX_NEW_TOKENS = Param(
    "max_new_tokens",
    "long",
    default=64,
    wanted=f"a whole number from 1 to {_MOST_NEW_TOKENS}",
    allows=lambda value: 1 <= value <= _MOST_NEW_TOKENS,
)
TEMPERATURE = Param("temperature", "double", default=1.0, wanted=_POSITIVE, allows=_is_positive)

# ``max_length`` is declared, and refused, so that MLflow does not drop it without an error.
GENERATION_PARAMS = (
    MAX_NEW_TOKENS,
    Param(
        "min_new_tokens",
        "long",
        default=0,
        wanted="a whole number from 0 to max_new_tokens",
        allows=lambda value: 0 <= value <= _MOST_NEW_TOKENS,
        none_is=0,
    ),
    Param("do_sample", "boolean", default=False, wanted="true or false"),
    TEMPERATURE,
    Param(
        "top_p",
        "double",
        default=1.0,
        wanted=f"a number from {_LEAST:g} to 1",
        allows=lambda value: _LEAST <= value <= 1,
    ),
    Param(
        "top_k",
        "long",
        default=50,
        wanted="a whole number of at least 1, or 0 for all tokens",
        allows=lambda value: value >= 0,
        none_is=0,
    ),
    Param(
        "num_beams",
        "long",
        default=1,
        wanted="a whole number from 1 to 64",
        allows=lambda value: 1 <= value <= 64,
    ),
    Param(
        "num_return_sequences",
        "long",
        default=1,
        wanted="a whole number from 1 to 64",
        allows=lambda value: 1 <= value <= 64,
        none_is=1,
    ),
    Param("repetition_penalty", "double", default=1.0, wanted=_POSITIVE, allows=_is_positive),
    Param(
        "no_repeat_ngram_size",
        "long",
        default=0,
        wanted="how many tokens in a row may not come twice, or 0 where any may",
        allows=lambda value: 0 <= value <= _MOST_NEW_TOKENS,
        none_is=0,
    ),
    Param(
        "seed",
        "long",
        default=-1,
        wanted="a whole number of at least 0, or -1 for other draws each time",
        allows=lambda value: -1 <= value < 2**63,
        none_is=-1,
    ),
    Param(
        "stop",
        "string",
        default=[],
        wanted="a list of texts, none of them empty",
        allows=all,
        many=True,
    ),
    Param(
        "max_length",
        "long",
        default=0,
        wanted="0: it would count what is read and what is written together; max_new_tokens says "
        "how much is written",
        allows=lambda value: value == 0,
        none_is=0,
    ),
    TRUNCATION,
)

# For golden rows, which are compared by logits; in no signature, as those of many rows, (rows,
# steps, vocabulary), would fill the memory.
KEEP_LOGITS = Param("keep_logits", "boolean", default=False, wanted="true or false")


def require_one_way(params: Mapping[str, Any]) -> None:
    """Refuse params that ask for beams and draws at once, or for more texts than there are beams.

    Raises:
        InputError: Names them.
    """
    beams, texts = params["num_beams"], params["num_return_sequences"]
    if params["do_sample"] and beams > 1:
        raise InputError(
            "Beams are searched, not sampled",
            where="params, 'do_sample' and 'num_beams'",
            wanted="num_beams 1 with do_sample, or do_sample false with beams",
            found=f"num_beams {beams}",
        )
    # Greedy decoding has one text, and a search as many as it has beams: the next ones would be
    # copies.
    if not params["do_sample"] and texts > beams:
        raise InputError(
            "Without sampling there are only as many texts as beams",
            where="params, 'num_return_sequences'",
            wanted=f"at most {beams}, which is num_beams; or do_sample true",
            found=texts,
        )


def require_least(params: Mapping[str, Any], default: int) -> None:
    """Refuse a request for more new tokens at least than at most.

    Args:
        params: Of the request, all of them.
        default: The model's own least number, which gives way to a shorter request.

    Raises:
        InputError: Names the param.
    """
    least, most = params["min_new_tokens"], params["max_new_tokens"]
    # MLflow sends defaults as if they had been asked for.
    if least > most and least != default:
        raise InputError(
            "A text cannot be longer than it may be",
            where="params, 'min_new_tokens'",
            wanted=f"at most {most}, the most tokens that are written",
            found=least,
        )
