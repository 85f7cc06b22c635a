"""``tokenizer.json``, read with the library ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError, SafeFlavorError

__all__ = ["TOKENIZER", "read_backend"]

TOKENIZER = "tokenizer.json"

# Bytes of a tokenizer.json: Gemma's, with 262,144 tokens, has a quarter of that.
_LARGEST_FILE = 2**27
# Characters that all replacements together may make of one: each part of a backend works on the
# text of the part before, so lengths multiply.
_LONGEST_INSERTION = 1000


def read_backend(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> Tokenizer:
    """The backend in a ``tokenizer.json``.

    Raises:
        IntegrityError: It cannot be read, or makes far more of a text than the text is.
    """
    try:
        if len(content := read(path)) > _LARGEST_FILE:
            raise ValueError(f"{len(content):,} bytes, which are more than {_LARGEST_FILE:,}")
        # Of the bytes, not of the path: these were compared with the manifest.
        backend = Tokenizer.from_buffer(content)
        _require_moderate(backend)
        return backend
    except SafeFlavorError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
        raise IntegrityError(
            "A file of the artifact cannot be read as a tokenizer",
            where=path,
            found=error,
            hint=FETCH_AGAIN,
        ) from None


def _require_moderate(backend: Tokenizer) -> None:
    """Raise ``ValueError`` for a backend that makes far more of a text than the text is."""
    # Never written by a save; padding to a length of 10^9 is a bomb.
    if backend.padding is not None or backend.truncation is not None:
        raise ValueError("padding or truncation, which a saved tokenizer never has")
    longest = 1
    for part in (
        backend.normalizer,
        backend.pre_tokenizer,
        backend.post_processor,
        backend.decoder,
    ):
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
