"""Windows: a long text, cut into parts that overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["count_windows", "windows"]


def count_windows(tokens: int, room: int, overlap: int) -> int:
    """Number of ``windows`` of so many tokens, without making them: a cap comes first."""
    return len(range(0, max(1, tokens - overlap), room - overlap))


def windows(
    row: Mapping[str, list[Any]], sequence: int, room: int, overlap: int
) -> Iterator[dict[str, list[Any]]]:
    """Cut one text of an encoded row into windows; each has all the other tokens, too.

    The windows are those of transformers' tokenizers with ``stride`` and
    ``return_overflowing_tokens``.

    Args:
        row: From ``TextEncoder.encode``, uncut and with spans.
        sequence: The text that is cut: 0, or 1 for the second one.
        room: Most tokens of that text in a window.
        overlap: Tokens that two neighbours share; less than ``room``.

    Returns:
        At least one row, from left to right.
    """
    body = [i for i, text in enumerate(row["sequence_ids"]) if text == sequence]
    rest = [i for i, text in enumerate(row["sequence_ids"]) if text != sequence]
    # A window of nothing but the overlap with the one before is left out, but there is always one.
    starts = range(0, max(1, len(body) - overlap), room - overlap)
    for start in starts:
        positions = sorted(rest + body[start : start + room])  # in the order of the row
        yield {name: [values[i] for i in positions] for name, values in row.items()}
