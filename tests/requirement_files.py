"""The files that MLflow installs from, written for distributions that a test installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlflow_safeflavor.environment import requirements
from mlflow_safeflavor.environment.files import environment_files
from mlflow_safeflavor.environment.recorded import Environment

if TYPE_CHECKING:
    from conftest import Site


def write_files(
    site: Site, folder: Path, **options: Any
) -> tuple[Environment, list[str], Any, Any]:
    folder.mkdir(exist_ok=True)
    recorded = environment_files(
        folder, ["torch", "mlflow"], torch_build={}, path=site.path, **options
    )
    lines = (folder / "requirements.txt").read_text().splitlines()
    conda, python_env = (
        yaml.safe_load((folder / name).read_text()) for name in ("conda.yaml", "python_env.yaml")
    )
    return recorded, lines, conda, python_env


def lines_of(pins: Mapping[str, str], torch_index: str | Path | None = "auto") -> list[str]:
    return requirements.requirement_lines(pins, torch_index=torch_index)
