"""What runs in the rehearsal's clean process: a load that may use nothing that stays behind on this machine.

    python -I clean_process.py MODEL ENGINES ANSWER

Run by its path, so it imports nothing of this package; the model brings its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
_METADATA = (".dist-info", ".egg-info")
"""Ends of what is imported, and of folders that say what is installed: both the business of the pins."""

_SYSTEM = (
    *("/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/nix", "/proc", "/sbin", "/sys", "/usr"),
    *("/Library", "/System", os.environ.get("SYSTEMROOT", "/usr")),
)


class Guard:
    """An audit hook, so that it sees what happens whatever library does it.

    Attributes:
        refused: What it did not let happen; some of it may have been caught.
    """

    def __init__(self, *own: str) -> None:
        roots = {*own, *_SYSTEM, sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
        self._roots = tuple(root for path in roots for root in (os.path.abspath(path), os.path.realpath(path)))
        self.refused: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Refuse a connection to another machine, and to read a file that only this machine has."""
        if event == "socket.connect" and isinstance(args[1], tuple):
            host = str(args[1][0])
            if not (host.startswith("127.") or host in ("::1", "localhost")):
                self._refuse(f"loading opened a connection to {host}")
        elif event == "open" and isinstance(args[0], (str, bytes)) and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            path = os.path.abspath(os.fsdecode(args[0]))
            installed = path.endswith((*_CODE, *_METADATA)) or os.path.dirname(path).endswith(_METADATA)
            if not installed and self._is_foreign(path):
                self._refuse(f"loading read {path}, which is no part of the model")

    def _refuse(self, what: str) -> None:
        self.refused.append(what)
        raise PermissionError(what)

    def _is_foreign(self, path: str) -> bool:
        if not os.path.isfile(path) or any(_is_below(way, self._roots) for way in (path, os.path.realpath(path))):
            return False
        # Data of a package that is imported from elsewhere, such as an editable install.
        modules = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
        packages = [folder for module in modules for folder in module.get("__path__", ())]
        return not _is_below(path, packages)


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(os.path.join(folder, "")) for folder in folders)


def end_with_parent() -> None:
    """End this process with the one that started it: standard input then ends. Nobody else reads from there."""
    lifeline, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(model: str, engines: str, answer: str) -> None:
    """Load the model with each of the engines, and write what went wrong, as JSON, to the file ``answer``."""
    guard = Guard(model, os.path.dirname(answer))
    sys.addaudithook(guard)
    problem = None
    try:
        import mlflow.pyfunc

        for engine in engines.split():
            mlflow.pyfunc.load_model(model, model_config={"engine": engine})
    except BaseException as error:
        problem = {"kind": type(error).__name__, "message": str(error), "refused": guard.refused}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(problem, file)


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
