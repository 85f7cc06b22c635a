"""Tokenizers of CTC models, which have no Rust backend: written as JSON, and read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_safeflavor.artifact.json_files import read_json, write_json
from mlflow_safeflavor.artifact.trust import require_harmless
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.guarded import guarded
from mlflow_safeflavor.tasks.inputs.ctc_decoder import ARGUMENTS, CtcDecoder, Said

__all__ = [
    "VOCABULARY",
    "is_ctc",
    "load_ctc_decoder",
    "load_ctc_tokenizer",
    "write_ctc_tokenizer",
]

VOCABULARY = "vocab.json"
_CONFIG = "ctc_config.json"


def is_ctc(tokenizer: Any) -> bool:
    """Whether it is transformers' ``Wav2Vec2CTCTokenizer`` itself, told by name."""
    cls = type(tokenizer)
    return cls.__name__ == "Wav2Vec2CTCTokenizer" and cls.__module__.startswith("transformers.")


def write_ctc_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write vocabulary and arguments as JSON, and prove that they decode alike.

    Of a vocabulary of several languages the one that is set is written.

    Args:
        tokenizer: A ``Wav2Vec2CTCTokenizer``; not changed.
        folder: Made if missing.

    Raises:
        StructureError: What was written decodes otherwise.
    """
    # Without one, the public attribute logs an error.
    between = getattr(tokenizer, "_word_delimiter_token", None)
    config = {
        name: between if name == "word_delimiter_token" else getattr(tokenizer, name)
        for name in sorted(ARGUMENTS)
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Tokens and ids as JSON knows them: some are AddedTokens.
    write_json(folder / VOCABULARY, {str(t): int(i) for t, i in tokenizer.get_vocab().items()})
    write_json(
        folder / _CONFIG,
        {
            name: value if isinstance(value, (bool, type(None))) else str(value)
            for name, value in config.items()
        },
    )
    decoder, again = load_ctc_decoder(folder), load_ctc_tokenizer(folder)
    for ids in _probes(sorted(tokenizer.get_vocab().values())):
        wanted = _decoded(tokenizer, ids)
        characters = decoder.characters(ids)
        found = decoder.text(characters), characters, decoder.words(characters)
        if not wanted == found == _decoded(again, ids):
            raise StructureError(
                "The tokenizer, read again, decodes otherwise than the one being saved",
                where=type(tokenizer).__name__,
                wanted=repr(wanted[0]),
                found=repr(found[0]),
            )


def load_ctc_decoder(folder: Path, read: Callable[[Path], Any] = read_json) -> CtcDecoder:
    """Read what ``write_ctc_tokenizer`` wrote, without transformers.

    Args:
        folder: Where it was written.
        read: Reads its files.

    Raises:
        IntegrityError: Its files are malformed.
    """
    return CtcDecoder(read(folder / VOCABULARY), read(folder / _CONFIG), folder)


def load_ctc_tokenizer(folder: Path) -> Any:
    """Read what ``write_ctc_tokenizer`` wrote as transformers' tokenizer; runs no other code.

    Raises:
        IntegrityError: Its files are malformed.
    """
    from transformers import Wav2Vec2CTCTokenizer

    load_ctc_decoder(folder)  # for its checks
    config = read_json(folder / _CONFIG)
    require_harmless(config, folder / _CONFIG)
    with guarded(folder):
        return Wav2Vec2CTCTokenizer(str(folder / VOCABULARY), **config)


def _probes(ids: list[int]) -> Iterator[list[int]]:
    """Frames of each token once and twice, then in any order: repeats, blanks and words."""
    random = np.random.default_rng(0)
    yield ids
    yield np.repeat(ids, 2).tolist()
    # One beyond the vocabulary, which a model may have outputs for.
    yield random.choice([*ids, max(ids, default=0) + 1], 500).tolist()
    yield []


def _decoded(tokenizer: Any, ids: list[int]) -> tuple[str, list[Said], list[Said]]:
    """Text, characters and words by transformers."""
    said = tokenizer.decode(
        ids, skip_special_tokens=False, output_char_offsets=True, output_word_offsets=True
    )
    characters, words = (
        [Said(one[kind], int(one["start_offset"]), int(one["end_offset"])) for one in offsets or ()]
        for kind, offsets in (("char", said["char_offsets"]), ("word", said["word_offsets"]))
    )
    return said["text"], characters, words
