"""A Dockerfile for one model: environment in a layer below the weights, checked in the build."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import digest_of_plain, open_plain
from mlflow_safeflavor.artifact.staging import staging
from mlflow_safeflavor.artifact.trust import require_agreed, require_known
from mlflow_safeflavor.environment.hashes import lock, missing_wheel, uv_settings, wheels_for
from mlflow_safeflavor.environment.pins import CONSTRAINTS, ONNX_REQUIREMENTS, Pin, Pins, read_pins
from mlflow_safeflavor.environment.wheels import folder_of
from mlflow_safeflavor.errors import EnvironmentMismatchError, InputError
from mlflow_safeflavor.graph.file import read_graph, reason_against
from mlflow_safeflavor.load.download import located
from mlflow_safeflavor.load.saved import Saved, copy_saved
from mlflow_safeflavor.predict.options import run_time_options

__all__ = ["TARGETS", "generate_dockerfile"]

TARGETS = ("cpu", "cuda")
ENGINES = ("auto", "onnx", "openvino", "module")

# Used with fullmatch: these are written into a Dockerfile, in which a line break begins a command.
_CUDA_ONLY = re.compile(r"nvidia-.*|cuda-.*|triton|pytorch-triton.*")
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]{0,300}")
_WHEELS = "wheels"

_DOCKERFILE = """\
# {what}
# Build: docker build -t NAME .
# Run:   docker run --rm{gpus} -p 5001:8080 --read-only --tmpfs /tmp NAME
ARG PYTHON_IMAGE={base_image}

# Changes only when the pins do: retraining the model does not install anything anew.
# Without the tests that come with numpy and pandas (28 MB). Compiled with all cores, as pip does
# not, and no tests; that some files are templates, and no Python, is no failure.
FROM ${{PYTHON_IMAGE}} AS environment
COPY environment /build
WORKDIR /build
RUN python -m venv --without-pip /opt/venv \\
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile \\
      --only-binary :all:{hashes} -r requirements.txt \\
 && find /opt/venv/lib/*/site-packages/numpy /opt/venv/lib/*/site-packages/pandas \\
      -name tests -prune -exec rm -rf {{}} + \\
 && {{ /opt/venv/bin/python -m compileall -qq -j 0 -x '/tests?/' /opt/venv/lib || true; }}

FROM ${{PYTHON_IMAGE}}
RUN useradd --system --uid 10001 --no-create-home {user}
COPY --from=environment /opt/venv /opt/venv
# Everything that is written goes below /tmp, so the rest may be read-only.
# What is installed here is what was recorded, so another environment is an error.
ENV PATH=/opt/venv/bin:$PATH \\
    HOME=/tmp XDG_CACHE_HOME=/tmp/.cache \\
    HF_HOME=/tmp/.cache/huggingface MPLCONFIGDIR=/tmp/.cache/matplotlib \\
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \\
    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MLFLOW_DISABLE_ENV_CREATION=true \\
    {options}
# Nobody but root writes here: servers import from the folder they are started in.
WORKDIR /opt/ml
COPY model /opt/ml/model
# Digests, every tensor and the golden rows: a damaged model fails the build. The model's code is
# compiled by the way, as no worker may do it later.
RUN PYTHONDONTWRITEBYTECODE= MLFLOW_SAFEFLAVOR_CACHE=off \\
    python -c "{imports}; container.check()" && rm -rf /tmp/.cache
{device}USER {user}
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \\
    CMD ["python", "-I", "-c", \\
         "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ping', timeout=8)"]
ENTRYPOINT ["python", "-c", "{imports}; container.serve()"]
"""

_ON_A_GPU = """\
# From here on: while an image is built there is no GPU, so the check above ran on the CPU.
ENV MLFLOW_SAFEFLAVOR_DEVICE=cuda
"""

# In place of the working folder, which is first otherwise; Python 3.10 has no -P, and sys is built
# in.
_IMPORTS = (
    "import sys; sys.path[0] = '/opt/ml/model/code'; from mlflow_safeflavor.load import container"
)


@checked
def generate_dockerfile(
    model_uri: str | Path,
    output_dir: str | Path,
    *,
    target: str = "cpu",
    user: str = "mlflow",
    engine: str = "auto",
    base_image: str | None = None,
    hashes: bool = True,
    trust: Collection[str] = (),
) -> Path:
    """Write a folder from which ``docker build`` makes an image that serves a model.

    It serves as the image of ``mlflow models build-docker`` does: MLflow's scoring server on port
    8080, the model at ``/opt/ml/model``. ``docs/docker.md`` compares the rest of both.

    Args:
        model_uri: See ``load_model``.
        output_dir: Folder to create.
        target: "cpu" refuses pins that install CUDA; "cuda" keeps them, and the container serves on
            a GPU or says what it is missing.
        user: Name of the user, not root, that serves.
        engine: "onnx", and "openvino" for a model that was saved with it, installs only the pins of
            the graph, and serves nothing else; the model must have one. "module" installs all
            pins. "auto" is "onnx" where a graph serves by default: if proven, on a CPU.
        base_image: By default ``python:X.Y.Z-slim`` of the Python that saved the model.
        hashes: Lock the pins with the hashes of the files that may be installed; needs uv and an
            index.
        trust: {"pickle"} where the model holds a pickle that the image may run.

    Returns:
        The Dockerfile.

    Raises:
        SafeFlavorError: The model is none of ours, its pins do not fit the target or cannot be
            locked, or it holds a pickle that nobody agreed to run; nothing is written then.
    """
    _require_sane(target, user, engine, base_image)
    require_known(trust)
    # The image's user must be able to read what root copies, whatever modes this process gives.
    with staging(output_dir, umask=0o022) as stage, ThreadPoolExecutor(1) as beside:
        # pip takes as long to tell them as the model to be copied.
        settings = beside.submit(uv_settings) if hashes else None
        with located(model_uri) as folder:
            # From here on only the copy is read, whose bytes were compared.
            saved = copy_saved(Layout(folder), stage / "model")
        spec, environment = saved.spec, saved.environment
        if "pickle" in spec.runs:
            require_agreed("pickle", trust, spec.model_class)
        engine = _engine(engine, target, saved)
        if engine != "module":
            read_graph(saved.layout)  # a refusal would else come first in the build of the image
        lean = engine != "module" and (saved.layout.root / ONNX_REQUIREMENTS).is_file()
        pins = read_pins(
            saved.layout, ONNX_REQUIREMENTS if lean else saved.layout.requirements.name
        )
        installed = environment.wheel_digests
        _require_target(pins.versions, target)
        if settings is not None:
            pins = lock(
                pins,
                python=environment.python,
                installed=installed,
                settings=settings.result(),
            )
            # Once more: locking adds what the pins require, such as nvidia-*.
            _require_target(pins.versions, target)
        _write_environment(pins, installed, stage / "environment")
        (stage / "Dockerfile").write_text(
            _DOCKERFILE.format(
                what=f"{spec.task}, {spec.model_class.rpartition(':')[2]}, saved in {spec.dtype}",
                base_image=base_image or f"python:{environment.python}-slim",
                hashes=" --no-deps --require-hashes" if pins.are_locked else "",
                user=user,
                options=_variables(trust, engine),
                imports=_IMPORTS,
                gpus=" --gpus all" if target == "cuda" else "",
                device=_ON_A_GPU if target == "cuda" else "",
            ),
            encoding="utf-8",
        )
    return Path(output_dir) / "Dockerfile"


def _require_sane(target: str, user: str, engine: str, base_image: str | None) -> None:
    if base_image is not None and not _IMAGE.fullmatch(base_image):
        raise InputError(
            "Not a name of an image", where="base_image", wanted="NAME:TAG", found=repr(base_image)
        )
    if engine not in ENGINES:
        raise InputError(
            "Unknown engine", where="engine", wanted=" | ".join(ENGINES), found=repr(engine)
        )
    if target not in TARGETS:
        raise InputError(
            "Unknown target", where="target", wanted=" | ".join(TARGETS), found=repr(target)
        )
    if not _NAME.fullmatch(user) or user == "root":
        raise InputError(
            "Not a name for the user that serves",
            where="user",
            wanted="lower case letters, not root",
            found=repr(user),
        )


def _engine(asked: str, target: str, saved: Saved) -> str:
    """The engine that the image installs and serves with: "onnx", "openvino" or "module"."""
    # As a load in the container would choose it, but by the target: this machine's accelerators
    # and variables (environ={}) do not count.
    reason, alone = reason_against(saved.layout), saved.spec.structure == "graph"
    if asked == "auto":
        stored = run_time_options({}, saved.spec.model_config)
        on_cpu = target == "cpu" and stored["device"] in ("auto", "cpu")
        by_graph = (
            on_cpu
            and stored["engine"] in ("auto", "onnx")
            and not (stored["compile"] or stored["dtype"])
        )
        asked = "onnx" if alone or (by_graph and reason is None) else "module"
        asked = "openvino" if on_cpu and stored["engine"] == "openvino" else asked
    if asked == "openvino" and not saved.layout.golden("openvino")[0].is_file():
        raise InputError(
            "The model was not saved to be served by OpenVINO, which is not among its pins",
            where="engine",
            wanted="auto | onnx",
            found="openvino",
            hint='leave it out, or save the model with model_config={"engine": "openvino"}',
        )
    if asked != "module" and target == "cuda":
        raise InputError(
            "A graph is served on a CPU",
            where="target",
            wanted="cpu",
            found="cuda",
            hint='target="cpu"' if alone else 'target="cpu", or engine="module"',
        )
    if asked == "onnx" and reason is not None:
        raise InputError(
            "The model has no graph that an image could serve",
            where="engine",
            wanted="auto",
            found=f"the reason against one is: {reason}",
        )
    if asked == "module" and alone:
        raise InputError(
            "The model was stored as a graph alone, so there is no module that an image could "
            "serve",
            where="engine",
            wanted="auto | onnx",
            found="module",
        )
    return asked


def _variables(trust: Iterable[str], engine: str) -> str:
    values = {"MLFLOW_SAFEFLAVOR_ENVIRONMENT": "error"}
    # "module" is not said: all pins are there, and the graph then serves what it can.
    if engine != "module":
        values["MLFLOW_SAFEFLAVOR_ENGINE"] = engine
    if "pickle" in trust:
        values["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "true"
    return " ".join(f"{name}={value}" for name, value in values.items())


def _require_target(pins: Mapping[str, str], target: str) -> None:
    """Refuse CUDA in an image for CPUs (GBs unused), and torch without CUDA in one for GPUs."""
    label = pins.get("torch", "").partition("+")[2]
    if target == "cuda" and label == "cpu":
        raise EnvironmentMismatchError(
            "The pins install a torch that knows no GPU",
            where="requirements.txt",
            wanted="a torch with CUDA",
            found=f"torch=={pins['torch']}",
            hint='target="cpu", or save the model where a torch with CUDA is installed',
        )
    if target == "cuda":
        return
    cuda = sorted(name for name in pins if _CUDA_ONLY.fullmatch(name))
    if cuda or label.startswith(("cu", "rocm", "xpu")):
        raise EnvironmentMismatchError(
            "The pins install a torch for accelerators",
            where="requirements.txt",
            wanted="a torch for CPUs, such as torch==…+cpu, and no nvidia-* or triton",
            found=", ".join([f"torch=={pins.get('torch')}", *cuda[:5]]),
            hint='target="cuda" for an image with CUDA; or save the model where the CPU build of '
            "torch is "
            'installed, with torch_index="auto", which keeps its label',
        )


def _write_environment(pins: Pins, installed: Mapping[str, str], folder: Path) -> None:
    """Write requirements.txt, constraints.txt, and copies of wheels that only this machine has."""
    (folder / _WHEELS).mkdir(parents=True)
    there = _copy_wheels(pins, installed, folder / _WHEELS)
    # In the image folders of this machine do not exist: their wheels lie in /build/wheels.
    options = [option for option in pins.options if not folder_of(option)]
    if there or len(options) < len(pins.options):
        options.insert(0, f"--find-links /build/{_WHEELS}")
    if pins.constraints:
        (folder / CONSTRAINTS).write_text(
            "".join(f"{pin}\n" for pin in pins.constraints), encoding="utf-8"
        )
    lines = [*options, *(_line(pin, installed, there) for pin in pins.pins)]
    lines += [f"-c {CONSTRAINTS}"] if pins.constraints else []
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _copy_wheels(pins: Pins, installed: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Copy the wheels that may be installed; returns SHA-256 → name of each."""
    allowed = {
        pin.name: pin.hashes or ((installed[pin.name],) if pin.name in installed else ())
        for pin in pins.pins
    }
    there: dict[str, str] = {}
    for wheel in wheels_for(pins, installed):
        copy = folder / wheel.path.name
        with open_plain(wheel.path) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        digest = digest_of_plain(copy)  # of the copy: the folder's file may change meanwhile
        if allowed[wheel.name] and digest not in allowed[wheel.name]:
            copy.unlink()
        else:
            there[digest] = copy.name
    return there


def _line(pin: Pin, installed: Mapping[str, str], there: Mapping[str, str]) -> str:
    """The line of a pin; without hashes, the very wheel that was installed, if it is known."""
    # By name alone pip was free to take an index's wheel of the same version.
    if pin.hashes or pin.name not in installed:
        return str(pin)
    if (digest := installed[pin.name]) not in there:
        raise missing_wheel(pin, digest, [])
    marker = f" ; {pin.requirement.marker}" if pin.requirement.marker else ""
    return (
        f"{pin.requirement.name} @ "
        f"file:///build/{_WHEELS}/{quote(there[digest])}#sha256={digest}{marker}"
    )
