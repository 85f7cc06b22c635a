"""What runs inside an image of ``image``.

MLflow's own scoring server, as many workers as there is CPU for.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.machine import available_cpus

__all__ = ["check", "serve"]

MODEL = "/opt/ml/model"
# Where MLflow's image has the model, and listens.
PORT = 8080


def check() -> None:
    """Load the model with every check, and replay its golden rows; while the image is built."""
    from mlflow_safeflavor.load.pyfunc import load_pyfunc

    print(f"safeflavor: {load_pyfunc(MODEL).model.report}")


def serve() -> None:
    """Become MLflow's scoring server.

    ``MLFLOW_MODELS_WORKERS`` is the number of workers; by default one for each core that affinity
    and quota allow, where MLflow's own image starts one for each core of the host. On a GPU it is
    one, since each worker has the weights there once more.

    Raises:
        SystemExit: The image was made for a GPU, and there is none; says what is missing.
    """
    from mlflow.pyfunc import scoring_server

    on_gpu = os.environ.get("MLFLOW_SAFEFLAVOR_DEVICE", "").startswith("cuda")
    if on_gpu and (missing := _missing_gpu()):
        raise SystemExit(str(_without_gpu(missing)))
    workers = int(os.environ.get("MLFLOW_MODELS_WORKERS") or (1 if on_gpu else available_cpus()))
    everywhere: Any = "0.0.0.0"  # noqa: S104  (a container's own; MLflow's annotation says int)
    command, environ = scoring_server.get_cmd(
        model_uri=MODEL, port=PORT, host=everywhere, nworkers=workers
    )
    sys.stdout.flush()
    # uvicorn imports from its working folder before any other, and that may be one that others
    # write to.
    os.chdir(os.path.dirname(MODEL))
    # In place of this process, so that it is the one that gets the signals of `docker stop`.
    # Through a shell, because MLflow 2.9.2 wrote its command for one: it has a variable in it.
    os.execvpe("sh", ["sh", "-c", f"exec {command}"], environ)  # noqa: S606, S607  (nothing of anybody else's is in it)


def _missing_gpu() -> str | None:
    """What is missing, asked of the driver and not of torch, which takes seconds.

    None where a GPU is there.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver in this container (libcuda.so.1)"
    count = ctypes.c_int(0)
    if code := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"an NVIDIA driver that answers with error {code}" + (
            ": it sees no GPU" if code == _NO_DEVICE else ""
        )
    return None if count.value else "an NVIDIA driver that shows no GPU to this container"


_NO_DEVICE = 100


def _without_gpu(missing: str) -> PlacementError:
    return PlacementError(
        "This image was made to serve on a GPU, and there is none here",
        where="MLFLOW_SAFEFLAVOR_DEVICE",
        wanted=os.environ["MLFLOW_SAFEFLAVOR_DEVICE"],
        found=missing,
        hint="docker run --gpus all …, on a host with NVIDIA's driver and container toolkit; "
        "-e MLFLOW_SAFEFLAVOR_DEVICE=cpu serves on the CPU all the same",
    )
