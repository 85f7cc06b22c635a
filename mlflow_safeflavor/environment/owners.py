"""Owners of files: the installed distribution that a file belongs to."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from urllib.parse import unquote, urlsplit

from mlflow_safeflavor.environment.installed import installed_distributions, source_tree

__all__ = ["Owners", "is_code", "site_folders"]

_CODE = (*SOURCE_SUFFIXES, *BYTECODE_SUFFIXES, *EXTENSION_SUFFIXES)


class Owners:
    """Files of the installed distributions.

    A file belongs to the distribution whose list of installed files (``RECORD``) has it; without
    such a list, to the one with its top-level name; below the folder of an editable install, to
    that.

    Args:
        path: Folders to search instead of ``sys.path``.
    """

    def __init__(self, path: Sequence[str] | None = None) -> None:
        self._sites = site_folders(path)
        self._files: dict[str, str] = {}
        trees: dict[str, str | None] = dict.fromkeys(self._sites)
        for name, one in installed_distributions(path).items():
            base = os.path.join(_real(str(one.distribution.locate_file(""))), "")
            record = one.distribution.read_text("RECORD") or ""
            self._files |= dict.fromkeys(_listed(record, base), name)
            folder = _editable_folder(one.distribution)
            if folder is not None:
                trees[os.path.join(_real(folder), "")] = name
            # Debian's packages have no RECORD.
            elif not record:
                tops = (
                    one.distribution.read_text("top_level.txt") or name.replace("-", "_")
                ).split()
                trees |= {
                    base + top + end: name for top in tops for end in (os.sep, *SOURCE_SUFFIXES)
                }
        # The longest first: the environment may lie in the folder of an editable install.
        self._trees = sorted(trees.items(), key=lambda tree: -len(tree[0]))

    def of(self, file: str) -> str | None:
        """Canonical name of the distribution that a file belongs to; None where there is none.

        Args:
            file: Absolute path.
        """
        if file in self._files:
            return self._files[file]
        # Of the folder alone: the file itself may be a link that its distribution installed.
        folder, name = os.path.split(file)
        path = os.path.join(_real(folder), name)
        if path in self._files:
            return self._files[path]
        tree = next((owner for tree, owner in self._trees if path.startswith(tree)), None)
        # Code that a package has made beside its own (byte code, generated parsers) is made anew
        # where it is installed; data that lies there was put there, and no index brings it.
        return tree or (self._of_neighbours(path) if is_code(path) else None)

    def _of_neighbours(self, path: str) -> str | None:
        """The one owner of all files in the folder, or in the nearest above it that has any."""
        folder = os.path.join(os.path.dirname(path), "")
        while folder.startswith(self._sites) and folder not in self._sites:
            owners = {owner for file, owner in self._files.items() if file.startswith(folder)}
            if owners:
                return owners.pop() if len(owners) == 1 else None
            folder = os.path.join(os.path.dirname(folder.rstrip(os.sep)), "")
        return None


def _listed(record: str, base: str) -> Iterator[str]:
    """Files of a ``RECORD`` but metadata."""
    lines = record.splitlines()
    # csv, which is slower, for the few with a quoted comma: there are tens of thousands of lines.
    for row in csv.reader(lines) if '"' in record else (line.split(",", 1) for line in lines):
        file = base + (row[0] if row else "")
        if ".dist-info/" not in file:
            yield os.path.normpath(file) if "/../" in file else file


def is_code(file: str) -> bool:
    """Whether Python imports files of such a name."""
    return file.endswith(_CODE)


def site_folders(path: Sequence[str] | None = None) -> tuple[str, ...]:
    """Folders of ``sys.path``, or of ``path``, that distributions are installed in.

    Each ends with a separator, so that ``startswith`` takes no ``site-packages-old`` for it.
    """
    searched = sys.path if path is None else path
    sites = [folder for folder in searched if folder.rstrip("/\\").endswith("-packages")]
    sites += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    return tuple({os.path.join(_real(site), "") for site in sites})


_real = functools.lru_cache(maxsize=2**14)(os.path.realpath)


def _editable_folder(distribution: importlib.metadata.Distribution) -> str | None:
    """The folder that an editable install is imported from; None for any other install."""
    text = distribution.read_text("direct_url.json")
    if text is None:
        return source_tree(distribution)
    try:
        facts = json.loads(text)
        url = urlsplit(facts["url"])
        return unquote(url.path) if facts["dir_info"]["editable"] and url.scheme == "file" else None
    except (KeyError, TypeError, ValueError):
        return None
