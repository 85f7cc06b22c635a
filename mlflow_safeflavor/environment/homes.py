"""Distributions that the classes of a model are from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from typing import Any

from packaging.utils import canonicalize_name

__all__ = ["homes_of"]


def homes_of(model: Any) -> list[str]:
    """Canonical names of the distributions that a model's classes are from, none twice.

    Args:
        model: A module, a transformers pipeline, a dict of parts of one, or a path or None, which
            have none.
    """
    tops = {
        base.__module__.partition(".")[0]
        for part in _parts(model)
        for base in type(part).__mro__
        if not isinstance(part, (str, type(None)))
    }
    installed = packages_distributions()
    return sorted({canonicalize_name(name) for top in tops for name in installed.get(top, ())})


def _parts(model: Any) -> Iterator[Any]:
    if isinstance(model, Mapping):
        yield from model.values()
        return
    yield model
    if any(base.__module__ == "transformers.pipelines.base" for base in type(model).__mro__):
        yield model.model
