"""The files that MLflow installs from, written for distributions that a test installed."""

from __future__ import annotations

import yaml

from mlflow_safeflavor.environment import requirements
from mlflow_safeflavor.environment.files import environment_files


def write_files(site, folder, **options):
    folder.mkdir(exist_ok=True)
    recorded = environment_files(
        folder, ["torch", "mlflow"], torch_build={}, path=site.path, **options
    )
    lines = (folder / "requirements.txt").read_text().splitlines()
    conda, python_env = (
        yaml.safe_load((folder / name).read_text()) for name in ("conda.yaml", "python_env.yaml")
    )
    return recorded, lines, conda, python_env


def lines_of(pins, torch_index="auto"):
    return requirements.requirement_lines(pins, torch_index=torch_index)
