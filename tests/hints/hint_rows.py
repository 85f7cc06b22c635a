"""The rows of the table of hints: a test that meets a message, and does what its hint says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hints.sites import Site

from mlflow_safeflavor.errors import SafeFlavorError

X = {"x": np.ones((2, 4), "float32")}
"""Rows of the modules that tests write, see ``code``."""

FOLLOWED: dict[Site, str] = {}
"""Site → the test that follows its hint; filled as test modules are imported."""


def follows(module: str, what: str, hint: str = "") -> Callable[[Any], Any]:
    """Mark a test that meets this message and does literally what its hint says.

    Args:
        module: Of the package, such as ``tasks/raw``.
        what: The message's first sentence, as it is written in the source, with ``…`` for what is
            computed.
        hint: Likewise; may be left out for a line of the log.
    """
    site = Site(module, what, hint or what)

    def mark(test: Any) -> Any:
        FOLLOWED[site] = f"{test.__module__}.py::{test.__name__}"
        return pytest.mark.hint(site)(test)

    return mark


def refused(kind: type[SafeFlavorError], act: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """The error of this kind that a call ends with."""
    with pytest.raises(kind) as error:
        act(*args, **given)
    return error.value
