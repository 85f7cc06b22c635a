"""Lines of requirements.txt: exact pins, and the source of torch's build."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.version import Version

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.environment.closure import closure_of
from mlflow_safeflavor.environment.homes import homes_of
from mlflow_safeflavor.environment.installed import TORCH_FAMILY, installed_version
from mlflow_safeflavor.environment.lines import StrPath
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = [
    "DEFAULT_ROOTS",
    "GRAPH_ROOTS",
    "TORCH_WHEELS",
    "default_requirements",
    "requirement_lines",
    "server_roots",
]


# Distributions that every saved model with a module needs; the user's own are added to these.
DEFAULT_ROOTS = ("torch", "transformers", "tokenizers", "safetensors", "mlflow", "cloudpickle")

# Those that a graph needs, beside ``server_roots``.
GRAPH_ROOTS = ("onnxruntime", "tokenizers", "safetensors", "numpy", "pandas")

TORCH_WHEELS = "https://download.pytorch.org/whl"
_TORCH_LABEL = re.compile(r"cpu|xpu|cu\d+|rocm\d+(\.\d+)*")
# Built by PyTorch, on its own index and not on PyPI.
_TORCH_TRITON = re.compile(r"pytorch-triton|(pytorch-)?triton-(rocm|xpu)")
_UNSAFE = re.compile(r"[\s#]")


def requirement_lines(
    pins: Mapping[str, str], *, torch_index: StrPath | None = "auto"
) -> list[str]:
    """The lines of requirements.txt: one exact pin a distribution, and where to find torch's build.

    Args:
        pins: Canonical name → exact version.
        torch_index: ``"auto"`` keeps a ``+cpu``/``+cuNNN``/``+rocmX.Y``/``+xpu`` label and names
            PyTorch's own page of wheels for it. The URL of an index or a folder of wheels is named
            instead, labels stay. None drops the labels, names nothing.

    Raises:
        EnvironmentMismatchError: torch_index is none of these, or "auto" meets a label that PyTorch
            does not publish.
    """
    pins = dict(sorted(pins.items()))
    if torch_index is None:
        pins |= {name: pins[name].partition("+")[0] for name in pins.keys() & TORCH_FAMILY}
        options = []
    elif torch_index == "auto":
        # No --extra-index-url: uv looks for every name that PyTorch's index shares with PyPI
        # (filelock, jinja2, numpy, …) only in the first index that has the name, and then does not
        # find the exact pin. A page for --find-links offers one distribution and no other, and pip
        # and uv read it the same way.
        builds = {
            name: version
            for name, version in pins.items()
            if name in TORCH_FAMILY and "+" in version
        }
        if "torch" in builds:
            builds |= {name: builds["torch"] for name in pins if _TORCH_TRITON.fullmatch(name)}
        options = [f"--find-links {_wheel_page(name, build)}" for name, build in builds.items()]
    else:
        options = [_index_option(str(torch_index))]
    return [*options, *(f"{name}=={version}" for name, version in pins.items())]


def _wheel_page(name: str, build: str) -> str:
    label = build.partition("+")[2]
    if not _TORCH_LABEL.fullmatch(label):
        raise EnvironmentMismatchError(
            "PyTorch publishes no wheels with this label",
            where=f"{name}=={build}",
            wanted="+cpu, +cuNNN, +rocmX.Y or +xpu, or no label",
            found=f"+{label}",
            hint="say where the wheel is with torch_index=URL or FOLDER, or drop the label with "
            "torch_index=None",
        )
    return f"{TORCH_WHEELS}/{'nightly/' if Version(build).is_devrelease else ''}{label}/{name}/"


def _index_option(torch_index: str) -> str:
    url = urlsplit(torch_index)
    if url.scheme in ("http", "https") and url.netloc and not _UNSAFE.search(torch_index):
        # requirements.txt is copied into every image and tracking store.
        if url.password and not re.fullmatch(r"\$\{[A-Z0-9_]+\}", url.password):
            raise EnvironmentMismatchError(
                "torch_index holds a password, and requirements.txt is readable by everybody who "
                "can read the model",
                where="torch_index",
                hint="write it as ${NAME_OF_A_VARIABLE}, which pip expands, or leave it to pip's "
                "own settings",
            )
        return f"--extra-index-url {torch_index}"
    if url.scheme == "file" and not _UNSAFE.search(torch_index):
        return f"--find-links {torch_index}"
    if torch_index and os.path.isdir(torch_index):
        folder = Path(os.path.abspath(torch_index))
        # Blanks would end the option and # would start a comment; a file URL has neither.
        return f"--find-links {folder.as_uri() if _UNSAFE.search(str(folder)) else folder}"
    raise EnvironmentMismatchError(
        "torch_index names no source that pip can use",
        where="torch_index",
        wanted='"auto", None, an http(s):// or file:// URL, or a folder that exists',
        found=repr(torch_index),
    )


@checked
def default_requirements(
    model: Any = None,
    *,
    torch_index: StrPath | None = "auto",
    path: Sequence[str] | None = None,
) -> list[str]:
    """Pins that every saved model needs directly; public as ``get_default_pip_requirements``.

    With a model, also those of the distributions that its classes are from. What ``save_model``
    pins is more: all that these need, and that the rehearsal was seen to use.
    """
    pins = {
        name: version
        for name in (*DEFAULT_ROOTS, *homes_of(model))
        if (version := installed_version(name, path)) is not None
    }
    return requirement_lines(pins, torch_index=torch_index)


def server_roots(path: Sequence[str] | None = None) -> list[str]:
    """The smallest part of MLflow that loads and serves a model."""
    # Before 2.15 MLflow was not made of parts; until 2.20 the smaller part lacks its own server.
    if installed_version("mlflow-skinny", path) is None:
        return ["mlflow"]
    brought = closure_of(["mlflow-skinny"], path=path)
    return ["mlflow-skinny", *([] if "fastapi" in brought else ["flask", "gunicorn"])]
