"""Fill the virtual environment whose interpreter runs this script.

PyPI's Linux wheels of torch bring several GB of CUDA with them. On a machine without an NVIDIA
GPU the CPU build is installed instead: the one that pip's own configuration offers, if there is
one, else the one from PyTorch's index. Standard library only: nothing is installed yet.

Read from the environment: ``TORCH``, ``TRANSFORMERS`` and ``MLFLOW`` (versions; empty for the
default), ``TORCH_INDEX`` (an index URL, or ``default`` for whatever pip is configured to use).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time

TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "test,dev,accelerate"
RUNNING = ".".join(platform.python_version_tuple()[:2])


def has_nvidia_gpu() -> bool:
    """Whether the driver's own tool sees a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def offered_torch_versions(python: str) -> set[str]:
    """Every version of torch that pip, as it is configured here, would consider; downloads none."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "index",
        "versions",
        "torch",
        "--python-version",
        python,
    ]
    listing = subprocess.run(command, capture_output=True, text=True)
    versions = re.search(r"^Available versions: (.*)$", listing.stdout, re.MULTILINE)
    return set(versions[1].split(", ")) if versions else set()


def torch_arguments(version: str, index: str, python: str = RUNNING) -> tuple[list[str], str]:
    """What to tell pip about torch, and why.

    Args:
        version: With or without a local label such as ``+cpu``.
        index: An index URL, ``default``, or nothing to choose by what this machine is.
        python: Release of the interpreter that is to have it, such as "3.11".
    """
    wanted = f"torch=={version}"
    if index and index != "default":
        return ["--index-url", index, wanted], f"from {index}"
    if index == "default" or "+" in version:
        return [wanted], "as pip is configured"
    if platform.system() != "Linux":
        return [wanted], "the build for this platform has no CUDA"
    if has_nvidia_gpu():
        return [wanted], "with CUDA: this machine has an NVIDIA GPU"
    if f"{version}+cpu" in offered_torch_versions(python):
        return [f"{wanted}+cpu"], "CPU build, which pip is configured to find"
    return ["--index-url", CPU_INDEX, wanted], f"CPU build, from {CPU_INDEX}"


def run(what: str, *arguments: str) -> None:
    """Run pip, quietly but for one line that says what it does and how long that took."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-qq",
        "--no-compile",
        *arguments,
    ]
    started = time.monotonic()
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1):
            print(f"\r{what} … {time.monotonic() - started:.0f} s ", end="", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        ticker.start()
    else:
        print(f"{what} …", flush=True)
    status = subprocess.run(command).returncode
    done.set()
    if ticker.is_alive():
        ticker.join()
    mark = "\r" if sys.stdout.isatty() else ""
    print(
        f"{mark}{what}: {'done' if status == 0 else 'FAILED'}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    if status != 0:
        sys.exit(
            f"pip could not do it: {' '.join(command)}\nTORCH_INDEX=URL names another place to "
            "take torch from."
        )


def compile_all() -> None:
    """Byte code, on all cores, unlike pip's; not of tests that come along, nor of templates."""
    print("byte code …", flush=True)
    command = [
        sys.executable,
        "-m",
        "compileall",
        "-qq",
        "-j",
        "0",
        "-x",
        "/tests?/",
        sysconfig.get_path("purelib"),
    ]
    subprocess.run([*command, "mlflow_safeflavor"])


def main() -> None:
    """Install torch first, then everything else around it."""
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        sys.exit(
            f"Python 3.10 to 3.13 is needed, this is {platform.python_version()}: make venv "
            "PYTHON=python3.11"
        )
    environ = os.environ.get
    arguments, why = torch_arguments(environ("TORCH") or TORCH, environ("TORCH_INDEX", ""))
    run(f"torch {environ('TORCH') or TORCH} ({why})", *arguments)
    pins = [
        f"{name}=={version}"
        for name in ("transformers", "mlflow")
        if (version := environ(name.upper()))
    ]
    run("mlflow-safeflavor and what it is tested with", "--editable", f".[{EXTRAS}]", *pins)
    compile_all()


if __name__ == "__main__":
    main()
