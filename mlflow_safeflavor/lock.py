"""Pins with the hash of every file that may be installed for them, as ``pip install --require-hashes`` wants them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_safeflavor.errors import EnvironmentMismatchError
from mlflow_safeflavor.scratch import scratch_folder

__all__ = ["lock", "read_lines"]

_TIMEOUT = 600  # seconds
_AS_UV_SAYS = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_EXTRA_INDEX_URL", "find-links": "UV_FIND_LINKS"}
"""Settings of pip → uv's variables: uv reads no pip.conf."""


def lock(lines: Sequence[str], *, python: str) -> list[str]:
    r"""Resolve exact pins with uv, and add the hashes that the index publishes.

    Args:
        lines: Of a requirements.txt; options (``--find-links``) count, and stay in front.
        python: Version to resolve for, like "3.11.7".

    Returns:
        The same options, then ``name==version \\`` and one ``--hash=sha256:…`` a line.

    Raises:
        EnvironmentMismatchError: uv is not installed, or finds no files for the pins.
    """
    with scratch_folder("lock") as folder:
        source, target = Path(folder, "requirements.txt"), Path(folder, "requirements.lock")
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [_uv(), "pip", "compile", str(source), "--output-file", str(target), "--generate-hashes"]
        command += ["--python-version", python, "--no-header", "--no-annotate", "--quiet"]
        # As pip looks: at all indexes for the pinned version, not only at the first that knows the name.
        command += ["--index-strategy", "unsafe-best-match"]
        environ = {**_pip_settings(), **os.environ}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
        if done.returncode:
            raise EnvironmentMismatchError(
                "The pins cannot be locked with hashes",
                where="uv pip compile",
                wanted="a file to install for each pin",
                found=done.stderr.strip()[-1500:],
                way_out="say where the files are (torch_index=… when saving, UV_DEFAULT_INDEX, UV_FIND_LINKS), "
                "or do without hashes",
            )
        options = [line for line in lines if line.startswith("--")]
        return [*options, *target.read_text(encoding="utf-8").splitlines()]


def read_lines(requirements: Path) -> list[str]:
    """Lines of a requirements.txt; constraints that it names by file are named by absolute path.

    Raises:
        EnvironmentMismatchError: It cannot be read.
    """
    try:
        lines = requirements.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentMismatchError("The pins cannot be read", where=requirements, found=error) from None
    return [f"-c {requirements.parent / line[3:]}" if line.startswith("-c ") else line for line in lines]


def _uv() -> str:
    if found := shutil.which(
        "uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ):
        return found
    raise EnvironmentMismatchError(
        "Hashes are looked up by uv, which is not installed",
        where="uv",
        way_out="pip install 'mlflow-safeflavor[docker]', or do without hashes",
    )


def _pip_settings() -> Mapping[str, str]:
    """Where pip is configured to look, as uv's variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        variable = _AS_UV_SAYS.get(name.rpartition(".")[2])
        if variable and value.startswith(("'", '"')):
            settings[variable] = " ".join(value[1:-1].replace("\\n", " ").split())
    if settings.get("UV_FIND_LINKS"):
        settings["UV_FIND_LINKS"] = settings["UV_FIND_LINKS"].replace(" ", ",")
    return settings
