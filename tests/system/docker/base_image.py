"""``python:X.Y.Z-slim``, which MLflow builds on.

From Docker Hub, or where that cannot be reached, a stand-in.

The stand-in is Debian's minimal system with this machine's CPython of exactly that version, and
with what this machine's pip needs to install anything: its settings, certificates and wheels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from system.docker.engine import Engine
from system.docker.pip_settings import pip_settings, wheels_of_installed

TAG = f"python:{platform.python_version()}-slim"

_STAND_IN = "mlflow-safeflavor-base"
_PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
_PACKAGES = (
    "ca-certificates libssl3 libffi8 libsqlite3-0 zlib1g libbz2-1.0 liblzma5 libreadline8 "
    "libncursesw6 libexpat1 libuuid1 netbase tzdata"
).split()
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# Debian's own interpreter is spread over /usr; no other one is.
_IS_DEBIANS = sys.base_prefix == "/usr"
_LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "turtledemo", "config-*", "*.a")

# As Debian's slim images are made.
_NO_FILES = [f"/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")]
# And as Python's: what is imported is compiled by whoever may write there.
_NO_COMPILED = "; find /usr /opt -name __pycache__ -prune -exec rm -rf {} +"
# Run in the new system; the import proves that every library is there which the interpreter was
# linked against.
_CHECK = f"""
python -c 'import bz2, ctypes, lzma, sqlite3, ssl, sys, uuid, zlib; \
assert "{platform.python_version()}" in sys.version'
pip --version"""
_PIP = (
    f"ln -sf {_PYTHON} /usr/local/bin/python; python -m ensurepip; ln -sf pip3 /usr/local/bin/pip"
)
_DEBIANS_PIP = f"rm -f /usr/lib/{_PYTHON}/EXTERNALLY-MANAGED"
_SETTINGS = (
    "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin",
    "ENV LANG=C.UTF-8",
    'CMD ["python"]',
    f"LABEL {_STAND_IN}=1",
)


@contextlib.contextmanager
def base_image(engine: Engine) -> Iterator[bool]:
    """Have ``TAG`` in the engine while inside; gives whether it is the stand-in.

    The stand-in stays in the engine under a name of its own, for the next run. The tag goes: nobody
    else should build on it unawares.
    """
    if _is_real(engine.inspect("image", TAG)) or _pulled(engine):
        yield False
        return
    engine.docker("tag", _stand_in(engine), TAG)
    try:
        yield True
    finally:
        engine.remove_images(TAG)


def _is_real(image: dict[str, Any] | None) -> bool:
    """Whether there is one, and it is no stand-in whose tag a killed run has left."""
    return image is not None and _STAND_IN not in (image["Config"]["Labels"] or {})


def _pulled(engine: Engine) -> bool:
    try:
        engine.docker("pull", "--quiet", TAG, timeout=300)
    except (AssertionError, subprocess.TimeoutExpired):
        return False
    return True


def _stand_in(engine: Engine) -> str:
    name = f"{_STAND_IN}:{_recipe()}"
    if engine.inspect("image", name) is None:
        engine.remove_images(_STAND_IN)
        with tempfile.TemporaryDirectory(prefix="base-image-") as folder:
            settings = [part for setting in _SETTINGS for part in ("--change", setting)]
            engine.docker("import", *settings, _make_system(Path(folder)), name, timeout=300)
    return name


def _recipe() -> str:
    """What decides on the content, as one short name."""
    parts = [
        Path(__file__).read_bytes(),
        sys.version.encode(),
        _release().encode(),
        repr(pip_settings()).encode(),
    ]
    parts += [f"{wheel} {wheel.stat().st_size}".encode() for wheel in wheels_of_installed()]
    parts += [Path(_CERTIFICATES).read_bytes()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[
        :16
    ]


def _release() -> str:
    """This machine's release of Debian: its interpreter was built against these libraries."""
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian" or shutil.which("mmdebstrap") is None:
        raise AssertionError(
            f"{TAG} can neither be pulled nor made: that takes Debian, and mmdebstrap installed"
        )
    return release["VERSION_CODENAME"]


def _make_system(folder: Path) -> Path:
    """One tar file with everything in it."""
    _write_files(folder / "files")
    script = folder / "script"
    script.write_text(
        "set -e; export PATH=/usr/local/bin:$PATH; ldconfig; "
        f"{_DEBIANS_PIP if _IS_DEBIANS else _PIP}{_CHECK}{_NO_COMPILED}"
    )
    packages = [
        *_PACKAGES,
        *(["python3", "python3-pip", "python-is-python3"] if _IS_DEBIANS else []),
    ]
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _NO_FILES]
    command += ["--dpkgopt=path-include=/usr/share/doc/*/copyright"]
    command += [
        f'--customize-hook=cp -a "{folder}/files/." "$1"',
        f'--customize-hook=chroot "$1" sh <"{script}"',
    ]
    command += [_release(), str(folder / "system.tar")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}"
    )
    return folder / "system.tar"


def _write_files(files: Path) -> None:
    """What is put over the system."""
    if not _IS_DEBIANS:
        _copy_interpreter(files / "usr/local")
    certificates = files / _CERTIFICATES.lstrip("/")
    certificates.parent.mkdir(parents=True)
    shutil.copyfile(_CERTIFICATES, certificates)
    (files / "etc/pip.conf").write_text(_pip_configuration())
    for wheel in wheels_of_installed():
        target = files / str(wheel).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(wheel, target)


def _copy_interpreter(prefix: Path) -> None:
    """CPython finds its library beside itself, so it works below /usr/local as where it was."""
    source = Path(sys.base_prefix)
    (prefix / "bin").mkdir(parents=True)
    shutil.copyfile(source / "bin" / _PYTHON, prefix / "bin" / _PYTHON)
    (prefix / "bin" / _PYTHON).chmod(0o755)
    shutil.copytree(
        source / "lib" / _PYTHON,
        prefix / "lib" / _PYTHON,
        ignore=shutil.ignore_patterns(*_LEFT_OUT),
    )
    (prefix / "lib" / _PYTHON / "site-packages").mkdir()
    for library in (source / "lib").glob("libpython*.so*"):
        shutil.copy2(library, prefix / "lib", follow_symlinks=False)


def _pip_configuration() -> str:
    """The settings of this machine's pip that say where and how to fetch.

    Folders of indexes stay behind.
    """
    settings = pip_settings()
    indexes = [
        url for url in settings.get("extra-index-url", "").split() if not url.startswith("file:")
    ]
    folders = sorted({str(wheel.parent) for wheel in wheels_of_installed()})
    links = [link for link in settings.get("find-links", "").split() if "://" in link]
    kept = {
        name: settings.get(name, "") for name in ("index-url", "trusted-host", "default-timeout")
    }
    kept |= {
        "extra-index-url": " ".join(indexes),
        "find-links": " ".join([*links, *folders]),
        "cert": _CERTIFICATES,
    }
    return (
        "\n".join(["[global]", *(f"{name} = {value}" for name, value in kept.items() if value)])
        + "\n"
    )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
