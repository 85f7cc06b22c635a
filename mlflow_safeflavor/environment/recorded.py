"""The environment that a model was saved in, and its JSON."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.spec import is_plain_text, is_scalar
from mlflow_safeflavor.errors import IntegrityError

__all__ = ["PLATFORM_KEYS", "Environment", "platform_facts"]


@dataclass(frozen=True)
class Environment:
    """Platform and distributions of the environment that a model was saved in.

    Attributes:
        python: Full version, such as ``3.11.7``.
        implementation: Such as ``CPython``.
        system: Such as ``Linux``.
        machine: Such as ``x86_64``.
        libc: Such as ``glibc 2.36``; empty where the platform does not tell.
        distributions: Canonical name → exact version with its local label (``2.13.0+cpu``), sorted
            by name.
        torch_build: Facts about torch that only torch itself knows, handed in by the caller; JSON
            scalars.
        only_module: Names among them that only the module needs, and the graph does not.
        wheels: Names among them that came from a wheel of a folder that requirements.txt names →
            its ``file``, ``sha256``, and ``content``; see ``wheels.installed_content``.
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
            # Sorted, so that the same environment is the same bytes of JSON.
            object.__setattr__(
                self, name, MappingProxyType(dict(sorted(getattr(self, name).items())))
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON-able value of ``environment.json``; ``from_json`` reads it back."""
        facts = {name: getattr(self, name) for name in PLATFORM_KEYS}
        pins = {"distributions": dict(self.distributions), "only_module": list(self.only_module)}
        wheels = {name: dict(wheel) for name, wheel in self.wheels.items()}
        return facts | pins | {"torch_build": dict(self.torch_build), "wheels": wheels}

    @property
    def wheel_digests(self) -> dict[str, str]:
        """Canonical name → SHA-256 of the wheel that was installed, where that is known."""
        return {name: wheel["sha256"] for name, wheel in self.wheels.items()}

    def for_graph(self) -> Environment:
        """Without the distributions that only the module needs."""
        kept = {
            name: version
            for name, version in self.distributions.items()
            if name not in self.only_module
        }
        wheels = {name: wheel for name, wheel in self.wheels.items() if name in kept}
        return replace(self, distributions=kept, only_module=(), wheels=wheels)

    @classmethod
    def read(cls, layout: Layout) -> Environment:
        """Read ``environment.json`` of an artifact; see ``from_json``."""
        return cls.from_json(layout.read_json(layout.environment))

    @classmethod
    def from_json(cls, value: object) -> Environment:
        """Read the value of ``environment.json``; keys that this release does not know are ignored.

        Raises:
            IntegrityError: A key is missing or of the wrong type.
        """
        entry = value if isinstance(value, Mapping) else {}
        # Checked here, once, for all who print these values or write them into a Dockerfile.
        for key, (pattern, words) in PLATFORM_KEYS.items():
            value = entry.get(key)
            _check(isinstance(value, str) and re.fullmatch(pattern, value), key, words, value)
        for key in ("distributions", "torch_build"):
            found = entry.get(key)
            _check(
                isinstance(found, Mapping) and all(isinstance(k, str) for k in found),
                key,
                "an object",
                found,
            )
        # Types first: matching a number or a list raises an error of Python's.
        for name, version in entry["distributions"].items():
            _check(re.fullmatch(_DISTRIBUTION, name), "distributions", "names", name)
            exact = re.fullmatch(_VERSION, version) if isinstance(version, str) else None
            _check(exact, f"distributions, {name}", "a version as a string", version)
        for name, fact in entry["torch_build"].items():
            _check(
                is_plain_text(name) and is_scalar(fact),
                "torch_build",
                "names with numbers or short texts",
                fact,
            )
        # Absent in artifacts of a module alone.
        only_module = entry.get("only_module", [])
        sound = isinstance(only_module, list) and all(map(is_plain_text, only_module))
        _check(sound, "only_module", "a list of names", only_module)
        wheels = entry.get("wheels", {})
        _check(isinstance(wheels, Mapping), "wheels", "an object", wheels)
        for name, wheel in wheels.items():
            _check(
                name in entry["distributions"] and _is_wheel(wheel),
                "wheels",
                "file, sha256 and content",
                wheel,
            )
        facts = {key: entry[key] for key in (*PLATFORM_KEYS, "distributions", "torch_build")}
        return cls(**facts, only_module=tuple(only_module), wheels=wheels)


# Used with fullmatch: "$" of a plain match would let a final line break through, and with it a line
# of a Dockerfile.
PLATFORM_KEYS = {
    "python": (r"\d{1,2}\.\d{1,3}(\.\d{1,3}[0-9A-Za-z.+]{0,20})?", "a version as a string"),
    "implementation": (r"[A-Za-z][\w.-]{0,40}", "a name as a string"),
    "system": (r"[\w.-]{0,40}", "a name as a string"),
    "machine": (r"[\w.-]{0,40}", "a name as a string"),
    "libc": (r"[\w.+-]{0,20}( [\w.+-]{1,40})?", "a name and a version as a string"),
}

_DISTRIBUTION = r"[A-Za-z0-9]([\w.-]{0,200}[A-Za-z0-9])?"
_VERSION = r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,100}"


def _is_wheel(value: object) -> bool:
    patterns = {
        "file": r"[\w.+!-]{1,250}\.whl",
        "sha256": r"[0-9a-f]{64}",
        "content": r"[0-9a-f]{64}",
    }
    return (
        isinstance(value, Mapping)
        and value.keys() == patterns.keys()
        and all(
            isinstance(value[key], str) and re.fullmatch(patterns[key], value[key])
            for key in patterns
        )
    )


def _check(ok: object, where: str, wanted: str, found: object) -> None:
    if not ok:
        raise IntegrityError(
            "environment.json does not say what its format asks for",
            where=f"environment.json, {where}",
            wanted=wanted,
            found="nothing" if found is None else repr(found)[:200],
            hint=FETCH_AGAIN,
        )


def platform_facts() -> dict[str, str]:
    """Facts of this platform, by the names of ``PLATFORM_KEYS``."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": " ".join(filter(None, platform.libc_ver())),
    }
