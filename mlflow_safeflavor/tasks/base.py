"""The shape every task has.

Data flows one way: rows → features → pieces → arrays → row outputs → answers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.records import count_rows
from mlflow_safeflavor.tasks.inputs.rows import Row, rows_of
from mlflow_safeflavor.tasks.inputs.texts import require_clean
from mlflow_safeflavor.tasks.inputs.wording import place
from mlflow_safeflavor.tasks.params import Param, check_defaults, check_params, with_defaults

if TYPE_CHECKING:
    import torch

__all__ = ["Task"]


class Task(ABC):
    """One task, bound to what ``describe`` recorded at save. Immutable, safe from many threads.

    Args:
        config: What ``describe`` returned.
        columns: Field → column name, for every field this model uses; None for a sole column
            without a name.
        encoder: The tokenizer, an ``inputs.text_encoder.TextEncoder``; None for tasks without text.
            Tasks that read something else name it in ``reads``.

    Attributes:
        columns: As given, in the order of ``fields``.
        asked: The params with the defaults that they were saved with.
        caps: The most that a request may ask for; set once, by whoever makes the task.

    Raises:
        InputError: ``columns`` are not what ``columns_for`` would return.
        IntegrityError: A saved default is not allowed.
    """

    name: ClassVar[str]
    # All fields the task knows, required ones first.
    fields: ClassVar[tuple[str, ...]]
    # Fields that ``columns`` must have. Every field in ``columns`` must then be in every row.
    required: ClassVar[tuple[str, ...]]
    # Per-request params, with the defaults of the task.
    params: ClassVar[tuple[Param, ...]] = ()
    # Names of those that ``forward`` looks at.
    #
    # Only requests that agree in them may share a batch.
    forward_params: ClassVar[frozenset[str]] = frozenset()
    # What else the constructor takes by name.
    #
    # ``encoder``, ``tokenizer``, ``hooks``, ``processor``.
    reads: ClassVar[tuple[str, ...]] = ()
    # What ``golden`` returns by default.
    golden_params: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Whether it is about sounds: for ``infer_task``, since the names of classes do not always tell.
    hears: ClassVar[bool] = False
    # Whether only the user's example tells columns, signature and golden rows.
    needs_example: ClassVar[bool] = False
    # Whether all rows of a request make one answer, so that ``result`` is no table.
    one_answer: ClassVar[bool] = False
    # Keys of the user's ``model_config`` that belong to the task and are fixed at save.
    task_options: ClassVar[frozenset[str]] = frozenset()
    # Whether golden rows hold their features, so that a tokenizer that drifted is named as such.
    records_features: ClassVar[bool] = True
    # Whether texts in cells may be files in base64, so that their characters are not capped.
    reads_files: ClassVar[bool] = False

    caps: Caps = Caps()

    def __init__(
        self, config: Mapping[str, Any], columns: Mapping[str, str | None], encoder: Any = None
    ) -> None:
        self.config = config
        self.asked = with_defaults(self.declared(config), config.get("params", {}))
        self.columns = self.columns_for(columns)
        self.encoder = encoder

    @classmethod
    def columns_for(
        cls, input_columns: Mapping[str, str | None] | None
    ) -> Mapping[str, str | None]:
        """Field → column name in the order of ``fields``, from what the user gave.

        Args:
            input_columns: None for the required fields under their own names, or without a name
                where there is one.

        Raises:
            InputError: A field is unknown or a required one missing, or two share a column.
        """
        own = {field: field if len(cls.required) > 1 else None for field in cls.required}
        if input_columns is None or dict(input_columns) == own:
            return own
        names = list(input_columns.values())
        right = set(cls.required) <= set(input_columns) <= set(cls.fields) and len(
            set(names)
        ) == len(names)
        if not right or not all(isinstance(name, str) and name for name in names):
            raise InputError(
                f"input_columns does not fit the task {cls.name}",
                where="input_columns",
                wanted="field → column name, each name once; fields: "
                f"{_listed(cls.fields, cls.required)}",
                found=repr(dict(input_columns)),
            )
        return {field: input_columns[field] for field in cls.fields if field in input_columns}

    @classmethod
    def columns_of(cls, example: Any) -> dict[str, str] | None:
        """Columns that an example has, for tasks whose ``needs_example`` is true."""
        return None

    @classmethod
    @abstractmethod
    def serves(cls, class_name: str) -> bool:
        """Whether a model class of this name was made for this task."""

    @classmethod
    @abstractmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        """What must be recorded at save to answer later; JSON only.

        Args:
            model: The module being saved; only looked at.
            options: The user's ``model_config`` keys named in ``task_options``.

        Raises:
            InputError: An option is unknown or has a value that is not allowed.
            StructureError: The model cannot do this task.
        """

    @classmethod
    def with_params(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What ``describe`` returned, and with it the defaults of params to save.

        The model's own, and those given.

        Raises:
            InputError: The task does not know a param, or its value is not allowed; names it.
        """
        own = config.get("params", {})
        return {
            **config,
            "params": {**own, **check_defaults(cls.name, cls.declared(config), given)},
        }

    @classmethod
    def declared(cls, config: Mapping[str, Any]) -> tuple[Param, ...]:
        """The params that a model has, of which ``describe`` returned ``config``."""
        return cls.params

    @classmethod
    def golden(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Params that golden rows of a model are asked with, other than its defaults.

        ``config`` as in ``Task``.
        """
        return dict(cls.golden_params)

    @classmethod
    def metadata(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Facts for the metadata in ``MLmodel`` and for ``inspect``; ``config`` as in ``Task``."""
        return {}

    @classmethod
    def describe_example(cls, config: Mapping[str, Any], example: Any) -> dict[str, Any]:
        """Facts of the user's example beyond ``config``, for tasks with ``needs_example``; JSON."""
        return {}

    def measured(self, engine: Engine, example: Any) -> dict[str, Any]:
        """What only forwards over the user's example tell, to be added to the config; JSON only."""
        return {}

    def stored_example(self, example: Any) -> Any:
        """The user's example as MLflow stores it.

        Rows under the names of their columns or fields, files in base64.
        """
        rows = [self.to_record(row) for row in self.rows(example)]
        return pd.DataFrame(
            [{self.columns[field] or field: value for field, value in row.items()} for row in rows]
        )

    @classmethod
    def require_known(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that are none of ``task_options``. Raises ``InputError`` naming them."""
        if unknown := sorted(options.keys() - cls.task_options):
            raise InputError(
                f"{cls.name} has {'no such option' if cls.task_options else 'no options'}",
                where=f"model_config, {', '.join(map(repr, unknown))}",
                wanted=" | ".join(sorted(cls.task_options)) or None,
            )

    @abstractmethod
    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        """Inputs by column name, outputs, and the per-request params with their defaults.

        Args:
            example: The user's example, for tasks whose ``needs_example`` is true.
            result: What was answered to it.
        """

    def rows(self, data: Any) -> list[Row]:
        """What the user handed to ``predict``, as rows by field.

        Raises ``InputError`` naming row and column.
        """
        self.require_few(data)
        return rows_of(data, self.columns, self.required)

    def require_few(self, data: Any) -> None:
        """Refuse more rows than the cap, before any is made. Raises ``InputError``."""
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
        caps = None if self.reads_files else self.caps
        for i, row in enumerate(rows):
            for field, value in row.items():
                require_clean(value, place(i, self.columns.get(field, field)), caps)
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
        """What ``predict`` returns.

        A DataFrame with one row for each row of ``data``, under the same index.
        """
        columns = {name: [answer[name] for answer in answers] for name in answers[0]}
        return pd.DataFrame(
            columns, index=data.index if isinstance(data, (pd.DataFrame, pd.Series)) else None
        )

    @property
    def folds(self) -> bool:
        """Whether a list in a cell can only be a whole column; see ``rows.unfold_columns``."""
        return False

    def golden_rows(self) -> list[Row]:
        """A few rows of different lengths whose answers are recorded at save and replayed at load.

        None for tasks whose rows nobody but the user knows; their example is recorded.
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

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """All params with defaults filled in. Raises ``InputError`` naming the param."""
        return check_params(self.asked, params)

    def require_defaults(self) -> None:
        """Refuse saved defaults of params that fit neither the model nor each other.

        Raises ``InputError``.
        """
        self.check_params({**self.golden(self.config), **self.config.get("params", {})})

    @abstractmethod
    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        """Rows → features, one each, in order, made while they are iterated.

        None for a pause within a row.

        Raises:
            InputError: Names row and column.
        """

    def encoded(self, rows: Sequence[Row], params: Mapping[str, Any]) -> list[Features]:
        """Rows → features, all at once; see ``encode``."""
        return [features for features in self.encode(rows, params) if features is not None]

    def holds(self, features: Features) -> int:
        """Bytes that a row takes until it is answered, about, features and outputs together."""
        return 64 * sum(self.cost(piece) for piece in self.pieces(features))

    def pieces(self, features: Features) -> Sequence[Features]:
        """What the model must see of one row, at least one piece.

        A long text in windows, a text with each label ….
        """
        return (features,)

    @abstractmethod
    def cost(self, features: Features) -> int:
        """Length of one piece in tokens (or what takes their place).

        Pieces of near cost share a batch.
        """

    @abstractmethod
    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        """Pad, run, cut: one output a piece.

        Nothing of one piece may depend on the pieces beside it beyond rounding.

        Args:
            engine: What runs the model.
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


def _listed(fields: Sequence[str], required: Sequence[str]) -> str:
    return ", ".join(f"{field} (required)" if field in required else field for field in fields)
