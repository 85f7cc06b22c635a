"""Base of the tasks that read text: encode, pad, run, and the length of a text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_texts
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.params import Param, param_schema
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION

__all__ = ["GOLDEN_PAIRS", "GOLDEN_TEXTS", "SPANS", "TextTask", "groups"]

# Features that ``TextEncoder.encode`` adds with ``spans``.
SPANS = ("offsets", "word_ids", "sequence_ids")

# Characters that are tokenised at a time: some milliseconds, after which others take their turn.
_CHARACTERS = 20_000

# Of different lengths, so that rows are padded; with accents, scripts and signs beyond 16 bits.

GOLDEN_TEXTS = (
    "Hello world.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps.",
    "Once a model is logged, it should answer the same way in a notebook, behind a server, in a "
    "container and on a cluster. If anything differs, such as a library, a file, a number format "
    "or the machine itself, it should say so before it answers.",
    "Café, naïve, Zürich, 東京, Ελλάδα: 3 € for 😀👍!",
)
GOLDEN_PAIRS = (
    "Hello there, world!",
    "A dog rests.",
    "It differs.",
    "Tout est cher à Zürich 😀, "
    "and everything costs more each year than it did in the year before.",
)


class TextTask(Task):
    """Rows of one text, or of two, through a tokenizer and a model that takes token ids."""

    fields: ClassVar[tuple[str, ...]] = ("text",)
    required: ClassVar[tuple[str, ...]] = ("text",)
    reads: ClassVar[tuple[str, ...]] = ("encoder",)
    params: ClassVar[tuple[Param, ...]] = (MAX_LENGTH, TRUNCATION)
    # Whether features also have ``SPANS``, the place of each token in the text.
    spans: ClassVar[bool] = False
    # The outputs part of the signature.
    answer: ClassVar[Schema | None]

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        inputs = Schema([ColSpec(DataType.string, column) for column in self.columns.values()])
        return ModelSignature(inputs=inputs, outputs=self.answer, params=param_schema(self.asked))

    @classmethod
    def golden(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # Golden rows may be longer than the model takes: cut, even where requests are refused.
        uncut = config.get("params", {}).get("truncation") is False
        return {**super().golden(config), **({"truncation": True} if uncut else {})}

    def golden_rows(self) -> list[Row]:
        texts = {"text": GOLDEN_TEXTS, "text_pair": GOLDEN_PAIRS}
        return [
            {field: texts[field][i] for field in self.columns} for i in range(len(GOLDEN_TEXTS))
        ]

    @property
    def folds(self) -> bool:
        return True

    # Length.

    @property
    def limit(self) -> int | None:
        """Most tokens of a row that both model and tokenizer take; None if neither says."""
        # The smaller one: each may declare more than the other takes.
        said = [self.config["max_length"], self.encoder.max_length]
        return min((length for length in said if length), default=None)

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        if "max_length" in checked:
            self.require_length("max_length", checked["max_length"], texts=len(self.columns))
        return checked

    def require_length(self, name: str, length: int, *, texts: int) -> None:
        """Refuse a length that leaves no token for each text, or that is beyond the model's.

        Args:
            name: The param.
            length: Its value; 0 for the model's own.
            texts: Texts that are encoded together, 1 or 2.

        Raises:
            InputError: Names the param.
        """
        # Below this, tokenizers do not cut at all and say nothing.
        least, most = self.encoder.special_tokens(pair=texts > 1) + texts, self.limit
        if length and (length < least or (most and length > most)):
            raise InputError(
                "A param has a value that is not allowed",
                where=f"params, {name!r}",
                wanted=f"{least} to {most or 'any'} tokens, or 0 for as many as the model takes",
                found=length,
            )

    # Rows → features → arrays.

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_texts(rows, self.columns)
        limit = params["max_length"] or self.limit
        for first, some in groups(rows):
            self.require_short(first, some, limit, cut=params["truncation"])
            encoded = self.encoder.encode(
                [row["text"] for row in some],
                [row["text_pair"] for row in some] if "text_pair" in self.columns else None,
                max_length=limit,
                truncation=params["truncation"],
                spans=self.spans,
            )
            for i, row in enumerate(encoded, first):
                self.require_fitting(i, len(row["input_ids"]), limit)
                yield self.known(row)

    def known(self, row: Mapping[str, list[Any]]) -> Features:
        """The model's arguments of an encoded row, and its ``SPANS`` if it has them."""
        names = (*self.config["input_names"], *SPANS)
        return {name: row[name] for name in names if name in row}

    def require_fitting(
        self, i: int, length: int, limit: int | None, *, least: bool = False
    ) -> None:
        """Refuse row ``i`` if it has no tokens, or more than ``limit``, or else than the cap.

        Args:
            i: Number of the row.
            length: Tokens that it has; with ``least`` at least.
            limit: Most that it may have.
            least: See ``length``.

        Raises:
            InputError: Names the row.
        """
        self.require_tokens(i, length)
        if limit is None:
            where = format_cell(i, *self.columns.values())
            what, instead = "A text is too long", "cut or split it"
            self.caps.require("max_tokens", length, what, where=where, instead=instead, least=least)
        if limit and length > limit:
            raise InputError(
                "A text is longer than the model takes, and truncation is off",
                where=format_cell(i, *self.columns.values()),
                wanted=f"at most {limit} tokens",
                found=f"{length} tokens{' or more' if least else ''}",
                hint="shorten or split the text, or let it be cut: params={'truncation': True}",
            )

    def require_short(
        self, first: int, rows: Sequence[Row], limit: int | None, *, cut: bool
    ) -> None:
        """Refuse by its beginning each text that ``require_fitting`` refuses once it is tokenised.

        Args:
            first: Number of the first row.
            rows: Rows of texts.
            limit: As there.
            cut: Whether rows are cut to ``limit``.

        Raises:
            InputError: Names the row.
        """
        most = limit or self.caps.max_tokens
        # A text that will be cut is never refused.
        if most and not (limit and cut):
            for i, row in enumerate(rows, first):
                if any(
                    isinstance(text, str) and self.encoder.exceeds(text, most)
                    for text in row.values()
                ):
                    self.require_fitting(i, most + 1, limit, least=True)

    def require_few_windows(
        self,
        text: str,
        pieces: int,
        rows: int,
        room: int,
        overlap: int,
        *,
        where: str,
        instead: str,
    ) -> None:
        """Refuse a row if the beginning of its text makes more windows than a request may have.

        Args:
            text: The text that is cut into windows.
            pieces: Windows of the rows before.
            rows: Rows of the request.
            room: See ``windows``.
            overlap: See ``windows``.
            where: See ``Caps.require``.
            instead: See ``Caps.require``.

        Raises:
            InputError: Names the row and the cap.
        """
        most = self.caps.most_pieces(rows)
        if most is not None and self.encoder.exceeds(
            text, overlap + max(0, most - pieces) * (room - overlap)
        ):
            self.caps.require_pieces(most + 1, rows, where=where, instead=instead, least=True)

    def require_tokens(self, i: int, length: int) -> None:
        """Refuse row ``i`` if it has no tokens. Raises ``InputError`` naming it."""
        if length == 0:
            # Alone it crashes a model; beside longer rows it is all padding, and its answer noise.
            raise InputError(
                "A text has no tokens, and this tokenizer adds none",
                where=format_cell(i, *self.columns.values()),
                wanted="at least one token",
                found="0 tokens",
                hint="drop the row, or put a text in it",
            )

    def cost(self, features: Features) -> int:
        return len(features["input_ids"])

    @property
    def pad_id(self) -> int | None:
        """Token id of padding; None where rows of this model must not be padded."""
        pad_id: int | None = self.config["pad_token_id"]
        return pad_id if "attention_mask" in self.config["input_names"] else None

    def collate(self, batch: Sequence[Features]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Pad rows to the longest.

        Args:
            batch: Encoded rows; of equal length where ``pad_id`` is None.

        Returns:
            The model's arguments, each int64 of shape (rows, longest), and the same-shaped mask of
            real tokens, bool.
        """
        fill = {
            "input_ids": self.pad_id or 0,
            "token_type_ids": self.encoder.config["pad_token_type_id"],
        }
        tables = {
            name: self._filled([row[name] for row in batch], fill.get(name, 0))
            for name in self.config["input_names"]
            if name in batch[0]
        }
        # Of real tokens, also where the model takes no attention mask.
        mask = self._filled([np.ones(self.cost(row), np.int64) for row in batch], 0)
        return tables, mask.astype(bool)

    def _filled(self, rows: Sequence[Any], fill: int) -> np.ndarray:
        # (rows, longest); int64, which torch's embedding and the graph's Gather take.
        longest = max(map(len, rows))
        if longest * len(rows) == sum(map(len, rows)):
            even: np.ndarray = np.array(rows, dtype=np.int64)
            return even
        left = self.config["padding_side"] == "left"
        table: np.ndarray = np.full((len(rows), longest), fill, dtype=np.int64)
        for line, row in zip(table, rows, strict=True):
            start = longest - len(row) if left else 0
            line[start : start + len(row)] = row
        return table

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        # Without a mask or a padding token the model would read the padding, so each row goes
        # alone.
        parts = [batch] if self.pad_id is not None else [[row] for row in batch]
        outputs: list[RowOutput] = []
        for part in parts:
            inputs, mask = self.collate(part)
            outputs.extend(self.read(engine(inputs), mask))
        return outputs

    @abstractmethod
    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        """One output a row, without padding.

        Args:
            outputs: Of the engine, for one batch.
            mask: From ``collate``: real tokens, bool of shape (rows, longest).
        """


def groups(rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
    """Rows in order, as many as are tokenised in some milliseconds, and the number of the first."""
    first = characters = 0
    for i, row in enumerate(rows):
        characters += sum(map(len, row.values()))
        if characters >= _CHARACTERS:
            yield first, rows[first : i + 1]
            first, characters = i + 1, 0
    if first < len(rows):
        yield first, rows[first:]
