"""Observers of forwards and requests, whose failures are nobody's answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec

__all__ = ["unfailing"]

Told = ParamSpec("Told")

_logger = logging.getLogger("mlflow.safeflavor")


def unfailing(observer: Callable[Told, object], what: str) -> Callable[Told, None]:
    """An observer whose exceptions end here; the first one is logged, as ``what``.

    It is called again all the same: a disk that is full for a minute ends no metrics.
    """
    failed = False

    def tell(*args: Told.args, **kwargs: Told.kwargs) -> None:
        nonlocal failed
        try:
            observer(*args, **kwargs)
        except Exception:
            # Once: it may be told thousands of times a second.
            if not failed:
                _logger.exception("safeflavor: %s failed, and answers go on", what)
            failed = True

    return tell
