"""Comparison of a module with the one that its constructor makes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.attributes import find_differences
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.leftovers import covered, fresh, written_by_forward
from mlflow_safeflavor.module.slots import UNKNOWN, shape_of, some
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.module.watch import FIRST_MARK, Watch

__all__ = ["compared", "require_same_shapes"]

_logger = logging.getLogger("mlflow.safeflavor")


def compared(
    subject: Subject,
    built: Subject,
    described: Mapping[str, Any],
    forward: Callable[[torch.nn.Module], None],
) -> torch.nn.Module:
    """The module to be saved; refuses one that its constructor does not give back."""
    found = list(find_differences(subject, built))
    if not found:
        return subject.module
    # The user's own class, in the user's own process: there is nothing to agree to.
    written = written_by_forward(subject, lambda: build(described, trust={"code"}), forward)
    left = covered(found, written)
    if lost := [
        difference for difference in found if difference.path not in left and not difference.tensor
    ]:
        more = f"; and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        raise StructureError(
            "The constructor does not give back all that the module holds: it was changed after "
            "it was made",
            where=f"{described['class']}, {lost[0].path}",
            wanted="each attribute as it is in the module",
            found="; ".join(map(str, lost[:_MOST_NAMED])) + more,
            hint=_hint(described, "pass init_args={…} with the constructor's arguments, "),
        )
    if not left:
        return subject.module
    _logger.info("safeflavor: not saved, because a forward makes it anew: %s", some(left))
    # Initialised, since tensors that a forward writes stay as the constructor makes them here.
    return fresh(subject, build(described, trust={"code"}, initialise=True), left)


_MOST_NAMED = 5


def _hint(described: Mapping[str, Any], first: str) -> str:
    """The hint, without ``first`` for layers of torch.nn, of which all arguments are known."""
    return f"{'' if described['kind'] == 'torch' else first}allow_pickle=True, or graph='only'"


def require_same_shapes(subject: Subject, structure: Mapping[str, Any]) -> Subject:
    """Call the constructor; refuse one whose parameters and buffers differ from the module's."""
    # The user's own class, in the user's own process: there is nothing to agree to.
    # Marked, so that it can be one of the two that ``damage`` compares.
    watch = Watch(torch.float32, FIRST_MARK)
    built = Subject.of(build(structure, trust={"code"}, watch=watch))
    wanted, found = (
        {slot.path: shape_of(slot.tensor) for slot in each.slots if slot.persistent}
        for each in (built, subject)
    )
    odd = sorted(
        path
        for path in wanted.keys() | found.keys()
        if wanted.get(path) != found.get(path)
        and not (path in found and wanted.get(path) == UNKNOWN)
    )
    if odd:
        raise StructureError(
            "The constructor does not give back the module: it was changed after it was made",
            where=f"{structure['class']}, {odd[0]}",
            wanted=f"{wanted.get(odd[0], 'no such tensor')} as the constructor makes it",
            found=f"{found.get(odd[0], 'no such tensor')} in the module, and {len(odd) - 1} more "
            "differences",
            hint=_hint(structure, "keep config in step with the module, pass init_args={…}, "),
        )
    return built
