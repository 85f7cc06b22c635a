"""The signature of a saved model: the task's own, or the user's where it fits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlflow.models import ModelSignature
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.params import param_schema

__all__ = ["columns_of", "defaults_of", "signature_of"]

_logger = logging.getLogger("mlflow.safeflavor")


Given = ModelSignature | Literal[False] | None
"""A signature that the user gave; False for a model without one."""


def defaults_of(signature: Given) -> dict[str, Any]:
    """Param → default, of a signature that the user gave."""
    schema = signature.params if signature else None
    return {} if schema is None else {param.name: param.default for param in schema.params}


def columns_of(signature: Given, cls: type[Task]) -> dict[str, str] | None:
    """The column of a task of one field that the user's signature names; None if it names none."""
    schema = signature.inputs if signature else None
    # A task of several fields cannot tell whose column a name is.
    if (
        schema is None
        or len(schema.inputs) != 1
        or len(cls.required) != 1
        or not schema.has_input_names()
    ):
        return None
    return (
        {cls.required[0]: schema.input_names()[0]}
        if isinstance(schema.input_types()[0], DataType)
        else None
    )


def signature_of(
    task: Task, example: Any, answers: Sequence[Mapping[str, Any]], given: Given
) -> ModelSignature | None:
    """The signature in ``MLmodel``.

    Args:
        task: As saved, with its defaults of params.
        example: The user's; None if there is none.
        answers: Its answers.
        given: The user's signature, whose params the task was found to know; None for the task's
            own, False for none. Its params get the types and defaults that count here.

    Raises:
        InputError: It names other inputs.
    """
    if given is False:
        return None
    own = task.signature(example, task.result(answers, example) if answers else None)
    if given is None:
        return own
    # MLflow enforces the signature before the model is asked: other names would refuse every row.
    if given.inputs is None or set(given.inputs.input_names()) != set(own.inputs.input_names()):
        raise InputError(
            "The signature does not fit the task",
            where="signature",
            wanted=f"inputs {own.inputs}",
            found=f"inputs {given.inputs}",
            hint="leave signature out, or rename columns with input_columns",
        )
    # The user chooses which params requests may set; types and defaults are the task's own.
    kept = [param for param in task.asked if param.name in defaults_of(given)]
    if left := [param.name for param in task.asked if param not in kept]:
        _logger.warning(
            "The signature does not declare %s, so MLflow drops %s from requests; leave signature "
            "out to have all params of the task.",
            ", ".join(left),
            "them" if len(left) > 1 else "it",
        )
    params = {"params": param_schema(kept)} if kept else {}
    return ModelSignature(given.inputs, given.outputs, **params)
