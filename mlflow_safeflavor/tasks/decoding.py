"""Settings of decoding, from the params of a request and the model's generation config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlflow_safeflavor.module.generation import Generation
from mlflow_safeflavor.tasks.generation_params import KEEP_LOGITS
from mlflow_safeflavor.tasks.sampling import SAMPLING, sampler, seed_of

__all__ = ["generation_for"]


def generation_for(
    kept: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    draws: Sequence[int],
    start: int,
    filler: int,
    stopping: Sequence[Callable[..., Any]],
) -> Generation:
    """The generation of rows that run together.

    Args:
        kept: The model's generation config, which params override.
        params: Of the request, all of them.
        draws: Of each row that runs together, which text of its prompt it is: each is drawn by
            itself.
        start: Index of the first new token in a sequence.
        filler: Token behind a text that ended before those beside it.
        stopping: See ``Generation``.
    """
    seeds = [seed_of(params["seed"], draw) for draw in draws]
    return Generation(
        _settings(kept, params, start, filler),
        processors=sampler({**kept, **params}, seeds) if params["do_sample"] else [],
        stopping=stopping,
        keep_logits=params[KEEP_LOGITS.name],
    )


def _settings(
    kept: Mapping[str, Any], params: Mapping[str, Any], start: int, filler: int
) -> dict[str, Any]:
    beams, most = params["num_beams"], params["max_new_tokens"]
    of_beams = ("early_stopping", "length_penalty") if beams == 1 else ()
    unused = {*SAMPLING, "min_length", *of_beams}
    # At least as many new tokens as the model's config says; transformers warns where a request
    # wants fewer.
    least = params["min_new_tokens"] or kept.get("min_length", 0) - start
    return {
        **{name: value for name, value in kept.items() if name not in unused},
        "max_new_tokens": most,
        "min_new_tokens": min(most, least) if least > 0 else None,
        "num_beams": beams,
        "num_return_sequences": 1 if params["do_sample"] else params["num_return_sequences"],
        "no_repeat_ngram_size": params["no_repeat_ngram_size"] or None,
        "repetition_penalty": params["repetition_penalty"],
        "do_sample": False,  # drawn by ``sampler``
        "pad_token_id": filler,
    }
