"""Every error a user can meet, as one tree.

::

    SafeFlavorError                     (also an ``MlflowException``)
    ├── EnvironmentMismatchError        pins, platform or interpreter differ, or cannot be pinned
    ├── TrustError                      the artifact wants to run something nobody agreed to
    ├── FormatVersionError              written by a newer release than this one reads
    ├── IntegrityError                  a file is missing, extra, cut short or has other bytes
    ├── WeightsError                    a tensor is missing, extra, or not the one that was saved
    ├── StructureError                  the module cannot be described, or not built again
    ├── ParityError                     recorded rows are answered differently now
    ├── RehearsalError                  the clean process could not load the staged artifact
    ├── InputError                      rows or parameters that no model could answer (HTTP 400)
    ├── AnswerError                     the model or a hook failed over rows it was asked (HTTP 500)
    ├── OverloadedError                 the queue is full, or a row needs too much memory (HTTP 503)
    ├── DeadlineError                   the model did not answer in the time it was given (HTTP 504)
    ├── DownloadError                   the store broke off, or wanted other credentials
    └── PlacementError                  no such device, or the model does not fit on it

Each message says what happened, where, what was wanted, what was found, and the hint.
"""

from __future__ import annotations

from typing import ClassVar

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    TEMPORARILY_UNAVAILABLE,
)

__all__ = [
    "AnswerError",
    "DeadlineError",
    "DownloadError",
    "EnvironmentMismatchError",
    "FormatVersionError",
    "InputError",
    "IntegrityError",
    "OverloadedError",
    "ParityError",
    "PlacementError",
    "RehearsalError",
    "SafeFlavorError",
    "StructureError",
    "TrustError",
    "WeightsError",
    "plain",
]


def plain(text: object) -> str:
    """Escape control characters of a stranger's text, and indent its further lines."""
    lines = str(text).replace("\r\n", "\n").split("\n")
    # Deeper than our own lines: a text could else bring a "hint:" that nobody of us wrote. Escape
    # sequences, which could hide lines of a terminal, are shown as Python writes them in a source.
    return "\n    ".join(
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines
    )


class SafeFlavorError(MlflowException):
    """Root of the tree: an ``MlflowException`` of up to five parts.

    Args:
        what: One sentence: what is wrong.
        where: The file, tensor, row, column or distribution it is about.
        wanted: The recorded or required value.
        found: The value instead.
        hint: What to do, as a line to write or run where there is one.
    """

    # HTTP 400. MLflow's scoring server answers 500 with a full traceback, paths of the server and
    # all, to every exception that is no MlflowException.
    status: ClassVar[int] = INVALID_PARAMETER_VALUE

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        wanted: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        # Kept apart, for ``with_hint`` and for programs that catch the error.
        self.what = what
        self.where = where
        self.wanted = wanted
        self.found = found
        self.hint = hint
        details = {"where": where, "wanted": wanted, "found": found, "hint": hint}
        lines = [
            what,
            # Plain: values quote artifacts, servers and rows.
            *(f"  {name}: {plain(value)}" for name, value in details.items() if value is not None),
        ]
        super().__init__("\n".join(lines), error_code=self.status)

    def with_hint(self, hint: str) -> SafeFlavorError:
        """The same error with another hint."""
        return type(self)(
            self.what, where=self.where, wanted=self.wanted, found=self.found, hint=hint
        )


class EnvironmentMismatchError(SafeFlavorError):
    """Pins, platform or interpreter differ from the recorded ones, or cannot be recorded."""


class TrustError(SafeFlavorError):
    """The artifact would run code or a pickle that the caller did not agree to."""


class FormatVersionError(SafeFlavorError):
    """The artifact was written in a format this release does not read."""


class DownloadError(SafeFlavorError):
    """The artifact's store broke off, or said something that MLflow has no error for."""


class IntegrityError(SafeFlavorError):
    """A file of the artifact is missing, extra, cut short, malformed or has other bytes."""


class WeightsError(SafeFlavorError):
    """A tensor is missing, extra, on meta, or differs from the recorded one."""


class StructureError(SafeFlavorError):
    """A module or tokenizer cannot be described at save, or not built again at load."""


class ParityError(SafeFlavorError):
    """Recorded rows are answered differently from when they were recorded."""


class RehearsalError(SafeFlavorError):
    """A clean process could not load the staged artifact, so nothing was published."""


class InputError(SafeFlavorError):
    """Rows, columns or parameters that cannot be answered; the server says 400."""


class AnswerError(SafeFlavorError):
    """The model's forward or a hook raised an exception of its own, kept as ``__cause__``.

    The server says 500.
    """

    # 500 without a trace: the fault is the model's or the hook's, not the request's.
    status = INTERNAL_ERROR


class OverloadedError(SafeFlavorError):
    """More requests wait at the model than it may queue, or a row needs more memory than there is.

    HTTP 503.
    """

    status = TEMPORARILY_UNAVAILABLE


class DeadlineError(SafeFlavorError):
    """The model did not answer in the time it was given; the server says 504."""

    status = DEADLINE_EXCEEDED


class PlacementError(SafeFlavorError):
    """The requested device does not exist, or the model cannot be placed on it."""
