"""Requirement lines that the user wrote: read, and matched with installed distributions."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias
from urllib.parse import unquote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from mlflow_safeflavor.environment.installed import OWN_NAME, installed_version
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = [
    "StrPath",
    "applies",
    "installed_roots",
    "is_pinnable",
    "name_of",
    "parse_requirements",
    "with_mlflow",
]

_logger = logging.getLogger("mlflow.safeflavor")

StrPath: TypeAlias = "str | os.PathLike[str]"

_MLFLOW_NAMES = frozenset({"mlflow", "mlflow-skinny"})
_OPTION = re.compile(r"(?:^|\s)-")  # begins the options behind a requirement, such as --hash


def parse_requirements(
    given: StrPath | Iterable[str], argument: str
) -> tuple[list[str], list[str]]:
    """Requirement lines and constraint lines, with the content of ``-r`` and ``-c`` files."""
    # MLflow's own reader, so that a line means here what it means at load.
    from mlflow.utils.requirements_utils import _parse_requirements as parse

    try:
        source = (
            os.fspath(given) if isinstance(given, (str, os.PathLike)) else [*map(os.fspath, given)]
        )
        parsed = list(parse(source, is_constraint=False))  # type: ignore[no-untyped-call]
    # TypeError: a member of the list is neither a text nor a path.
    except (OSError, TypeError, UnicodeDecodeError) as error:
        raise EnvironmentMismatchError(
            f"{argument} cannot be read",
            where=argument,
            wanted="a list of requirement strings, or the path of a requirements file",
            found=error,
        ) from None
    lines: tuple[list[str], list[str]] = [], []
    for requirement in parsed:
        lines[requirement.is_constraint].append(requirement.req_str)
    return lines


def _requirement_of(line: str) -> Requirement | None:
    try:
        return Requirement(_OPTION.split(line)[0])
    except InvalidRequirement:
        return None


def applies(line: str) -> bool:
    """Whether the line holds on this machine, as its marker says."""
    requirement = _requirement_of(line)
    return requirement is None or requirement.marker is None or requirement.marker.evaluate()


def is_pinnable(line: str, path: Sequence[str] | None) -> bool:
    """Whether the line is a plain requirement whose exact version this environment can tell."""
    requirement = _requirement_of(line)
    # "--hash=…" behind a requirement is for the very file that the user means.
    if requirement is None or requirement.url or _OPTION.search(line) or not applies(line):
        return False
    if (
        canonicalize_name(requirement.name) == OWN_NAME
        or installed_version(requirement.name, path) is not None
    ):
        return True
    _logger.warning(
        "%s is not installed here, so it stays as written and is not pinned any further", line
    )
    return False


def installed_roots(lines: Iterable[str], path: Sequence[str] | None) -> Iterator[str]:
    """Requirement strings of the lines whose distribution is installed."""
    for line in lines:
        name, requirement = name_of(line), _requirement_of(line)
        if name is not None and installed_version(name, path) is not None:
            yield name if requirement is None else str(requirement)


def name_of(line: str) -> str | None:
    """The distribution that a line of a requirements file is about, as far as the line tells."""
    requirement = _requirement_of(line)
    if requirement is not None:
        return canonicalize_name(requirement.name)
    # No requirement: an editable install, a URL, or the path of a wheel.
    target = re.sub(r"^(-e|--editable)[\s=]+", "", line)
    if egg := re.search(r"[#&]egg=([\w.-]+)", target):
        return canonicalize_name(egg[1])
    last = re.split(r"[\\/]", re.split(r"[#?\s]", target)[0].rstrip("/"))[-1]
    if target.startswith(("git+", "hg+", "svn+", "bzr+")):
        return canonicalize_name(re.sub(r"(\.git)?(@.*)?$", "", last))
    try:
        return parse_wheel_filename(unquote(last))[0]
    except InvalidWheelFilename:
        return None


def with_mlflow(lines: list[str], path: Sequence[str] | None) -> list[str]:
    """The lines, and a pin of MLflow where none is about it."""
    # MLflow's own flavors add it in the same way: no environment without it serves a model.
    if _MLFLOW_NAMES & {name_of(line) for line in lines}:
        return lines
    version = installed_version("mlflow", path)
    return ["mlflow" if version is None else f"mlflow=={version}", *lines]
