"""Entry points of an image made by ``image``: the check in its build, and MLflow's server."""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from typing import Any

from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.machine import available_cpus

__all__ = ["check", "serve"]

# Both as in MLflow's own image, so that either image takes the other's place.
MODEL = "/opt/ml/model"
PORT = 8080

# uvicorn starts each worker anew, which is mostly imports. Here its workers are forks of a process
# that has imported what all of them need: four took 70 % of the CPU time and 80 % of the memory.
# uvicorn has no seam for it; with a release without these names workers start as ever. Not among
# what is imported: onnxruntime, which starts a thread if it is to report to its makers, and torch,
# which reads its number of threads.
_UVICORN = """\
import multiprocessing, sys
from uvicorn import main
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["mlflow.pyfunc.scoring_server", "fastapi", "uvicorn.server"])
try:
    from uvicorn import _subprocess
    _subprocess.spawn = forks
except ImportError:
    pass
main(sys.argv[2:], "uvicorn")
"""


def check() -> None:
    """Load the model with every check, and replay its golden rows."""
    # In the build of the image: a damaged model fails there, not when it is to serve.
    from mlflow_safeflavor.load.pyfunc import load_pyfunc

    print(f"safeflavor: {load_pyfunc(MODEL).model.report}")


def serve() -> None:
    """Become MLflow's scoring server.

    ``MLFLOW_MODELS_WORKERS`` is the number of workers; by default one for each core that affinity
    and quota allow, on a GPU one.

    Raises:
        SystemExit: The image was made for a GPU, and there is none; says what is missing.
    """
    from mlflow.pyfunc import scoring_server

    on_gpu = os.environ.get("MLFLOW_SAFEFLAVOR_DEVICE", "").startswith("cuda")
    if on_gpu and (missing := _missing_gpu()):
        raise SystemExit(str(_without_gpu(missing)))
    # MLflow's own image starts a worker for each core of the host, whatever --cpus says. On a GPU
    # each worker would have the weights there once more.
    workers = int(os.environ.get("MLFLOW_MODELS_WORKERS") or (1 if on_gpu else available_cpus()))
    everywhere: Any = "0.0.0.0"  # noqa: S104  (a container's own; MLflow's annotation says int)
    command, environ = scoring_server.get_cmd(
        model_uri=MODEL, port=PORT, host=everywhere, nworkers=workers
    )
    sys.stdout.flush()  # exec drops what is buffered
    # uvicorn imports from its working folder before any other, and that may be one that others
    # write to.
    os.chdir(os.path.dirname(MODEL))
    if command.startswith("uvicorn "):
        command = f"{shlex.join([sys.executable, '-c', _UVICORN])} {command}"
    # In place of this process, so that it is the one that gets the signals of `docker stop`.
    # Through a shell, because MLflow 2.9.2 wrote its command for one: it has a variable in it.
    # Nothing in it comes from a model or a request.
    os.execvpe("sh", ["sh", "-c", f"exec {command}"], environ)  # noqa: S606, S607


def _missing_gpu() -> str | None:
    """Words for the missing part of a GPU's setup; None where there is a GPU."""
    # Asked of the driver: to import torch for this would take seconds of each start.
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


_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def _without_gpu(missing: str) -> PlacementError:
    return PlacementError(
        "This image was made to serve on a GPU, and there is none here",
        where="MLFLOW_SAFEFLAVOR_DEVICE",
        wanted=os.environ["MLFLOW_SAFEFLAVOR_DEVICE"],
        found=missing,
        hint="docker run --gpus all …, on a host with NVIDIA's driver and container toolkit; "
        "-e MLFLOW_SAFEFLAVOR_DEVICE=cpu serves on the CPU all the same",
    )
