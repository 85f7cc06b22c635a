"""The files that MLflow installs a model's environment from: exact pins, and what the user wrote.

``save`` writes them, before anything is published; nothing here may import torch or transformers.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.environment.closure import closure_of, tops_of
from mlflow_safeflavor.environment.installed import OWN_NAME, TORCH_FAMILY, installed_version
from mlflow_safeflavor.environment.pins import CONSTRAINTS, ONNX_REQUIREMENTS
from mlflow_safeflavor.environment.record import record, with_wheels
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.environment.wheels import folder_of
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = [
    "DEFAULT_ROOTS",
    "GRAPH_ROOTS",
    "default_conda_env",
    "default_requirements",
    "environment_files",
    "missing_lines",
    "requirement_lines",
    "server_roots",
]

StrPath: TypeAlias = "str | os.PathLike[str]"

_logger = logging.getLogger("mlflow.safeflavor")

DEFAULT_ROOTS = ("torch", "transformers", "tokenizers", "safetensors", "mlflow", "cloudpickle")
"""What every saved model with a module needs; the user's own requirements are added to these."""

GRAPH_ROOTS = ("onnxruntime", "tokenizers", "safetensors", "numpy", "pandas")
"""What a graph needs beside what ``server_roots`` tells."""

_MLFLOW_NAMES = frozenset({"mlflow", "mlflow-skinny"})
_TORCH_WHEELS = "https://download.pytorch.org/whl"
_TORCH_LABEL = re.compile(r"cpu|xpu|cu\d+|rocm\d+(\.\d+)*")
_TORCH_TRITON = re.compile(r"pytorch-triton|(pytorch-)?triton-(rocm|xpu)")  # what PyTorch builds and PyPI lacks
_UNSAFE = re.compile(r"[\s#]")
_OPTION = re.compile(r"(?:^|\s)-")  # begins the options behind a requirement, such as --hash


# Pins


def requirement_lines(pins: Mapping[str, str], *, torch_index: StrPath | None = "auto") -> list[str]:
    """The lines of requirements.txt: one exact pin a distribution, and where to find torch's build.

    Args:
        pins: Canonical name → exact version.
        torch_index: ``"auto"`` keeps a ``+cpu``/``+cuNNN``/``+rocmX.Y``/``+xpu`` label and names PyTorch's own page of
            wheels for it. The URL of an index or a folder of wheels is named instead, labels stay. None drops the
            labels, names nothing.

    Raises:
        EnvironmentMismatchError: torch_index is none of these, or "auto" meets a label that PyTorch does not publish.
    """
    pins = dict(sorted(pins.items()))
    if torch_index is None:
        pins |= {name: pins[name].partition("+")[0] for name in pins.keys() & TORCH_FAMILY}
        options = []
    elif torch_index == "auto":
        # No --extra-index-url: uv looks for every name that PyTorch's index shares with PyPI (filelock, jinja2, numpy,
        # …) only in the first index that has the name, and then does not find the exact pin. A page for --find-links
        # offers one distribution and no other, and pip and uv read it the same way.
        builds = {name: version for name, version in pins.items() if name in TORCH_FAMILY and "+" in version}
        if "torch" in builds:
            builds |= {name: builds["torch"] for name in pins if _TORCH_TRITON.fullmatch(name)}
        options = [f"--find-links {_wheel_page(name, build)}" for name, build in builds.items()]
    else:
        options = [_index_option(str(torch_index))]
    return [*options, *(f"{name}=={version}" for name, version in pins.items())]


def _wheel_page(name: str, build: str) -> str:
    label = build.partition("+")[2]
    if not _TORCH_LABEL.fullmatch(label):
        raise EnvironmentMismatchError(
            "PyTorch publishes no wheels with this label",
            where=f"{name}=={build}",
            wanted="+cpu, +cuNNN, +rocmX.Y or +xpu, or no label",
            found=f"+{label}",
            way_out="say where the wheel is with torch_index=URL or FOLDER, or drop the label with torch_index=None",
        )
    return f"{_TORCH_WHEELS}/{'nightly/' if Version(build).is_devrelease else ''}{label}/{name}/"


def _index_option(torch_index: str) -> str:
    url = urlsplit(torch_index)
    if url.scheme in ("http", "https") and url.netloc and not _UNSAFE.search(torch_index):
        if url.password and not re.fullmatch(r"\$\{[A-Z0-9_]+\}", url.password):
            raise EnvironmentMismatchError(
                "torch_index holds a password, and requirements.txt is readable by everybody who can read the model",
                where="torch_index",
                way_out="write it as ${NAME_OF_A_VARIABLE}, which pip expands, or leave it to pip's own settings",
            )
        return f"--extra-index-url {torch_index}"
    if url.scheme == "file" and not _UNSAFE.search(torch_index):
        return f"--find-links {torch_index}"
    if torch_index and os.path.isdir(torch_index):
        folder = Path(os.path.abspath(torch_index))
        # Blanks would end the option and # would start a comment; a file URL has neither.
        return f"--find-links {folder.as_uri() if _UNSAFE.search(str(folder)) else folder}"
    raise EnvironmentMismatchError(
        "torch_index says nothing that pip could use",
        where="torch_index",
        wanted='"auto", None, an http(s):// or file:// URL, or a folder that exists',
        found=repr(torch_index),
    )


@checked
def default_requirements(*, torch_index: StrPath | None = "auto", path: Sequence[str] | None = None) -> list[str]:
    """Pins of what every saved model needs directly, as ``get_default_pip_requirements`` gives them."""
    pins = {name: version for name in DEFAULT_ROOTS if (version := installed_version(name, path)) is not None}
    return requirement_lines(pins, torch_index=torch_index)


def server_roots(path: Sequence[str] | None = None) -> list[str]:
    """What of MLflow loads and serves a model of ours where nothing else needs more of it.

    Of MLflow before 2.15 all, since it was not made of parts. Until 2.20 the smaller part lacks its own server.
    """
    if installed_version("mlflow-skinny", path) is None:
        return ["mlflow"]
    brought = closure_of(["mlflow-skinny"], path=path)
    return ["mlflow-skinny", *([] if "fastapi" in brought else ["flask", "gunicorn"])]


def default_conda_env() -> dict[str, Any]:
    """A conda environment that holds ``default_requirements``."""
    return _with_pip_section(_bare_conda_env(), default_requirements())


# Files


def environment_files(
    folder: str | Path,
    roots: Iterable[str] = DEFAULT_ROOTS,
    *,
    graph_roots: Iterable[str] | None = None,
    torch_build: Mapping[str, Any],
    torch_index: StrPath | None = "auto",
    pip_requirements: StrPath | Iterable[str] | None = None,
    extra_pip_requirements: StrPath | Iterable[str] | None = None,
    conda_env: StrPath | Mapping[str, Any] | None = None,
    path: Sequence[str] | None = None,
) -> Environment:
    """Write requirements.txt, conda.yaml and python_env.yaml (and constraints.txt where the user has any).

    Args:
        folder: Root of the artifact.
        roots: What the model needs directly.
        graph_roots: What of a model with a graph and a module its graph needs; the pins of that are written to
            requirements-onnx.txt, too, unless the user wrote all lines.
        torch_build: See ``record``.
        torch_index: See ``requirement_lines``; not used where the user writes the lines.
        pip_requirements: Replaces all lines: requirement strings, or the path of a requirements file.
        extra_pip_requirements: Adds to them. What is installed is pinned exactly, with what it requires; URLs,
            options and what is not installed stay as written.
        conda_env: Used as it is: a dict, or the path of a YAML file.
        path: Folders to search instead of ``sys.path``.

    Returns:
        What belongs into environment.json.

    Raises:
        EnvironmentMismatchError: The arguments exclude each other or cannot be read, or see ``record``.
    """
    conda = _parse_conda_env(conda_env, pip_requirements, extra_pip_requirements)
    given = pip_requirements if conda is None else _pip_section(conda)
    if given is not None:
        lines, constraints = _parse_requirements(given, "pip_requirements" if conda is None else "conda_env")
        lines = _with_mlflow(lines, path)
        more = [*_installed_roots(lines, path)]
        environment = record([*roots, *more], torch_build=torch_build, strict=False, path=path)
    else:
        extra, constraints = _parse_requirements(extra_pip_requirements or (), "extra_pip_requirements")
        more = [*_installed_roots(extra, path)]
        environment, lines = _pin([*roots, *more], extra, torch_build, torch_index, path)
    _write_files(Path(folder), lines, constraints, _bare_conda_env() if conda is None else conda)
    if graph_roots is not None:
        unneeded = environment.distributions.keys() - closure_of([*graph_roots, *more], path=path)
        environment = replace(environment, only_module=tuple(sorted(unneeded)))
        if given is None:
            _write_lines(Path(folder, ONNX_REQUIREMENTS), _without(lines, unneeded), constraints)
    return with_wheels(environment, filter(None, map(folder_of, lines)), path=path)


def _pin(
    roots: Iterable[str],
    extra: Sequence[str],
    torch_build: Mapping[str, Any],
    torch_index: StrPath | None,
    path: Sequence[str] | None,
) -> tuple[Environment, list[str]]:
    """The closure of the roots; what ``extra`` has beside what is installed follows as written."""
    verbatim = [line for line in extra if not _is_pinnable(line, path)]
    elsewhere = {name for line in verbatim if _applies(line) and (name := _name_of(line)) is not None}
    environment = record(roots, torch_build=torch_build, editable_ok=elsewhere, path=path)
    pins = {name: version for name, version in environment.distributions.items() if name not in elsewhere}
    return environment, [*requirement_lines(pins, torch_index=torch_index), *verbatim]


def _without(lines: Iterable[str], names: Collection[str]) -> list[str]:
    """The lines but pins of these distributions, and pages of their wheels."""
    pages = tuple(f"/{name}/" for name in names)
    there = (line for line in lines if _name_of(line) not in names)
    return [line for line in there if not (line.startswith(f"--find-links {_TORCH_WHEELS}") and line.endswith(pages))]


def missing_lines(folder: Path, used: Mapping[str, str], *, path: Sequence[str] | None = None) -> list[str]:
    """Lines for what was used and neither requirements.txt nor conda.yaml of an artifact brings.

    Args:
        folder: Root of the artifact.
        used: Canonical name → version.
        path: Folders to search instead of ``sys.path``.
    """
    lines, _ = _parse_requirements(folder / "requirements.txt", "requirements.txt")
    conda = [part for part in _read_yaml(folder / "conda.yaml")["dependencies"] if isinstance(part, str)]
    # Conda's names are those of Python for all but a few; what follows them is a version, in its own words.
    named = [_CONDA_NAMES.get(name, name) for part in conda if (name := re.split(r"[\s=<>!~\[]", part, maxsplit=1)[0])]
    brought = closure_of(_installed_roots([*lines, *named], path), path=path)
    brought |= set(filter(None, map(_name_of, [*lines, *named])))
    return requirement_lines({name: used[name] for name in tops_of(used.keys() - brought, path=path)}, torch_index=None)


_CONDA_NAMES = {"pytorch": "torch"}


def _parse_requirements(given: StrPath | Iterable[str], argument: str) -> tuple[list[str], list[str]]:
    """Requirement lines and constraint lines; ``-r`` and ``-c`` are read and replaced by what they hold."""
    # MLflow's own reader, so that a line means here what it means at load.
    from mlflow.utils.requirements_utils import _parse_requirements as parse

    try:
        source = os.fspath(given) if isinstance(given, (str, os.PathLike)) else [*map(os.fspath, given)]
        parsed = list(parse(source, is_constraint=False))  # type: ignore[no-untyped-call]
    except (OSError, TypeError, UnicodeDecodeError) as error:
        raise EnvironmentMismatchError(
            f"{argument} cannot be read",
            where=argument,
            wanted="a list of requirement strings, or the path of a requirements file",
            found=error,
        ) from None
    lines: tuple[list[str], list[str]] = [], []
    for requirement in parsed:
        lines[requirement.is_constraint].append(requirement.req_str)
    return lines


def _requirement_of(line: str) -> Requirement | None:
    try:
        return Requirement(_OPTION.split(line)[0])
    except InvalidRequirement:
        return None


def _applies(line: str) -> bool:
    requirement = _requirement_of(line)
    return requirement is None or requirement.marker is None or requirement.marker.evaluate()


def _is_pinnable(line: str, path: Sequence[str] | None) -> bool:
    """Whether the line is a plain requirement that this environment can answer with an exact version."""
    requirement = _requirement_of(line)
    if requirement is None or requirement.url or _OPTION.search(line) or not _applies(line):
        return False
    if canonicalize_name(requirement.name) == OWN_NAME or installed_version(requirement.name, path) is not None:
        return True
    _logger.warning("%s is not installed here, so it stays as written and is not pinned any further", line)
    return False


def _installed_roots(lines: Iterable[str], path: Sequence[str] | None) -> Iterator[str]:
    for line in lines:
        name, requirement = _name_of(line), _requirement_of(line)
        if name is not None and installed_version(name, path) is not None:
            yield name if requirement is None else str(requirement)


def _name_of(line: str) -> str | None:
    """The distribution that a line of a requirements file is about, as far as the line tells."""
    requirement = _requirement_of(line)
    if requirement is not None:
        return canonicalize_name(requirement.name)
    target = re.sub(r"^(-e|--editable)[\s=]+", "", line)
    if egg := re.search(r"[#&]egg=([\w.-]+)", target):
        return canonicalize_name(egg[1])
    last = re.split(r"[\\/]", re.split(r"[#?\s]", target)[0].rstrip("/"))[-1]
    if target.startswith(("git+", "hg+", "svn+", "bzr+")):
        return canonicalize_name(re.sub(r"(\.git)?(@.*)?$", "", last))
    try:
        return parse_wheel_filename(unquote(last))[0]
    except InvalidWheelFilename:
        return None


def _with_mlflow(lines: list[str], path: Sequence[str] | None) -> list[str]:
    """MLflow has to be in every environment that serves a model; its own flavors add it in the same way."""
    if _MLFLOW_NAMES & {_name_of(line) for line in lines}:
        return lines
    version = installed_version("mlflow", path)
    return ["mlflow" if version is None else f"mlflow=={version}", *lines]


def _parse_conda_env(conda_env: object, pip_requirements: object, extra: object) -> dict[str, Any] | None:
    arguments = {"conda_env": conda_env, "pip_requirements": pip_requirements, "extra_pip_requirements": extra}
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise EnvironmentMismatchError(
            "Only one of conda_env, pip_requirements and extra_pip_requirements can be used",
            where=", ".join(given),
            way_out=f"keep {given[0]}, and write the rest into it",
        )
    if conda_env is None:
        return None
    if isinstance(conda_env, (str, os.PathLike)):
        conda_env = _read_yaml(Path(conda_env))
    if not isinstance(conda_env, Mapping) or not isinstance(conda_env.get("dependencies"), list):
        raise EnvironmentMismatchError(
            "conda_env describes no conda environment",
            where="conda_env",
            wanted="a mapping with a list of dependencies, or the path of a YAML file that holds one",
            found=repr(conda_env)[:200],
        )
    return dict(conda_env)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EnvironmentMismatchError("conda_env cannot be read", where=path, found=error) from None


def _pip_section(conda: Mapping[str, Any]) -> list[str]:
    sections = [part["pip"] for part in conda["dependencies"] if isinstance(part, Mapping) and "pip" in part]
    return [*sections[0]] if sections and sections[0] else []


def _with_pip_section(conda: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    others = [part for part in conda["dependencies"] if not (isinstance(part, Mapping) and "pip" in part)]
    return {**conda, "dependencies": [*others, {"pip": [*lines]}]}


def _bare_conda_env() -> dict[str, Any]:
    pip = installed_version("pip", None)
    # At most this pip, as MLflow writes it: conda-forge gets a new pip later than others do.
    dependencies = [f"python={_python_release()}", f"pip<={pip}" if pip else "pip"]
    return {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": dependencies}


def _python_release() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def _write_files(folder: Path, lines: Sequence[str], constraints: Sequence[str], conda: Mapping[str, Any]) -> None:
    if constraints:
        (folder / CONSTRAINTS).write_text("\n".join(constraints) + "\n", encoding="utf-8")
    lines = _write_lines(folder / "requirements.txt", lines, constraints)
    # No build dependencies: MLflow would put pip, setuptools and wheel on the same pip command line, where they
    # contradict pins of the closure, break hash checking, and are looked for in folders that only hold the pins.
    python_env = {"python": _python_release(), "build_dependencies": [], "dependencies": ["-r requirements.txt"]}
    for name, value in (("conda.yaml", _with_pip_section(conda, lines)), ("python_env.yaml", python_env)):
        (folder / name).write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def _write_lines(path: Path, lines: Sequence[str], constraints: Sequence[str]) -> Sequence[str]:
    """Write a file that pip reads, with the name of the constraints where there are any. Returns its lines."""
    lines = [*lines, f"-c {CONSTRAINTS}"] if constraints else lines
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
