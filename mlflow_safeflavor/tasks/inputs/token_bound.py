"""Lower bound of a text's tokens, from its beginning: far too long ones cost little to refuse.

The beginning of a text has the tokens that it has in the whole text where words are cut at spaces
and each is tokenised by itself. Other tokenizers are given the whole text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

__all__ = ["TokenBound"]

# Characters that are tokenised at first; shorter texts are not worth it.
_SAMPLE = 4_000

# Normalizers whose result for a word does not depend on the words behind it.
_LOCAL_NORMALIZERS = frozenset(
    (
        *(
            "BertNormalizer",
            "ByteLevel",
            "Lowercase",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Nmt",
            "Precompiled",
            "Prepend",
        ),
        *("Strip", "StripAccents"),
    )
)
# Pre-tokenizers that cut at every space, with the options that they must have for it; and those
# that cut words only further.
_AT_SPACES = {
    "BertPreTokenizer": {},
    "ByteLevel": {"use_regex": True},
    "Metaspace": {"split": True},
    "Whitespace": {},
    "WhitespaceSplit": {},
}  # fmt: skip
_FINER = frozenset(("ByteLevel", "Digits", "Metaspace", "Punctuation"))
_OF_WORDS = frozenset(("BPE", "Unigram", "WordLevel", "WordPiece"))


class TokenBound:
    """A lower bound of the number of tokens.

    Args:
        backend: Without truncation and padding.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._local = _cuts_at_spaces(backend)

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether the beginning of a text has more than so many tokens, special ones not counted.

        Args:
            text: The text.
            tokens: Number of tokens.

        Returns:
            False also where it is not known.
        """
        size = _SAMPLE
        while self._local and size < len(text) // 2:
            end = text.rfind(" ", 0, size)
            words = text[: max(0, end)].rstrip()  # up to the end of a word that a space follows
            (encoding,) = self._backend.encode_batch_fast([words], add_special_tokens=False)
            if len(encoding) > tokens:
                return True
            # The characters of so many tokens, at the rate so far, and a tenth more.
            size = max(2 * size, int(1.1 * len(words) * tokens / max(1, len(encoding))))
        return False


def _cuts_at_spaces(backend: Tokenizer) -> bool:
    """Whether the tokens of a word never depend on the text behind the space that ends it."""
    normalizers, pre_tokenizers = (
        list(_parts(part)) for part in (backend.normalizer, backend.pre_tokenizer)
    )
    return (
        type(backend.model).__name__ in _OF_WORDS
        # An added token with a space in it is found across two words.
        and not any(
            map(
                str.isspace,
                "".join(token.content for token in backend.get_added_tokens_decoder().values()),
            )
        )
        and all(map(_is_local, normalizers))
        and all(part["type"] in _FINER or _is_at_spaces(part) for part in pre_tokenizers)
        and any(map(_is_at_spaces, pre_tokenizers))
    )


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """Parts of a normalizer or pre-tokenizer, as JSON."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    for said in waiting:
        if said["type"] == "Sequence":
            waiting += said.get("normalizers") or said.get("pretokenizers") or []
        else:
            yield said


def _is_local(normalizer: Mapping[str, Any]) -> bool:
    if normalizer["type"] == "Replace":  # one that touches spaces may make one word of many
        return normalizer["pattern"] == {"Regex": " {2,}"} or " " not in normalizer["pattern"].get(
            "String", " "
        )
    return normalizer["type"] in _LOCAL_NORMALIZERS


def _is_at_spaces(pre_tokenizer: Mapping[str, Any]) -> bool:
    options = _AT_SPACES.get(pre_tokenizer["type"])
    return options is not None and all(
        pre_tokenizer.get(name) is value for name, value in options.items()
    )
