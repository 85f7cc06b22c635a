"""A saved module rebuilt on real memory, and compared with what was saved tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.module import (
    bounds,
    inventory,
    memory,
    pickled,
    structure,
    tensors,
    user_code,
)
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.fill import NOT_GIVEN_BACK, fill, realise
from mlflow_safeflavor.module.guarded import guarded

__all__ = ["rebuild", "unpickled_hooks"]


def rebuild(
    layout: Layout, spec: ModelSpec, saved: Inventory, trust: Collection[str]
) -> tuple[torch.nn.Module, dict[str, Callable[..., Any]]]:
    """Build on real memory, fill by assignment, compare every tensor's facts with the inventory.

    Returns:
        The module, in eval mode and without gradients, and the user's hooks by name.

    Raises:
        WeightsError: A tensor is not the one that was saved.
    """
    # Numbers first, then weights: nothing is built from a config that asks for more than is stored.
    described = structure.read_structure(layout, spec)
    bounds.require_explained(described.get("config"), saved, layout.name_of(layout.config))
    bounds.require_explained(described.get("tree"), saved, layout.name_of(layout.structure))
    values = tensors.read_tensors(saved, layout)
    objects: dict[str, Any] = {}
    hidden: dict[str, torch.Tensor] = {}
    with guarded(layout.root, unpickles=bool(spec.runs)):
        if "code" in trust:
            user_code.make_importable(layout)
        # Hooks and module share these objects: a tensor of both is one again.
        realised = realise(saved, values) if "pickle" in spec.runs else {}
        for file, facts in (
            (layout.structure_pickle, "pickle"),
            (layout.hooks_pickle, "hooks_pickle"),
        ):
            if described[facts] is not None:
                # A pickle may construct and allocate, too: on real memory and within bounds.
                with memory.real_memory(inventory=saved):
                    objects |= pickled.load(file, layout, described[facts], realised, trust)
        if described["kind"] == "pickle":
            module = objects["module"].eval().requires_grad_(False)
            hidden = {
                path: realised[path] for path, row in saved.rows.items() if row.kind == "hidden"
            }
        else:
            module = build(described, trust=trust, inventory=saved)
            fill(module, saved, values)
        names = described["hooks"]
        hooks = {
            hook: user_code.import_name(name) if name else objects[hook]
            for hook, name in names.items()
        }
    # Last, after all that runs code of the artifact: pickles, constructors, imports of hooks.
    _require_same_tensors(module, saved, hidden)
    return module, hooks


def unpickled_hooks(
    described: Mapping[str, Any], saved: Inventory, layout: Layout, trust: Collection[str]
) -> dict[str, Any]:
    """Hooks that cannot be imported, from their own pickle; the module stays unbuilt."""
    realised = realise(saved, tensors.read_tensors(saved, layout))
    with guarded(layout.root, unpickles=True):
        if "code" in trust:
            user_code.make_importable(layout)
        return pickled.load(layout.hooks_pickle, layout, described["hooks_pickle"], realised, trust)


def _require_same_tensors(
    module: torch.nn.Module, saved: Inventory, hidden: Mapping[str, torch.Tensor]
) -> None:
    if differences := list(inventory.find_differences(module, saved, hidden)):
        raise WeightsError(
            "The rebuilt module is not the one that was saved",
            where=differences[0],
            found=f"{len(differences)} differences",
            hint=NOT_GIVEN_BACK,
        )
