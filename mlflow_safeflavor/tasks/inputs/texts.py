"""Texts: checks of those in rows, and spaces taken away from those that were decoded."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value

__all__ = ["cleaned_up", "require_clean", "require_texts"]

# Where ``clean_up_tokenization`` of transformers takes spaces away, in its order.
_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def require_texts(rows: Sequence[Row], columns: Mapping[str, str | None]) -> None:
    """Refuse rows in which a field of ``columns`` is anything but a text.

    Raises:
        InputError: Names the first such row and column.
    """
    for i, row in enumerate(rows):
        for field, column in columns.items():
            value = row.get(field)
            if not isinstance(value, str):
                raise InputError(
                    "A value is not a text",
                    where=format_cell(i, column),
                    wanted="a str (it may be empty)",
                    found=format_value(value) if field in row else "no such column",
                    hint="convert it first, for example data[column].astype(str); drop or fill "
                    "missing values",
                )


def require_clean(value: Any, where: str, caps: Caps | None = None) -> None:
    """Refuse a cell or param with a text, at any depth, that UTF-8 cannot encode or is too long.

    Args:
        value: Anything.
        where: Row and column, or param, for messages.
        caps: With the most characters that all its texts may have together; None where they are
            files.

    Raises:
        InputError: Names ``where``.
    """
    characters = 0
    # JSON can hold half of a surrogate pair ("\ud800"), which no library in Rust takes for a text.
    for text in _texts_in(value):
        characters += len(text)
        if not (text.isascii() or _is_unicode(text)):
            raise InputError(
                "A text holds half of a surrogate pair, which nothing can read",
                where=where,
                wanted="a str that can be encoded as UTF-8",
                found=ascii(reprlib.repr(text)),
                hint='clean it first, for example text.encode("utf-8", "replace").decode()',
            )
    if caps is not None:
        caps.require(
            "max_characters",
            characters,
            "A text is too long",
            where=where,
            instead="cut or split it",
        )


def _texts_in(value: Any) -> Iterator[str]:
    waiting = [value]  # no recursion: a cell may be nested deeper than Python's stack
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):  # keys are texts, too
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            waiting += part
        elif isinstance(part, np.ndarray) and part.dtype.kind in "OU":
            waiting += part.ravel().tolist()


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def cleaned_up(text: str) -> str:
    """A decoded text without spaces before punctuation, as transformers' tokenizers clean up."""
    for spaced in _CLEANED_UP:
        text = text.replace(spaced, spaced.strip())
    return text
