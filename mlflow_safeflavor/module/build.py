"""Build a module from its description, on real memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.trust import is_proven, require_agreed
from mlflow_safeflavor.errors import SafeFlavorError, StructureError
from mlflow_safeflavor.module.bounds import within
from mlflow_safeflavor.module.configs import config_from_json
from mlflow_safeflavor.module.embedding import Embedder
from mlflow_safeflavor.module.layers import make_layers
from mlflow_safeflavor.module.memory import real_memory
from mlflow_safeflavor.module.random_state import seed_generators
from mlflow_safeflavor.module.user_code import import_name
from mlflow_safeflavor.module.watch import Watch

__all__ = ["build", "flags_of"]


def flags_of(cls: type) -> dict[str, bool]:
    """Boolean constructor arguments of a class, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if isinstance(parameter.default, bool)
    }


def build(
    structure: Mapping[str, Any],
    *,
    trust: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    inventory: Inventory | None = None,
    initialise: bool = False,
    watch: Watch | None = None,
) -> torch.nn.Module:
    """Call the constructor on real CPU memory, by default without random initialisation.

    The values of its parameters mean nothing before ``fill``.

    Args:
        structure: From ``describe`` or ``read_structure``, of a kind other than ``pickle``.
        trust: What the caller agreed to run.
        dtype: Torch's default dtype during construction.
        inventory: What the module must hold; bounds what its constructor may allocate.
        initialise: Run random initialisers, too.
        watch: Looks at the constructor; other marks mean other random values, too.

    Raises:
        TrustError: The class is the user's own, and ``trust`` has no agreement to run it.
        StructureError: The class is not there any more, or its constructor fails.
    """
    try:
        make = _maker(structure, trust)
        with (
            real_memory(dtype, inventory=inventory, initialise=initialise),
            contextlib.nullcontext() if watch is None else watch,
        ):
            if watch is not None and watch.mark is not None:
                seed_generators(watch.mark)
            # Eight times, as in ``memory``: stored dtypes may be narrower than the constructor's.
            module = make() if inventory is None else within(8 * inventory.nbytes, make)
    except SafeFlavorError:
        raise
    except Exception as error:
        raise StructureError(
            "The constructor of the model failed",
            where=structure["class"],
            found=f"{type(error).__name__}: {error}",
            hint="when saving, pass init_args={…} or allow_pickle=True",
        ) from error
    if not isinstance(module, torch.nn.Module):  # a class may have a __new__ of its own
        raise StructureError("The class does not make a module", where=structure["class"])
    for parameter in module.parameters():
        if not torch.nn.parameter.is_lazy(parameter):  # which has no gradient, and no shape
            parameter.requires_grad_(False)
    return module.eval()


def _maker(structure: Mapping[str, Any], trust: Collection[str]) -> Callable[[], Any]:
    """A call of the constructor, once its class was checked and agreed to."""
    if structure["kind"] == "torch":
        return functools.partial(make_layers, structure["tree"])
    lookup = _transformers_class
    if structure["kind"] == "import":
        require_agreed("code", trust, structure["class"])
        lookup = import_name
    elif not is_proven(structure["class"].rpartition(":")[2]):
        raise StructureError(
            "The class of transformers is not among those proven to come back as saved",
            where=structure["class"],
            wanted="a class in proven_classes.txt of this release",
            hint='save the model again with this release: it is then of the kind "import", for '
            'trust={"code"}',
        )
    cls = lookup(structure["class"])
    # Before it is called: os.system is no model, and after the call it would be too late.
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise StructureError(
            "The class is no module", where=structure["class"], wanted="a torch.nn.Module"
        )
    # Flags alone: a text among the arguments could name a repository or a file.
    if structure["kind"] == "transformers" and (
        odd := sorted(structure["arguments"].keys() - flags_of(cls))
    ):
        raise StructureError(
            "The class has no such flag", where=f"{structure['class']}, {odd[0]}", hint=FETCH_AGAIN
        )

    def make() -> Any:
        arguments = {
            name: value["value"] if "value" in value else config_from_json(value, lookup)
            for name, value in structure["arguments"].items()
        }
        config = config_from_json(structure, lookup)
        made = cls(**arguments) if config is None else cls(config, **arguments)
        return made if structure["layers"] is None else Embedder(made, structure["layers"])

    return make


_DEFINES_MODELS = re.compile(
    r"transformers\.models(\.\w+)+\.(modeling|configuration)_\w+", re.ASCII
)


def _transformers_class(full_name: str) -> Any:
    """A model or config class of transformers, by its module or the package's own table."""
    # Nothing outside that package is imported for an artifact's sake, and of it only modules that
    # define models and configs: others hold command lines, downloads and what they import.
    module_name, _, name = full_name.partition(":")
    if _DEFINES_MODELS.fullmatch(module_name) and name.isidentifier():
        try:
            found = getattr(importlib.import_module(module_name), name, None)
        except ImportError:
            found = None
        if found is None:  # moved between releases
            found = getattr(importlib.import_module("transformers"), name, None)
        # The class's own module: a modeling file also holds the names that it imports.
        if isinstance(found, type) and found.__module__.startswith("transformers.models."):
            return found
    raise StructureError(
        "The model's class is not in the installed transformers",
        where=full_name,
        wanted="a class of the transformers package",
        hint=FETCH_AGAIN,
    )
