"""Program of the rehearsal's clean process: a load that may use nothing of this machine alone.

    python -I rehearsal_program.py MODEL ANSWER HIDDEN

It imports MLflow at once, and loads the model when standard input names the engines. The answer
holds the error, if there was one, and the opened files with their readers, from which the pins are
told. Run by its path, and ``guard`` with it: it imports nothing of this package, since the model
brings its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import sys
import threading
from types import FrameType
from typing import Any


def listen() -> queue.SimpleQueue[str]:
    """Lines of the process that started this one; its end ends this one.

    Its end of standard input then closes.
    """
    # Standard input of all others is empty: a question of some library gets an end of file.
    lifeline, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        while line := os.read(lifeline, 4096):  # shorter than what a pipe takes in one piece
            said.put(line.decode())
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return said


class Witness:
    """Notes opened files with their readers, from now on.

    Args:
        own: Folders whose files are not noted.
    """

    def __init__(self, *own: str) -> None:
        self._own = tuple(os.path.join(path, "") for path in (*own, *map(os.path.realpath, own)))
        # Imported when the interpreter started: .pth files and sitecustomize run tools of many
        # kinds. Files that a tool reads of its own are no need of the model.
        tops = (
            {name.partition(".")[0] for name in sys.modules}
            - sys.stdlib_module_names
            - {"__main__"}
        )
        # Namespaces without a file, such as "google", are no tools.
        self._tools = {top for top in tops if getattr(sys.modules.get(top), "__file__", None)}
        self._files: dict[str, str] = {}
        # Folder → reader: to walk the stack for one costs more than all the rest.
        self._readers: dict[str, str] = {}

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Note the file of an event of Python's audit hooks."""
        # No file: a descriptor that is open already.
        given = args[_OPENS[event]]
        if not isinstance(given, (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(given))
        if path in self._files or path.startswith(self._own):
            return
        folder = os.path.dirname(path)
        reader = self._readers.get(folder) or self._reader(path)
        if reader is not None:
            self._files[path] = reader
            # In site-packages itself single modules of many distributions lie side by side.
            if folder.removesuffix(f"{os.sep}__pycache__") not in sys.path:
                self._readers[folder] = reader

    def _reader(self, path: str) -> str | None:
        """The module, not of Python's, for which a file is opened; None for a tool's own file."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_globals is globals():  # the hook's own
            frame = frame.f_back
        while frame is not None and frame.f_globals is not globals():
            name = str(frame.f_globals.get("__name__"))
            top = name.partition(".")[0]
            if top in self._tools and f"{os.sep}{top}" in path:
                return None
            if top not in self._tools and top not in sys.stdlib_module_names:
                return name
            frame = frame.f_back
        return "the load"

    def take(self) -> dict[str, str]:
        """File → reader, of all files opened since the last call."""
        taken, self._files = self._files, {}
        return taken


# Events that open a file, and which of their arguments names it.
_OPENS = {"open": 0, "import": 1, "ctypes.dlopen": 0}


def main(said: queue.SimpleQueue[str], model: str, answer: str, hidden: str) -> None:
    """Load the model with each of the engines, and write the outcome to ``answer`` as JSON.

    Args:
        said: Gives the engines once the model is complete.
        model: Its folder.
        answer: File to write.
        hidden: Modules that cannot be imported while MLflow is.
    """
    scratch, guards, witness = (
        os.path.dirname(answer),
        _guards(),
        Witness(model, os.path.dirname(answer)),
    )
    # Inside of it the load has a guard of its own around building. The rest of this process may
    # change itself: that ends with it.
    system, harmless = (
        ("/dev", "/etc", "/proc"),
        ("os.chdir", "os.putenv", "os.unsetenv", "pickle.find_class"),
    )
    guard = guards.Guard(model, scratch, *system, writable=[scratch], allowed=harmless)
    guards.guard_process(guard)
    sys.addaudithook(lambda event, args: witness(event, args) if event in _OPENS else None)
    path, opened, problem = list(sys.path), {}, None
    try:
        # None in sys.modules makes an import fail, as where the module is not installed.
        ruled_out: Any = None
        sys.modules.update(dict.fromkeys(hidden.split(), ruled_out))
        import mlflow.pyfunc

        for name in hidden.split():
            del sys.modules[name]
        # Nothing else beforehand: what a load imports tells the pins of its engine.
        for engine in said.get().split():
            # Another dtype that is stored as an option is the module's, or OpenVINO's.
            dtype = {"dtype": ""} if engine == "onnx" else {}
            mlflow.pyfunc.load_model(model, model_config={"engine": engine, **dtype})
            opened[engine] = witness.take()
    # SystemExit too: whatever ends the load is the answer.
    except BaseException as error:
        problem = {"kind": type(error).__name__, "message": str(error), "missing": _missing(error)}
    if guard.refused and problem is None:  # a library caught it; another release may not
        problem = {"kind": "PermissionError", "message": "something was refused", "missing": None}
    told = {"problem": problem, "refused": guard.refused, "path": path, "opened": opened}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(told, file)


def _missing(error: BaseException | None) -> str | None:
    """The module that could not be imported, where that is at the bottom of an error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        error = error.__cause__ or error.__context__
    return None


def _guards() -> Any:
    package = os.path.dirname(os.path.dirname(__file__))
    spec = importlib.util.spec_from_file_location(
        "guard", os.path.join(package, "module", "guard.py")
    )
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(listen(), *sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # To take down torch and transformers, object by object, takes longer than to load the model.
    os._exit(0)
