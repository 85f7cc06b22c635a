"""The files of a saved model: their names, how they become visible at once, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow_safeflavor.artifact.plain_files import (
    WAY_OUT,
    decode,
    digest_of_plain,
    list_files,
    read_bytes,
    read_text,
    reason_to_refuse,
)
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.errors import IntegrityError

__all__ = [
    "WAY_OUT",
    "Layout",
    "digest_json",
    "digest_of_file",
    "find_broken_files",
    "parse_json",
    "read_json",
    "read_manifest",
    "staging",
    "without_duplicates",
    "write_json",
    "write_manifest",
]

_MANIFEST_VERSION = 1
_MAX_GUARDED = 10**7  # characters; the largest ever seen had some thousand
_MAX_YAML = 2 * 10**6  # bytes; YAML is read at 100 kB/s, and 20,000 labels are half of this
_MAX_LINES = 4 * 10**6  # requirements.txt with every hash that an index lists: some 200 kB
_MAX_JSON = 64 * 10**6  # read whole, and some 20 times larger as objects
_MAX_GRAPH = 128 * 10**6  # with the constants that a graph may hold
_DEEPEST = 100  # lists and dicts within each other; of all that was ever saved a config's few levels are the most
_TOO_DEEP = f"lists or dicts nested more than {_DEEPEST} deep"
_MAX_TOKENIZER = 256 * 10**6  # the largest ever seen had 34 MB


class Layout:
    """Where each file of an artifact lies below its root folder, and what was in it.

    Args:
        root: The folder.
        keeps: Read each file once: later readers get what the first one got, whatever happened to the file.
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
        self.held: dict[Path, Path] = {}
        """Where to map a file of weights from, once it is held; see ``weights_files``."""
        self.sealed: dict[str, str] = {}
        """Name → SHA-256 of files that were compared with the manifest: who reads one gets these bytes or an error."""
        self._contents: dict[Path, bytes] | None = {} if keeps else None

    def golden(self, engine: str) -> tuple[Path, Path]:
        """Golden rows as an engine answered them: what it said, and arrays."""
        if engine == "module":
            return self.parity, self.parity_tensors
        return self.data / f"parity-{engine}.json", self.data / f"parity-{engine}.safetensors"

    def recorded(self, engine: str) -> tuple[Path, Path]:
        """Golden rows that an engine is compared with: in OpenVINO those of ONNX Runtime where it has none."""
        own = self.golden(engine)
        return self.golden("onnx") if engine == "openvino" and not own[0].exists() else own

    def is_weights(self, name: str) -> bool:
        """Whether a name of the manifest is a file of weights, which are hashed tensor by tensor."""
        pure = PurePosixPath(name)
        return pure.parent.as_posix() == self.DATA and pure.match("model*.safetensors")

    def limit_of(self, name: str) -> int | None:
        """Bytes that a file may have which is read whole; None for weights, code and what nobody reads."""
        pure = PurePosixPath(name)
        if pure.parts[:2] == (self.DATA, self.tokenizer.name):
            return _MAX_TOKENIZER
        if name == self.MLMODEL or pure.suffix == ".yaml":
            return _MAX_YAML
        return (
            {".json": _MAX_JSON, ".txt": _MAX_LINES, ".onnx": _MAX_GRAPH}.get(pure.suffix)
            if pure.parts[0] != self.CODE
            else None
        )

    def read_bytes(self, path: Path) -> bytes:
        """Content of a file that is read whole.

        Raises:
            IntegrityError: It is missing, no plain file, too large, or not what was compared with the manifest.
        """
        if self._contents is not None and path in self._contents:
            return self._contents[path]
        name = self.name_of(path)
        content = read_bytes(path, self.limit_of(name) or sys.maxsize)
        if name in self.sealed and hashlib.sha256(content).hexdigest() != self.sealed[name]:
            raise IntegrityError("A file of the artifact was changed while it was loaded", where=name, way_out=WAY_OUT)
        if self._contents is not None:
            self._contents[path] = content
        return content

    def read_json(self, path: Path) -> Any:
        """A JSON file of the artifact; see ``read_bytes`` and the function ``read_json``."""
        return _parse(decode(self.read_bytes(path), path), path)

    def keep(self, *folders: Path) -> None:
        """Read all files below folders now, so that nobody reads them later."""
        for path in (path for folder in folders for path in folder.rglob("*") if self._contents is not None):
            if not path.is_dir():
                self.read_bytes(path)

    def has(self, folder: Path) -> bool:
        """Whether there is such a folder, or was when it was kept."""
        return any(folder in path.parents for path in self._contents or ()) or folder.is_dir()

    @contextmanager
    def copied(self, folder: Path) -> Iterator[Path]:
        """A folder with the files that were kept of one of the artifact's, for libraries that only read files."""
        kept = {path: content for path, content in (self._contents or {}).items() if folder in path.parents}
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
            except OSError:  # nowhere to write: the artifact's own files will do, if they are still the same
                if any(read_bytes(path, sys.maxsize) != content for path, content in kept.items()):
                    raise IntegrityError(
                        "A file of the artifact was changed after it was loaded", where=folder, way_out=WAY_OUT
                    ) from None
                scratch = folder
            yield scratch

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
        strict: Refuse links, and what JSON does not have but Python reads: equal keys, NaN and infinities.

    Raises:
        IntegrityError: The file is missing, no plain file, too large, no JSON, or nested too deep.
    """
    return _parse(read_text(path if strict else Path(os.path.realpath(path)), _MAX_JSON), path, strict)


def _parse(text: str, path: Path, strict: bool = True) -> Any:
    try:
        return parse_json(text, strict=strict)
    except ValueError as error:
        raise IntegrityError(
            "A file of the artifact cannot be read as JSON", where=path, found=error, way_out=WAY_OUT
        ) from None


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:
    """Parse JSON that any function may walk by recursion, wherever Python stands.

    Args:
        text: What somebody else wrote.
        strict: Also refuse equal keys, NaN and infinities.

    Raises:
        ValueError: It is no JSON, or lists and dicts are nested more than 100 deep.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": without_duplicates, "parse_constant": _refuse_constant}
    try:
        content = json.loads(text, **hooks if strict else {})
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [content]
    for _ in range(_DEEPEST + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [item for part in parts for item in part]
    if level:
        raise ValueError(_TOO_DEEP)
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers disagree on which of two equal keys counts, so what one checked another would not use."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def digest_of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file, or of the file that a link names, as hexadecimal digits."""
    return digest_of_plain(Path(os.path.realpath(path)))


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


def write_manifest(layout: Layout, *, mlmodel: Mapping[str, Any]) -> None:
    """Record size and SHA-256 of every file, and the parts of ``MLmodel`` that predictions depend on.

    ``MLmodel`` itself cannot be listed: MLflow adds run, model and registry ids to it later.
    """
    own = (layout.MLMODEL, layout.name_of(layout.manifest))
    files = {
        name: {"sha256": digest_of_file(layout.root / name), "size": facts.st_size}
        for name, facts in list_files(layout.root).items()
        if name not in own
    }
    content = {"version": _MANIFEST_VERSION, "mlmodel": digest_json(mlmodel), "files": files}
    write_json(layout.manifest, {**content, "sha256": digest_json(content)})


def read_manifest(layout: Layout) -> dict[str, Any]:
    """The manifest, with its shape and its names checked.

    Raises:
        IntegrityError: It is missing or malformed, or a name in it points outside the artifact.
    """
    manifest = layout.read_json(layout.manifest)
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
            raise IntegrityError(
                "The manifest names no path inside the artifact", where=where, found=repr(name[:300]), way_out=WAY_OUT
            )
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
    manifest, there = read_manifest(layout), list_files(layout.root)
    files = manifest["files"]
    if manifest["mlmodel"] != digest_json(mlmodel):
        yield f"{layout.MLMODEL}: its flavors or signature are not the ones that were saved"
    for name, entry in files.items():
        if name not in there:
            yield f"{name}: is missing{_link_above(layout.root, name)}"
        elif kind := reason_to_refuse(there[name].st_mode):
            yield f"{name}: is {kind}, wanted a plain file"
        elif (size := there[name].st_size) != entry["size"]:
            yield f"{name}: has {size} bytes, wanted {entry['size']}"
        elif size > (limit := layout.limit_of(name) or size):
            yield f"{name}: has {size} bytes, of such a file at most {limit} are read"
        elif digests and name not in elsewhere and (found := digest_of_plain(layout.root / name)) != entry["sha256"]:
            yield f"{name}: has SHA-256 {found[:12]}…, wanted {entry['sha256'][:12]}…"
    # A file nobody recorded could be imported (code/) or read in place of another (safeflavor/).
    manifest_name = layout.name_of(layout.manifest)
    for name, facts in there.items():
        if name.partition("/")[0] in (layout.CODE, layout.DATA) and name not in files and name != manifest_name:
            kind = reason_to_refuse(facts.st_mode)
            yield f"{name}: {f'is {kind}, and ' if kind else ''}was not there when the model was saved"


def _link_above(root: Path, name: str) -> str:
    """Names a folder that is a symbolic link: nobody would look at what is behind it."""
    links = (parent for parent in PurePosixPath(name).parents if (root / parent).is_symlink())
    link = next((parent.as_posix() for parent in links if parent.as_posix() != "."), None)
    return f", as {link} is a symbolic link" if link else ""
