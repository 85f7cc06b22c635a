"""Greedy decoding of connectionist temporal classification, without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.tasks.inputs.texts import cleaned_up

__all__ = ["ARGUMENTS", "CtcDecoder", "Said"]

# Arguments of transformers' tokenizer that decide about its texts.
ARGUMENTS = frozenset(
    (
        *("bos_token", "eos_token", "unk_token", "pad_token", "word_delimiter_token"),
        *("replace_word_delimiter_char", "do_lower_case", "clean_up_tokenization_spaces"),
    )
)


class Said(NamedTuple):
    """A text, the first frame in which it was said, and the frame behind the last one."""

    text: str
    start: int
    end: int


class CtcDecoder:
    """Tokens of frames → text, exactly as the saved tokenizer's; safe from many threads.

    Args:
        vocabulary: Token → id.
        config: The tokenizer's ``ARGUMENTS``.
        where: For messages.

    Raises:
        IntegrityError: These are something else.
    """

    def __init__(self, vocabulary: Any, config: Any, where: object) -> None:
        known = isinstance(vocabulary, dict) and all(type(i) is int for i in vocabulary.values())
        said = isinstance(config, dict) and config.keys() == ARGUMENTS
        if not known or not said:
            raise IntegrityError(
                "The tokenizer is described by something else", where=where, hint=FETCH_AGAIN
            )
        self._tokens: Mapping[int, str] = {i: token for token, i in vocabulary.items()}
        self._config: Mapping[str, Any] = config

    def characters(self, ids: Sequence[int]) -> list[Said]:
        """Tokens of frames, repeats collapsed and blanks dropped, in order."""
        pad, between = self._config["pad_token"], self._config["word_delimiter_token"]
        found, end = [], 0
        # By token and not by id: two ids that the vocabulary does not know are one unknown token.
        for token, run in groupby(self._tokens.get(i, self._config["unk_token"]) for i in ids):
            start, end = end, end + sum(1 for _ in run)
            # Special tokens stay, as in transformers' pipeline: an <unk> was heard, too.
            if token != pad:
                text = self._config["replace_word_delimiter_char"] if token == between else token
                found.append(Said(text, start, end))
        return found

    def words(self, characters: Sequence[Said]) -> list[Said]:
        """The words that ``characters`` make, in order."""
        space = self._config["replace_word_delimiter_char"]
        return [
            Said("".join(one.text for one in word), word[0].start, word[-1].end)
            for spaces, run in groupby(characters, key=lambda one: one.text == space)
            if not spaces and (word := list(run))
        ]

    def text(self, characters: Sequence[Said]) -> str:
        """The text that ``characters`` make."""
        text = "".join(one.text for one in characters).strip()
        if self._config["do_lower_case"]:
            text = text.lower()
        return cleaned_up(text) if self._config["clean_up_tokenization_spaces"] else text
