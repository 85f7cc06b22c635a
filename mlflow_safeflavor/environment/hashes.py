"""Pins with the hashes of their wheels, as ``pip install --require-hashes`` reads them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.utils import canonicalize_name

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.environment.installed import TORCH_FAMILY
from mlflow_safeflavor.environment.pins import ONNX_REQUIREMENTS, Pin, Pins, parse_pins, read_pins
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.environment.wheels import Wheel, folder_of, wheels_in
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = ["lock", "lock_file", "missing_wheel", "uv_settings", "wheels_for"]

_TIMEOUT = 600  # seconds
# Settings of pip → uv's variables: uv reads no pip.conf.
_AS_UV_SAYS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
}


def lock(
    pins: Pins,
    *,
    python: str,
    installed: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Pins:
    """Resolve pins with uv, from wheels alone, and add the hashes of all that may be installed.

    Where a folder named by the pins holds a wheel of a pinned version, that wheel counts, and never
    an index's of the same version. An index named by the pins is asked for builds of torch alone.
    All other names are looked up where pip and uv are configured to, and only in the first index
    that has the name; where pip is configured to several, it and we take them as one.

    Args:
        pins: Pins to lock; those that have hashes are left as they are.
        python: Version to resolve for, like "3.11.7".
        installed: Canonical name → SHA-256 of the wheel that was installed when the model was
            saved, where that is known; no other may be installed.
        settings: From ``uv_settings``, where they are known.

    Raises:
        EnvironmentMismatchError: uv is not installed, or finds no wheels for the pins, or others
            than were installed.
    """
    if pins.are_locked:
        return pins
    environ = uv_settings() if settings is None else settings
    with scratch_folder("lock") as folder:
        Path(folder, "pyproject.toml").write_text(
            _project(pins, installed or {}, environ), encoding="utf-8"
        )
        Path(folder, "constraints.txt").write_text(
            "\n".join(map(str, pins.constraints)), encoding="utf-8"
        )
        lines = _compiled(folder, environ, python, filter(None, map(folder_of, pins.options)))
    locked = [_as_installed(pin, installed or {}) for pin in parse_pins(lines, "uv pip compile")]
    return replace(pins, pins=tuple(locked), constraints=())


def _compiled(
    folder: Path, environ: Mapping[str, str], python: str, wheels: Iterable[Path]
) -> list[str]:
    """Lines of the lock that uv makes of the project and the constraints in a folder."""
    # Nothing is built here: a source distribution runs its author's code.
    command = [_uv(), "pip", "compile", "pyproject.toml", "--only-binary", ":all:"]
    command += ["--constraint", "constraints.txt", "--output-file", "lock.txt", "--generate-hashes"]
    command += ["--python-version", python, "--no-header", "--no-annotate", "--quiet"]
    # uv was seen to read a uv.toml of the folder for temporary files, and to run its .venv: other
    # users may write both.
    command += ["--no-config", "--python", sys.executable, "--no-python-downloads"]
    command += [f"--find-links={found}" for found in wheels]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise EnvironmentMismatchError(
            "The pins cannot be locked with hashes",
            where="uv pip compile",
            wanted="a wheel to install for each pin",
            found=done.stderr.strip()[-1500:],
            hint="say where the wheels are (torch_index=… when saving, UV_DEFAULT_INDEX, "
            "UV_FIND_LINKS); where several indexes have the name, "
            "UV_INDEX_STRATEGY=unsafe-best-match looks at all; or do without hashes",
        )
    return Path(folder, "lock.txt").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


def lock_file(layout: Layout, recorded: Environment) -> None:
    """Lock the pins of a staged artifact, and those of its graph alone where it has both.

    Raises:
        EnvironmentMismatchError: See ``lock``.
    """
    settings = uv_settings()
    for path in (layout.requirements, layout.root / ONNX_REQUIREMENTS):
        if path.exists():
            locked = lock(
                read_pins(layout, path.name),
                python=recorded.python,
                installed=recorded.wheel_digests,
                settings=settings,
            )
            lines = [*locked.options, *map(str, locked.pins)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_installed(pin: Pin, installed: Mapping[str, str]) -> Pin:
    """The pin with the one hash of the wheel that was installed when the model was saved."""
    if (wanted := installed.get(pin.name)) is None:
        return pin
    if wanted not in pin.hashes:
        raise missing_wheel(pin, wanted, pin.hashes)
    return replace(pin, hashes=(wanted,))


def missing_wheel(pin: Pin, wanted: str, found: Sequence[str]) -> EnvironmentMismatchError:
    """The error about a wheel that was installed at save and that no folder or index has now."""
    return EnvironmentMismatchError(
        "The wheel that was installed when the model was saved is not there any more",
        where=pin.requirement,
        wanted=f"SHA-256 {wanted}",
        found=", ".join(found[:5]) or "none in the folders that the model and UV_FIND_LINKS name",
        hint="name the folder that holds it: UV_FIND_LINKS=FOLDER; or save the model again where "
        "another build is installed",
    )


def _project(pins: Pins, installed: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """A pyproject.toml that ties each distribution of a named folder or index to that source."""
    # Where it may look at other indexes as well, uv was seen to take their wheel of the same
    # version instead of the folder's. Only sources of a project tie a name to an index.
    sources: dict[str, str] = {}  # canonical name → index, the first counts
    for wheel in wheels_for(pins, installed, environ):
        sources.setdefault(wheel.name, _index(wheel.path.parent.absolute().as_uri(), flat=True))
    for option in pins.options:
        name, _, url = option.partition(" ")
        if not folder_of(option):
            for served in _served(url, pins):
                sources.setdefault(served, _index(url, flat=name == "--find-links"))
    indexes = list(dict.fromkeys(sources.values()))
    lines = ["[project]", 'name = "mlflow-safeflavor-image"', 'version = "0"']
    lines += [
        f"dependencies = {json.dumps([str(pin.requirement) for pin in pins.pins])}",
        "[tool.uv.sources]",
    ]
    lines += [
        f'{name} = {{index = "source-{indexes.index(index)}"}}' for name, index in sources.items()
    ]
    for i, index in enumerate(indexes):
        # explicit: asked for the names tied to it, and for no others.
        lines += ["[[tool.uv.index]]", f'name = "source-{i}"', "explicit = true", index]
    return "\n".join(lines) + "\n"


def _index(url: str, *, flat: bool) -> str:
    return f"url = {json.dumps(url)}" + ('\nformat = "flat"' if flat else "")


def _served(url: str, pins: Pins) -> list[str]:
    """Names that a URL of ``torch_index`` is asked for: its page's, or all labelled builds."""
    page = canonicalize_name(url.rstrip("/").rpartition("/")[2])
    labelled = [
        name for name, version in pins.versions.items() if name in TORCH_FAMILY or "+" in version
    ]
    return [page] if page in pins.versions else labelled


def wheels_for(
    pins: Pins, installed: Mapping[str, str], environ: Mapping[str, str] | None = None
) -> Iterator[Wheel]:
    """Wheels of the pinned versions in local folders that the pins or ``UV_FIND_LINKS`` name."""
    given = [folder for option in pins.options if (folder := folder_of(option))]
    told = (os.environ if environ is None else environ).get("UV_FIND_LINKS", "").split(",")
    others = [folder for path in told if (folder := folder_of(f"--find-links {path}"))]
    # UV_FIND_LINKS counts for distributions whose wheel was recorded, since its folder may have
    # moved; of all others uv itself chooses among folders and indexes.
    versions = pins.versions
    for folders, names in ((given, versions.keys()), (others, versions.keys() & installed.keys())):
        for wheel in (wheel for folder in folders for wheel in wheels_in(folder)):
            if wheel.name in names and versions[wheel.name] == wheel.version:
                yield wheel


def _uv() -> str:
    if found := shutil.which(
        "uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ):
        return found
    raise EnvironmentMismatchError(
        "Hashes are looked up by uv, which is not installed",
        where="uv",
        hint="pip install 'mlflow-safeflavor[docker]', or do without hashes",
    )


def uv_settings() -> dict[str, str]:
    """Variables for uv: pip's settings, overruled by this process's own, with absolute folders."""
    environ = {**_pip_settings(), **os.environ}
    if links := environ.get("UV_FIND_LINKS"):
        # uv runs in a folder of its own, where relative ones would name others.
        absolute = (
            os.path.abspath(link) if os.path.isdir(link) else link for link in links.split(",")
        )
        environ["UV_FIND_LINKS"] = ",".join(absolute)
    return environ


def _pip_settings() -> Mapping[str, str]:
    """Where pip is configured to look, as uv's variables.

    pip takes the best of all its indexes; uv asks those beside the default one first, and then no
    other that has the name: a build of a private name on a public index is not taken.
    """
    # In a scratch folder: with -m Python imports from the working folder, which may be a downloaded
    # model with a pip.py.
    command = [sys.executable, "-m", "pip", "config", "list"]
    with scratch_folder("lock") as folder:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        variable = _AS_UV_SAYS.get(name.rpartition(".")[2])
        if variable and value.startswith(("'", '"')):
            settings[variable] = " ".join(value[1:-1].replace("\\n", " ").split())
    if settings.get("UV_FIND_LINKS"):
        settings["UV_FIND_LINKS"] = settings["UV_FIND_LINKS"].replace(" ", ",")
    return settings
