"""The tests on other releases of transformers and MLflow, and on other Pythons.

`make matrix`, or one by one.

    .venv/bin/nox -l                                              say what there is
    .venv/bin/nox -s "matrix(py3.11-transformers4.57-mlflow2.9)"  the oldest releases
    .venv/bin/nox -s light                                        what needs no torch
    .venv/bin/nox -s project                                      MLproject in its own environment

Run it after `make venv`, whose environment is the other side of each comparison. Environments are
made by uv, which keeps what it has unpacked: the first takes a minute, others seconds. A Python
that is not installed is skipped.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nox
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parent
sys.path.insert(0, str(REPOSITORY / "tools"))
import install  # noqa: E402  (where torch comes from is known in one place)

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.allow_parallel = True
nox.options.error_on_missing_interpreters = False
# pyenv's shims answer for those of its Pythons alone that are chosen.
PYENV = sorted(
    Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.1[0-3].*")
)
os.environ.setdefault("PYENV_VERSION", ":".join(folder.name for folder in PYENV))

TRANSFORMERS = {"4.57": "==4.57.5", "5.0": "==5.0.0", "5": ">=5,<6"}
MLFLOW = {"2.9": "==2.9.2", "2.22": "==2.22.*", "3": ">=3,<4"}
CORNERS = {("4.57", "2.9"), ("5", "2.9"), ("4.57", "3")}
"""Run by CI. The fourth is the main environment."""
# MLflow 2.9.2 wants numpy 1, of which there are wheels up to Python 3.12.
LEGS = [
    nox.param(
        python,
        transformers,
        mlflow,
        id=f"py{python}-transformers{transformers}-mlflow{mlflow}",
        tags=["ci"] if python == "3.11" and (transformers, mlflow) in CORNERS else [],
    )
    for python in ("3.11", "3.10", "3.12", "3.13")
    for transformers in TRANSFORMERS
    for mlflow in MLFLOW
    if (python, mlflow) != ("3.13", "2.9")
]
# They use what newer releases of their requirements lack (FallbackAsyncAdaptedQueuePool,
# pkg_resources, app.route).
LIMITS = {
    "2.9": ["sqlalchemy<2.1", "setuptools>=77,<82"],
    "2.22": ["sqlalchemy<2.1", "starlette<1"],
}

# Tests that run where neither torch nor transformers is installed: the light rooms' and those of
# what is saved elsewhere. The few of them that need torch skip.
ROOMS = ("artifact", "environment", "graph", "predict", "server", "tasks")
LIGHT = [*(f"unit/{room}" for room in ROOMS), "system/matrix/test_without_torch.py"]

CLIENTS = [
    f"integration/test_{name}.py" for name in ("llm_embeddings", "llm_generation", "autolog")
]

SAVED, OWN = REPOSITORY / ".nox" / "saved", REPOSITORY / ".nox" / "project"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@nox.session(venv_backend="none")
def saved(session: nox.Session) -> None:
    """Save the models of the matrix in the environment that runs nox, for all others to load."""
    if importlib.util.find_spec("mlflow_safeflavor") is None:
        session.error("this is not the main environment: `make venv`, and then .venv/bin/nox")
    if "CI" in os.environ and sys.version_info[:2] != (3, 11):
        session.error("the corners are on Python 3.11, and would be skipped")
    shutil.rmtree(SAVED, ignore_errors=True)
    command = [sys.executable, "tests/system/matrix/matrix_models.py", "save", str(SAVED)]
    session.run(*command, env={**OFFLINE, **ONE_THREAD}, external=True)


@nox.session(requires=["saved"])
@nox.parametrize("python,transformers,mlflow", LEGS)
def matrix(session: nox.Session, transformers: str, mlflow: str) -> None:
    """Save, load and serve with other releases, and exchange models with the main environment."""
    _configure(session)
    session.install(*_torch(str(session.python)))
    wanted = [f"transformers{TRANSFORMERS[transformers]}", f"mlflow{MLFLOW[mlflow]}"]
    session.install("--editable", ".[demo]", *wanted, *LIMITS.get(mlflow, []), "pytest>=8.2")
    _test(session, "system/matrix/test_other_releases.py")


@nox.session(python="3.11", tags=["ci"], requires=["saved"])
def without_transformers(session: nox.Session) -> None:
    """Graphs where torch is installed and transformers is not.

    The same artifacts, the same bits.
    """
    _configure(session)
    session.install(*_torch(str(session.python)))
    session.install(*_requirements_without("torch", "transformers"), "pytest>=8.2")
    session.install("--no-deps", "--editable", ".")
    _test(session, "system/matrix/test_without_transformers.py")


@nox.session(python=["3.10", "3.12", "3.13"], tags=["ci"], requires=["saved"])
def light(session: nox.Session) -> None:
    """What needs no torch, on the Pythons that torch may not be at hand for."""
    _configure(session)
    session.install(
        *_requirements_without("torch", "transformers"), "pytest>=8.2", "hypothesis>=6.100"
    )
    session.install("--no-deps", "--editable", ".")
    _test(session, *LIGHT)


@nox.session(python="3.11", tags=["ci"])
def clients(session: nox.Session) -> None:
    """Clients of OpenAI's API, LangChain's and LlamaIndex's among them, at running servers."""
    _configure(session)
    # What the main environment has, this one sees: it only adds forty distributions that nothing
    # else needs.
    main = Path(sysconfig.get_path("purelib"))
    frozen = Path(session.create_tmp()) / "main.txt"
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    installed.pop("mlflow-safeflavor", None)
    frozen.write_text("".join(f"{name}=={installed[name]}\n" for name in installed))
    session.install("--constraint", str(frozen), *_extra("clients"))
    site = next(Path(session.virtualenv.location).glob("lib/python*/site-packages"))
    (site / "main.pth").write_text(f"import site; site.addsitedir({str(main)!r})\n")
    # `mlflow models serve` starts uvicorn by its name.
    programs = [str(session.env.get("PATH", os.environ["PATH"])), str(Path(sys.executable).parent)]
    session.env["PATH"] = os.pathsep.join(programs)
    _test(session, *CLIENTS, which="server or sentence")


@nox.session(venv_backend="none", tags=["ci"], requires=["saved"])
def project(session: nox.Session) -> None:
    """`mlflow run` of this project in an environment that MLflow makes from python_env.yaml."""
    _configure(session)
    shutil.rmtree(OWN, ignore_errors=True)  # it would hold the package as it was
    OWN.mkdir(parents=True)
    *index, torch = _torch()
    (OWN / "constraints.txt").write_text(torch)
    made = {"MLFLOW_ENV_ROOT": str(OWN), "MLFLOW_TRACKING_URI": f"sqlite:///{OWN}/mlflow.db"}
    made |= {"UV_CONSTRAINT": str(OWN / "constraints.txt")}
    # uv lies beside Python
    made |= {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    if index:
        made |= {"UV_INDEX": index[-1], "UV_INDEX_STRATEGY": "unsafe-best-match"}
    command = [sys.executable, "-m", "mlflow", "run", ".", "-e", "verify", "--env-manager", "uv"]
    given = ["-P", f"model_uri={SAVED / 'classifier'}"]
    session.run(*command, *given, env={**OFFLINE, **ONE_THREAD, **made}, external=True)


def _configure(session: nox.Session) -> None:
    """Let uv find what pip finds.

    Torch's CPU build may lie in a folder that pip is configured to look in.
    """
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    by_pip = (
        os.environ.get("PIP_FIND_LINKS")
        or subprocess.run(command, capture_output=True, text=True).stdout
    )
    folders = ",".join(by_pip.split())
    session.env.update(
        {"UV_PYTHON_DOWNLOADS": "never", "UV_FIND_LINKS": os.environ.get("UV_FIND_LINKS", folders)}
    )


def _torch(python: str = install.RUNNING) -> list[str]:
    """What to tell uv about torch: where it comes from, if that has to be said, and which."""
    wanted, index = os.environ.get("TORCH") or install.TORCH, os.environ.get("TORCH_INDEX", "")
    arguments, _ = install.torch_arguments(wanted, index, python=python)
    return arguments


def _requirements_without(*names: str) -> list[str]:
    metadata = configparser.ConfigParser()
    metadata.read(REPOSITORY / "setup.cfg")
    lines = metadata["options"]["install_requires"].split("\n")
    return [line for line in lines if line and Requirement(line).name not in names]


def _extra(name: str) -> list[str]:
    metadata = configparser.ConfigParser()
    metadata.read(REPOSITORY / "setup.cfg")
    return [line for line in metadata["options.extras_require"][name].split("\n") if line]


def _test(session: nox.Session, *files: str, which: str = "") -> None:
    given = {"SAFEFLAVOR_MATRIX_PYTHON": sys.executable, "SAFEFLAVOR_MATRIX_SAVED": str(SAVED)}
    # Old releases warn about the new ones of what they are built on.
    command = [
        "python",
        "-m",
        "pytest",
        "-W",
        "ignore",
        *(f"tests/{file}" for file in files),
        *(["-k", which] if which else []),
        *session.posargs,
    ]
    session.run(*command, env={**OFFLINE, **ONE_THREAD, **given})
