"""A module or hook as a pickle whose tensors are taken out and stay in safetensors.

It carries what no constructor call can: classes of notebooks, closures, and models whose
``__init__`` reads other checkpoints. Rebuilding calls no ``__init__`` at all.
"""

from __future__ import annotations

import io
import pickle
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.trust import require_agreed
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.module.slots import Slot, hidden_slot

__all__ = ["dump", "load"]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # no stubs
    """Puts a number in the place of each tensor, and remembers the tensor."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.numbers: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor):
            return None
        # By identity: a tensor in two places, or of module and hook, stays one object. ``tensors``
        # keeps each alive, so that no other gets its id.
        if id(thing) not in self.numbers:
            self.numbers[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return self.numbers[id(thing)]


def dump(
    objects: Mapping[str, Any], slots: Sequence[Slot]
) -> tuple[bytes, list[Slot], dict[str, Any]]:
    """Pickle ``objects`` without their tensors.

    Args:
        objects: Name → module or function.
        slots: Of the module, and of what was pickled before.

    Returns:
        The pickle; the slots, followed by one for each tensor that only the pickle reaches (in
        closures, in objects that are no modules); and what ``load`` must know, JSON only.

    Raises:
        StructureError: Something cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(dict(objects))
    except Exception as error:  # every class has its own way to refuse
        raise StructureError(
            "The model cannot be pickled",
            where=", ".join(f"{name} ({type(thing).__name__})" for name, thing in objects.items()),
            found=f"{type(error).__name__}: {error}",
            hint="take locks, files, loggers and generators out of the module before saving it",
        ) from error
    paths = {id(slot.tensor): slot.path for slot in reversed(slots)}  # the first path wins
    hidden = [tensor for tensor in pickler.tensors if id(tensor) not in paths]
    taken = sum(slot.kind == "hidden" for slot in slots)  # those of another pickle
    names = {id(tensor): f"<hidden {number}>" for number, tensor in enumerate(hidden, taken)}
    all_slots = [*slots, *(hidden_slot(names[id(tensor)], tensor) for tensor in hidden)]
    facts = {
        "tensors": [(paths | names)[id(tensor)] for tensor in pickler.tensors],
        # Functions and classes pickled by value are byte code, which belongs to one minor version.
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cloudpickle": cloudpickle.__version__,
    }
    return buffer.getvalue(), all_slots, facts


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]


def load(
    file: Path,
    layout: Layout,
    facts: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    trust: Collection[str],
) -> dict[str, Any]:
    """Unpickle with the stored tensors in place, which runs any code of the pickle.

    Args:
        file: The pickle.
        layout: The artifact that it is in.
        facts: As ``dump`` returned them.
        tensors: Path → tensor.
        trust: What the caller agreed to run.

    Raises:
        TrustError: Nobody agreed to run a pickle.
        StructureError: It was made by another Python, or cannot be unpickled here.
    """
    # Before a byte is read: unpickling calls what the pickle names.
    require_agreed("pickle", trust, layout.name_of(file))
    here = ".".join(platform.python_version_tuple()[:2])
    if facts.get("python") != here:
        raise StructureError(
            "The pickle holds byte code of another Python",
            where=layout.name_of(file),
            wanted=f"Python {facts.get('python')}",
            found=f"Python {here}",
            hint="load it with that Python, or save the model with importable classes "
            "(code_paths=[…])",
        )
    try:
        content = layout.read_bytes(file)
        in_order = [tensors[path] for path in facts["tensors"]]
    except (OSError, KeyError, TypeError) as error:
        raise IntegrityError(
            "The pickle or its list of tensors is damaged",
            where=layout.name_of(layout.structure),
            found=error,
            hint=FETCH_AGAIN,
        ) from None
    try:
        return dict(_Unpickler(io.BytesIO(content), in_order).load())
    except Exception as error:
        raise StructureError(
            "The model cannot be unpickled here",
            where=layout.name_of(file),
            found=f"{type(error).__name__}: {error}",
            hint="when saving, pass code_paths=[…] with the modules it needs",
        ) from error
