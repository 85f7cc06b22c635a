"""What the rows of the table of hints share: each hint was told to somebody while its test ran."""

from __future__ import annotations

import logging
import re
import warnings

import pytest
import torch  # noqa: F401  (its first import warns, which within a test would be an error)
from sites import Site

from mlflow_safeflavor.errors import SafeFlavorError


@pytest.fixture(autouse=True)
def told(request, monkeypatch):
    """Every hint of the test's rows is told to somebody while it runs."""
    said: list[tuple[str, str]] = []
    make, warn = SafeFlavorError.__init__, warnings.warn

    def note(self, what, **details):
        said.append((what, details.get("hint") or ""))
        make(self, what, **details)

    def note_warning(message, *args, **options):
        said.append((str(message),) * 2)
        warn(message, *args, **options)

    monkeypatch.setattr(SafeFlavorError, "__init__", note)
    monkeypatch.setattr(warnings, "warn", note_warning)
    handler = logging.Handler()
    handler.emit = lambda record: said.append((str(record.msg),) * 2)
    logger = logging.getLogger("mlflow.safeflavor")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    for site in (marker.args[0] for marker in request.node.iter_markers("hint")):
        assert any(_is(site, *each) for each in said), f"nobody was told: {site}; but {said}"


def _is(site: Site, what: str, hint: str) -> bool:
    # What has no blank is the name of a constant, or of the function that makes a hint of it.
    named = " " not in site.what or any(
        _pattern(one).fullmatch(what) for one in site.what.split(" | ")
    )
    return named and _pattern(site.hint).search(hint) is not None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, re.split(r"…|\{model\}", template))), re.DOTALL)
