"""Prompt templates: a text of the owner's around each prompt, as mlflow.transformers has them."""

from __future__ import annotations

from string import Formatter
from typing import Any

from mlflow_safeflavor.errors import InputError

__all__ = ["split_template"]


def split_template(template: Any) -> list[str]:
    """The texts before and after ``{prompt}`` in a template, which doubles other braces.

    Raises:
        InputError: It is no text with one ``{prompt}`` and no other field.
    """
    # Split at save, and not formatted at load: a width in a field of a hostile artifact, as in
    # "{prompt:9999999999}", would fill the memory.
    texts, fields = [""], list[tuple[Any, ...]]()
    try:
        for text, field, width, conversion in Formatter().parse(template):
            texts[-1] += text
            if field is not None:
                fields.append((field, width, conversion))
                texts.append("")
    except (TypeError, ValueError):
        fields = []
    if fields != [("prompt", "", None)]:
        raise InputError(
            "Not a prompt template",
            where="prompt_template",
            wanted="a text with {prompt} once, and any other brace doubled",
            found=repr(template),
        )
    return texts
