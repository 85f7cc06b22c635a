"""Base of all tasks; data flows rows → features → pieces → arrays → row outputs → answers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature

from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.rows import Row, rows_of
from mlflow_safeflavor.tasks.inputs.tables import count_rows
from mlflow_safeflavor.tasks.inputs.texts import require_clean
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.kind import TaskKind
from mlflow_safeflavor.tasks.params import check_params, with_defaults

__all__ = ["Task"]


class Task(TaskKind):
    """One task, bound to its config of ``describe``; immutable, safe from many threads.

    Args:
        config: From ``describe``.
        columns: Field → column name, for every field this model uses; None for a sole column
            without a name.
        encoder: The tokenizer, an ``inputs.text_encoder.TextEncoder``; None for tasks without text.
            Tasks that read something else name it in ``reads``.

    Attributes:
        columns: As given, in the order of ``fields``.
        asked: The params with the defaults that they were saved with.
        caps: Bounds of a request; set once, where the task is made.

    Raises:
        InputError: ``columns`` are not what ``columns_for`` would return.
        IntegrityError: A saved default is not allowed.
    """

    caps: Caps = Caps()

    def __init__(
        self, config: Mapping[str, Any], columns: Mapping[str, str | None], encoder: Any = None
    ) -> None:
        self.config = config
        self.asked = with_defaults(self.declared(config), config.get("params", {}))
        self.columns = self.columns_for(columns)
        self.encoder = encoder

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> type[Task]:
        """The class that is bound to this config: the task's own, or one of its several ways.

        Raises:
            IntegrityError: There is no such way.
        """
        return cls

    def measured(self, engine: Engine, example: Any) -> dict[str, Any]:
        """Facts for the config that forwards over the user's example give; JSON only."""
        return {}

    def stored_example(self, example: Any) -> Any:
        """The user's example as MLflow stores it: a table of columns or fields, files in base64."""
        rows = [self.to_record(row) for row in self.rows(example)]
        return pd.DataFrame(
            [{self.columns[field] or field: value for field, value in row.items()} for row in rows]
        )

    @abstractmethod
    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        """Inputs by column name, outputs, and the per-request params with their defaults.

        Args:
            example: The user's example, for tasks whose ``needs_example`` is true.
            result: What was answered to it.
        """

    def rows(self, data: Any) -> list[Row]:
        """The data of ``predict`` as rows by field. Raises ``InputError`` naming row and column."""
        # By its length, before a row is made of it.
        self.require_few(data)
        return rows_of(data, self.columns, self.required)

    def require_few(self, data: Any) -> None:
        """Raise ``InputError`` for more rows than the cap."""
        self.caps.require(
            "max_rows",
            count_rows(data),
            "A request has too many rows",
            where="rows",
            instead="predict them in chunks: over HTTP in several requests, natively from an "
            "iterator of DataFrames",
        )

    def require_clean(self, rows: Sequence[Row], params: Mapping[str, Any] | None) -> None:
        """Refuse texts, in rows and params, that UTF-8 cannot encode, and texts and lists too long.

        Raises:
            InputError: Names row and column, or param.
        """
        # A file in base64 is long by nature, and has bounds of its own (``files.MAX_BYTES``).
        caps = None if self.reads_files else self.caps
        for i, row in enumerate(rows):
            for field, value in row.items():
                require_clean(value, format_cell(i, self.columns.get(field, field)), caps)
        for name, value in params.items() if isinstance(params, Mapping) else ():
            where = f"params, {name!r}"
            if isinstance(value, (list, tuple, np.ndarray)):
                items, instead = (
                    np.size(value) if isinstance(value, np.ndarray) else len(value),
                    "shorten the list",
                )
                self.caps.require(
                    "max_pieces", items, "A param is too long", where=where, instead=instead
                )
            require_clean(value, where, self.caps)

    def result(self, answers: Sequence[Mapping[str, Any]], data: Any) -> Any:
        """The result of ``predict``: a DataFrame, one row for each of ``data``, with its index."""
        columns = {name: [answer[name] for answer in answers] for name in answers[0]}
        index = data.index if isinstance(data, (pd.DataFrame, pd.Series)) else None
        # Else pandas joins columns of one dtype in a copy, a twelfth of what this takes for a row.
        return pd.DataFrame(columns, index=index, copy=False)

    @property
    def folds(self) -> bool:
        """Whether a list in a cell can only be a whole column; see ``rows.unfold_columns``."""
        return False

    def golden_rows(self) -> list[Row]:
        """A few rows of different lengths whose answers are recorded at save and replayed at load.

        None for tasks with ``needs_example``; there the example is recorded.
        """
        return []

    def to_record(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """A golden row or its answer as JSON."""
        return dict(value)

    @classmethod
    def sent(cls, cell: Any) -> Any:
        """A cell of a recorded golden row as a client sends it."""
        return cell

    def from_record(self, value: Mapping[str, Any], features: Mapping[str, np.ndarray]) -> Row:
        """A golden row back from its JSON and its recorded features."""
        return value

    def comparable(
        self, recorded: RowOutput, found: RowOutput
    ) -> tuple[RowOutput, RowOutput] | None:
        """The parts of two outputs of one golden row that must be near each other, with answers.

        None where outputs and answers must be near in all; else the answers, which follow from what
        was left out here, are not compared.
        """
        return None

    @property
    def uncapped(self) -> Task:
        """The same task without caps: for golden rows, which are the owner's own."""
        task = copy.copy(self)
        task.caps = Caps(**dict.fromkeys(vars(Caps()), 0))
        return task

    def batch_budget(self, max_batch_tokens: int) -> int:
        """Most ``cost`` of one forward, given the run-time option."""
        return max_batch_tokens

    def asked_in(self, data: Any, params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The params of a request, with those that its data brings. Raises ``InputError``."""
        return params

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """All params with defaults filled in. Raises ``InputError`` naming the param."""
        return check_params(self.asked, params)

    def require_defaults(self) -> None:
        """Raise ``InputError`` for saved defaults of params that do not fit model or each other."""
        self.check_params({**self.golden(self.config), **self.config.get("params", {})})

    @abstractmethod
    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        """Rows → features, one each, in order, made while they are iterated; None for a pause.

        Raises:
            InputError: Names row and column.
        """

    def encoded(self, rows: Sequence[Row], params: Mapping[str, Any]) -> list[Features]:
        """Rows → features, all at once; see ``encode``."""
        return [features for features in self.encode(rows, params) if features is not None]

    def holds(self, features: Features) -> int:
        """Bytes that a row takes until it is answered, about, features and outputs together."""
        # Ids, mask and types of a token as Python's lists, and some numbers of its output.
        return 64 * sum(self.cost(piece) for piece in self.pieces(features))

    def pieces(self, features: Features) -> Sequence[Features]:
        """Pieces of one row, at least one: windows of a long text, a text with each label …."""
        return (features,)

    @abstractmethod
    def cost(self, features: Features) -> int:
        """Cost of one piece in tokens, or their equivalent; pieces of near cost share a batch."""

    @abstractmethod
    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        """Pad, run, cut: one output a piece.

        Nothing of one piece may depend on the pieces beside it beyond rounding.

        Args:
            engine: Runs the model.
            batch: Pieces, of any rows of any requests.
            params: Of one of these requests; all agree in ``forward_params``, so nothing else may
                be read.
        """

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        """The outputs of one row's pieces, in order, as one."""
        return outputs[0]

    @abstractmethod
    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        """Outputs → answers, one dict a row with the same keys in every row; JSON-able values.

        Made while they are iterated; None for a pause within a row. Nothing in them is anybody
        else's memory.

        Args:
            rows: As asked, or some of them.
            features: What ``encode`` made of them.
            outputs: What ``join`` made of their pieces' outputs.
            params: What ``check_params`` returned.
            first: Number of the first of ``rows``, for messages.
        """

    def decoded(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Outputs → answers, all at once; see ``decode``."""
        return [
            answer for answer in self.decode(rows, features, outputs, params) if answer is not None
        ]

    def check_streamed(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """As ``check_params``, of a stream; for tasks whose ``streams`` is true."""
        raise NotImplementedError

    def streamed(
        self,
        row: Row,
        params: Mapping[str, Any],
        tokens: Iterable[int],
        output: Callable[[], RowOutput],
    ) -> Iterator[Any]:
        """The answer to a row in parts, each as soon as it is settled.

        Args:
            row: The row.
            params: What ``check_streamed`` returned.
            tokens: Ids of new tokens as they are written; none where a later one may replace an
                earlier one, as in a search by beams.
            output: What ``join`` makes, once all tokens are written.
        """
        raise NotImplementedError
