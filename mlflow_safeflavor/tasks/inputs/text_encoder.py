"""Texts to token ids and back, without transformers, by a tokenizer whose state never changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.tasks.inputs.backend import TOKENIZER, read_backend
from mlflow_safeflavor.tasks.inputs.probes import PROBES
from mlflow_safeflavor.tasks.inputs.texts import cleaned_up
from mlflow_safeflavor.tasks.inputs.token_bound import TokenBound

__all__ = ["TextEncoder"]


class TextEncoder:
    """Texts → token ids, exactly as the saved tokenizer's; safe from many threads.

    Args:
        folder: Where ``write_tokenizer`` wrote.
        config: From ``write_tokenizer``.
        read: Reads its file.

    Attributes:
        config: As given.
        max_length: Most tokens the tokenizer declares for its model; None if it declares none.

    Raises:
        IntegrityError: ``tokenizer.json`` cannot be read, or the config lacks a key.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        read: Callable[[Path], bytes] = Path.read_bytes,
    ) -> None:
        self.config = dict(config)
        self._tokenizer = read_backend(Path(folder) / TOKENIZER, read)
        # Truncation is state of a ``tokenizers.Tokenizer``: changing it under a concurrent call
        # gives wrong lengths without an exception. For a pair it also builds every combination of
        # the tokens cut off: two texts of 20 kB cut to 16 tokens took 15 s and 4.5 GB. So it never
        # truncates, and rows are cut afterwards, by the same rules.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = [self._tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)]
        try:
            self.input_names = tuple(config["model_input_names"])
            self.max_length: int | None = config["model_max_length"]
            self._left = config["truncation_side"] == "left"
            # Whether "[SEP]" inside a text is the special token is no part of tokenizer.json.
            self._tokenizer.encode_special_tokens = bool(config["split_special_tokens"])
        except KeyError as error:
            raise IntegrityError(
                "The config of the text encoder lacks a key",
                where="encoder",
                wanted=error.args[0],
                hint=FETCH_AGAIN,
            ) from None

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncation: bool = True,
        only: int | None = None,
        special: bool = True,
        spans: bool = False,
    ) -> list[dict[str, list[Any]]]:
        """Encode without padding.

        Args:
            texts: The (first) texts.
            pairs: The second texts, as many; an empty one still makes a pair.
            max_length: Most tokens of a row, special ones included; None for ``self.max_length``.
                Special tokens are never cut, so it should be more than ``special_tokens``.
            truncation: Cut what is longer, the longer text of a pair first. Otherwise rows keep
                their length, and the caller compares ``len(row["input_ids"])``.
            only: Cut this text of a pair (0 or 1) and never the other; a row stays longer where
                that is not enough.
            special: Add the special tokens.
            spans: Also give the place of each token in the texts.

        Returns:
            One dict a row: name in ``input_names`` → list of int, all equally long. With ``spans``
            also ``offsets`` (``[start, end]`` in characters of its text), ``word_ids`` (number of
            the pre-tokenized word) and ``sequence_ids`` (0 for the text, 1 for the second one); the
            latter two are -1 for special tokens.
        """
        limit = (max_length or self.max_length) if truncation else None
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        # Offsets cost time; the ids are the same.
        encode = self._tokenizer.encode_batch if spans else self._tokenizer.encode_batch_fast
        return [
            self._named(encoding, limit, only, spans)
            for encoding in encode(inputs, add_special_tokens=special)
        ]

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether a text surely has more than so many tokens; see ``TokenBound``."""
        # Not worth a look where even a token a character would not be too many.
        return len(text) > tokens and self._bound.exceeds(text, tokens)

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self._tokenizer)

    def pair(
        self,
        first: Mapping[str, list[Any]],
        second: Mapping[str, list[Any]],
        *,
        max_length: int | None,
        only: int | None = None,
    ) -> dict[str, list[Any]]:
        """The pair, as ``encode`` makes it, of two texts encoded alone without special tokens.

        A text that goes with many others is tokenised once.

        Args:
            first: The first text.
            second: The second one.
            max_length: Most tokens; None for any.
            only: See ``encode``.

        Raises:
            StructureError: The tokenizer joins texts by what is in them.
        """
        ids = [first["input_ids"], second["input_ids"]]
        frame = self._frame
        # All parts of the frame but the two texts are special tokens.
        budget = max(0, max_length - len(frame) + 2) if max_length else None
        if budget is not None and sum(map(len, ids)) > budget:
            whole = [len(part) for part in ids]
            lengths = (
                _longest_first(whole[0], whole[1], budget)
                if only is None
                else _only(only, whole, budget)
            )
            ids = [
                part[len(part) - length :] if self._left else part[:length]
                for part, length in zip(ids, lengths, strict=True)
            ]
        row: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": []}
        for text, token, kind in frame:
            placed = [token] if text is None else ids[text]
            row["input_ids"] += placed
            row["token_type_ids"] += [kind] * len(placed)
        row["attention_mask"] = [1] * len(row["input_ids"])
        return {name: row[name] for name in self.input_names}

    @cached_property
    def _frame(self) -> list[tuple[int | None, int, int]]:
        """Frame of a pair: special tokens (None, id, type), and texts (number, 0, type)."""
        # Told by joining a probe with itself; the first ones may have no tokens.
        for text in PROBES:
            encoding = self._tokenizer.encode(text, text)
            frame = list[tuple[int | None, int, int]]()
            places = zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True)
            for number, token, kind in places:
                place = (number, 0 if number is not None else token, kind)
                if number is None or not frame or frame[-1] != place:
                    frame.append(place)
            if sorted(number for number, *_ in frame if number is not None) == [0, 1]:
                return frame
        raise StructureError(
            "The tokenizer does not join texts to pairs as others do",
            where="tokenizer",
            wanted="one text, then the other",
        )

    def special_tokens(self, *, pair: bool) -> int:
        """Number of special tokens added to a text, or to a pair."""
        return int(self._special[pair])

    # And back.

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Token ids → text, as the saved tokenizer's ``decode``."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))
        return cleaned_up(text) if self.config["clean_up"] else text

    def join(self, tokens: Sequence[str]) -> str:
        """Tokens → text, as ``convert_tokens_to_string`` makes it."""
        decoder = self._tokenizer.decoder
        # Without a decoder the tokenizers library puts spaces between tokens.
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def token(self, token_id: int) -> str:
        """Token of that id, as the vocabulary writes it; empty if there is none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it; None if there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def changes_words(self) -> bool:
        """Whether decoding one token more may change the words before it, or the space there."""
        return bool(self.config["clean_up"]) or self.marks_subwords

    @property
    def marks_subwords(self) -> bool:
        """Whether tokens that go on with a word are marked as such, like "##ing"."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def _named(
        self, encoding: Any, limit: int | None, only: int | None, spans: bool
    ) -> dict[str, list[Any]]:
        made = {
            "input_ids": "ids",
            "token_type_ids": "type_ids",
            "attention_mask": "attention_mask",
        }
        row: dict[str, list[Any]] = {
            name: getattr(encoding, made[name]) for name in self.input_names
        }
        if spans:
            row["offsets"] = [list(span) for span in encoding.offsets]
            row["word_ids"] = [-1 if word is None else word for word in encoding.word_ids]
            row["sequence_ids"] = [-1 if text is None else text for text in encoding.sequence_ids]
        if limit is None or len(encoding) <= limit:
            return row
        kept = self._kept(encoding.sequence_ids, limit, only)
        return {name: [values[i] for i in kept] for name, values in row.items()}

    def _kept(self, sequence_ids: Sequence[int | None], limit: int, only: int | None) -> list[int]:
        """Positions kept when a row is cut: special tokens, and one end of each text."""
        places = [[i for i, text in enumerate(sequence_ids) if text == wanted] for wanted in (0, 1)]
        special = [i for i, text in enumerate(sequence_ids) if text is None]
        whole, budget = [len(positions) for positions in places], max(0, limit - len(special))
        lengths = (
            _longest_first(whole[0], whole[1], budget)
            if only is None
            else _only(only, whole, budget)
        )
        for positions, length in zip(places, lengths, strict=True):
            special += positions[len(positions) - length :] if self._left else positions[:length]
        return sorted(special)


def _longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """Tokens kept of each text of a pair, as by tokenizers' ``longest_first``."""
    # The shorter one stays whole while it fits into half of the budget. If neither does, both get
    # half, and the odd token goes to the longer one (to the second, if they are equally long).
    shorter = min(first, second)
    if shorter <= budget // 2:
        longer = min(max(first, second), budget - shorter)
        return (shorter, longer) if first <= second else (longer, shorter)
    half = budget // 2
    return (half, budget - half) if first <= second else (budget - half, half)


def _only(cut: int, lengths: Sequence[int], budget: int) -> list[int]:
    """Tokens kept of each text when one alone is cut, down to a single token if it must be."""
    kept = list(lengths)
    kept[cut] = min(kept[cut], max(1, budget - kept[1 - cut]))
    return kept
