"""Kinds of tasks: fields, params and options of each, and what a save records for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.params import Param, check_defaults

if TYPE_CHECKING:
    import torch

__all__ = ["TaskKind"]


class TaskKind(ABC):
    """All that is asked of a task's class, before it is bound to what ``describe`` recorded."""

    name: ClassVar[str]
    # All fields the task knows, required ones first.
    fields: ClassVar[tuple[str, ...]]
    # Fields that ``columns`` must have. Every field in ``columns`` must then be in every row.
    required: ClassVar[tuple[str, ...]]
    # Per-request params, with the defaults of the task.
    params: ClassVar[tuple[Param, ...]] = ()
    # Names of those that ``forward`` reads: only requests that agree in them may share a batch.
    forward_params: ClassVar[frozenset[str]] = frozenset()
    # Arguments that the constructor takes by name: "encoder", "tokenizer", "hooks", "processor" ….
    reads: ClassVar[tuple[str, ...]] = ()
    # Params of golden rows: see ``golden``.
    golden_params: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Whether it is about sounds: for ``infer_task``, since the names of classes do not always tell.
    hears: ClassVar[bool] = False
    # Whether columns, signature and golden rows are those of the user's example.
    needs_example: ClassVar[bool] = False
    # Whether all rows of a request make one answer, so that ``result`` is no table.
    one_answer: ClassVar[bool] = False
    # Keys of that answer that are of the moment, and in no comparison: ids and times.
    passing: ClassVar[frozenset[str]] = frozenset()
    # Whether the answer to a row can be had as it is written: see ``Task.streamed``.
    streams: ClassVar[bool] = False
    # Keys of the user's ``model_config`` that belong to the task and are fixed at save.
    task_options: ClassVar[frozenset[str]] = frozenset()
    # Whether golden rows hold their features, so that a tokenizer that drifted is named as such.
    records_features: ClassVar[bool] = True
    # Whether texts in cells may be files in base64, so that their characters are not capped.
    reads_files: ClassVar[bool] = False

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
        # A sole field has no column name, as in mlflow.transformers: any one column is it.
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
        """The config of a task, recorded at save; JSON only.

        Args:
            model: The module being saved; not changed.
            options: The user's ``model_config`` keys named in ``task_options``.

        Raises:
            InputError: An option is unknown or has a value that is not allowed.
            StructureError: The model cannot do this task.
        """

    @classmethod
    def with_params(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The config with the defaults of params to save: the model's own, and those given.

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
        """The params of a model with this config."""
        return cls.params

    @classmethod
    def golden(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Params of golden rows other than the model's defaults; ``config`` as in ``Task``."""
        return dict(cls.golden_params)

    @classmethod
    def metadata(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Facts for the metadata in ``MLmodel`` and for ``inspect``; ``config`` as in ``Task``."""
        return {}

    @classmethod
    def describe_example(cls, config: Mapping[str, Any], example: Any) -> dict[str, Any]:
        """Facts of the user's example beyond ``config``, for tasks with ``needs_example``; JSON."""
        return {}

    @classmethod
    def require_known(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that are none of ``task_options``. Raises ``InputError`` naming them."""
        if unknown := sorted(options.keys() - cls.task_options):
            raise InputError(
                f"{cls.name} has {'no such option' if cls.task_options else 'no options'}",
                where=f"model_config, {', '.join(map(repr, unknown))}",
                wanted=" | ".join(sorted(cls.task_options)) or None,
            )


def _listed(fields: Sequence[str], required: Sequence[str]) -> str:
    return ", ".join(f"{field} (required)" if field in required else field for field in fields)
