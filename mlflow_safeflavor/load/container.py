"""Entry points of an image made by ``image``: the check in its build, and MLflow's server."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlflow_safeflavor.errors import InputError, PlacementError
from mlflow_safeflavor.load.forks import share_with_forks
from mlflow_safeflavor.machine import available_cpus

__all__ = ["check", "serve"]

# Both as in MLflow's own image, so that either image takes the other's place.
MODEL = "/opt/ml/model"
PORT = 8080


def check() -> None:
    """Load the model with every check, and replay its golden rows."""
    # In the build of the image: a damaged model fails there, not when it is to serve.
    from mlflow_safeflavor.load.pyfunc import load_pyfunc

    print(f"safeflavor: {load_pyfunc(MODEL).model.report}")


def serve() -> None:
    """Be MLflow's scoring server.

    ``MLFLOW_MODELS_WORKERS`` is the number of workers; by default one for each core that affinity
    and quota allow, on a GPU one.

    Raises:
        SystemExit: The image was made for a GPU, and there is none, or the number is none; says
            what is missing.
    """
    from mlflow.pyfunc import scoring_server

    on_gpu = os.environ.get("MLFLOW_SAFEFLAVOR_DEVICE", "").startswith("cuda")
    if on_gpu and (missing := _missing_gpu()):
        raise SystemExit(str(_without_gpu(missing)))
    # MLflow's own image starts a worker for each core of the host, whatever --cpus says. On a GPU
    # each worker would have the weights there once more.
    workers = os.environ.get("MLFLOW_MODELS_WORKERS") or str(1 if on_gpu else available_cpus())
    if not workers.isdecimal() or not int(workers):
        raise SystemExit(str(_without_workers(workers)))
    everywhere: Any = "0.0.0.0"  # noqa: S104  (a container's own; MLflow's annotation says int)
    command, environ = scoring_server.get_cmd(
        model_uri=MODEL, port=PORT, host=everywhere, nworkers=int(workers)
    )
    # uvicorn imports from its working folder before any other, and that may be one that others
    # write to.
    os.chdir(os.path.dirname(MODEL))
    program, *arguments = shlex.split(command)
    if program == "uvicorn":
        # What is imported here is imported once: another process would do it all again.
        os.environ.update(environ, MLFLOW_MODELS_WORKERS=workers)
        # MLflow has no seam there either.
        load = scoring_server.load_model  # type: ignore[attr-defined]
        scoring_server.load_model = partial(_loaded, load)  # type: ignore[attr-defined]
        if not on_gpu:  # no driver survives a fork, and it was asked above
            _fork_workers()
        _serve_from_here(arguments)
        return
    sys.stdout.flush()  # exec drops what is buffered
    # In place of this process, so that it is the one that gets the signals of `docker stop`.
    # Through a shell, because MLflow 2.9.2 wrote its command for one: it has a variable in it.
    # Nothing in it comes from a model or a request.
    os.execvpe("sh", ["sh", "-c", f"exec {command}"], environ)  # noqa: S606, S607


def _without_workers(found: str) -> InputError:
    return InputError(
        "A server needs workers",
        where="MLFLOW_MODELS_WORKERS",
        wanted="a whole number from 1",
        found=found,
    )


def _fork_workers() -> None:
    """Have uvicorn fork its workers from this process, with all that they need imported."""
    # It starts each anew, which is mostly imports, and has no seam for another way: with a release
    # without these names workers start as ever.
    try:
        from uvicorn import _subprocess
    except ImportError:
        return
    _subprocess.spawn = multiprocessing.get_context("fork")  # type: ignore[assignment]
    # Else one that is told to end before it serves would only note that, as the parent does.
    os.register_at_fork(after_in_child=_end_by_signals)
    share_with_forks()


def _end_by_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


# Whether a worker has ever been up, and whether one failed before; memory that forks share.
_UP, _FAILED = 0, 1
_seen = mmap.mmap(-1, 2)
_server = os.getpid()


def _loaded(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """MLflow's load in a worker, whose failure ends the server if none has ever been up."""
    try:
        # MLflow's look at the pins reads the metadata of all that is installed. Our own load
        # compares every distribution with what was recorded; in an image a difference is an error.
        model = load(*args, **kwargs, suppress_warnings=True)
    except Exception:
        if not _seen[_UP] and os.getpid() != _server:
            # Else uvicorn would start it again for ever.
            _seen[_FAILED] = 1
            os.kill(_server, signal.SIGTERM)
        raise
    _seen[_UP] = 1
    return model


def _serve_from_here(arguments: Sequence[str]) -> None:
    """Run uvicorn in this process."""
    # The model's own code comes first only once MLflow puts it there: it may have the name of
    # something that the server imports.
    sys.path.pop(0)
    import uvicorn

    try:
        uvicorn.main(arguments, "uvicorn")
    except SystemExit as ended:  # with 0 also where a worker failed
        sys.exit(ended.code or _seen[_FAILED])


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
