"""A saved model, read by every tool in one order: manifest and digests first, then the rest."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.inventory_file import Inventory, read_inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import find_broken_files, find_tolerated, read_manifest
from mlflow_safeflavor.artifact.plain_files import hint_of, open_plain
from mlflow_safeflavor.artifact.spec import ModelSpec, read_spec
from mlflow_safeflavor.artifact.trust import require_agreed, require_known, require_no_shadows
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import IntegrityError

__all__ = ["Saved", "copy_saved", "read_saved", "require_intact", "require_none"]


@dataclass(frozen=True)
class Saved:
    """An artifact whose files are those of its manifest.

    Attributes:
        layout: Its files.
        spec: Its entry in ``MLmodel``.
        environment: The environment that it was saved in.
        files: Name → SHA-256 and size.
        digest: Of the manifest, and so of everything but what MLflow may add to ``MLmodel``.
        tolerated: Differences from what was saved that change no answer, in words.
    """

    layout: Layout
    spec: ModelSpec
    environment: Environment
    files: Mapping[str, Mapping[str, Any]]
    digest: str
    tolerated: tuple[str, ...] = ()

    @cached_property
    def inventory(self) -> Inventory:
        """The inventory of its tensors, read once."""
        return read_inventory(self.layout)

    @property
    def hashed_bytes(self) -> int:
        """Bytes of all files but weights, which have digests tensor by tensor."""
        return sum(
            facts["size"] for name, facts in self.files.items() if not self.layout.is_weights(name)
        )


def read_saved(
    root: str | Path, *, weights: bool, digests: bool = True, trust: Collection[str] | None = None
) -> Saved:
    """Compare an artifact with its manifest, and read spec and environment; runs nothing of it.

    Args:
        root: Folder of the artifact.
        weights: Whether to hash the weights, too, which takes a second for each gigabyte.
        digests: Whether to hash the other files.
        trust: Kinds of its own code that may run; None where nothing is to be built.

    Raises:
        SafeFlavorError: It is not the artifact that was saved, or of another flavor.
    """
    layout = Layout(root, keeps=True)
    spec, guarded = read_spec(layout)
    # Agreement first: who did not give it need not wait until gigabytes are hashed.
    if trust is not None:
        require_known(trust)
        for kind in spec.runs:
            require_agreed(kind, trust, spec.model_class)
    manifest = read_manifest(layout)
    files = manifest["files"]
    elsewhere = (
        frozenset() if weights else frozenset(name for name in files if layout.is_weights(name))
    )
    require_intact(layout, manifest, guarded, digests=digests, elsewhere=elsewhere)
    # Before torch is imported: under pyfunc code/ comes first on sys.path.
    if trust is not None:
        require_no_shadows(layout.code)
    tolerated = tuple(find_tolerated(layout, manifest, mlmodel=guarded))
    environment = Environment.read(layout)
    return Saved(layout, spec, environment, files, manifest["sha256"], tolerated)


def copy_saved(layout: Layout, target: Path) -> Saved:
    """Copy the files of the manifest and no others, then check the copy, which is ours alone.

    Raises:
        SafeFlavorError: See ``read_saved``.
    """
    # Names, kinds and sizes before copying: no pipe that waits, no file beyond its limit. Digests
    # after it, of the copy: the original may change between a look and the copying.
    _, guarded = read_spec(layout)
    manifest = read_manifest(layout)
    require_intact(layout, manifest, guarded, digests=False)
    for name in (layout.MLMODEL, layout.name_of(layout.manifest), *manifest["files"]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_plain(layout.root / name) as source, (target / name).open("xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    return read_saved(target, weights=True)


def require_intact(
    layout: Layout,
    manifest: Mapping[str, Any],
    guarded: Mapping[str, Any],
    *,
    digests: bool,
    elsewhere: frozenset[str] = frozenset(),
) -> None:
    """Raise an IntegrityError that names the first files that differ from the manifest."""
    broken = list(
        find_broken_files(layout, manifest, mlmodel=guarded, digests=digests, elsewhere=elsewhere)
    )
    require_none(broken, "Files of the artifact are not the ones that were saved")
    # From here on every reader compares once more: see ``Layout.read_bytes``.
    if digests:
        layout.sealed = {name: facts["sha256"] for name, facts in manifest["files"].items()}


def require_none(problems: Sequence[str], what: str) -> None:
    """Raise an IntegrityError that names the first of the problems, if there are any."""
    if problems:
        shown = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise IntegrityError(what, where=shown, hint=hint_of(shown))
