"""Probes of tokenizers: difficult texts, alone and in pairs, cut and uncut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.errors import StructureError

if TYPE_CHECKING:
    from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder

__all__ = ["PROBES", "probe_with_encoder", "probe_with_transformers", "require_same_ids"]

# Each for a thing in which tokenizers may differ: spaces, composed and decomposed accents, scripts
# without spaces, joined emoji, directions, control characters, code, length.
PROBES = (
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


def probe_with_encoder(encoder: TextEncoder) -> list[dict[str, list[int]]]:
    """The probes, encoded without transformers, one dict a row."""
    texts, pairs = list(PROBES), list(reversed(PROBES))
    return [
        row
        for length in _PROBE_LENGTHS
        for second in (None, pairs)
        for row in encoder.encode(texts, second, max_length=length, truncation=length is not None)
    ]


def probe_with_transformers(tokenizer: Any, names: Sequence[str]) -> list[dict[str, list[int]]]:
    """The probes, encoded by a tokenizer of transformers, one dict a row.

    Raises:
        StructureError: It takes no plain texts.
    """
    texts, pairs = list(PROBES), list(reversed(PROBES))
    rows = []
    for length in _PROBE_LENGTHS:
        for second in (None, pairs):
            try:
                batch = tokenizer(
                    texts, second, truncation=length is not None, max_length=length, verbose=False
                )
                # Not padded: ids, masks and types are lists of each row's own length.
                rows += [{name: batch[name][i] for name in names} for i in range(len(texts))]
            # Some classes want boxes, languages or images beside the text.
            except Exception as error:
                raise StructureError(
                    "The tokenizer does not take plain texts",
                    where=type(tokenizer).__name__,
                    found=error,
                ) from error
    return rows


def require_same_ids(
    wanted: Sequence[object], found: Sequence[object], name: str, reader: str
) -> None:
    """Raise ``StructureError`` for a tokenizer that, read again, gives other ids of the probes."""
    different = [i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
    if different:
        raise StructureError(
            f"The tokenizer, read again {reader}, gives other ids than the one being saved",
            where=f"{name}, text {PROBES[different[0] % len(PROBES)]!r}",
            wanted=wanted[different[0]],
            found=found[different[0]],
            hint="save one whose behaviour is all in its backend: "
            "PreTrainedTokenizerFast(tokenizer_object=...)",
        )
