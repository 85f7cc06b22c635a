"""Checkpoints as folders for builds: of one commit, hashed, loaded once, complete or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.json_files import read_json, write_json
from mlflow_safeflavor.artifact.manifest import entries_of
from mlflow_safeflavor.artifact.plain_files import digest_of_file
from mlflow_safeflavor.artifact.staging import staging
from mlflow_safeflavor.checkpoints import hub
from mlflow_safeflavor.checkpoints.from_pretrained import from_pretrained
from mlflow_safeflavor.checkpoints.other_formats import (
    require_torch_weights,
    require_torch_weights_among,
)
from mlflow_safeflavor.checkpoints.preprocessors import tokenizer_of
from mlflow_safeflavor.checkpoints.state_dict import read_state
from mlflow_safeflavor.errors import InputError, IntegrityError, StructureError

__all__ = ["MANIFEST", "Prefetched", "prefetch"]

# Beside the checkpoint's files: its origin, and size and SHA-256 of every file.
MANIFEST = "prefetch.json"

_VERSION = 1
_SAFETENSORS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json")
# Config, vocabularies, licences; no code, no pickles, and no files in folders: no name leads out.
_BESIDE = re.compile(
    r"[\w.-]+\.(json|txt|model|jinja)|LICEN[CS]E.*|NOTICE.*|README\.md", re.IGNORECASE
)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_HINT = "remove the folder and prefetch again"


@dataclass(frozen=True)
class Prefetched:
    """A prefetched checkpoint.

    Args:
        folder: The checkpoint; ``from_pretrained`` and ``save_model`` take it.
        source: Id on the hub; None for a copy of a local folder.
        revision: The commit, or None.
        files: Names of all files.
        fresh: False where it was there already and was only checked.
    """

    folder: Path
    source: str | None
    revision: str | None
    files: tuple[str, ...]
    fresh: bool


@checked
def prefetch(
    name_or_path: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    resolve: bool = False,
    convert: bool = False,
    model_class: str | None = None,
    dtype: str = "float32",
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Prefetched:
    """Put a checkpoint's weights, config and tokenizer into a folder that appears once they load.

    Only safetensors, JSON and texts are taken. Every file that comes from a hub is compared with
    the digest that the hub lists. Where the folder is there already, its files are compared with
    its own manifest, and nothing is downloaded.

    Args:
        name_or_path: Id of a hub repository, or a local checkpoint folder.
        output_dir: Folder to create.
        revision: Commit of the repository, 40 hexadecimal digits.
        resolve: Take also a branch or a tag, and record which commit it was.
        convert: Where there are no safetensors, read pickled weights without running anything of
            them, and write safetensors.
        model_class: Class of transformers to load it as; by default the one that its config names.
        dtype: To load it in, for this check; files stay as they are.
        new: See ``from_pretrained``.
        drop: See ``from_pretrained``.

    Raises:
        StructureError: The checkpoint or the hub cannot be read, the revision is not pinned, or
            there are no safetensors.
        IntegrityError: A file is damaged, or the folder holds something else.
        SafeFlavorError: ``from_pretrained`` refuses it. Nothing is left at ``output_dir`` then.
    """
    require_torch_weights(name_or_path)
    target, source, commit = Path(output_dir), *_identity(name_or_path, revision, resolve)
    # The manifest is written last, so a folder with one was complete.
    if (target / MANIFEST).exists():
        return _already_there(target, source, commit, Path(name_or_path))
    with staging(target) as stage:
        if source is None:
            taken = _copy(Path(name_or_path), stage, convert)
        else:
            taken = _fetch(source, str(commit), stage, convert)
        if convert and not any(stage.glob("model*.safetensors")):
            _convert(stage)
        # Loaded as its users will: a build fails here, and not in the stage that trains.
        _load(stage, model_class, dtype, new, drop)
        content = {
            "version": _VERSION,
            "source": source,
            "asked": revision,
            "revision": commit,
            "taken": taken,
        }
        files = entries_of(stage, but=[MANIFEST])
        write_json(stage / MANIFEST, {**content, "files": files})
    return Prefetched(target, source, commit, tuple(files), fresh=True)


def _identity(
    name_or_path: str | Path, revision: str | None, resolve: bool
) -> tuple[str | None, str | None]:
    """Id on the hub and commit; None and None for a local folder."""
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise InputError(
                "A local folder has no revision",
                where="revision",
                found=revision,
                hint="leave it out",
            )
        return None, None
    name = str(name_or_path)
    if not hub.is_hub_id(name):
        raise StructureError(
            "There is no such checkpoint", where=name, wanted="a folder, or a hub id"
        )
    if hub.is_commit(revision):
        return name, revision
    if resolve and revision:
        # Asked once: two questions could get two commits.
        return name, hub.list_files(name, revision)[0]
    raise StructureError(
        "A hub repository needs a pinned revision, as its branches and tags move",
        where=name,
        wanted="a commit, 40 hexadecimal digits",
        found=repr(revision),
        hint="take it from the repository's list of commits; or resolve=True (--resolve) takes the "
        "commit that the branch or tag is now, and records it",
    )


def _choose(names: Collection[str], convert: bool, where: object) -> list[str]:
    """The files to take: weights, and JSON and texts beside them.

    Weights are safetensors, or with ``convert`` pickled ones where there are no others.
    """
    weights = [name for name in names if _SAFETENSORS.fullmatch(name)]
    pickled = [name for name in names if _PICKLED.fullmatch(name)]
    if not weights and not (convert and pickled):
        require_torch_weights_among(names, where)
        raise StructureError(
            "The checkpoint has no safetensors",
            where=where,
            wanted="model.safetensors, or its shards and their index",
            found=", ".join(sorted(names)[:10]) or "nothing",
            hint="convert=True (--convert) reads the pickled weights, without running anything, "
            "and stores them as safetensors"
            if pickled
            else "choose another checkpoint or revision",
        )
    beside = [
        name
        for name in names
        if _BESIDE.fullmatch(name) and name != MANIFEST and not _is_index(name)
    ]
    return sorted({*(weights or pickled), *beside})


def _is_index(name: str) -> bool:
    """Whether it lists shards of weights."""
    # An index of shards that are not taken would be read first by any loader.
    return name.endswith(".index.json")


def _copy(folder: Path, stage: Path, convert: bool) -> dict[str, str]:
    """Copy the files of a local checkpoint; returns name → SHA-256 of each."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    taken = {}
    for name in _choose(names, convert, folder):
        shutil.copyfile(folder / name, stage / name)
        taken[name] = digest_of_file(stage / name)
    return taken


def _fetch(name: str, commit: str, stage: Path, convert: bool) -> dict[str, str]:
    """Download the files of a commit, and compare each with the digest that the hub lists."""
    # By the hub's list, not by what came: a proxy may leave a file out, or add one.
    listed = {file.name: file for file in hub.list_files(name, commit)[1]}
    where = f"{name} at {commit}"
    chosen = _choose(listed, convert, where)
    cached = hub.download(name, commit, chosen, exact=True)
    taken = {}
    for file in chosen:
        shutil.copyfile(cached / file, stage / file)
        # The copy is compared, not the cache's file, which others of this user may write.
        if not listed[file].is_content_of(stage / file):
            raise IntegrityError(
                "A downloaded file is not the one that the hub lists",
                where=f"{file} of {where}",
                hint=f"remove {cached / file} and what it links to, and prefetch again",
            )
        taken[file] = digest_of_file(stage / file)
    return taken


def _convert(stage: Path) -> None:
    """Rewrite pickled weights as one file of safetensors."""
    # Tied tensors are stored twice: safetensors refuses tensors that share memory.
    from safetensors.torch import save_file

    state = read_state(stage)
    save_file(
        {key: value.clone().contiguous() for key, value in state.items()},
        stage / "model.safetensors",
        {"format": "pt"},
    )
    # With their index: a loader that finds one reads the shards that it lists.
    for path in stage.iterdir():
        if _PICKLED.fullmatch(path.name):
            path.unlink()


def _load(
    stage: Path, model_class: str | None, dtype: str, new: Sequence[str], drop: Sequence[str]
) -> None:
    """Load it as its users will; the result is not kept."""
    from_pretrained(stage, model_class=_class(model_class), dtype=dtype, new=new, drop=drop)
    # Checkpoints of images have none, and transformers would make one of nothing.
    if any((stage / name).exists() for name in _TOKENIZER):
        tokenizer_of(stage)


def _class(name: str | None) -> type[Any] | None:
    import transformers

    if name is None:
        return None
    found = getattr(transformers, name, None)
    if not isinstance(found, type):
        raise InputError(
            "Not a class of the installed transformers",
            where="model_class",
            wanted="a name like RobertaModel",
            found=name,
        )
    return found


def _already_there(folder: Path, source: str | None, commit: str | None, given: Path) -> Prefetched:
    """Compare a folder with its own manifest, and the manifest with the wanted checkpoint."""
    manifest = read_json(folder / MANIFEST)
    try:
        version, files, taken = (
            manifest["version"],
            dict(manifest["files"]),
            dict(manifest["taken"]),
        )
        found = manifest["source"], manifest["revision"]
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(
            "The manifest is malformed", where=folder / MANIFEST, hint=_HINT
        ) from None
    # Another commit, or a local folder that has changed since: never silently the old files.
    if (
        version != _VERSION
        or found != (source, commit)
        or (source is None and _has_changed(given, taken))
    ):
        raise IntegrityError(
            "The folder holds another checkpoint",
            where=folder,
            wanted=_name(source, commit, given),
            found=_name(*found, "a local folder, or an earlier state of it"),
            hint="choose another folder, or remove this one",
        )
    # Added files as well: a loader may prefer one to those that were checked.
    if differences := sorted(_differences(files, entries_of(folder, but=[MANIFEST]))):
        raise IntegrityError(
            "Files of the folder are not the ones that were prefetched",
            where=f"{folder}: {', '.join(differences[:5])}",
            hint=_HINT,
        )
    return Prefetched(folder, source, commit, tuple(files), fresh=False)


def _has_changed(folder: Path, taken: dict[str, str]) -> bool:
    """Whether a local checkpoint has changed since it was copied."""
    # With convert=True, or a folder of pickled weights would be an error here, and not unchanged.
    names = [path.name for path in folder.iterdir() if path.is_file()]
    chosen = _choose(names, convert=True, where=folder)
    return taken != {name: digest_of_file(folder / name) for name in chosen}


def _name(source: object, commit: object, otherwise: object) -> str:
    return f"{source} at {commit}" if source else str(otherwise)


def _differences(recorded: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for name in recorded.keys() | found.keys():
        if recorded.get(name) != found.get(name):
            yield (
                f"{name} is missing"
                if name not in found
                else f"{name} was added"
                if name not in recorded
                else f"{name} was changed"
            )
