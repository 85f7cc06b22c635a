"""Caps: the most that one request may ask for, checked before any work is done for it.

The cost of a request should follow from its size. Some params and files multiply it: a few hundred
bytes can ask for every token of a vocabulary in every gap, or name an image of a billion pixels.
Caps bound that, and not a table of many rows, beyond their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlflow_safeflavor.errors import InputError

__all__ = ["ANSWERS_A_ROW", "PIECES_A_ROW", "Caps"]

# Windows and labels that a row may have on average, beyond ``max_pieces`` in all.
PIECES_A_ROW = 16
# Tokens that a row may be answered with on average, beyond ``max_answers`` in all.
ANSWERS_A_ROW = 3_000
# Answers of other tasks (labels) that take about as long as a new token.
_WEIGHT = 32
# Tokens that a row may be answered with on average, of all beams, beyond ``max_answers`` in all.
_WRITTEN_A_ROW = 1024


@dataclass(frozen=True)
class Caps:
    """The caps of a loaded model, each under the name of its run-time option; 0 for no bound.

    Attributes:
        max_rows: Rows of a request.
        max_characters: Characters of a text; of all texts of a param together.
        max_tokens: Tokens of a text where neither model nor tokenizer says what it takes: memory
            grows by the square.
        max_pieces: Windows and candidate labels that the model reads for a request, and items of a
            param's list. A table may have ``PIECES_A_ROW`` on average, however many that makes.
        max_answers: Tokens in the lists that params ask for: a label is one, a filled gap as many
            as its text, an answer or a written text as many as it may have. A table may have
            ``ANSWERS_A_ROW`` on average.
        max_pixels: Pixels of an image, as its header tells them.
        max_seconds: Seconds of a sound, as its header tells them.
    """

    max_rows: int = 100_000
    max_characters: int = 200_000
    max_tokens: int = 4_096
    max_pieces: int = 2_048
    max_answers: int = 500_000
    max_pixels: int = 25_000_000
    max_seconds: float = 60.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Caps:
        """The caps among all run-time options."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def require(
        self,
        cap: str,
        found: float,
        what: str,
        *,
        where: object,
        instead: str,
        allowed: float = 0,
        least: bool = False,
    ) -> None:
        """Raise ``InputError`` for a request beyond a cap.

        Args:
            cap: One of the attributes.
            found: Amount that a request asks for, in the cap's unit.
            what: The message's first sentence.
            where: Row and column, or param.
            instead: A remedy without raising the cap, as an imperative.
            allowed: Amount that is allowed even where the cap is lower.
            least: Whether it asks for ``found`` at least, since counting stopped there.

        Raises:
            InputError: Names the cap, what was found, and how to raise it.
        """
        # ``allowed`` grows with the rows, so that a long table passes under any cap.
        most = max(getattr(self, cap), allowed)
        if not getattr(self, cap) or found <= most:  # 0 is no bound
            return
        raise InputError(
            what,
            where=where,
            wanted=f"at most {most:,.10g} {cap.removeprefix('max_')}",
            found=f"{found:,.10g}{' or more' if least else ''}",
            hint=f"{instead}, or raise the cap: model_config={{{cap!r}: …}} where the model is "
            f"saved or loaded, or the variable MLFLOW_SAFEFLAVOR_{cap.upper()}; 0 for no bound",
        )

    def most_pieces(self, rows: int) -> int | None:
        """Windows and labels that a request of so many rows may have; None for any number."""
        return max(self.max_pieces, PIECES_A_ROW * rows) if self.max_pieces else None

    def require_pieces(
        self, pieces: int, rows: int, *, where: object, instead: str, least: bool = False
    ) -> None:
        """Raise ``InputError`` for more windows and labels than ``max_pieces``."""
        what, allowed = "A request has the model read too much", PIECES_A_ROW * rows
        self.require(
            "max_pieces", pieces, what, where=where, instead=instead, allowed=allowed, least=least
        )

    def require_answers(self, tokens: int, rows: int, *, where: object, instead: str) -> None:
        """Raise ``InputError`` for longer answers than ``max_answers``."""
        what = "A request asks for too many answers"
        self.require(
            "max_answers", tokens, what, where=where, instead=instead, allowed=ANSWERS_A_ROW * rows
        )

    def require_written(self, tokens: int, rows: int, *, where: object, instead: str) -> None:
        """Raise ``InputError`` for more new tokens, of all beams, than ``max_answers`` allows."""
        what = f"A request asks for too much text; a token that is written counts as {_WEIGHT}"
        allowed = _WEIGHT * _WRITTEN_A_ROW * rows
        self.require(
            "max_answers", _WEIGHT * tokens, what, where=where, instead=instead, allowed=allowed
        )
