"""Base of the tasks that write down speech: windows of long sounds, and a decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.listening import ListeningTask
from mlflow_safeflavor.tasks.sound_windows import Windows, windows_of

__all__ = ["SPAN", "SpeechTask"]

# Feature of a window that is no argument of the model: its samples, and of these the overlaps with
# its neighbours on the left and right, int64 of shape (3,).
SPAN = "span"
_WINDOWS = "windows"


class SpeechTask(ListeningTask):
    """The text of a sound, whole or in windows that are put together again.

    Answers: ``text``; with ``return_timestamps`` also ``chunks``, dicts of a ``text`` and its
    ``timestamp``, a list of two numbers of seconds.

    Args:
        config: See ``Task``.
        columns: See ``Task``.
        processor: See ``ProcessedTask``.
        decoder: Makes what gives the text of tokens, once: the tokenizer of transformers, or a
            ``CtcDecoder``.
    """

    name = "automatic-speech-recognition"
    reads = ("processor", "decoder")
    answer = Schema([ColSpec(DataType.string, "text")])

    def __init__(
        self,
        config: Mapping[str, Any],
        columns: Mapping[str, str | None],
        processor: Any,
        decoder: Callable[[], Any],
    ) -> None:
        super().__init__(config, columns, processor)
        self.decoder = decoder

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        self.windows(checked)
        return checked

    def windows(self, params: Mapping[str, Any]) -> Windows | None:
        """The windows that params ask for; None for whole sounds.

        Raises:
            InputError: A window is too short for the model, or for its overlaps.
        """
        windows = windows_of(params, self.rate, self.config["align"])
        least = self.config["min_samples"]
        if windows is not None and windows.length < least:
            raise InputError(
                "A param has a value that is not allowed",
                where="params, 'chunk_length_s'",
                wanted=f"at least {least} samples at {self.rate} Hz, which the model needs for one "
                "output",
                found=f"{windows.length} samples",
            )
        return windows

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        windows, pieces = self.windows(params), 0
        for i, row in enumerate(rows):
            where = format_cell(i, self.columns[self.field])
            samples = self.read(row[self.field], where)
            if windows is None:
                yield {_WINDOWS: [self.features(samples, where)]}
                continue
            pieces += windows.count(len(samples))
            self.caps.require_pieces(
                pieces, len(rows), where=where, instead="ask for longer windows (chunk_length_s)"
            )
            made = []
            for start, end, *overlaps in windows.of(len(samples)):
                # The rest of a sound may be too short for a single output, so nothing is lost.
                if end - start >= self.config["min_samples"]:
                    span = np.array([end - start, *overlaps])
                    made.append({**self.features(samples[start:end], where), SPAN: span})
                    yield None
            yield {_WINDOWS: made}

    def pieces(self, features: Features) -> Sequence[Features]:
        pieces: Sequence[Features] = features[_WINDOWS]
        return pieces

    def holds(self, features: Features) -> int:
        return sum(super(SpeechTask, self).holds(piece) for piece in self.pieces(features))

    def collate(self, batch: Sequence[Features]) -> dict[str, np.ndarray]:
        arguments = [{name: row[name] for name in row if name != SPAN} for row in batch]
        return super().collate(arguments)

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        decoder = self.decoder()
        for i, (row, output) in enumerate(zip(features, outputs, strict=True), first):
            text, chunks = self.written(i, row, output, decoder, params)
            yield {"text": text, **({} if chunks is None else {"chunks": chunks})}

    @abstractmethod
    def written(
        self,
        i: int,
        features: Features,
        output: RowOutput,
        decoder: Any,
        params: Mapping[str, Any],
    ) -> tuple[str, list[dict[str, Any]] | None]:
        """Text of row ``i``, and its ``chunks`` where params ask for them.

        Raises:
            InputError: The model's answer is not a number; names the row.
            StructureError: The decoder is of another kind than the model.
        """
