"""MLflow flavor for PyTorch and Transformers models: the same answers everywhere, or an error.

Log a model once with ``log_model``; ``mlflow.pyfunc.load_model``, ``mlflow models serve``, ``mlflow
models build-docker`` and ``load_model`` then rebuild it on real memory, compare every tensor with
the saved one, replay recorded answers, and only then predict.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.version import __version__ as __version__

if TYPE_CHECKING:
    from mlflow_safeflavor.artifact.spec import FLAVOR_NAME
    from mlflow_safeflavor.checkpoints.from_pretrained import from_pretrained
    from mlflow_safeflavor.checkpoints.materialize import materialize
    from mlflow_safeflavor.environment.conda import default_conda_env as get_default_conda_env
    from mlflow_safeflavor.environment.requirements import (
        default_requirements as get_default_pip_requirements,
    )
    from mlflow_safeflavor.load.image import generate_dockerfile
    from mlflow_safeflavor.load.load import load_model
    from mlflow_safeflavor.load.pyfunc import PyfuncModel
    from mlflow_safeflavor.save.autolog import autolog
    from mlflow_safeflavor.save.save import log_model, save_model
    from mlflow_safeflavor.verify.verify import verify_model

__all__ = [
    "FLAVOR_NAME",
    "autolog",
    "from_pretrained",
    "generate_dockerfile",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "materialize",
    "save_model",
    "verify_model",
]

# Names are looked up when they are used: importing this package, which MLflow does before anything
# is checked, imports neither torch nor transformers.
_HOMES = {
    "FLAVOR_NAME": ("artifact.spec", "FLAVOR_NAME"),
    "autolog": ("save.autolog", "autolog"),
    "from_pretrained": ("checkpoints.from_pretrained", "from_pretrained"),
    "generate_dockerfile": ("load.image", "generate_dockerfile"),
    "get_default_conda_env": ("environment.conda", "default_conda_env"),
    "get_default_pip_requirements": ("environment.requirements", "default_requirements"),
    "load_model": ("load.load", "load_model"),
    "log_model": ("save.save", "log_model"),
    "materialize": ("checkpoints.materialize", "materialize"),
    "save_model": ("save.save", "save_model"),
    "verify_model": ("verify.verify", "verify_model"),
}

_LOADER_ALONE = (
    "{name} is not in {folder}: that is the loader of a saved model, which MLflow imports when it "
    "loads the model. Import mlflow_safeflavor before the first mlflow.pyfunc.load_model, or in "
    "another process"
)


def __getattr__(name: str) -> Any:
    # AttributeError, or hasattr() and from-imports of submodules would fail with another error.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    # Here alone: an editable install would add rooms of its own release to a loader of another.
    if PathFinder.find_spec(f"{__name__}.{module.partition('.')[0]}", __path__) is None:
        raise ImportError(_LOADER_ALONE.format(name=name, folder=__path__[0]))
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """Entry point of MLflow: ``loader_module`` of every saved model is this package."""
    # Not above: whoever only saves, or inspects, needs nothing of it.
    from mlflow_safeflavor.load.pyfunc import load_pyfunc

    return load_pyfunc(path, model_config)
