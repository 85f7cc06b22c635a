"""What runs inside an image of ``docker.py``: MLflow's own scoring server, as many workers as there is CPU for."""

from __future__ import annotations

import os
import sys
from typing import Any

from mlflow_safeflavor.cpu import available_cpus

__all__ = ["check", "serve"]

MODEL = "/opt/ml/model"
PORT = 8080
"""Where MLflow's image has the model, and listens."""


def check() -> None:
    """Load the model with every check, and replay its golden rows; while the image is built."""
    from mlflow_safeflavor.pyfunc import load_pyfunc

    print(f"safeflavor: {load_pyfunc(MODEL).model.report}")


def serve() -> None:
    """Become MLflow's scoring server.

    ``MLFLOW_MODELS_WORKERS`` is the number of workers; by default one for each core that affinity and quota
    allow, where MLflow's own image starts one for each core of the host.
    """
    from mlflow.pyfunc import scoring_server

    workers = int(os.environ.get("MLFLOW_MODELS_WORKERS") or available_cpus())
    everywhere: Any = "0.0.0.0"  # noqa: S104  (a container's own; MLflow's annotation says int)
    command, environ = scoring_server.get_cmd(model_uri=MODEL, port=PORT, host=everywhere, nworkers=workers)
    sys.stdout.flush()
    # uvicorn imports from its working folder before any other, and that may be one that others write to.
    os.chdir(os.path.dirname(MODEL))
    # In place of this process, so that it is the one that gets the signals of `docker stop`. Through a shell, because
    # MLflow 2.9.2 wrote its command for one: it has a variable in it.
    os.execvpe("sh", ["sh", "-c", f"exec {command}"], environ)  # noqa: S606, S607  (nothing of anybody else's is in it)
