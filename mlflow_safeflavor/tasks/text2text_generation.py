"""Texts → texts of an encoder-decoder: summaries, translations, answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.features import Features
from mlflow_safeflavor.tasks.generation import GenerationTask
from mlflow_safeflavor.tasks.generation_config import describe_generation
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_texts
from mlflow_safeflavor.tasks.text import groups

if TYPE_CHECKING:
    import torch

__all__ = ["Text2TextGeneration", "specific_task"]

_SPECIFIC = re.compile(r"summarization|translation(_\w+_to_\w+)?", re.ASCII)


class Text2TextGeneration(GenerationTask):
    """The text that an encoder-decoder generates from a text.

    Options, fixed at save through ``model_config``: ``prefix``, put before each text,
    ``prompt_template``, a text around each ``{prompt}``, behind the prefix, and ``generation``,
    changes of the model's generation config. Saved as ``summarization``,
    ``translation`` or ``translation_xx_to_yy``, the task also takes prefix and generation settings
    of that name from the ``task_specific_params`` of the model's config, as transformers' pipelines
    do.

    A text longer than the model takes is cut where its tokenizer cuts.
    """

    name = "text2text-generation"
    task_options = frozenset({"generation", "prefix", "prompt_template"})
    encoder_decoder = True
    # Key of ``task_specific_params``.
    specific: ClassVar[str | None] = None

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith(("ForConditionalGeneration", "MTModel"))

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        named = getattr(getattr(model, "config", None), "task_specific_params", None) or {}
        # T5 has "translate English to German: " there, with beams and a length.
        specific = dict(named.get(cls.specific) or {})
        prefix = {"prefix": specific.pop("prefix", None) or "", **options}["prefix"]
        if not isinstance(prefix, str):
            raise InputError(
                "The prefix is not a text",
                where="model_config, 'prefix'",
                wanted="a str",
                found=repr(prefix),
            )
        return {
            **describe_generation(cls, model, options, specific),
            "prefix": prefix,
        }

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_texts(rows, self.columns)
        self.require_little(rows, params)
        limit = self.prompt_limit(params)
        for first, some in groups(rows):
            self.require_short(first, some, limit, cut=params["truncation"])
            # Prefix and template are the owner's: not among the characters that a cap counts.
            texts = [self.config["prefix"] + self.prompt(row["text"]) for row in some]
            encoded = self.encoder.encode(texts, max_length=limit, truncation=params["truncation"])
            for i, row in enumerate(encoded, first):
                self.require_fitting(i, len(row["input_ids"]), limit)
                yield self.featured(row["input_ids"], params)


@cache
def specific_task(name: str) -> type[Text2TextGeneration] | None:
    """The task under a name that pipelines have for one use of a model; None for other names."""
    if not _SPECIFIC.fullmatch(name):
        return None
    return type(
        Text2TextGeneration.__name__, (Text2TextGeneration,), {"name": name, "specific": name}
    )
