"""Check the package on a GPU, in six minutes, on a machine with no network and little installed.

    python tools/gpu_check.py wheels DIR [--python 3.12]         with a network: what to carry along
    python tools/gpu_check.py run [--wheels DIR] [--out DIR]     with a GPU; refuses without one
    python tools/gpu_check.py run --fake [--only auto,tensors]   with a C++ compiler: on a faked
                                                                 device of torch's

The machine has torch, transformers, accelerate, tokenizers and safetensors; all else is in DIR.
Each check has a limit of its own, and prints one line; ``gpu.json`` in the folder ``--out`` holds
all figures. See docs/gpu.md. Standard library only: nothing is installed yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST = 64 << 20
"""Bytes of all wheels."""

TOTAL = 360.0
"""Seconds for all checks on a GPU."""

THERE = frozenset(("torch", "transformers", "tokenizers", "safetensors", "numpy", "tqdm"))
"""What the machine has (tqdm by transformers); accelerate, too, which is an extra."""

PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")]


# --- wheels


def wanted() -> list[str]:
    """What the package needs beside what is there; of MLflow its skinny part."""
    import configparser

    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options"]["install_requires"].split()
    found = [line for line in lines if line.replace(">", "=").split("=")[0] not in THERE]
    return [
        line.replace("mlflow", "mlflow-skinny", 1) if line.startswith("mlflow") else line
        for line in found
    ]


def collect(folder: Path, python: str) -> None:
    """Put the wheels of the package, and of all that it needs on such a machine, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if uv is None:
        raise SystemExit("uv is missing: pip install 'mlflow-safeflavor[docker]'")
    with tempfile.TemporaryDirectory() as scratch:
        (asked := Path(scratch, "in.txt")).write_text("\n".join(wanted()))
        target = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
        left_out = [part for name in sorted(THERE) for part in ("--no-emit-package", name)]
        pinned = os.path.join(scratch, "pinned.txt")
        command = [uv, "pip", "compile", "-q", str(asked), *target, *left_out]
        subprocess.run(
            [*command, "--only-binary", ":all:", "--no-header", "--no-annotate", "-o", pinned],
            check=True,
        )
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        command = [
            *pip,
            "download",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--python-version",
            python,
        ]
        command += [part for name in PLATFORMS for part in ("--platform", name)]
        got = Path(scratch, "got")
        subprocess.run([*command, "-d", str(got), "-r", pinned], check=True)
        # From a copy: a build leaves files, and takes those of the last one.
        source = Path(scratch, "source")
        shutil.copytree(
            ROOT / "mlflow_safeflavor",
            source / "mlflow_safeflavor",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(got), str(source)], check=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in got.glob("*.whl"):
            shutil.copy(wheel, folder)
    wheels = list(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(
        f"{len(wheels)} wheels for Python {python} in {folder}: {size / 2**20:.1f} MiB of "
        f"{MOST >> 20}"
    )
    if size > MOST:
        largest = sorted(wheels, key=lambda wheel: -wheel.stat().st_size)[:5]
        raise SystemExit(
            "too much to carry along; largest: " + ", ".join(wheel.name for wheel in largest)
        )


def environment_with(wheels: Path, folder: Path) -> Path:
    """A virtual environment of what is installed here and, before it, those wheels.

    Returns its interpreter.

    They are unpacked, which for wheels is all there is to it: nobody promises that there is a pip.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"no wheels in {wheels}")
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / f"python{version}" / "site-packages"
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(packages)
        if file.name.startswith("mlflow_skinny-"):
            _name_mlflow(packages, file.name.split("-")[1])
    here = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
        site.getusersitepackages(),
    ]
    (packages / "what_is_there.pth").write_text(
        "".join(f"{path}\n" for path in dict.fromkeys(here) if os.path.isdir(path))
    )
    return folder / "bin" / "python"


def _name_mlflow(packages: Path, version: str) -> None:
    """The package needs "mlflow", of which the skinny part is here.

    All of it that loading and serving use.
    """
    facts = packages / f"mlflow-{version}.dist-info"
    facts.mkdir()
    lines = (
        "Metadata-Version: 2.1",
        "Name: mlflow",
        f"Version: {version}",
        f"Requires-Dist: mlflow-skinny=={version}",
    )
    (facts / "METADATA").write_text("\n".join(lines) + "\n")


# --- checks


class Worker:
    """A process that runs checks, and what it tells; ended when one takes too long."""

    def __init__(self, python: Path, kind: str, folder: Path, names: list[str]) -> None:
        paths = [str(ROOT / "tests")]
        offline = dict.fromkeys(
            ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"),
            "1",
        )
        environ = {
            **os.environ,
            **offline,
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environ |= {
            "MLFLOW_SAFEFLAVOR_CACHE": str(folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environ |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `end`)
        self.process = subprocess.Popen(
            [str(python), "-m", "gpu.worker", kind, str(folder), *names],
            cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self.errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        nothing: list[str] = []
        with self.process.stdout or contextlib.nullcontext(nothing) as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put(None)

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next that it tells; None when it has ended.

        Raises ``queue.Empty`` when it is too late.
        """
        line = self.lines.get(timeout=max(0.1, seconds))
        return None if line is None else json.loads(line)

    def end(self) -> str:
        """Whatever it does. Returns the last that it said beside."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(5)  # a grandchild may hold the other end
        with self.errors:
            self.errors.seek(0)
            return self.errors.read()[-1500:].strip()


def run(python: Path, kind: str, names: list[str], out: Path, patience: float) -> int:
    """Run checks, one line each; returns an exit status.

    0 where none failed, 2 where none could be run.
    """
    results: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    until = time.monotonic() + TOTAL * patience
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        todo, first = names, True
        while todo or first:
            worker, running, left, first = (
                Worker(python, kind, Path(scratch), todo),
                None,
                120.0 * patience,
                False,
            )
            begun, started = time.monotonic(), False
            while True:
                try:
                    told = worker.line(min(begun + left, until) - time.monotonic())
                except queue.Empty:
                    why = (
                        "took too long"
                        if time.monotonic() < until
                        else f"no time left of {TOTAL * patience:.0f} s"
                    )
                    break
                if told is None:
                    why = "the process died" if todo or not started else ""
                    break
                if "refused" in told:
                    worker.end()
                    print(f"refused: {told['refused']}")
                    return 2
                if "facts" in told:
                    facts, started = told["facts"], True
                    todo = todo or list(told["checks"])
                    if not results:
                        print(
                            ", ".join(f"{name} {value}" for name, value in facts.items()),
                            flush=True,
                        )
                elif "begins" in told:
                    running, begun, left = (
                        told["begins"],
                        time.monotonic(),
                        told["limit"] * patience,
                    )
                else:
                    results.append(told)
                    todo, running, begun, left = (
                        [n for n in todo if n != told["check"]],
                        None,
                        time.monotonic(),
                        60.0,
                    )
                    show(told)
            said = worker.end()
            if why:
                name = running or "start"
                results.append(
                    {
                        "check": name,
                        "seconds": round(time.monotonic() - begun, 2),
                        "verdict": "FAIL",
                    }
                )
                results[-1] |= {"said": why, "trace": said}
                show(results[-1])
                todo = [other for other in todo if other != name] if running else []
            if time.monotonic() >= until:
                for name in todo:
                    results.append(
                        {
                            "check": name,
                            "seconds": 0.0,
                            "verdict": "FAIL",
                            "said": "no time was left",
                        }
                    )
                    show(results[-1])
                todo = []
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    failed = [result["check"] for result in results if result["verdict"] == "FAIL"]
    print(
        f"{len(results)} checks, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}; "
        f"{out / 'gpu.json'}"
    )
    return 1 if failed else 0


def show(result: dict[str, Any]) -> None:
    """One line, and where it failed what was said."""
    figures = json.dumps(result.get("figures", result.get("said", "")), default=str)
    print(
        f"{result['verdict']:12} {result['check']:18} {result['seconds']:7.2f} s  {figures[:1500]}",
        flush=True,
    )
    if result["verdict"] == "FAIL":
        print(result.get("trace", ""), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    carried = commands.add_parser("wheels", help="collect what to carry along")
    carried.add_argument("folder", type=Path)
    carried.add_argument("--python", default="3.12")
    runs = commands.add_parser("run", help="run the checks")
    which = runs.add_mutually_exclusive_group()
    which.add_argument(
        "--real",
        action="store_true",
        help="on a GPU, else not at all (this is what happens without)",
    )
    which.add_argument("--fake", action="store_true", help="on a faked device")
    runs.add_argument("--wheels", type=Path, help="made by `wheels`; without, what is installed")
    runs.add_argument("--out", type=Path, default=Path("gpu-check"))
    runs.add_argument("--only", default="", help="names of checks, with commas")
    runs.add_argument(
        "--patience", type=float, default=1.0, help="times all limits, for slow machines"
    )
    given = parser.parse_args(arguments)
    if given.command == "wheels":
        collect(given.folder, given.python)
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-venv-") as folder:
        python = Path(sys.executable)
        if given.wheels:
            python = environment_with(given.wheels, Path(folder))
        names = [name for name in given.only.split(",") if name]
        return run(python, "fake" if given.fake else "real", names, given.out, given.patience)


if __name__ == "__main__":
    sys.exit(main())
