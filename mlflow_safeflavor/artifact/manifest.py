"""The manifest: size and SHA-256 of every file, and a digest of ``MLmodel``'s guarded parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow_safeflavor.artifact.edits import find_signature_edits
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import (
    FETCH_AGAIN,
    digest_of_plain,
    is_junk,
    list_files,
    reason_to_refuse,
)
from mlflow_safeflavor.errors import IntegrityError

__all__ = [
    "digest_json",
    "entries_of",
    "find_broken_files",
    "find_tolerated",
    "read_manifest",
    "write_manifest",
]

_MANIFEST_VERSION = 1
_MAX_GUARDED = 10**7  # characters; the largest ever seen had some thousand


def digest_json(value: object) -> str:
    """SHA-256 of a JSON-able value, independent of key order.

    Raises:
        IntegrityError: It is no JSON, or far larger than that of any model.
    """
    digest, size = hashlib.sha256(), 0
    try:
        # Piece by piece: by aliases a few lines of YAML can name one list a billion times, which
        # costs nothing before it is written out.
        for part in json.JSONEncoder(sort_keys=True, default=str).iterencode(value):
            digest.update(part.encode())
            size += len(part)
            if size > _MAX_GUARDED:
                raise ValueError(f"more than {_MAX_GUARDED} characters")
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(
            "MLmodel holds a value that no save writes",
            where=Layout.MLMODEL,
            found=error,
            hint=FETCH_AGAIN,
        ) from None
    return digest.hexdigest()


def entries_of(folder: Path, *, but: Collection[str]) -> dict[str, dict[str, Any]]:
    """Name → SHA-256 and size of every file below a folder; a link or a pipe is refused."""
    return {
        name: {"sha256": digest_of_plain(folder / name), "size": facts.st_size}
        for name, facts in list_files(folder).items()
        if name not in but
    }


def write_manifest(layout: Layout, *, mlmodel: Mapping[str, Any]) -> None:
    """Record size and SHA-256 of every file but ``MLmodel``, and of that the guarded parts."""
    # MLmodel cannot be listed as a file: MLflow adds run, model and registry ids to it later.
    files = entries_of(layout.root, but=(layout.MLMODEL, layout.name_of(layout.manifest)))
    guarded = {"flavors": digest_json(mlmodel["flavors"]), "signature": mlmodel["signature"]}
    content = {"version": _MANIFEST_VERSION, "mlmodel": guarded, "files": files}
    write_json(layout.manifest, {**content, "sha256": digest_json(content)})


def read_manifest(layout: Layout) -> dict[str, Any]:
    """Read the manifest; check its keys, its names and its own digest.

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
            and mlmodel.keys() == {"flavors", "signature"}
            and isinstance(mlmodel["flavors"], str)
            and all(
                set(entry) == {"sha256", "size"}
                and type(entry["size"]) is int
                and type(entry["sha256"]) is str
                for entry in files.values()
            )
        )
    except (KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise IntegrityError("The manifest is malformed", where=where, hint=FETCH_AGAIN)
    for name in files:
        pure = PurePosixPath(name)
        # Readers join names to the artifact's folder, and copy files under them: none may lead out
        # of it, also not on Windows (``\\``), nor be so long that the system raises its own error.
        too_long = (
            any(len(part.encode(errors="replace")) > 255 for part in pure.parts) or len(name) > 4096
        )
        if (
            too_long
            or pure.is_absolute()
            or ".." in pure.parts
            or pure.as_posix() != name
            or "\\" in name
        ):
            raise IntegrityError(
                "The manifest names a path outside the artifact",
                where=where,
                found=repr(name[:300]),
                hint=FETCH_AGAIN,
            )
    # Of weights, hashed tensor by tensor, the digests in here are compared with nothing: damage of
    # these lines is seen by the manifest's own digest alone.
    if manifest["sha256"] != digest_json(
        {name: manifest[name] for name in manifest.keys() - {"sha256"}}
    ):
        raise IntegrityError(
            "The manifest is not the one that was saved", where=where, hint=FETCH_AGAIN
        )
    return dict(manifest)


def find_broken_files(
    layout: Layout,
    manifest: Mapping[str, Any],
    *,
    mlmodel: Mapping[str, Any],
    digests: bool,
    elsewhere: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """Differences between the manifest and the files, one sentence each.

    Args:
        layout: The artifact.
        manifest: From ``read_manifest``.
        mlmodel: The parts of ``MLmodel`` that ``write_manifest`` was given.
        digests: Also read and hash every file; otherwise only names and sizes are compared.
        elsewhere: Names that are hashed elsewhere (the weights, tensor by tensor).
    """
    files, there = manifest["files"], list_files(layout.root)
    guarded = manifest["mlmodel"]
    if guarded["flavors"] != digest_json(mlmodel["flavors"]):
        yield f"{layout.MLMODEL}: its flavors are not the ones that were saved"
    yield from find_signature_edits(guarded["signature"], mlmodel["signature"])[1]
    # Kind and size before content: to open a pipe may wait for ever, and gigabytes of a file that
    # was cut short need not be hashed.
    for name, entry in files.items():
        if name not in there:
            yield f"{name}: is missing{_link_above(layout.root, name)}"
        elif kind := reason_to_refuse(there[name].st_mode):
            yield f"{name}: is {kind}, wanted a plain file"
        elif (size := there[name].st_size) != entry["size"]:
            yield f"{name}: has {size} bytes, wanted {entry['size']}"
        elif size > (limit := layout.limit_of(name) or size):
            yield f"{name}: has {size} bytes, of such a file at most {limit} are read"
        elif (
            digests
            and name not in elsewhere
            and (found := layout.digest_of(name)) != entry["sha256"]
        ):
            yield f"{name}: has SHA-256 {found[:12]}…, wanted {entry['sha256'][:12]}…"
    # A file nobody recorded could be imported (code/) or read in place of another (safeflavor/).
    manifest_name = layout.name_of(layout.manifest)
    for name, facts in there.items():
        if (
            name.partition("/")[0] in (layout.CODE, layout.DATA)
            and name not in files
            and name != manifest_name
        ):
            kind = reason_to_refuse(facts.st_mode)
            if kind is None and is_junk(name):
                continue
            yield (
                f"{name}: {f'is {kind}, and ' if kind else ''}was not there when the model was "
                "saved"
            )


def find_tolerated(
    layout: Layout, manifest: Mapping[str, Any], *, mlmodel: Mapping[str, Any]
) -> list[str]:
    """Differences that ``find_broken_files`` lets pass, one sentence each.

    They change no answer.
    """
    edits, _ = find_signature_edits(manifest["mlmodel"]["signature"], mlmodel["signature"])
    own = (layout.CODE, layout.DATA)
    junk = [
        name for name in list_files(layout.root) if name.partition("/")[0] in own and is_junk(name)
    ]
    return [*edits, *(f"{name}: is ignored" for name in junk if name not in manifest["files"])]


def _link_above(root: Path, name: str) -> str:
    """Words that name the symbolic link above a missing file; the walk of files follows none."""
    links = (parent for parent in PurePosixPath(name).parents if (root / parent).is_symlink())
    link = next((parent.as_posix() for parent in links if parent.as_posix() != "."), None)
    return f", as {link} is a symbolic link" if link else ""
