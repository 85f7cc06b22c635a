"""Texts of written tokens: whole ones, and the settled part of one that still grows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from mlflow_safeflavor.tasks.stop_texts import first_stop, unfinished_stop

__all__ = ["deltas_of", "settled_text", "written_text"]

# A byte-level token may be the first part of a character, which decodes to this one.
_PART = "\N{REPLACEMENT CHARACTER}"


def written_text(
    encoder: Any, ids: Sequence[int], ends: Collection[int], stop: Sequence[str], forced: int | None
) -> tuple[str, str]:
    """The text of new tokens, and its ``finish_reason``, "stop" or "length".

    Args:
        encoder: Decodes ids.
        ids: New tokens of one text.
        ends: Ids that end a text.
        stop: Texts before which it ends.
        forced: Number of tokens at which the last one is a forced end, which only means that the
            length is used up; None where none is forced.
    """
    text: str = encoder.decode(ids)
    place = first_stop(text, stop)
    ended = place is not None or bool(ids and ids[-1] in ends and len(ids) != forced)
    return (text[:place], "stop") if ended else (text.rstrip(_PART), "length")


def settled_text(encoder: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """The beginning of a text that no further token changes."""
    text: str = encoder.decode(ids)
    place = first_stop(text, stop)
    if place is not None:
        return text[:place]
    text = text.rstrip(_PART)
    # What looks like the beginning of a stop text may become one, and then is no part of the text.
    text = text[: unfinished_stop(text, stop)]
    # The next token may go on with the last word, or take the space before it away.
    return text[: text.rfind(" ") + 1].rstrip(" ") if encoder.changes_words else text


def deltas_of(
    encoder: Any,
    stop: Sequence[str],
    tokens: Iterable[int],
    texts: Callable[[], Sequence[tuple[str, str]]],
) -> Iterator[tuple[int, str, str | None]]:
    """Number of a text, what is added to it, and with its end the ``finish_reason``.

    Args:
        encoder: Decodes ids.
        stop: Texts before which a text ends.
        tokens: New tokens of the first text as they are written, or none.
        texts: Of ``written_text``, once all tokens are written.
    """
    sent, ids = "", list[int]()
    for token in tokens:
        ids.append(token)
        text = settled_text(encoder, ids, stop)
        if len(text) > len(sent):
            yield 0, text[len(sent) :], None
            sent = text
    for i, (text, reason) in enumerate(texts()):
        yield i, text if i else text[len(sent) :], reason
