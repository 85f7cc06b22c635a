"""A loaded model's share in MLflow's scoring server: the gate, metrics and a line a request."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT

from mlflow_safeflavor.predict.options import is_set
from mlflow_safeflavor.server.gate import App, Gate, Told
from mlflow_safeflavor.server.lines import LOG_REQUESTS, write_line
from mlflow_safeflavor.server.metrics import METRICS, Metrics, address_of, count_in
from mlflow_safeflavor.server.shared import shared_folder

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["attach", "prepare"]

# No keys of ``model_config``: that comes with the model, and whether a port is opened and what is
# logged is up to the server's owner.
_VARIABLES = (METRICS, LOG_REQUESTS)

_logger = logging.getLogger("mlflow.safeflavor")


def prepare(environ: Mapping[str, str] = os.environ) -> None:
    """Look at what the server's owner wants, before a model is loaded.

    Raises:
        InputError: ``MLFLOW_SAFEFLAVOR_METRICS`` is no place.
    """
    if not _makes_app():
        for name in _VARIABLES:
            if environ.get(name):
                _logger.warning("safeflavor: %s needs MLflow's server on FastAPI", name)
        return
    # Workers that are forked after their imports would all draw the same numbers; Python's own
    # generator is seeded anew by a fork.
    np.random.seed()
    if text := environ.get(METRICS):
        address_of(text)
        count_in(shared_folder())


def attach(model: LoadedModel, environ: Mapping[str, str] = os.environ) -> None:
    """Put a gate before the app that MLflow's scoring server is about to make in this process.

    Of several models in one server, such as those of an ensemble, the first one's gate stands.

    Raises:
        EnvironmentMismatchError: Metrics are wanted, and prometheus-client is not installed.
    """
    if not _makes_app() or _is_attached():
        return
    told: list[Told] = [write_line] if is_set(LOG_REQUESTS, environ) else []
    serves: Callable[[], None] | None = None
    if text := environ.get(METRICS):
        metrics = Metrics(model)
        told.append(metrics.request)
        host, port = address_of(text)
        serves = lambda: metrics.serve(host, port)  # noqa: E731
    limits = {name: model.options[name] for name in ("max_queue", "max_wait", "max_body")}

    def gated(app: App) -> App:
        if serves is not None:
            serves()  # not before: until it answers, a worker is none
        # MLflow's own variables have no types.
        timeout = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()  # type: ignore[no-untyped-call]
        return Gate(app, **limits, timeout=timeout, told=told)

    _around_next_app(gated)


def _makes_app() -> bool:
    # The module that makes the app loads the model first. Before MLflow 2.22 there was none, but a
    # server that answers one request at a time.
    return "mlflow.pyfunc.scoring_server.app" in sys.modules


def _is_attached() -> bool:
    import fastapi

    return not isinstance(fastapi.FastAPI, type)


def _around_next_app(make: Callable[[App], App]) -> None:
    """Have ``make`` put something around the next app that FastAPI makes in this process."""
    # MLflow has no seam there: it makes its app, and adds what stands before it, in one function.
    import fastapi

    plain = fastapi.FastAPI

    class Gated(plain):  # type: ignore[misc, valid-type]
        """The app of MLflow's scoring server, behind a gate."""

        def build_middleware_stack(self) -> App:
            """Outermost: a request that is refused costs nothing behind it."""
            return make(super().build_middleware_stack())

    def once(*args: object, **kwargs: object) -> object:
        fastapi.FastAPI = plain  # type: ignore[misc]
        return Gated(*args, **kwargs)

    fastapi.FastAPI = once  # type: ignore[misc, assignment]
