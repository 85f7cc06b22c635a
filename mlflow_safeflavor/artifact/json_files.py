"""JSON: written as the same bytes for the same value, read without trust in its author."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN, read_text
from mlflow_safeflavor.errors import IntegrityError

__all__ = ["MAX_JSON", "parse_file", "parse_json", "read_json", "write_json"]

MAX_JSON = 64 * 10**6  # bytes; read whole, and some 20 times larger as objects
# Lists and dicts within each other. Of all that was ever saved a config's few levels are the most.
_DEEPEST = 100
_TOO_DEEP = f"lists or dicts nested more than {_DEEPEST} deep"


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON that is the same bytes for the same value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, *, strict: bool = True) -> Any:
    """Read a JSON file of an artifact.

    Args:
        path: The file.
        strict: Refuse links, and Python's extensions of JSON: equal keys, NaN and infinities.

    Raises:
        IntegrityError: The file is missing, no plain file, too large, no JSON, or nested too deep.
    """
    return parse_file(
        read_text(path if strict else Path(os.path.realpath(path)), MAX_JSON), path, strict
    )


def parse_file(text: str, path: Path, strict: bool = True) -> Any:
    """Parse a file of an artifact that was read; raises ``IntegrityError`` that names it."""
    try:
        return parse_json(text, strict=strict)
    except ValueError as error:
        raise IntegrityError(
            "A file of the artifact cannot be read as JSON",
            where=path,
            found=error,
            hint=FETCH_AGAIN,
        ) from None


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:
    """Parse JSON of bounded depth, which any function may walk by recursion.

    Args:
        text: A stranger's.
        strict: Also refuse equal keys, NaN and infinities.

    Raises:
        ValueError: It is no JSON, or lists and dicts are nested more than 100 deep.
    """
    hooks: dict[str, Any] = {
        "object_pairs_hook": _without_duplicates,
        "parse_constant": _refuse_constant,
    }
    try:
        content = json.loads(text, **hooks if strict else {})
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # The parser's own bound is Python's stack, as much as is left of it where this is called: what
    # passes here could still overflow a function that walks it from a deeper place. Level by level,
    # not by recursion, for the same reason.
    level = [content]
    for _ in range(_DEEPEST + 1):
        parts = [
            part.values() if isinstance(part, dict) else part
            for part in level
            if isinstance(part, (dict, list))
        ]
        level = [item for part in parts for item in part]
    if level:
        raise ValueError(_TOO_DEEP)
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ in which of two equal keys they keep: a check would see one, tokenizers or
    # safetensors, which parse in Rust, the other.
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
