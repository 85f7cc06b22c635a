"""What runs in the rehearsal's clean process: a load that may use nothing that stays behind on this machine.

    python -I clean_process.py MODEL ENGINES ANSWER

Run by its path, and with it ``guard``, so it imports nothing of this package; the model brings its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from typing import Any


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
    scratch, guards = os.path.dirname(answer), _guards()
    # The load itself guards what it builds; all the rest may do what ends with this process.
    system, harmless = ("/dev", "/etc", "/proc"), ("os.chdir", "os.putenv", "os.unsetenv", "pickle.find_class")
    guard = guards.Guard(model, scratch, *system, writable=[scratch], allowed=harmless)
    guards.guard_process(guard)
    problem = None
    try:
        import mlflow.pyfunc

        for engine in engines.split():
            mlflow.pyfunc.load_model(model, model_config={"engine": engine})
    except BaseException as error:
        problem = {"kind": type(error).__name__, "message": str(error), "refused": guard.refused}
    if guard.refused and problem is None:  # somebody caught it, which the next one may not
        problem = {"kind": "PermissionError", "message": "something was refused", "refused": guard.refused}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(problem, file)


def _guards() -> Any:
    spec = importlib.util.spec_from_file_location("guard", os.path.join(os.path.dirname(__file__), "guard.py"))
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
