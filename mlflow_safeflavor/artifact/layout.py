"""The files of a saved model: their names, and contents that were read."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow_safeflavor.artifact.json_files import MAX_JSON, parse_file
from mlflow_safeflavor.artifact.plain_files import (
    FETCH_AGAIN,
    decode,
    digest_of_plain,
    is_junk,
    read_bytes,
)
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.errors import IntegrityError

__all__ = ["Layout"]

_MAX_YAML = 2 * 10**6  # bytes; YAML is read at 100 kB/s, and 20,000 labels are half of this
_MAX_LINES = 4 * 10**6  # requirements.txt with every hash that an index lists: some 200 kB
_MAX_GRAPH = 128 * 10**6  # with the constants that a graph may hold
_MAX_TOKENIZER = 256 * 10**6  # the largest ever seen had 34 MB


class Layout:
    """Paths of an artifact's files below its root folder, and contents that were read.

    Args:
        root: The folder.
        keeps: Read each file once: later readers get the same bytes, also where the file was
            changed or removed meanwhile.
    """

    MLMODEL = "MLmodel"
    CODE = "code"
    DATA = "safeflavor"

    def __init__(self, root: str | Path, *, keeps: bool = False) -> None:
        self.root = Path(root)
        self.mlmodel = self.root / self.MLMODEL
        self.requirements = self.root / "requirements.txt"
        self.conda = self.root / "conda.yaml"
        self.python_env = self.root / "python_env.yaml"
        self.code = self.root / self.CODE
        self.data = self.root / self.DATA
        self.config = self.data / "config.json"
        self.structure = self.data / "structure.json"
        self.structure_pickle = self.data / "structure.pkl"
        self.hooks_pickle = self.data / "hooks.pkl"
        self.tensors = self.data / "tensors.json"
        self.graph = self.data / "graph.onnx"
        self.graph_facts = self.data / "graph.json"
        self.tokenizer = self.data / "tokenizer"
        self.processor = self.data / "processor"
        self.environment = self.data / "environment.json"
        self.parity = self.data / "parity.json"
        self.parity_tensors = self.data / "parity.safetensors"
        self.manifest = self.data / "manifest.json"
        # Where to map a file of weights from, once it is held; see ``weights_files``.
        self.held: dict[Path, Path] = {}
        # Name → SHA-256 of files that were compared with the manifest: reading one gives these
        # bytes or an error.
        self.sealed: dict[str, str] = {}
        self._contents: dict[Path, bytes] | None = {} if keeps else None
        self._parsed: dict[Path, Any] | None = {} if keeps else None

    def golden(self, engine: str) -> tuple[Path, Path]:
        """Paths of the golden rows as an engine answered them: JSON, and arrays."""
        if engine == "module":
            return self.parity, self.parity_tensors
        return self.data / f"parity-{engine}.json", self.data / f"parity-{engine}.safetensors"

    def recorded(self, engine: str) -> tuple[Path, Path]:
        """Paths of the golden rows that an engine is compared with."""
        # OpenVINO may be asked for at load alone, for a model saved to be served by ONNX Runtime.
        own = self.golden(engine)
        return self.golden("onnx") if engine == "openvino" and not own[0].exists() else own

    def is_weights(self, name: str) -> bool:
        """Whether a name of the manifest is a file of weights, hashed tensor by tensor."""
        pure = PurePosixPath(name)
        return pure.parent.as_posix() == self.DATA and pure.match("model*.safetensors")

    def limit_of(self, name: str) -> int | None:
        """Bytes that a file may have which is read whole; None for weights, code and all others."""
        pure = PurePosixPath(name)
        if pure.parts[:2] == (self.DATA, self.tokenizer.name):
            return _MAX_TOKENIZER
        if name == self.MLMODEL or pure.suffix == ".yaml":
            return _MAX_YAML
        return (
            {".json": MAX_JSON, ".txt": _MAX_LINES, ".onnx": _MAX_GRAPH}.get(pure.suffix)
            if pure.parts[0] != self.CODE
            else None
        )

    def read_bytes(self, path: Path) -> bytes:
        """Content of a file that is read whole.

        Raises:
            IntegrityError: It is missing, no plain file, too large, or was changed since it was
                compared with the manifest.
        """
        if self._contents is not None and path in self._contents:
            return self._contents[path]
        name = self.name_of(path)
        content = read_bytes(path, self.limit_of(name) or sys.maxsize)
        # Compared with the manifest before; but between that and this somebody may have written.
        if name in self.sealed and hashlib.sha256(content).hexdigest() != self.sealed[name]:
            raise IntegrityError(
                "A file of the artifact was changed while it was loaded",
                where=name,
                hint=FETCH_AGAIN,
            )
        if self._contents is not None:
            self._contents[path] = content
        return content

    def read_json(self, path: Path) -> Any:
        """A JSON file of the artifact; see ``read_bytes`` and ``json_files.read_json``.

        Its readers share one value where files are kept, and none of them changes it.
        """
        if self._parsed is not None and path in self._parsed:
            return self._parsed[path]
        content = parse_file(decode(self.read_bytes(path), path), path)
        if self._parsed is not None:
            self._parsed[path] = content
        return content

    def digest_of(self, name: str) -> str:
        """SHA-256 of a file; JSON is kept, since every load reads it afterwards."""
        path = self.root / name
        if self._contents is not None and self.data in path.parents and path.suffix == ".json":
            return hashlib.sha256(self.read_bytes(path)).hexdigest()
        return digest_of_plain(path)

    def keep(self, *folders: Path) -> None:
        """Read all files below folders now, for tokenizers and processors that are made later."""
        for path in (
            path for folder in folders for path in folder.rglob("*") if self._contents is not None
        ):
            if not path.is_dir() and not is_junk(path.name):
                self.read_bytes(path)

    def has(self, folder: Path) -> bool:
        """Whether a folder exists, or did when it was kept."""
        return any(folder in path.parents for path in self._contents or ()) or folder.is_dir()

    @contextmanager
    def copied(self, folder: Path) -> Iterator[Path]:
        """Write the files kept of one folder to a new one, for libraries that only read files."""
        kept = {
            path: content
            for path, content in (self._contents or {}).items()
            if folder in path.parents
        }
        if not kept:
            yield folder
            return
        with contextlib.ExitStack() as stack:
            try:
                scratch = stack.enter_context(scratch_folder("tokenizer"))
                for path, content in kept.items():
                    copy = scratch / path.relative_to(folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(content)
            # Nowhere to write, as in a container that is read-only without a /tmp: the artifact's
            # own files will do, if they are still the same.
            except OSError:
                if any(read_bytes(path, sys.maxsize) != content for path, content in kept.items()):
                    raise IntegrityError(
                        "A file of the artifact was changed after it was loaded",
                        where=folder,
                        hint=FETCH_AGAIN,
                    ) from None
                scratch = folder
            yield scratch

    def name_of(self, path: Path) -> str:
        """The plain relative name of a file, as messages and the manifest use it."""
        return path.relative_to(self.root).as_posix()
