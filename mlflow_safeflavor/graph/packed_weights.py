"""Weights packed for this CPU's kernels once on a host, and mapped by every process serving them.

A process that is alone packs its own, which costs least. A second one writes the graph as it is run
and all its packed weights into the private cache of this user; later ones map them, and the first
one changes over to them. The bits are the same, since kernels and weights are.

The file was made here from weights whose digests were compared, and only this user can write to it.
It counts until the machine starts again, since its bytes may not have reached the disk, and for no
longer than a week.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact import host_cache
from mlflow_safeflavor.artifact.weights_files import HeldFile, boot
from mlflow_safeflavor.machine import cpu_features

__all__ = ["PackedWeights"]

_FILE = "packed.onnx"

_logger = logging.getLogger("mlflow.safeflavor")


class PackedWeights:
    """The entry of a graph and its weights in this host's cache.

    Args:
        content: The graph.
        weights: Files that its weights are mapped from.
        runtime: Name and version of what packs them.
    """

    def __init__(self, content: bytes, weights: Sequence[HeldFile], runtime: str) -> None:
        here = (boot(), cpu_features(), runtime, *(file.facts for file in weights))
        self._name = f"packed-{hashlib.sha256(repr(here).encode() + content).hexdigest()[:32]}"
        # A file that is no private copy may be changed by others (small ones have no copy: they are
        # packed in less time than it takes to ask). Without a name of this start of the machine
        # nothing tells whether the bytes reached the disk.
        self._kept = bool(boot()) and bool(weights) and all(file.kind == "copy" for file in weights)
        self._awaited: Path | None = None
        self._lock = threading.Lock()

    def open(
        self, map_file: Callable[[Path], Any], save: Callable[[Path], None], nbytes: int
    ) -> Any:
        """The session of the kept file, written now if another process uses its entry; else None.

        Args:
            map_file: Opens a file that ``save`` wrote.
            save: Writes the graph to a path, and the weights to the same with the suffix ``.data``.
            nbytes: Of the weights.
        """
        if not self._kept:
            return None
        try:
            with host_cache.entry(self._name) as folder:
                # Another process holds the entry: not waited for, but looked at by each forward.
                if folder is None:
                    root = host_cache.cache_folder()
                    self._awaited = None if root is None else root / self._name / _FILE
                    return None
                path = folder / _FILE
                # Unlinked, not overwritten: a process that has mapped it keeps its pages.
                if not host_cache.is_fresh(path):
                    path.unlink(missing_ok=True)
                alone = not path.exists() and not host_cache.is_used(folder)
                # Held as long as this object lives: the next process sees that it is not alone.
                weakref.finalize(self, os.close, host_cache.in_use(folder))
                if not alone and not path.exists() and host_cache.has_room(folder, 2 * nbytes):
                    self._write(path, save)
                if not path.exists():
                    self._awaited = path
                    return None
            return map_file(path)
        except Exception as error:  # ONNX Runtime's classes, and the disk's
            _logger.info(
                "safeflavor: packed weights are not shared: %s", str(error).partition("\n")[0]
            )
            return None

    @staticmethod
    def _write(path: Path, save: Callable[[Path], None]) -> None:
        scratch, data = path.with_suffix(".new"), path.with_suffix(".data")
        # Removed, not overwritten: others may have mapped the old ones, which must stay so.
        for left in (scratch, data):
            left.unlink(missing_ok=True)
        try:
            save(scratch)
        except BaseException:
            for left in (scratch, data):
                left.unlink(missing_ok=True)
            raise
        os.replace(scratch, path)  # at once: a path that exists is a whole file

    def found(self, map_file: Callable[[Path], Any]) -> Any:
        """The session of a file that another process has written since; None if none has."""
        # Asked before each forward: one look at the disk, and none once the file was mapped.
        path = self._awaited
        if path is None or not path.exists():
            return None
        with self._lock:
            if self._awaited is None:
                return None
            self._awaited = None
            try:
                return map_file(path)
            except Exception as error:
                _logger.info(
                    "safeflavor: packed weights are not shared: %s", str(error).partition("\n")[0]
                )
                return None
