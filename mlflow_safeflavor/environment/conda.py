"""conda.yaml: the environment that the user gave, or a bare one, and its section for pip."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlflow_safeflavor.environment.installed import installed_version
from mlflow_safeflavor.environment.requirements import default_requirements
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = [
    "bare_conda_env",
    "default_conda_env",
    "parse_conda_env",
    "pip_section",
    "python_release",
    "read_yaml",
    "with_pip_section",
]


def default_conda_env(model: Any = None) -> dict[str, Any]:
    """A conda environment that holds ``default_requirements``."""
    return with_pip_section(bare_conda_env(), default_requirements(model))


def parse_conda_env(
    conda_env: object, pip_requirements: object, extra: object
) -> dict[str, Any] | None:
    """The conda environment that the user gave, or None; it excludes the two others.

    Raises:
        EnvironmentMismatchError: More than one is given, or it describes no environment.
    """
    arguments = {
        "conda_env": conda_env,
        "pip_requirements": pip_requirements,
        "extra_pip_requirements": extra,
    }
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise EnvironmentMismatchError(
            "Only one of conda_env, pip_requirements and extra_pip_requirements can be used",
            where=", ".join(given),
            hint=f"keep {given[0]}, and write the rest into it",
        )
    if conda_env is None:
        return None
    if isinstance(conda_env, (str, os.PathLike)):
        conda_env = read_yaml(Path(conda_env))
    if not isinstance(conda_env, Mapping) or not isinstance(conda_env.get("dependencies"), list):
        raise EnvironmentMismatchError(
            "conda_env describes no conda environment",
            where="conda_env",
            wanted="a mapping with a list of dependencies, or the path of a YAML file that holds "
            "one",
            found=repr(conda_env)[:200],
        )
    return dict(conda_env)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        EnvironmentMismatchError: It cannot be read.
    """
    # safe_load: a plain load runs constructors that the file names.
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EnvironmentMismatchError(
            "conda_env cannot be read", where=path, found=error
        ) from None


def pip_section(conda: Mapping[str, Any]) -> list[str]:
    """Requirement lines among the dependencies; empty where there are none."""
    # {"pip": null} is what YAML makes of a section that somebody emptied.
    sections = [
        part["pip"] for part in conda["dependencies"] if isinstance(part, Mapping) and "pip" in part
    ]
    return [*sections[0]] if sections and sections[0] else []


def with_pip_section(conda: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    """The same environment with these requirement lines."""
    # One section in place of all: MLflow reads the first and knows no others.
    others = [
        part for part in conda["dependencies"] if not (isinstance(part, Mapping) and "pip" in part)
    ]
    return {**conda, "dependencies": [*others, {"pip": [*lines]}]}


def bare_conda_env() -> dict[str, Any]:
    """A conda environment of this Python and pip alone."""
    pip = installed_version("pip", None)
    # At most this pip, as MLflow writes it: conda-forge gets a new pip later than others do.
    dependencies = [f"python={python_release()}", f"pip<={pip}" if pip else "pip"]
    return {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": dependencies}


def python_release() -> str:
    """The release of this Python, such as ``3.11.7``."""
    return ".".join(map(str, sys.version_info[:3]))
