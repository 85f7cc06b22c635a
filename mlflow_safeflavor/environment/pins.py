"""requirements.txt of an artifact, read strictly: pins, their hashes, and sources of wheels.

A stranger may have written these lines, and pip and uv obey many: options, URLs, files of this
machine, builds. Only forms that install wheels by name and version are let through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import read_text
from mlflow_safeflavor.errors import EnvironmentMismatchError, IntegrityError

__all__ = ["CONSTRAINTS", "ONNX_REQUIREMENTS", "Pin", "Pins", "parse_pins", "read_pins"]

# The one file that a requirements.txt may name, beside it.
CONSTRAINTS = "constraints.txt"

# Pins for the graph alone, beside requirements.txt, of a model that has a module, too.
ONNX_REQUIREMENTS = "requirements-onnx.txt"

# No quotes, blanks or backslashes in a place: it is written into files that uv and pip parse.
_OPTION = re.compile(
    r"--(find-links|extra-index-url) (https?://[^\s#\"'\\]+|file:///[^\s#\"'\\]+|/[^\s#\"'\\]*)"
)
_HASHES = re.compile(r"((?:\s+--hash=sha256:[0-9a-f]{64})*)\s*")
_HINT = (
    "build wheels of what no index has (`pip wheel -w FOLDER …`), install them from there, and "
    "save the model with torch_index=FOLDER; let pip's own configuration hold other indexes and "
    "passwords"
)


@dataclass(frozen=True)
class Pin:
    """One line about one distribution.

    Attributes:
        requirement: Parsed; never with a URL.
        hashes: SHA-256 of each file that may be installed; empty where the line has none.
    """

    requirement: Requirement
    hashes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Canonical name."""
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str | None:
        """The exact version, with its local label; None where the line allows several."""
        exact = re.fullmatch(r"==([^*,]+)", str(self.requirement.specifier))
        return exact[1] if exact else None

    def __str__(self) -> str:
        hashes = (f"--hash=sha256:{digest}" for digest in self.hashes)
        return " \\\n    ".join([str(self.requirement), *hashes])


@dataclass(frozen=True)
class Pins:
    """The lines that an environment is installed from.

    Attributes:
        options: Lines ``--find-links FOLDER|URL`` and ``--extra-index-url URL``.
        pins: One for each distribution.
        constraints: Versions that nothing may leave.
    """

    options: tuple[str, ...]
    pins: tuple[Pin, ...]
    constraints: tuple[Pin, ...] = ()

    @property
    def are_locked(self) -> bool:
        """Whether every pin has hashes, so that pip installs only these files."""
        return all(pin.hashes for pin in self.pins)

    @property
    def versions(self) -> Mapping[str, str]:
        """Canonical name → exact version, of those that have one."""
        return {pin.name: pin.version for pin in self.pins if pin.version is not None}


def read_pins(layout: Layout, name: str = "requirements.txt") -> Pins:
    """Read a file of pins, and constraints.txt where it names that.

    Args:
        layout: The artifact.
        name: requirements.txt or requirements-onnx.txt.

    Raises:
        EnvironmentMismatchError: A line is none that installs from wheels by name and version.
        IntegrityError: A file cannot be read.
    """
    options: list[str] = []
    pins: list[Pin] = []
    constraints: tuple[Pin, ...] = ()
    for line in _lines(layout, layout.root / name):
        if line == f"-c {CONSTRAINTS}":
            path = layout.root / CONSTRAINTS
            constraints = tuple(parse_pins(_lines(layout, path), CONSTRAINTS))
        # pip fills ${NAME} with variables of this machine, tokens among them, and sends them there.
        elif _OPTION.fullmatch(line) and "${" not in line:
            options.append(line)
        else:
            pins += parse_pins([line], name)
    # With one hash pip demands them all (--require-hashes), in the build of the image.
    if any(pin.hashes for pin in pins) and not all(pin.hashes for pin in pins):
        raise IntegrityError(
            "Some pins have hashes and some have none",
            where=name,
            hint="save the model with hashes for all of them or for none",
        )
    return Pins(tuple(options), tuple(pins), constraints)


def _lines(layout: Layout, path: Path) -> Iterator[str]:
    """Logical lines: continued ones joined, without empty ones and comments."""
    text = read_text(path, layout.limit_of(path.name) or 0)
    # pip joins lines a little otherwise (a comment ends where it ends). That opens no way around
    # these checks: images are installed from pins written anew, never from this file.
    for line in re.sub(r"\\\r?\n", " ", text).split("\n"):
        if (line := line.strip()) and not line.startswith("#"):
            yield line


def parse_pins(lines: Iterator[str] | list[str], where: str) -> Iterator[Pin]:
    """Read lines of the form ``name==1.0; marker --hash=sha256:…``.

    Raises:
        EnvironmentMismatchError: A line has another form.
    """
    for line in lines:
        # Behind the first option only hashes: others, such as --config-settings, steer a build.
        text, dashes, rest = line.partition(" --")
        hashes = _HASHES.fullmatch(dashes + rest)
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            requirement = None
        wanted = (
            requirement is not None
            and requirement.url is None
            and hashes is not None
            # A carriage return or NUL would make two lines of one, in a file that we write.
            and line.isprintable()
        )
        if requirement is None or hashes is None or not wanted:
            raise EnvironmentMismatchError(
                "A line of the requirements does not install a wheel by name and version",
                where=where,
                wanted="name==version, with markers and hashes; --find-links or --extra-index-url "
                f"with a place; -c {CONSTRAINTS}",
                found=line[:300],
                hint=_HINT,
            )
        yield Pin(requirement, tuple(re.findall(r"sha256:([0-9a-f]{64})", hashes[1])))
