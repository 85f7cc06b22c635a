"""Wheels in a folder, and whether a distribution was installed from one of them."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from mlflow_safeflavor.artifact.plain_files import digest_of_plain, reason_to_refuse

__all__ = ["Wheel", "folder_of", "installed_content", "installed_wheels", "wheels_in"]

_MAX_RECORD = 64 * 10**6  # bytes; torch with CUDA has 2 MB
# Files of a dist-info folder that every installer takes over as they are.
_FROM_THE_WHEEL = ("METADATA", "WHEEL")


@dataclass(frozen=True)
class Wheel:
    """The file of a wheel, which may be installed for a pin.

    Attributes:
        name: Canonical name of the distribution.
        version: As in the file's name.
        path: The file.
    """

    name: str
    version: str
    path: Path


def folder_of(option: str) -> Path | None:
    """The local folder that a line ``--find-links PLACE`` names, if there is one."""
    name, _, place = option.partition(" ")
    url = urlsplit(place)
    folder = Path(unquote(url.path) if url.scheme == "file" else place)
    is_local = name == "--find-links" and url.scheme in ("", "file")
    return folder if is_local and folder.is_absolute() and folder.is_dir() else None


def wheels_in(folder: Path) -> Iterator[Wheel]:
    """Every wheel of a folder that is a plain file."""
    # A link named like a wheel would copy any file of this machine into an image.
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, *_ = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if reason_to_refuse(path.lstat().st_mode) is None:
            yield Wheel(name, str(version), path)


def installed_wheels(
    folder: Path, installed: Mapping[str, importlib.metadata.Distribution]
) -> dict[str, dict[str, str]]:
    """Canonical name → file, SHA-256 and content digest of a folder's wheels that are installed."""
    found: dict[str, dict[str, str]] = {}
    for wheel in wheels_in(folder):
        distribution = installed.get(wheel.name)
        content = None if distribution is None else installed_content(distribution)
        if (
            content
            and distribution is not None
            and _entries_of(wheel.path) <= _entries(distribution)
        ):
            facts = {
                "file": wheel.path.name,
                "sha256": digest_of_plain(wheel.path),
                "content": content,
            }
            found[wheel.name] = facts
    return found


def installed_content(distribution: importlib.metadata.Distribution) -> str | None:
    """SHA-256 over a distribution's files in site-packages, by its ``RECORD``; None without one."""
    entries = _entries(distribution)
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest() if entries else None


def _entries(distribution: importlib.metadata.Distribution) -> set[str]:
    return set(_parsed(distribution.read_text("RECORD") or ""))


def _entries_of(wheel: Path) -> set[str]:
    """Entries of the wheel's own ``RECORD``; one that no distribution has if it cannot be read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
            # By the size that the archive tells: a few kilobytes of zip may unpack to gigabytes.
            if archive.getinfo(name).file_size > _MAX_RECORD:
                raise ValueError("a list that is no list")
            entries = set(_parsed(archive.read(name).decode("utf-8")))
    # No zip, cut short, encrypted (RuntimeError), or of an unknown compression
    # (NotImplementedError).
    except (
        OSError,
        ValueError,
        StopIteration,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ):
        entries = set()
    return entries or {"unreadable"}


def _parsed(record: str) -> Iterator[str]:
    for path, digest, *_ in (row for row in csv.reader(io.StringIO(record)) if len(row) > 1):
        folder, _, name = path.rpartition("/")
        elsewhere = path.startswith(("/", "..")) or ".data/" in path
        # Installers make scripts, byte code and their own metadata anew on each machine: such lines
        # have no digest, another place or another name than in the wheel.
        if (
            digest
            and not elsewhere
            and (not folder.endswith(".dist-info") or name in _FROM_THE_WHEEL)
        ):
            yield f"{path},{digest}"
