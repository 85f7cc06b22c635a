"""The files that MLflow installs a model's environment from: exact pins, and the user's lines."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mlflow_safeflavor.environment.closure import closure_of, tops_of
from mlflow_safeflavor.environment.conda import (
    bare_conda_env,
    parse_conda_env,
    pip_section,
    python_release,
    read_yaml,
    with_pip_section,
)
from mlflow_safeflavor.environment.lines import (
    StrPath,
    applies,
    installed_roots,
    is_pinnable,
    name_of,
    parse_requirements,
    with_mlflow,
)
from mlflow_safeflavor.environment.pins import CONSTRAINTS, ONNX_REQUIREMENTS
from mlflow_safeflavor.environment.record import record, with_wheels
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.environment.requirements import (
    DEFAULT_ROOTS,
    TORCH_WHEELS,
    requirement_lines,
)
from mlflow_safeflavor.environment.wheels import folder_of

__all__ = ["environment_files", "missing_lines"]


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
    """Write requirements.txt, conda.yaml, python_env.yaml, and the user's constraints.txt if any.

    Args:
        folder: Root of the artifact.
        roots: Distributions that the model needs directly.
        graph_roots: Of a model with a graph and a module, those that its graph needs; their pins
            are written to requirements-onnx.txt, too, unless the user wrote all lines.
        torch_build: See ``record``.
        torch_index: See ``requirement_lines``; not used where the user writes the lines.
        pip_requirements: Replaces all lines: requirement strings, or the path of a requirements
            file.
        extra_pip_requirements: Lines beside them. Installed distributions are pinned exactly, with
            their requirements; URLs, options and names that are not installed stay as written.
        conda_env: Used as it is: a dict, or the path of a YAML file.
        path: Folders to search instead of ``sys.path``.

    Returns:
        Facts for environment.json.

    Raises:
        EnvironmentMismatchError: The arguments exclude each other or cannot be read, or see
            ``record``.
    """
    conda = parse_conda_env(conda_env, pip_requirements, extra_pip_requirements)
    given = pip_requirements if conda is None else pip_section(conda)
    if given is not None:
        lines, constraints = parse_requirements(
            given, "pip_requirements" if conda is None else "conda_env"
        )
        lines = with_mlflow(lines, path)
        more = [*installed_roots(lines, path)]
        # Not strict: who writes all lines may know better; but facts of what is here are recorded.
        environment = record([*roots, *more], torch_build=torch_build, strict=False, path=path)
    else:
        extra, constraints = parse_requirements(
            extra_pip_requirements or (), "extra_pip_requirements"
        )
        more = [*installed_roots(extra, path)]
        environment, lines = _pin([*roots, *more], extra, torch_build, torch_index, path)
    _write_files(Path(folder), lines, constraints, bare_conda_env() if conda is None else conda)
    if graph_roots is not None:
        # Lines that the user added (more) are kept for the graph, too: whether graph or module
        # needs them cannot be told.
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
    """Pins of the roots' closure, then lines of ``extra`` that cannot be pinned, as written."""
    verbatim = [line for line in extra if not is_pinnable(line, path)]
    elsewhere = {name for line in verbatim if applies(line) and (name := name_of(line)) is not None}
    environment = record(roots, torch_build=torch_build, editable_ok=elsewhere, path=path)
    # A pin beside "name @ git+https://…" would be two lines about one distribution, which pip
    # refuses.
    pins = {
        name: version
        for name, version in environment.distributions.items()
        if name not in elsewhere
    }
    return environment, [*requirement_lines(pins, torch_index=torch_index), *verbatim]


def _without(lines: Iterable[str], names: Collection[str]) -> list[str]:
    """The lines without pins of these distributions and pages of their wheels."""
    pages = tuple(f"/{name}/" for name in names)
    there = (line for line in lines if name_of(line) not in names)
    return [
        line
        for line in there
        if not (line.startswith(f"--find-links {TORCH_WHEELS}") and line.endswith(pages))
    ]


def missing_lines(
    folder: Path, used: Mapping[str, str], *, path: Sequence[str] | None = None
) -> list[str]:
    """Lines for used distributions that neither requirements.txt nor conda.yaml brings.

    Args:
        folder: Root of the artifact.
        used: Canonical name → version.
        path: Folders to search instead of ``sys.path``.
    """
    lines, _ = parse_requirements(folder / "requirements.txt", "requirements.txt")
    conda = [
        part for part in read_yaml(folder / "conda.yaml")["dependencies"] if isinstance(part, str)
    ]
    # Conda's names are those of Python for all but a few; versions behind them have a syntax of
    # their own.
    named = [
        _CONDA_NAMES.get(name, name)
        for part in conda
        if (name := re.split(r"[\s=<>!~\[]", part, maxsplit=1)[0])
    ]
    brought = closure_of(installed_roots([*lines, *named], path), path=path)
    brought |= set(filter(None, map(name_of, [*lines, *named])))
    return requirement_lines(
        {name: used[name] for name in tops_of(used.keys() - brought, path=path)}, torch_index=None
    )


_CONDA_NAMES = {"pytorch": "torch"}


def _write_files(
    folder: Path, lines: Sequence[str], constraints: Sequence[str], conda: Mapping[str, Any]
) -> None:
    if constraints:
        (folder / CONSTRAINTS).write_text("\n".join(constraints) + "\n", encoding="utf-8")
    lines = _write_lines(folder / "requirements.txt", lines, constraints)
    # No build dependencies: MLflow would put pip, setuptools and wheel on the same pip command
    # line, where they contradict pins of the closure, break hash checking, and are looked for in
    # folders that only hold the pins.
    python_env = {
        "python": python_release(),
        "build_dependencies": [],
        "dependencies": ["-r requirements.txt"],
    }
    for name, value in (
        ("conda.yaml", with_pip_section(conda, lines)),
        ("python_env.yaml", python_env),
    ):
        (folder / name).write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def _write_lines(path: Path, lines: Sequence[str], constraints: Sequence[str]) -> Sequence[str]:
    """Write a requirements file, which names constraints if there are any; returns its lines."""
    lines = [*lines, f"-c {CONSTRAINTS}"] if constraints else lines
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
