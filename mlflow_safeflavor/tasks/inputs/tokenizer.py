"""Tokenizers: written as JSON files only, read without transformers, used without ever changing their state."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlflow_safeflavor.artifact.json_files import read_json, write_json
from mlflow_safeflavor.artifact.plain_files import WAY_OUT
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.artifact.trust import require_harmless
from mlflow_safeflavor.errors import IntegrityError, SafeFlavorError, StructureError, TrustError
from mlflow_safeflavor.module.guard import guarded
from mlflow_safeflavor.tasks.inputs.token_bound import TokenBound

__all__ = ["TextEncoder", "load_tokenizer", "write_tokenizer"]

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_WRITTEN = (_TOKENIZER, _CONFIG, _SPECIAL_TOKENS)

_UNLIMITED = int(1e20)
"""At and above this, ``model_max_length`` is transformers' way to say that there is none."""

_NOT_PORTABLE = (
    "auto_map",
    "is_local",
    "local_files_only",
    "name_or_path",
)
"""Keys of the config that speak of the machine it was loaded on, or of code that is not here."""

_ATTRIBUTES = (
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)

_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Where ``clean_up_tokenization`` takes spaces away, in its order."""

_PROBES = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\tand a tab\nand a line ",
    "naïve café über Å ﬁ",
    "日本語のテキスト",
    "👩‍👩‍👧 🙂 e\u0301",
    "العربية \u202eright to left\u202c",
    "control \x00\x07\u200b\ufeff characters",
    "def f(x):\n    return {x: [1.5, 'a'], **{}}",
    "word " * 40,
    "x" * 300,
)
_PROBE_LENGTHS = (None, 16)


class TextEncoder:
    """Texts → token ids, exactly as the tokenizer that was saved makes them. Safe from many threads.

    Truncation is state of a ``tokenizers.Tokenizer``; changing it under a concurrent call gives wrong lengths without
    an exception. Also, for a pair it builds every combination of what it cuts off: two texts of 20 kB cut to 16
    tokens took 15 s and 4.5 GB. So the tokenizer here never truncates, and rows are cut afterwards, by the same rules.

    Args:
        folder: Where ``write_tokenizer`` wrote.
        config: What ``write_tokenizer`` returned.
        read: What reads its file.

    Attributes:
        config: As given.
        max_length: Most tokens the tokenizer declares for its model; None if it declares none.

    Raises:
        IntegrityError: ``tokenizer.json`` cannot be read, or the config lacks a key.
    """

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], read: Callable[[Path], bytes] = Path.read_bytes
    ) -> None:
        self.config = dict(config)
        self._tokenizer = _read_backend(Path(folder) / _TOKENIZER, read)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        try:
            self.input_names = tuple(config["model_input_names"])
            self.max_length: int | None = config["model_max_length"]
            self._left = config["truncation_side"] == "left"
            # Whether "[SEP]" inside a text is the special token is no part of tokenizer.json.
            self._tokenizer.encode_special_tokens = bool(config["split_special_tokens"])
        except KeyError as error:
            raise IntegrityError(
                "The config of the text encoder lacks a key", where="encoder", wanted=error.args[0], way_out=WAY_OUT
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
            max_length: Most tokens of a row, special ones included; None for ``self.max_length``. Special tokens
                are never cut, so it should be more than ``special_tokens``.
            truncation: Cut what is longer, the longer text of a pair first. Otherwise rows keep their
                length, and the caller compares ``len(row["input_ids"])``.
            only: Cut this text of a pair (0 or 1) and never the other; a row stays longer where that does not do.
            special: Add the special tokens.
            spans: Also say where in the texts each token is from.

        Returns:
            One dict a row: name in ``input_names`` → list of int, all equally long. With ``spans`` also ``offsets``
            (``[start, end]`` in characters of its text), ``word_ids`` (number of the pre-tokenized word) and
            ``sequence_ids`` (0 for the text, 1 for the second one); the latter two are -1 for special tokens.
        """
        limit = (max_length or self.max_length) if truncation else None
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        # Offsets cost time; the ids are the same.
        encode = self._tokenizer.encode_batch if spans else self._tokenizer.encode_batch_fast
        return [self._named(encoding, limit, only, spans) for encoding in encode(inputs, add_special_tokens=special)]

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether a text has more than so many tokens, as far as that is told cheaply; see ``TokenBound``."""
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
        """Two texts, each encoded alone, whole and without special tokens → what ``encode`` makes of them as a pair.

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
        budget = max(0, max_length - len(frame) + 2) if max_length else None
        if budget is not None and sum(map(len, ids)) > budget:
            whole = [len(part) for part in ids]
            lengths = _longest_first(whole[0], whole[1], budget) if only is None else _only(only, whole, budget)
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
        """How two texts are joined: special tokens (None, id, type) and, in their places, texts (number, 0, type)."""
        for text in _PROBES:
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
        """How many special tokens are added to a text, or to a pair."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    # And back.

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Token ids → text, as ``decode`` of the tokenizer that was saved makes it."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))
        for spaced in _CLEANED_UP if self.config["clean_up"] else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def join(self, tokens: Sequence[str]) -> str:
        """Tokens → text, as ``convert_tokens_to_string`` makes it."""
        decoder = self._tokenizer.decoder
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
    def marks_subwords(self) -> bool:
        """Whether tokens that go on with a word are marked as such, like "##ing"."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def _named(self, encoding: Any, limit: int | None, only: int | None, spans: bool) -> dict[str, list[Any]]:
        made = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
        row: dict[str, list[Any]] = {name: getattr(encoding, made[name]) for name in self.input_names}
        if spans:
            row["offsets"] = [list(span) for span in encoding.offsets]
            row["word_ids"] = [-1 if word is None else word for word in encoding.word_ids]
            row["sequence_ids"] = [-1 if text is None else text for text in encoding.sequence_ids]
        if limit is None or len(encoding) <= limit:
            return row
        kept = self._kept(encoding.sequence_ids, limit, only)
        return {name: [values[i] for i in kept] for name, values in row.items()}

    def _kept(self, sequence_ids: Sequence[int | None], limit: int, only: int | None) -> list[int]:
        """Positions that stay when a row is cut to ``limit``: special tokens (None) and the near end of each text."""
        places = [[i for i, text in enumerate(sequence_ids) if text == wanted] for wanted in (0, 1)]
        special = [i for i, text in enumerate(sequence_ids) if text is None]
        whole, budget = [len(positions) for positions in places], max(0, limit - len(special))
        lengths = _longest_first(whole[0], whole[1], budget) if only is None else _only(only, whole, budget)
        for positions, length in zip(places, lengths, strict=True):
            special += positions[len(positions) - length :] if self._left else positions[:length]
        return sorted(special)


def _longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens of each text of a pair are kept, as tokenizers' ``longest_first`` does it.

    The shorter one stays whole while it fits into half of the budget. If neither does, both get half, and the
    odd token goes to the longer one (to the second, if they are equally long).
    """
    shorter = min(first, second)
    if shorter <= budget // 2:
        longer = min(max(first, second), budget - shorter)
        return (shorter, longer) if first <= second else (longer, shorter)
    half = budget // 2
    return (half, budget - half) if first <= second else (budget - half, half)


def _only(cut: int, lengths: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each text are kept when one alone is cut, down to a single token if it must be."""
    kept = list(lengths)
    kept[cut] = min(kept[cut], max(1, budget - kept[1 - cut]))
    return kept


def write_tokenizer(tokenizer: Any, folder: str | Path) -> dict[str, Any]:
    """Write a transformers tokenizer as JSON files only, and prove that they give the same ids.

    The user's tokenizer is not changed. Truncation and padding, which earlier calls leave behind in a tokenizer,
    are not written. A chat template goes into ``tokenizer_config.json``.

    Args:
        tokenizer: A fast tokenizer of transformers.
        folder: Made if missing.

    Returns:
        The config of ``TextEncoder``, JSON only.

    Raises:
        StructureError: The tokenizer has no Rust backend, cannot be written as JSON, or what was written gives
            other ids.
    """
    folder = Path(folder)
    private = _private_copy(tokenizer)
    config = _encoder_config(private)
    folder.mkdir(parents=True, exist_ok=True)
    _write_files(private, folder)
    encoder = TextEncoder(folder, config)
    wanted = _probe_with_transformers(private, config["model_input_names"])
    for reader, found in (
        ("without transformers", _probe_with_encoder(encoder)),
        ("with transformers", _probe_with_transformers(load_tokenizer(folder), config["model_input_names"])),
    ):
        _require_same_ids(wanted, found, type(tokenizer).__name__, reader)
    return config


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer that ``write_tokenizer`` wrote; opens no connection and runs no code beside it.

    Args:
        folder: Where it was written.

    Raises:
        IntegrityError: ``tokenizer.json`` cannot be read.
        StructureError: No class of this transformers release reads it unchanged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = _read_backend(Path(folder) / _TOKENIZER)
    require_harmless(read_json(Path(folder) / _CONFIG), Path(folder) / _CONFIG)
    if odd := sorted({path.name for path in Path(folder).iterdir()} - set(_WRITTEN)):
        raise IntegrityError(
            "A file beside the tokenizer is none that was saved", where=Path(folder) / odd[0], way_out=WAY_OUT
        )
    wanted = backend.encode_batch(list(_PROBES))
    failure: object = None
    # Classes of transformers 5 build their own backend from the vocabulary and may disregard parts of
    # tokenizer.json; the generic class takes it as it is.
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            with guarded(folder):
                tokenizer = cls.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            found = tokenizer.backend_tokenizer.encode_batch(list(_PROBES))
        except TrustError:
            raise
        except Exception as error:  # each class has its own ways to fail; the last resort below names them
            failure = error
            continue
        if [e.ids for e in found] == [e.ids for e in wanted]:
            return tokenizer
        failure = f"{type(tokenizer).__name__} gives other ids than {_TOKENIZER}"
    raise StructureError("The tokenizer cannot be built again by transformers", where=folder, found=failure)


_LARGEST_FILE = 2**27
"""Bytes of a tokenizer.json: Gemma's, with 262,144 tokens, has a quarter of that."""
_LONGEST_INSERTION = 1000
"""Characters that all replacements together may make of one."""


def _read_backend(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> Tokenizer:
    try:
        if len(content := read(path)) > _LARGEST_FILE:
            raise ValueError(f"{len(content):,} bytes, which are more than {_LARGEST_FILE:,}")
        backend = Tokenizer.from_buffer(content)
        _require_moderate(backend)
        return backend
    except SafeFlavorError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
        raise IntegrityError(
            "A file of the artifact cannot be read as a tokenizer", where=path, found=error, way_out=WAY_OUT
        ) from None


def _require_moderate(backend: Tokenizer) -> None:
    """Refuse a backend that makes far more of a text than the text is. Raises ``ValueError``."""
    if backend.padding is not None or backend.truncation is not None:  # never written; 10^9 is a length, too
        raise ValueError("padding or truncation, which a saved tokenizer never has")
    longest = 1
    for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder):
        for text in () if part is None else _insertions(json.loads(part.__getstate__())):
            longest *= max(1, len(text))
    if longest > _LONGEST_INSERTION:
        raise ValueError(f"replacements that make {longest:,} characters of one")


def _insertions(part: Any) -> Iterator[str]:
    """Texts that a part of a backend puts in the place of others, or before them."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("content", "prepend", "replacement") and isinstance(value, str):
                yield value
            elif key not in ("special_tokens", "vocab", "added_tokens"):
                yield from _insertions(value)
    elif isinstance(part, list):
        for item in part:
            yield from _insertions(item)


def _private_copy(tokenizer: Any) -> Any:
    """A copy that may be changed, without truncation and padding."""
    if getattr(tokenizer, "backend_tokenizer", None) is None or not getattr(tokenizer, "is_fast", False):
        raise StructureError(
            "The tokenizer has no fast backend, so it cannot be stored as JSON",
            where=type(tokenizer).__name__,
            wanted="a fast tokenizer (tokenizer.is_fast), which is backed by the tokenizers library",
            way_out="load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it with "
            "transformers.convert_slow_tokenizer and wrap it in PreTrainedTokenizerFast(tokenizer_object=...)",
        )
    try:
        private = copy.deepcopy(tokenizer)
    except Exception as error:  # a backend with parts written in Python fails in ways of its own
        raise StructureError(
            "The tokenizer cannot be copied, so it cannot be stored as JSON",
            where=type(tokenizer).__name__,
            wanted="a backend without custom parts written in Python",
            found=error,
        ) from error
    private.backend_tokenizer.no_truncation()
    private.backend_tokenizer.no_padding()
    return private


def _encoder_config(tokenizer: Any) -> dict[str, Any]:
    limit = tokenizer.model_max_length
    made = ("input_ids", "token_type_ids", "attention_mask")
    return {
        # Other names (boxes, pixels) are not made from text; a model that needs them fails at save.
        "model_input_names": [name for name in made if name in {"input_ids", *tokenizer.model_input_names}],
        "model_max_length": int(limit) if limit is not None and 0 < limit < _UNLIMITED else None,
        "clean_up": _cleans_up(tokenizer),
        "cls_token_id": tokenizer.cls_token_id,
        "mask_token": tokenizer.mask_token,
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "pad_token_type_id": int(tokenizer.pad_token_type_id),
        "padding_side": str(tokenizer.padding_side),
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "truncation_side": str(tokenizer.truncation_side),
        "unk_token_id": tokenizer.unk_token_id,
    }


def _cleans_up(tokenizer: Any) -> bool:
    """Whether decoding takes away spaces before punctuation; transformers 5 never does it for BPE unless forced."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    spared = type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not getattr(tokenizer, forced, True)
    return bool(tokenizer.clean_up_tokenization_spaces) and not spared


def _write_files(tokenizer: Any, folder: Path) -> None:
    """Save elsewhere and take over the JSON files only: some classes add vocabularies, templates or code."""
    with scratch_folder("tokenizer") as scratch:
        try:
            tokenizer.save_pretrained(scratch, legacy_format=False, save_jinja_files=False)
        except Exception as error:  # each tokenizer class has its own save and its own ways to fail
            raise StructureError(
                "The tokenizer cannot be written as JSON", where=type(tokenizer).__name__, found=error
            ) from error
        config = read_json(scratch / _CONFIG)
        # Files by their name are files of this machine, too.
        config = {key: value for key, value in config.items() if key not in _NOT_PORTABLE and "_file" not in key}
        # transformers writes those that were given when the tokenizer was made, not those set since or fixed by
        # its class.
        config.update({name: getattr(tokenizer, name) for name in _ATTRIBUTES if hasattr(tokenizer, name)})
        if type(tokenizer).__module__.partition(".")[0] != "transformers":
            # A class of the user's own is not stored; that the generic one does the same is proven by probes.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / _CONFIG, config)
        for name in (_TOKENIZER, _SPECIAL_TOKENS):
            if (scratch / name).exists():
                shutil.copyfile(scratch / name, folder / name)


# Probes: nasty texts, alone and in pairs, cut and uncut.


def _probe_with_encoder(encoder: TextEncoder) -> list[dict[str, list[int]]]:
    texts, pairs = list(_PROBES), list(reversed(_PROBES))
    return [
        row
        for length in _PROBE_LENGTHS
        for second in (None, pairs)
        for row in encoder.encode(texts, second, max_length=length, truncation=length is not None)
    ]


def _probe_with_transformers(tokenizer: Any, names: Sequence[str]) -> list[dict[str, list[int]]]:
    texts, pairs = list(_PROBES), list(reversed(_PROBES))
    rows = []
    for length in _PROBE_LENGTHS:
        for second in (None, pairs):
            try:
                batch = tokenizer(texts, second, truncation=length is not None, max_length=length, verbose=False)
                rows += [{name: batch[name][i] for name in names} for i in range(len(texts))]
            except Exception as error:  # some classes want boxes, languages or images beside the text
                raise StructureError(
                    "The tokenizer does not take plain texts", where=type(tokenizer).__name__, found=error
                ) from error
    return rows


def _require_same_ids(wanted: Sequence[object], found: Sequence[object], name: str, reader: str) -> None:
    different = [i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
    if different:
        raise StructureError(
            f"The tokenizer, read again {reader}, gives other ids than the one being saved",
            where=f"{name}, text {_PROBES[different[0] % len(_PROBES)]!r}",
            wanted=wanted[different[0]],
            found=found[different[0]],
            way_out="save one whose behaviour is all in its backend: PreTrainedTokenizerFast(tokenizer_object=...)",
        )
