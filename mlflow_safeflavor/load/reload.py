"""A loaded model in another process: loaded again, while its folder holds the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import read_manifest
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.load.options import LoadOptions

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["Reload", "reloadable"]


@dataclass(frozen=True)
class Reload:
    """Loads a model as it was loaded; what a pickle of it holds.

    Args:
        load: ``load_folder``.
        folder: Root of the artifact.
        manifest: The digest in its manifest.
        options: What whoever loaded it asked for, its agreements included.
    """

    load: Callable[[Path, LoadOptions], LoadedModel]
    folder: Path
    manifest: str
    options: LoadOptions

    def __call__(self) -> LoadedModel:
        """Load it.

        Raises:
            SafeFlavorError: One of those of ``load_model``; an IntegrityError where the folder is
                gone or holds another model.
        """
        self._require_there()
        return self.load(self.folder, self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        self._require_there()
        return Reload, (self.load, self.folder, self.manifest, self.options)

    def _require_there(self) -> None:
        layout = Layout(self.folder)
        there = layout.manifest.is_file()
        if not there or read_manifest(layout)["sha256"] != self.manifest:
            raise IntegrityError(
                "A loaded model is pickled as the folder it came from, which does not hold it",
                where=self.folder,
                wanted="the model as it was loaded",
                found="another model" if there else "nothing",
                hint="load the model in each process: mlflow_safeflavor.load_model(uri); or pass "
                "dst_path=…, where what is downloaded stays",
            )


def reloadable(
    model: LoadedModel,
    manifest: str,
    load: Callable[[Path, LoadOptions], LoadedModel],
    options: LoadOptions,
) -> LoadedModel:
    """The same loaded model, which can be pickled; ``manifest`` is the digest of its manifest."""
    return replace(model, reload=Reload(load, model.folder.absolute(), manifest, options))
