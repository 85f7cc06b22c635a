"""What a model was saved with: the exact closure of pins, and every difference from it.

Save records the closure of *installed* distributions, never inferred imports. Load compares before
torch is imported, so nothing here may import torch or transformers.
"""

from __future__ import annotations

import email.parser
import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mlflow_safeflavor.artifact.plain_files import WAY_OUT
from mlflow_safeflavor.artifact.spec import is_plain_text, is_scalar
from mlflow_safeflavor.environment.wheels import installed_content, installed_wheels
from mlflow_safeflavor.errors import (
    EnvironmentMismatchError,
    IntegrityError,
    ParityError,
    StructureError,
    WeightsError,
)

__all__ = [
    "OWN_NAME",
    "POLICIES",
    "TORCH_FAMILY",
    "Difference",
    "Environment",
    "Installed",
    "closure_of",
    "find_differences",
    "format_differences",
    "installed_distributions",
    "installed_version",
    "naming_missing",
    "record",
    "require_same",
    "source_tree",
    "tops_of",
    "with_wheels",
]

_logger = logging.getLogger("mlflow.safeflavor")

POLICIES = ("ignore", "warn", "error")
"""What ``require_same`` may do about differences."""

OWN_NAME = canonicalize_name("mlflow-safeflavor")
"""Vendored in every artifact, and so never pinned."""

TORCH_FAMILY = frozenset({"torch", "torchaudio", "torchvision"})
"""Released in several builds, told apart by a local label (``+cpu``)."""

_HARDWARE = frozenset({"cpu_capability", "threads"})
_MISSING = "not installed"
_WAY_OUT = (
    "install requirements.txt of the model (`pip install -r requirements.txt`) under the Python of its "
    "python_env.yaml, or let MLflow do both with --env-manager uv"
)


@dataclass(frozen=True)
class Environment:
    """What was installed, and on what, when a model was saved.

    Attributes:
        python: Full version, such as ``3.11.7``.
        implementation: Such as ``CPython``.
        system: Such as ``Linux``.
        machine: Such as ``x86_64``.
        libc: Such as ``glibc 2.36``; empty where the platform does not tell.
        distributions: Canonical name → exact version with its local label (``2.13.0+cpu``), sorted by name.
        torch_build: Facts about torch that only torch itself knows, handed in by the caller; JSON scalars.
        only_module: Names among them that nobody needs who serves the graph and never rebuilds the module.
        wheels: Names among them that came from a wheel of a folder that requirements.txt names → its ``file``,
            ``sha256``, and ``content``; see ``wheels.installed_content``.
    """

    python: str
    implementation: str
    system: str
    machine: str
    libc: str
    distributions: Mapping[str, str]
    torch_build: Mapping[str, Any]
    only_module: tuple[str, ...] = ()
    wheels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("distributions", "torch_build", "wheels"):
            object.__setattr__(self, name, MappingProxyType(dict(sorted(getattr(self, name).items()))))

    def to_json(self) -> dict[str, Any]:
        """The JSON-able value of ``environment.json``; ``from_json`` reads it back."""
        facts = {name: getattr(self, name) for name in _PLATFORM_KEYS}
        pins = {"distributions": dict(self.distributions), "only_module": list(self.only_module)}
        wheels = {name: dict(wheel) for name, wheel in self.wheels.items()}
        return facts | pins | {"torch_build": dict(self.torch_build), "wheels": wheels}

    @property
    def wheel_digests(self) -> dict[str, str]:
        """Canonical name → SHA-256 of the wheel that was installed, where that is known."""
        return {name: wheel["sha256"] for name, wheel in self.wheels.items()}

    def for_graph(self) -> Environment:
        """Without the distributions that only the module needs."""
        kept = {name: version for name, version in self.distributions.items() if name not in self.only_module}
        wheels = {name: wheel for name, wheel in self.wheels.items() if name in kept}
        return replace(self, distributions=kept, only_module=(), wheels=wheels)

    @classmethod
    def from_json(cls, value: object) -> Environment:
        """Read the value of ``environment.json``; keys that this release does not know are ignored.

        Raises:
            IntegrityError: A key is missing or of the wrong type.
        """
        entry = value if isinstance(value, Mapping) else {}
        for key, (pattern, words) in _PLATFORM_KEYS.items():
            value = entry.get(key)
            _check(isinstance(value, str) and re.fullmatch(pattern, value), key, words, value)
        for key in ("distributions", "torch_build"):
            found = entry.get(key)
            _check(isinstance(found, Mapping) and all(isinstance(k, str) for k in found), key, "an object", found)
        for name, version in entry["distributions"].items():
            _check(re.fullmatch(_DISTRIBUTION, name), "distributions", "names", name)
            exact = re.fullmatch(_VERSION, version) if isinstance(version, str) else None
            _check(exact, f"distributions, {name}", "a version as a string", version)
        for name, fact in entry["torch_build"].items():
            _check(is_plain_text(name) and is_scalar(fact), "torch_build", "names with numbers or short texts", fact)
        only_module = entry.get("only_module", [])
        sound = isinstance(only_module, list) and all(map(is_plain_text, only_module))
        _check(sound, "only_module", "a list of names", only_module)
        wheels = entry.get("wheels", {})
        _check(isinstance(wheels, Mapping), "wheels", "an object", wheels)
        for name, wheel in wheels.items():
            _check(name in entry["distributions"] and _is_wheel(wheel), "wheels", "file, sha256 and content", wheel)
        facts = {key: entry[key] for key in (*_PLATFORM_KEYS, "distributions", "torch_build")}
        return cls(**facts, only_module=tuple(only_module), wheels=wheels)


# Used with fullmatch. Readers print these, and write them into Dockerfiles.
_PLATFORM_KEYS = {
    "python": (r"\d{1,2}\.\d{1,3}(\.\d{1,3}[0-9A-Za-z.+]{0,20})?", "a version as a string"),
    "implementation": (r"[A-Za-z][\w.-]{0,40}", "a name as a string"),
    "system": (r"[\w.-]{0,40}", "a name as a string"),
    "machine": (r"[\w.-]{0,40}", "a name as a string"),
    "libc": (r"[\w.+-]{0,20}( [\w.+-]{1,40})?", "a name and a version as a string"),
}
_DISTRIBUTION = r"[A-Za-z0-9]([\w.-]{0,200}[A-Za-z0-9])?"
_VERSION = r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,100}"


def _is_wheel(value: object) -> bool:
    patterns = {"file": r"[\w.+!-]{1,250}\.whl", "sha256": r"[0-9a-f]{64}", "content": r"[0-9a-f]{64}"}
    return (
        isinstance(value, Mapping)
        and value.keys() == patterns.keys()
        and all(isinstance(value[key], str) and re.fullmatch(patterns[key], value[key]) for key in patterns)
    )


def _check(ok: object, where: str, wanted: str, found: object) -> None:
    if not ok:
        raise IntegrityError(
            "environment.json does not say what its format asks for",
            where=f"environment.json, {where}",
            wanted=wanted,
            found="nothing" if found is None else repr(found)[:200],
            way_out=WAY_OUT,
        )


@dataclass(frozen=True)
class Difference:
    """One fact that is not as it was at save.

    Attributes:
        kind: ``python`` (another minor version), ``python-patch``, ``implementation``, ``system``, ``machine``,
            ``libc``, ``distribution``, ``missing``, ``wheel`` (same version, other
            content than the wheel it came from), ``torch-build`` (same torch release, other build) or
            ``hardware`` (CPU capability and threads, which no installation can change).
        name: The distribution or fact.
        wanted: What was recorded.
        found: What is there now.
    """

    kind: str
    name: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: wanted {self.wanted}, found {self.found}"


# Recording


def record(
    roots: Iterable[str],
    *,
    torch_build: Mapping[str, Any],
    editable_ok: Collection[str] = (),
    strict: bool = True,
    path: Sequence[str] | None = None,
) -> Environment:
    """Record this interpreter and the exact closure of installed distributions that the roots need.

    mlflow-safeflavor itself is vendored in every artifact and so never part of the closure; what it
    requires is followed only where it is a root. A requirement *of a distribution* that is not
    installed at all is left out with a warning: metadata that names something the program runs
    without is common, and pip fetches it anyway. An installed version that contradicts a requirement is
    refused, because pip would refuse the same pins later, in the container.

    Args:
        roots: Names or requirement strings, extras included (``"mlflow[extras]"``).
        torch_build: Facts that only torch knows; stored as they are.
        editable_ok: Names that may be editable, VCS, folder or archive installs, since the caller pins them.
        strict: False logs contradictions and accepts every kind of install: for pins that the user wrote.
        path: Folders to search instead of ``sys.path``.

    Raises:
        EnvironmentMismatchError: A root is not installed, two requirements contradict each other, or a
            distribution of the closure cannot be pinned.
    """
    installed = installed_distributions(path)
    closure, missing, conflicts = _closure(roots, installed)
    if missing:
        _logger.warning("Not installed and so not pinned, although something requires it: %s", "; ".join(missing))
    if conflicts and strict:
        _raise_conflicts(conflicts)
    if conflicts:
        found = "; ".join(f"{wanted}, found {version}" for wanted, version in conflicts)
        _logger.warning("Installed versions contradict what is required: %s", found)
    if strict:
        _require_releases([installed[name] for name in closure - set(map(canonicalize_name, editable_ok))])
    pins = {name: installed[name].version for name in closure}
    return Environment(**_platform_facts(), distributions=pins, torch_build=torch_build, only_module=(), wheels={})


def with_wheels(recorded: Environment, folders: Iterable[Path], *, path: Sequence[str] | None = None) -> Environment:
    """Record which distributions came from a wheel of these folders: an index may have others of the same version."""
    there = installed_distributions(path).items()
    installed = {name: one.distribution for name, one in there if name in recorded.distributions}
    wheels: dict[str, dict[str, str]] = {}
    for folder in folders:
        wheels = installed_wheels(folder, installed) | wheels
    return replace(recorded, wheels=wheels)


def closure_of(roots: Iterable[str], *, path: Sequence[str] | None = None) -> frozenset[str]:
    """Canonical names of the installed distributions that the roots need, themselves among them."""
    return frozenset(_closure(roots, installed_distributions(path))[0])


def tops_of(names: Iterable[str], *, path: Sequence[str] | None = None) -> list[str]:
    """Those of the installed distributions that none of the others requires."""
    installed = installed_distributions(path)
    tops: dict[str, set[str]] = {}
    for name in sorted(names):
        if not any(name in closure for closure in tops.values()):
            closure = _closure([name], installed)[0]
            tops = {top: below for top, below in tops.items() if top not in closure} | {name: closure}
    return sorted(tops)


def _platform_facts() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": " ".join(filter(None, platform.libc_ver())),
    }


def _search(path: Sequence[str] | None, **context: str) -> Iterator[importlib.metadata.Distribution]:
    where: dict[str, Any] = dict(context) if path is None else {**context, "path": list(path)}
    yield from importlib.metadata.distributions(**where)


@dataclass(frozen=True)
class Installed:
    """What a distribution says of itself, and the distribution, for what few questions are left."""

    name: str
    version: str
    requires: tuple[str, ...]
    distribution: importlib.metadata.Distribution


def installed_distributions(path: Sequence[str] | None) -> dict[str, Installed]:
    """Canonical name → distribution; the first on the path wins, as it does for imports."""
    found: dict[str, Installed] = {}
    for one in filter(None, map(_read, _search(path))):
        found.setdefault(canonicalize_name(one.name), one)
    return found


def _read(distribution: importlib.metadata.Distribution) -> Installed | None:
    """None for what a broken uninstall left behind."""
    text = distribution.read_text("METADATA")
    if text is not None:
        # After the blank line comes a description of many pages.
        names, versions, requires = _parse(text.partition("\n\n")[0])
    else:
        try:
            metadata = distribution.metadata
        except FileNotFoundError:  # the importlib_metadata backport, whose finder MLflow puts on sys.meta_path
            return None
        names, versions, requires = metadata.get_all("Name"), metadata.get_all("Version"), distribution.requires
    if not (names and versions and names[0] and versions[0]):
        return None
    return Installed(names[0], versions[0], tuple(requires or ()), distribution)


@functools.cache  # by what was just read, so never stale: importlib parses all anew at each access, for seconds
def _parse(headers: str) -> tuple[list[str] | None, list[str] | None, list[str] | None]:
    parsed = email.parser.HeaderParser().parsestr(headers)
    return parsed.get_all("Name"), parsed.get_all("Version"), parsed.get_all("Requires-Dist")


def _closure(
    roots: Iterable[str], installed: Mapping[str, Installed]
) -> tuple[set[str], list[str], list[tuple[str, str]]]:
    """Names reached from the roots, requirements nothing installed answers, and (wanted, found) of contradictions."""
    queue = [("", requirement) for requirement in _roots(roots, installed)]
    done: dict[str, set[str]] = {}
    missing: dict[str, None] = {}
    conflicts: dict[tuple[str, str], None] = {}
    while queue:
        origin, requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        wanted = f"{origin or 'this model'} requires {requirement}"
        if name not in installed:
            missing[wanted] = None
            continue
        if not _satisfies(requirement, installed[name].version):
            conflicts[wanted, f"{name} {installed[name].version}"] = None
        extras = {"", *map(canonicalize_name, requirement.extras)} - done.setdefault(name, set())
        done[name] |= extras
        if name != OWN_NAME or not origin:
            queue.extend((name, needed) for needed in _requires(installed[name], extras))
    return done.keys() - {OWN_NAME}, sorted(missing), sorted(conflicts)


def _roots(roots: Iterable[str], installed: Mapping[str, object]) -> Iterator[Requirement]:
    for requirement in map(Requirement, roots):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if canonicalize_name(requirement.name) not in installed:
            raise EnvironmentMismatchError(
                "A distribution that the model needs is not installed",
                where=requirement.name,
                wanted=str(requirement),
                found=_MISSING,
                way_out=f"pip install '{requirement}'",
            )
        yield requirement


def _requires(distribution: Installed, extras: Collection[str]) -> Iterator[Requirement]:
    """Requirements that hold on this machine for any of the extras; ``""`` stands for no extra."""
    for line in distribution.requires:
        try:
            requirement = _parse_requirement(line)
        except InvalidRequirement:
            _logger.warning("Metadata of %s holds a requirement nobody can read: %s", distribution.name, line)
            continue
        if requirement.marker is None:
            if "" in extras:
                yield requirement
        elif any(_holds(line, extra) for extra in extras):
            yield requirement


_parse_requirement = functools.cache(Requirement)


@functools.cache  # a save asks for several closures, each with a thousand markers
def _holds(line: str, extra: str) -> bool:
    marker = _parse_requirement(line).marker
    return marker is None or marker.evaluate({"extra": extra})


def _satisfies(requirement: Requirement, version: str) -> bool:
    try:
        return not requirement.specifier or requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _raise_conflicts(conflicts: Sequence[tuple[str, str]]) -> None:
    wanted, found = zip(*conflicts, strict=True)
    raise EnvironmentMismatchError(
        "Installed versions contradict what is required, so pip could never install these pins",
        wanted="; ".join(wanted),
        found="; ".join(dict.fromkeys(found)),
        way_out="install versions that agree (`pip check` tells), or write all pins yourself with pip_requirements",
    )


def _require_releases(distributions: Iterable[Installed]) -> None:
    """Refuse what no index could deliver to another machine."""
    sources = {
        d.name: (d.version, source) for d in distributions if (source := _find_source(d.distribution)) is not None
    }
    if not sources:
        return
    name, (version, _) = next(iter(sorted(sources.items())))
    raise EnvironmentMismatchError(
        "Distributions that the model needs were not installed as releases, so no pin could bring them back",
        where=", ".join(sorted(sources)),
        wanted="releases installed by name and version",
        found="; ".join(f"{n} {v}: {source}" for n, (v, source) in sorted(sources.items())),
        way_out=(
            "publish it, or build a wheel (`pip wheel --no-deps -w FOLDER SOURCE`) and install that with "
            f"`pip install {name}=={version} --find-links FOLDER`; or say where others get it, as in "
            f"extra_pip_requirements=['{name} @ git+https://HOST/REPOSITORY@COMMIT']; "
            "or write all pins yourself with pip_requirements"
        ),
    )


def _find_source(distribution: importlib.metadata.Distribution) -> str | None:
    """Where a distribution came from if not as a release from an index (PEP 610)."""
    # conda writes the folder of its build machine into direct_url.json; those are releases all the same.
    if (distribution.read_text("INSTALLER") or "").strip() == "conda":
        return None
    text = distribution.read_text("direct_url.json")
    if text is None:
        folder = source_tree(distribution)
        return None if folder is None else f"editable install of the folder {folder}"
    try:
        facts = dict(json.loads(text))
    except (ValueError, TypeError):
        return "an install whose direct_url.json cannot be read"
    url, vcs, folder = facts.get("url"), facts.get("vcs_info"), facts.get("dir_info")
    if isinstance(vcs, dict):
        return f"VCS install of {vcs.get('vcs')}+{url}@{vcs.get('commit_id')}"
    if isinstance(folder, dict):
        return f"{'editable install' if folder.get('editable') else 'install'} of the folder {url}"
    return f"install of the archive {url}"


def source_tree(distribution: importlib.metadata.Distribution) -> str | None:
    """The folder of an old-style editable install: an egg-info beside its setup.py."""
    if distribution.read_text("METADATA") is not None:
        return None
    folder = Path(str(distribution.locate_file("")))
    is_source = any((folder / name).is_file() for name in ("setup.py", "setup.cfg", "pyproject.toml"))
    return str(folder) if is_source else None


# Comparing


def find_differences(
    recorded: Environment, *, torch_build: Mapping[str, Any] | None = None, path: Sequence[str] | None = None
) -> list[Difference]:
    """Compare this interpreter and what is installed with what was recorded; imports nothing.

    The C library counts only when its family differs (glibc or another): its version is the choice of
    whoever builds the base image, and the recorded predictions prove more than it could.

    Args:
        recorded: From environment.json.
        torch_build: The same facts as at save, where torch is imported already.
        path: Folders to search instead of ``sys.path``.
    """
    return [
        *_platform_differences(recorded),
        *_distribution_differences(recorded.distributions, path),
        *_wheel_differences(recorded, path),
        *_build_differences(recorded.torch_build, torch_build or {}),
    ]


def _platform_differences(recorded: Environment) -> Iterator[Difference]:
    facts = _platform_facts()
    for name in _PLATFORM_KEYS:
        wanted, found = getattr(recorded, name), facts[name]
        if name == "libc":
            wanted, found = wanted.partition(" ")[0], found.partition(" ")[0]
        if wanted != found:
            is_patch = name == "python" and wanted.split(".")[:2] == found.split(".")[:2]
            yield Difference("python-patch" if is_patch else name, name, wanted or "unknown", found or "unknown")


def _distribution_differences(pins: Mapping[str, str], path: Sequence[str] | None) -> Iterator[Difference]:
    listed = _listed_versions(sys.path if path is None else path)
    for name, wanted in pins.items():
        if _same_version(wanted, listed.get(name)):
            continue
        # The slow question, asked only where a folder name did not settle it: other formats, zip files, finders.
        found = installed_version(name, path)
        if found is None:
            yield Difference("missing", name, wanted, _MISSING)
        elif not _same_version(wanted, found):
            is_build = name in TORCH_FAMILY and wanted.partition("+")[0] == found.partition("+")[0]
            yield Difference("torch-build" if is_build else "distribution", name, wanted, found)


def _wheel_differences(recorded: Environment, path: Sequence[str] | None) -> Iterator[Difference]:
    """Other builds of the same version: an index's in place of a folder's."""
    for name, wheel in recorded.wheels.items():
        one = next(filter(None, map(_read, _search(path, name=name))), None)
        content = None if one is None else installed_content(one.distribution)
        if one and content and content != wheel["content"] and _same_version(recorded.distributions[name], one.version):
            yield Difference("wheel", name, f"the build of {wheel['file']}", f"another build of {one.version}")


def _build_differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    for key in sorted(wanted.keys() & found.keys()):
        if wanted[key] != found[key]:
            kind = "hardware" if key in _HARDWARE else "torch-build"
            yield Difference(kind, f"torch {key}", str(wanted[key]), str(found[key]))


def _listed_versions(path: Iterable[str]) -> dict[str, str]:
    """Canonical name → version, from the names of the dist-info folders alone: a hundred times faster than reading."""
    found: dict[str, str] = {}
    for folder in path:
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in entries:
            if entry.endswith(".dist-info") and os.path.isfile(os.path.join(folder, entry, "METADATA")):
                name, _, version = entry.removesuffix(".dist-info").rpartition("-")
                found.setdefault(canonicalize_name(name), version)
    return found


def installed_version(name: str, path: Sequence[str] | None) -> str | None:
    """The version that is imported under this name, read from the metadata; None if there is none."""
    return next((one.version for one in map(_read, _search(path, name=name)) if one), None)


def _same_version(wanted: str, found: str | None) -> bool:
    try:
        return wanted == found or (found is not None and Version(wanted) == Version(found))
    except InvalidVersion:
        return False


def format_differences(differences: Sequence[Difference]) -> str:
    """The differences as an aligned table with one way out; empty for none."""
    return f"{_table(differences)}\n  way out: {_WAY_OUT}" if differences else ""


@contextmanager
def naming_versions(recorded: Environment, *, path: Sequence[str] | None = None) -> Iterator[None]:
    """Put the pinned versions first in the way out of a load that failed inside, where others are installed.

    Raises:
        SafeFlavorError: What was raised inside.
    """
    try:
        yield
    except (ParityError, StructureError, WeightsError) as error:
        found = [str(one) for one in find_differences(recorded, path=path) if one.kind in _INSTALLABLE]
        if not found:
            raise
        versions = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
        way_out = f"{_WAY_OUT} ({versions})" + (f"; or {error.way_out}" if error.way_out else "")
        raise error.with_way_out(way_out).with_traceback(error.__traceback__) from error.__cause__


@contextmanager
def naming_missing() -> Iterator[None]:
    """Say what to install where the module is wanted in an environment that was made for the graph alone.

    Raises:
        EnvironmentMismatchError: Something that is not installed was imported inside.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentMismatchError(
            "The graph cannot answer this, and what its module needs is not installed",
            where=error.name or str(error),
            found=_MISSING,
            way_out="install requirements.txt of the model, and not only requirements-onnx.txt; an image of "
            "`mlflow-safeflavor dockerfile --engine module` has it all",
        ) from error


_INSTALLABLE = frozenset(("python", "implementation", "distribution", "missing", "wheel", "torch-build"))
"""Kinds of differences that installing something else removes."""


def _table(differences: Sequence[Difference]) -> str:
    names, wanted = (max(len(getattr(d, part)) for d in differences) for part in ("name", "wanted"))
    rows = [f"  {d.name:<{names}}  wanted {d.wanted:<{wanted}}  found {d.found}" for d in differences]
    count = "1 difference" if len(rows) == 1 else f"{len(rows)} differences"
    return "\n".join([f"This is not the environment that the model was saved in ({count})", *rows])


def require_same(recorded: Environment, *, policy: str, path: Sequence[str] | None = None) -> list[Difference]:
    """Act on differences as the policy says.

    Args:
        recorded: From environment.json.
        policy: ``"ignore"`` does not even look, ``"warn"`` logs the table, ``"error"`` raises it.
        path: Folders to search instead of ``sys.path``.

    Returns:
        What differs.

    Raises:
        EnvironmentMismatchError: Something differs under ``"error"``, or there is no such policy.
    """
    if policy not in POLICIES:
        raise EnvironmentMismatchError(
            "Unknown policy for a differing environment", where="environment", wanted=list(POLICIES), found=repr(policy)
        )
    differences = [] if policy == "ignore" else find_differences(recorded, path=path)
    if differences and policy == "error":
        raise EnvironmentMismatchError(
            _table(differences), way_out=f'{_WAY_OUT}; or accept the differences with environment="warn"'
        )
    if differences:
        _logger.warning("%s", format_differences(differences))
    return differences
