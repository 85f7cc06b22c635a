"""Where pip looks on this machine."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.utils import (
    InvalidWheelFilename,
    NormalizedName,
    canonicalize_name,
    parse_wheel_filename,
)


@functools.cache
def pip_settings() -> dict[str, str]:
    """Setting of pip → value as configured here, by files or variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.partition("=") for line in listing.splitlines()]
    # Variables are listed first and win.
    return {
        key.rpartition(".")[2]: ast.literal_eval(value)
        for key, _, value in reversed(lines)
        if value
    }


@functools.cache
def wheels_of_installed() -> tuple[Path, ...]:
    """Wheels of the versions installed here, in folders that pip is configured to look in."""
    installed = {
        canonicalize_name(one.name): one.version for one in importlib.metadata.distributions()
    }
    folders = [
        Path(part.removeprefix("file://")) for part in pip_settings().get("find-links", "").split()
    ]
    wheels = sorted(
        wheel for folder in folders if folder.is_dir() for wheel in folder.glob("*.whl")
    )
    return tuple(wheel for wheel in wheels if _is_version_of(wheel, installed))


def _is_version_of(wheel: Path, installed: dict[NormalizedName, str]) -> bool:
    try:
        name, version, _, _ = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename:
        return False
    return installed.get(name) == str(version)


def torch_wheels() -> Path | None:
    """The folder that holds the installed torch; None where there is none."""
    return next(
        (wheel.parent for wheel in wheels_of_installed() if wheel.name.startswith("torch-")), None
    )
