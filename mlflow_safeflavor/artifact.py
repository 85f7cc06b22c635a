"""The files of a saved model: their names, how they become visible at once, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.scratch import scratch_folder

__all__ = [
    "Layout",
    "digest_json",
    "digest_of_file",
    "find_broken_files",
    "read_json",
    "read_manifest",
    "read_plain_file",
    "reason_against",
    "staging",
    "without_duplicates",
    "write_json",
    "write_manifest",
]

_CHUNK = 1 << 20
_MANIFEST_VERSION = 1
_MAX_GUARDED = 10**7  # characters; the largest ever seen had some thousand
WAY_OUT = "fetch the artifact again, or log the model again; files of a saved model are not meant to be edited"


class Layout:
    """Where each file of an artifact lies below its root folder."""

    MLMODEL = "MLmodel"
    CODE = "code"
    DATA = "safeflavor"

    def __init__(self, root: str | Path) -> None:
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
        self.tensors = self.data / "tensors.json"
        self.graph = self.data / "graph.json"
        self.graph_tensors = self.data / "graph.safetensors"
        self.tokenizer = self.data / "tokenizer"
        self.processor = self.data / "processor"
        self.environment = self.data / "environment.json"
        self.parity = self.data / "parity.json"
        self.parity_tensors = self.data / "parity.safetensors"
        self.manifest = self.data / "manifest.json"

    def is_weights(self, name: str) -> bool:
        """Whether a name of the manifest is a file of weights, which are hashed tensor by tensor."""
        pure = PurePosixPath(name)
        return pure.parent.as_posix() == self.DATA and pure.match("model*.safetensors")

    def name_of(self, path: Path) -> str:
        """The plain relative name of a file, as messages and the manifest use it."""
        return path.relative_to(self.root).as_posix()


@contextmanager
def staging(target: str | Path, *, umask: int | None = None) -> Iterator[Path]:
    """A folder beside ``target`` that becomes ``target`` in one rename, or vanishes on any error.

    An empty folder at ``target`` is replaced: MLflow hands one over in ``log_model``.

    Args:
        target: Folder to create.
        umask: Decides on the modes of all files; by default this process's own.

    Raises:
        IntegrityError: ``target`` exists and is not an empty folder.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise IntegrityError(
            "There is something at the target path already",
            where=target,
            wanted="a path that does not exist, or an empty folder",
            way_out="choose another path or remove it first",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder("staging", target.parent, stem=f".{target.name}") as stage:
        yield stage
        # The folder is made private (0700), and safetensors' files are (0600); a model has the modes that
        # any new folder and file would have.
        _set_modes(stage, _own_umask() if umask is None else umask)
        os.replace(stage, target)


def _own_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _set_modes(root: Path, umask: int) -> None:
    """Give a folder and all below it the modes that new ones get under ``umask``; scripts stay executable."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            executable = 0o111 if path.is_dir() else path.stat().st_mode & 0o111
            path.chmod((0o666 | executable) & ~umask)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON that is the same bytes for the same value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, *, strict: bool = True) -> Any:
    """Read a JSON file of an artifact.

    Args:
        path: The file.
        strict: Refuse what JSON does not have but Python reads: equal keys, NaN and infinities.

    Raises:
        IntegrityError: The file is missing or is not JSON.
    """
    try:
        text = read_plain_file(path)
        if not strict:
            return json.loads(text)
        return json.loads(text, object_pairs_hook=without_duplicates, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise IntegrityError("A file of the artifact is missing", where=path, way_out=WAY_OUT) from None
    except (ValueError, RecursionError, OSError) as error:
        raise IntegrityError(
            "A file of the artifact cannot be read as JSON", where=path, found=error, way_out=WAY_OUT
        ) from None


def reason_against(layout: Layout) -> str | None:
    """Why an artifact has no graph, in words; None if it has one, which is not looked at any closer."""
    if not layout.graph.exists():
        return "none was asked for"
    content = read_json(layout.graph)
    if not isinstance(content, dict) or not isinstance(content.get("reason", ""), str):
        raise IntegrityError("The graph is malformed", where=layout.name_of(layout.graph), way_out=WAY_OUT)
    reason: str | None = content.get("reason")
    return reason


def read_plain_file(path: Path) -> str:
    """Text of a file that is no pipe or device: opening those could block for ever, or never end.

    Raises:
        OSError: There is none, or it is something else.
        ValueError: It is not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a plain file")
    return path.read_text(encoding="utf-8")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers disagree on which of two equal keys counts, so what one checked another would not use."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def digest_json(value: object) -> str:
    """SHA-256 of a JSON-able value, independent of key order.

    Raises:
        IntegrityError: It is no JSON, or larger than anything that was ever meant: a few lines of YAML
            can name one list a billion times.
    """
    digest, size = hashlib.sha256(), 0
    try:
        for part in json.JSONEncoder(sort_keys=True, default=str).iterencode(value):
            digest.update(part.encode())
            size += len(part)
            if size > _MAX_GUARDED:
                raise ValueError(f"more than {_MAX_GUARDED} characters")
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(
            "MLmodel holds something that no model was saved with", where=Layout.MLMODEL, found=error, way_out=WAY_OUT
        ) from None
    return digest.hexdigest()


def _files_below(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        # Running vendored code leaves byte code behind; it is no part of the artifact.
        # A link to a folder counts as a file: nobody would look at what is behind it.
        if (path.is_symlink() or not path.is_dir()) and "__pycache__" not in path.parts:
            yield path


def write_manifest(layout: Layout, *, mlmodel: Mapping[str, Any]) -> None:
    """Record size and SHA-256 of every file, and the parts of ``MLmodel`` that predictions depend on.

    ``MLmodel`` itself cannot be listed: MLflow adds run, model and registry ids to it later.
    """
    files = {
        layout.name_of(path): {"sha256": digest_of_file(path), "size": path.stat().st_size}
        for path in _files_below(layout.root)
        if path not in (layout.manifest, layout.mlmodel)
    }
    content = {"version": _MANIFEST_VERSION, "mlmodel": digest_json(mlmodel), "files": files}
    write_json(layout.manifest, {**content, "sha256": digest_json(content)})


def read_manifest(layout: Layout) -> dict[str, Any]:
    """The manifest, with its shape and its names checked.

    Raises:
        IntegrityError: It is missing or malformed, or a name in it points outside the artifact.
    """
    manifest = read_json(layout.manifest)
    where = layout.name_of(layout.manifest)
    try:
        version, files, mlmodel = manifest["version"], manifest["files"], manifest["mlmodel"]
        well_formed = (
            set(manifest) == {"version", "files", "mlmodel", "sha256"}
            and version == _MANIFEST_VERSION
            and isinstance(mlmodel, str)
            and all(
                set(entry) == {"sha256", "size"} and type(entry["size"]) is int and type(entry["sha256"]) is str
                for entry in files.values()
            )
        )
    except (KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise IntegrityError("The manifest is malformed", where=where, way_out=WAY_OUT)
    for name in files:
        pure = PurePosixPath(name)
        too_long = any(len(part.encode(errors="replace")) > 255 for part in pure.parts) or len(name) > 4096
        if too_long or pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or "\\" in name:
            raise IntegrityError("The manifest names no path inside the artifact", where=where, found=repr(name[:300]))
    # Some of its lines nobody compares with anything: the weights are hashed tensor by tensor.
    if manifest["sha256"] != digest_json({name: manifest[name] for name in manifest.keys() - {"sha256"}}):
        raise IntegrityError("The manifest is not the one that was saved", where=where, way_out=WAY_OUT)
    return dict(manifest)


def find_broken_files(
    layout: Layout, *, mlmodel: Mapping[str, Any], digests: bool, elsewhere: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Differences between the manifest and the files, one sentence each.

    Args:
        layout: The artifact.
        mlmodel: The parts of ``MLmodel`` that ``write_manifest`` was given.
        digests: Also read and hash every file; otherwise only names and sizes are compared.
        elsewhere: Names whose bytes somebody else hashes (the weights, tensor by tensor).
    """
    manifest = read_manifest(layout)
    files = manifest["files"]
    if manifest["mlmodel"] != digest_json(mlmodel):
        yield f"{layout.MLMODEL}: its flavors or signature are not the ones that were saved"
    for name, entry in files.items():
        path = layout.root / name
        if path.is_symlink():
            yield f"{name}: is a symbolic link, wanted a plain file"
        elif not path.is_file():
            yield f"{name}: is missing"
        elif (size := path.stat().st_size) != entry["size"]:
            yield f"{name}: has {size} bytes, wanted {entry['size']}"
        elif digests and name not in elsewhere and (found := digest_of_file(path)) != entry["sha256"]:
            yield f"{name}: has SHA-256 {found[:12]}…, wanted {entry['sha256'][:12]}…"
    # A file nobody recorded could be imported (code/) or read in place of another (safeflavor/).
    for path in (layout.data, layout.code, layout.manifest):
        if path.is_symlink():
            yield f"{layout.name_of(path)}: is a symbolic link"
    for folder in (layout.data, layout.code):
        for path in _files_below(folder):
            if (name := layout.name_of(path)) not in files and path != layout.manifest:
                yield f"{name}: was not there when the model was saved"
