"""Guard: no artifact steers a library to a network, a file or a process while it is built.

Python reports such events to audit hooks, for any library. There is one hook in a process, and it
looks only at threads that build. It is no jail: code that the caller agreed to run can get around
it, and calls of a library outside of Python go unseen. It keeps configs from steering installed
code.
"""

# Nothing of this package is imported here: ``save/rehearsal_program.py`` runs the file by its path.

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Collection, Sequence
from functools import cache
from types import FrameType
from typing import Any

__all__ = ["Guard", "guard_process", "guards", "hook"]

# --- what is refused -----------------------------------------------------------------------------

_SYSTEM = (
    *(
        "/bin",
        "/lib",
        "/lib32",
        "/lib64",
        "/nix/store",
        "/sbin",
        "/sys",
        "/usr",
        "/Library",
        "/System",
    ),
    *(
        "/dev/null",
        "/dev/random",
        "/dev/urandom",
        "/etc/localtime",
        "/etc/mime.types",
        "/etc/os-release",
    ),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/version"),
    os.environ.get("SYSTEMROOT", "/usr"),
)
# Files of this process below ``/proc`` that may be read: not its variables, nor its open files.
_OF_THE_PROCESS = ("cgroup", "maps", "mountinfo", "mounts", "smaps", "stat", "statm", "status")

# Metadata of distributions, wherever they lie: transformers asks for those of all that it may use.
_METADATA = (".dist-info", ".egg-info")

_NETWORK = {
    "socket.connect": "opened a connection to {1}",
    **dict.fromkeys(("socket.sendmsg", "socket.sendto"), "sent to {1}"),
    **dict.fromkeys(
        ("socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname"), "looked up {0}"
    ),
    "socket.getnameinfo": "looked up {0}",
}
_OTHERS = {
    "socket.bind": "waits for connections at {1}",
    **dict.fromkeys(
        ("os.exec", "os.posix_spawn", "os.startfile", "os.system", "pty.spawn"), "started {0!r}"
    ),
    **dict.fromkeys(("os.spawn", "subprocess.Popen"), "started {1!r}"),
    **dict.fromkeys(("os.fork", "os.forkpty"), "started a process"),
    **dict.fromkeys(("os.kill", "os.killpg"), "sent a signal to {0}"),
    "builtins.input": "asked on the terminal: {0!r}",
    "os.chdir": "changed the working folder to {0!r}",
    **dict.fromkeys(("os.putenv", "os.unsetenv"), "changed the variable {0!r}"),
}
# RWKV of transformers starts this while it is built, to see whether there is a compiler.
_HARMLESS = ("ninja", ["ninja", "--version"], None, None)

# Events that change files → how many of their arguments are paths.
_CHANGES = {
    **dict.fromkeys(
        ("os.chflags", "os.chmod", "os.chown", "os.removexattr", "os.setxattr", "os.truncate"), 1
    ),
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.utime", "sqlite3.connect"), 1),
    **dict.fromkeys(("os.link", "os.rename", "os.symlink"), 2),
}

_WATCHED = frozenset((*_NETWORK, *_OTHERS, *_CHANGES, "ctypes.dlopen", "open", "pickle.find_class"))

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_IMPORT_SYSTEM = ("<frozen importlib._bootstrap_external>", "<frozen zipimport>")
_OURS = ("mlflow_safeflavor", "__main__")


class Guard:
    """Checks events one by one, and refuses some with a ``PermissionError``.

    An installed library may do as it likes while it is imported, short of a connection: that was
    decided with its installation.

    Args:
        own: Folders that may be read beside those of installed packages.
        writable: Those of them that may be written, too.
        allowed: Events that are not checked.

    Attributes:
        refused: Refused events, in words; libraries may have caught some of the errors.
        began: The frame that builds; imports that called that one are none of the model.
    """

    def __init__(
        self,
        *own: str | os.PathLike[str],
        writable: Sequence[str] = (),
        allowed: Collection[str] = (),
    ) -> None:
        # Packages on the path outside of Python's own folders: the user's, Spark's.
        self._installed = _installed(
            tuple(path for path in sys.path if path.rstrip("/\\").endswith("-packages"))
        )
        self._readable = (*_folders(*own), *self._installed)
        self._writable = _folders(os.devnull, *writable)
        self._allowed = frozenset(allowed)
        self.refused: list[str] = []
        self.began: FrameType | None = None

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Refuse an event of Python's audit hooks, or do nothing."""
        if event in self._allowed or (event == "subprocess.Popen" and args == _HARMLESS):
            return
        if event == "open":
            self._look_at_open(*args)
        elif event in _CHANGES:
            for path in args[: _CHANGES[event]]:
                self._look_at_change(path)
        elif event == "ctypes.dlopen":  # a bare name is searched for in the system's folders
            if args[0] and os.path.dirname(args[0]) and not self._may_read(_path(args[0])):
                self._refuse(f"loaded the library {args[0]!r}")
        elif event == "pickle.find_class":
            self._refuse(f"unpickled {args[0]}.{args[1]}")
        elif event in _NETWORK:
            self._refuse(_NETWORK[event].format(*args), even_imports=True)
        elif event in _OTHERS:
            self._refuse(_OTHERS[event].format(*args))

    def _look_at_open(self, path: Any, mode: str | None, flags: int | None) -> None:
        if (flags or 0) & _WRITES or set(mode or "") & set("wax+"):
            self._look_at_change(path)
        elif path == 0:
            self._refuse("read from the terminal")
        elif not isinstance(path, int) and not self._may_read(_path(path)):
            self._refuse(f"read {_path(path)}, which is no part of the model")

    def _look_at_change(self, path: Any) -> None:
        # A number is a file that is open already, and was checked then.
        if isinstance(path, int) or path in (":memory:", b":memory:"):
            return
        if not _is_below(_path(path), self._writable):
            self._refuse(f"wrote {_path(path)}")

    def _may_read(self, path: str) -> bool:
        """Whether a file is part of the model or of what is installed, or does not exist."""
        if _is_below(path, self._readable) or not os.path.lexists(path):
            return True
        real = os.path.realpath(path)
        folder, name = os.path.split(real)
        if _is_below(real, self._readable) or folder.endswith(_METADATA):
            return True
        if folder == f"/proc/{os.getpid()}":
            return name in _OF_THE_PROCESS
        # A package that is imported from elsewhere, such as an editable install. Links are followed
        # for none of these thousands, which would take half a second.
        modules = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
        places = [
            place
            for module in modules
            for place in (*module.get("__path__", ()), module.get("__file__"))
        ]
        folders = tuple(os.path.join(place, "") for place in places if isinstance(place, str))
        return _is_below(path, folders) or _is_below(real, folders)

    def _refuse(self, what: str, *, even_imports: bool = False) -> None:
        if even_imports or not self._is_import():
            # Kept, since a library may catch the error; escaped, since a path may hold a terminal's
            # codes.
            self.refused.append(what.encode("unicode_escape").decode()[:300])
            raise PermissionError(f"building the model {what}")

    def _is_import(self) -> bool:
        """Whether Python reads or caches a module, or an installed one is being imported."""
        frame: FrameType | None = sys._getframe()  # out of this file's own frames
        while frame is not None and frame.f_globals is globals():
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename in _IMPORT_SYSTEM:
            return True
        # Up to where the building began: all this may have been called while another module is
        # imported.
        while (
            frame not in (None, self.began)
            and str(frame.f_globals.get("__name__")).partition(".")[0] not in _OURS
        ):
            if frame.f_code.co_name == "<module>" and _is_below(
                frame.f_code.co_filename, self._installed
            ):
                return True
            frame = frame.f_back
        return False


@cache
def _installed(sites: tuple[str, ...]) -> tuple[str, ...]:
    """Folders of installed packages, for ``_is_below``."""
    # Cached, since a guard is made at each load, and following links takes a while.
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    libraries = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    return _folders(*_SYSTEM, *prefixes, *libraries, *sites)


def _folders(*paths: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """Each path as it is and with its links followed, for ``_is_below``."""
    given = [os.fspath(path) for path in paths if path]
    return tuple(
        {
            os.path.join(way(path), "")
            for path in given
            for way in (os.path.abspath, os.path.realpath)
        }
    )


def _path(path: Any) -> str:
    """An absolute path. ``..`` is resolved as the system does it, which goes through links."""
    text = os.fsdecode(path)
    return os.path.realpath(text) if ".." in text else os.path.abspath(text)


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    return os.path.join(path, "").startswith(folders)


# --- who is looked at ----------------------------------------------------------------------------

# Thread → its guard. The hook can never be taken out again, so it costs next to nothing while this
# is empty: 0.1 to 0.3 µs an event.
guards: dict[int, Guard] = {}


def hook(event: str, args: tuple[Any, ...]) -> None:
    """Hand an event of Python's audit hooks to the guard of this thread, if it has one."""
    if guards and event in _WATCHED and (guard := guards.get(threading.get_ident())):
        guard(event, args)


def guard_process(guard: Guard) -> None:
    """Let a guard look at every thread of this process, for good."""
    sys.addaudithook(lambda event, args: guard(event, args) if event in _WATCHED else None)
