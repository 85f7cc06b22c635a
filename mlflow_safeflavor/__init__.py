"""MLflow flavor for PyTorch and Transformers models that answer the same everywhere, or refuse with a reason.

Log a model once with ``log_model``; ``mlflow.pyfunc.load_model``, ``mlflow models serve``,
``mlflow models build-docker`` and ``load_model`` then rebuild it on real memory, compare every tensor
with what was saved, replay recorded answers, and only then predict.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.version import __version__ as __version__

if TYPE_CHECKING:
    from mlflow_safeflavor.checkpoint import from_pretrained
    from mlflow_safeflavor.docker import generate_dockerfile
    from mlflow_safeflavor.load import load_model
    from mlflow_safeflavor.meta import materialize
    from mlflow_safeflavor.pyfunc import PyfuncModel
    from mlflow_safeflavor.requirements import default_conda_env as get_default_conda_env
    from mlflow_safeflavor.requirements import default_requirements as get_default_pip_requirements
    from mlflow_safeflavor.save import log_model, save_model
    from mlflow_safeflavor.spec import FLAVOR_NAME
    from mlflow_safeflavor.verify import verify_model

__all__ = [
    "FLAVOR_NAME",
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
    "FLAVOR_NAME": ("spec", "FLAVOR_NAME"),
    "from_pretrained": ("checkpoint", "from_pretrained"),
    "generate_dockerfile": ("docker", "generate_dockerfile"),
    "get_default_conda_env": ("requirements", "default_conda_env"),
    "get_default_pip_requirements": ("requirements", "default_requirements"),
    "load_model": ("load", "load_model"),
    "log_model": ("save", "log_model"),
    "materialize": ("meta", "materialize"),
    "save_model": ("save", "save_model"),
    "verify_model": ("verify", "verify_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """What MLflow calls: ``loader_module`` of every saved model is this package."""
    from mlflow_safeflavor.pyfunc import load_pyfunc

    return load_pyfunc(path, model_config)
