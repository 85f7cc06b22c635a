"""The closure: installed distributions that the roots require, directly or in turn."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mlflow_safeflavor.environment.installed import (
    MISSING,
    OWN_NAME,
    Installed,
    installed_distributions,
)
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = ["closure_of", "reached_from", "tops_of"]

_logger = logging.getLogger("mlflow.safeflavor")


def closure_of(roots: Iterable[str], *, path: Sequence[str] | None = None) -> frozenset[str]:
    """Canonical names of the installed distributions that the roots need, themselves among them."""
    return frozenset(reached_from(roots, installed_distributions(path))[0])


def tops_of(names: Iterable[str], *, path: Sequence[str] | None = None) -> list[str]:
    """The installed distributions among ``names`` that no other of them requires."""
    installed = installed_distributions(path)
    tops: dict[str, set[str]] = {}
    for name in sorted(names):
        if not any(name in closure for closure in tops.values()):
            closure = reached_from([name], installed)[0]
            tops = {top: below for top, below in tops.items() if top not in closure} | {
                name: closure
            }
    return sorted(tops)


def reached_from(
    roots: Iterable[str], installed: Mapping[str, Installed]
) -> tuple[set[str], list[str], list[tuple[str, str]]]:
    """Names reached from the roots, requirements without an installed answer, contradictions.

    A contradiction is a pair (wanted, found).
    """
    queue = [("", requirement) for requirement in _present(roots, installed)]
    # Name → extras already followed: a distribution comes again with each new extra, and cycles
    # (sphinx and its own plugins) end.
    done: dict[str, set[str]] = {}
    missing: dict[str, None] = {}
    conflicts: dict[tuple[str, str], None] = {}
    while queue:
        origin, requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        wanted = f"{origin or 'this model'} requires {requirement}"
        # Told and not refused: metadata that names what the program runs without is common.
        if name not in installed:
            missing[wanted] = None
            continue
        if not _satisfies(requirement, installed[name].version):
            conflicts[wanted, f"{name} {installed[name].version}"] = None
        extras = {"", *map(canonicalize_name, requirement.extras)} - done.setdefault(name, set())
        done[name] |= extras
        # This package comes along in every artifact: a requirement on it brings none of ours.
        if name != OWN_NAME or not origin:
            queue.extend((name, needed) for needed in _requires(installed[name], extras))
    return done.keys() - {OWN_NAME}, sorted(missing), sorted(conflicts)


def _present(roots: Iterable[str], installed: Mapping[str, object]) -> Iterator[Requirement]:
    """The roots whose marker holds here, each of which has to be installed."""
    for requirement in map(Requirement, roots):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if canonicalize_name(requirement.name) not in installed:
            raise EnvironmentMismatchError(
                "A distribution that the model needs is not installed",
                where=requirement.name,
                wanted=str(requirement),
                found=MISSING,
                hint=f"pip install '{requirement}'",
            )
        yield requirement


def _requires(distribution: Installed, extras: Collection[str]) -> Iterator[Requirement]:
    """Requirements that hold on this machine for any of the extras; ``""`` stands for no extra."""
    for line in distribution.requires:
        try:
            requirement = _parse_requirement(line)
        # Old releases hold lines that packaging does not read any more, such as "a>=1.0.*".
        except InvalidRequirement:
            _logger.warning(
                "Metadata of %s holds a requirement nobody can read: %s", distribution.name, line
            )
            continue
        if requirement.marker is None:
            if "" in extras:
                yield requirement
        elif any(_holds(line, extra) for extra in extras):
            yield requirement


_parse_requirement = functools.cache(Requirement)


# Cached: a save asks for several closures, each with a thousand markers.
@functools.cache
def _holds(line: str, extra: str) -> bool:
    marker = _parse_requirement(line).marker
    return marker is None or marker.evaluate({"extra": extra})


def _satisfies(requirement: Requirement, version: str) -> bool:
    try:
        # prereleases: else an installed 2.0rc1 would not answer ">=1.0", though pip installed it.
        return not requirement.specifier or requirement.specifier.contains(
            Version(version), prereleases=True
        )
    except InvalidVersion:
        return False
