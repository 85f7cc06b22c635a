"""A model under construction reaches no network, file or process; other threads notice nothing."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import pickle
import queue
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlflow_safeflavor.errors import InputError, TrustError
from mlflow_safeflavor.module.guarded import guarded


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a file, outside of everything; the working folder, too."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "secret").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def read(path, **how):
    open(path, **how).close()


def try_to_read(path):
    """As a library does that can do without."""
    with contextlib.suppress(OSError):
        read(path)


def udp(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", address)


def connect(family, address):
    with socket.socket(family) as connecting:
        connecting.connect(address)


TRIED = {
    "TCP": (
        lambda: connect(socket.AF_INET, ("127.0.0.1", 9)),
        "opened a connection to ('127.0.0.1', 9)",
    ),
    "IPv6": (lambda: connect(socket.AF_INET6, ("::1", 9)), "opened a connection to ('::1', 9"),
    "unix": (lambda: connect(socket.AF_UNIX, "their.sock"), "opened a connection to their.sock"),
    "UDP": (lambda: udp(("192.0.2.1", 53)), "sent to ('192.0.2.1', 53)"),
    "server": (
        lambda: socket.create_server(("127.0.0.1", 0)),
        "waits for connections at ('127.0.0.1', 0)",
    ),
    "name": (lambda: socket.gethostbyname("db.example"), "looked up db.example"),
    "address": (lambda: socket.getaddrinfo("db.example", 80), "looked up db.example"),
    "URL": (
        lambda: importlib.import_module("urllib.request").urlopen("http://db.example/"),
        "looked up db.example",
    ),
    "file": (lambda: read("secret"), "read {there}/secret"),
    "file by number": (lambda: os.open("secret", os.O_RDONLY), "read {there}/secret"),
    "file above": (lambda: read("../theirs/secret"), "read {there}/secret"),
    "file behind a link": (lambda: read(os.path.join(*LINK)), "read {there}/secret"),
    "file of bytes": (lambda: read(b"secret"), "read {there}/secret"),
    "code": (lambda: importlib.import_module("runpy").run_path("secret"), "read {there}/secret"),
    "variables": (lambda: read("/proc/self/environ"), "read /proc/self/environ"),
    "users": (lambda: read("/etc/passwd"), "read /etc/passwd"),
    "write": (lambda: read("new", mode="x"), "wrote {there}/new"),
    "append": (lambda: read("secret", mode="a"), "wrote {there}/secret"),
    "write by number": (lambda: os.open("new", os.O_CREAT | os.O_WRONLY), "wrote {there}/new"),
    "write where it reads": (
        lambda: read(os.path.join(sys.prefix, "new"), mode="w"),
        "wrote {prefix}/new",
    ),
    "folder": (lambda: os.mkdir("new"), "wrote {there}/new"),
    "remove": (lambda: os.remove("secret"), "wrote {there}/secret"),
    "rename": (lambda: os.rename("secret", "new"), "wrote {there}/secret"),
    "link": (lambda: os.symlink("secret", "new"), "wrote {there}/secret"),
    "database": (lambda: sqlite3.connect("new"), "wrote {there}/new"),
    "process": (lambda: subprocess.run(["touch", "new"]), "started ['touch', 'new']"),
    "shell": (lambda: os.system("touch new"), "started b'touch new'"),
    "fork": (lambda: os.fork() or os._exit(0), "started a process"),
    "spawn": (lambda: os.posix_spawn("/bin/true", ["true"], {}), "started '/bin/true'"),
    "question": (
        lambda: input("Do you wish to run the custom code? [y/N]"),
        "asked on the terminal: 'Do you wish",
    ),
    "standard input": (lambda: read(0, closefd=False), "read from the terminal"),
    "terminal": (lambda: read("/dev/tty"), "read /dev/tty"),
    "library": (lambda: ctypes.CDLL("./secret"), "loaded the library './secret'"),
    "variable": (lambda: os.putenv("HF_TOKEN", "theirs"), "changed the variable b'HF_TOKEN'"),
    "folder of the process": (lambda: os.chdir("/"), "changed the working folder to '/'"),
    "pickle": (lambda: pickle.loads(b"cposix\nsystem\n."), "unpickled posix.system"),
}
LINK: list[str] = []
"""Of a link to a folder and what comes then: a file that seems to be where it may be read."""


@pytest.mark.parametrize("name", TRIED)
def test_what_is_tried_is_refused_and_named(name, there, tmp_path):
    act, words = TRIED[name]
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "link").symlink_to(there)
    LINK[:] = [str(tmp_path / "model" / "link"), "..", "theirs", "secret"]
    with pytest.raises(TrustError) as refused, guarded(tmp_path / "model"):
        act()
    assert "it " + words.format(there=there, prefix=sys.prefix) in str(refused.value.found)
    assert sorted(path.name for path in there.iterdir()) == ["secret"]


def test_what_is_caught_ends_it_all_the_same(there):
    with pytest.raises(TrustError, match=r"read .*/secret"), guarded():
        try_to_read("secret")


def test_what_a_library_makes_of_it_is_kept_as_the_cause(there):
    def act():
        try_to_read("secret")
        raise InputError("no words")

    with pytest.raises(TrustError) as refused, guarded():
        act()
    assert isinstance(refused.value.__cause__, InputError)


def test_a_library_may_ask_whether_there_is_a_compiler(monkeypatch):
    """RWKV does so in its constructor.

    Nothing else of that program, and not from another folder.
    """
    monkeypatch.setenv("PATH", "/nowhere")
    with guarded(), pytest.raises(FileNotFoundError):
        subprocess.check_output(["ninja", "--version"])
    for options in (
        {"args": ["ninja", "-f", "build"]},
        {"args": ["ninja", "--version"], "cwd": "/"},
    ):
        with pytest.raises(TrustError, match="it started"), guarded():
            subprocess.Popen(**options)


def test_other_errors_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), guarded():
        1 / 0  # noqa: B018


def test_what_is_part_of_the_model_or_installed_is_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with guarded(tmp_path):
        assert (tmp_path / "config.json").read_text() == "{}"
        assert importlib.metadata.version("pytest")
        assert Path(pytest.__file__).read_text()
        assert Path("/proc/self/status").read_text()
        read(os.devnull, mode="w")
        ctypes.CDLL(None)
        sqlite3.connect(":memory:").close()
        for end in socket.socketpair():
            end.close()
        with pytest.raises(FileNotFoundError):
            (tmp_path / "missing").read_text()


def test_data_of_a_package_that_is_imported_from_elsewhere_is_read(tmp_path, monkeypatch):
    package = tmp_path / "package_of_somebody"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.txt").write_text("theirs")
    monkeypatch.syspath_prepend(tmp_path)
    with guarded():
        importlib.import_module(package.name)
        assert (package / "words.txt").read_text() == "theirs"
    monkeypatch.delitem(sys.modules, package.name)


@pytest.fixture
def install(there, monkeypatch):
    """Put a module where pip would put it."""

    def run(source):
        site = there.parent / "site-packages"
        site.mkdir()
        (site / "installed_by_somebody.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        monkeypatch.setattr(sys, "dont_write_bytecode", False)
        return site

    yield run
    sys.modules.pop("installed_by_somebody", None)


def test_an_installed_module_may_do_as_it_likes_while_it_is_imported(there, install):
    site = install(f"with open({str(there / 'secret')!r}) as file: text = file.read()")
    with guarded():
        assert importlib.import_module("installed_by_somebody").text == "mine"
    # and is cached, or each start would compile it again
    assert list((site / "__pycache__").iterdir())


def test_but_look_up_no_name(install):
    install("import socket; socket.gethostbyname('db.example')")
    with pytest.raises(TrustError, match=r"looked up db\.example"), guarded():
        importlib.import_module("installed_by_somebody")


def test_nor_do_anything_afterwards(there, install):
    install("def act(path): open(path)")
    with pytest.raises(TrustError, match=r"read .*/secret"), guarded():
        importlib.import_module("installed_by_somebody").act(there / "secret")


# Threads.


def test_other_threads_notice_nothing(there):
    begin, done = threading.Event(), queue.Queue()

    def other():
        begin.wait(10)
        done.put((there / "secret").read_text())

    thread = threading.Thread(target=other)
    thread.start()
    with guarded():
        begin.set()
        assert done.get(timeout=10) == "mine"
        thread.join()
    assert (there / "secret").read_text() == "mine"


def test_a_thread_that_is_started_while_building_is_guarded(there):
    def act():
        thread = threading.Thread(target=try_to_read, args=["secret"])
        thread.start()
        thread.join()

    before = threading.Thread.start
    with pytest.raises(TrustError, match=r"read .*/secret"), guarded():
        act()
    assert threading.Thread.start is before


def test_it_is_guarded_until_it_ends(there):
    built, found, before = threading.Event(), queue.Queue(), threading.Thread.start

    def act():
        built.wait(10)
        try:
            found.put((there / "secret").read_text())
        except PermissionError as error:
            found.put(str(error))

    with guarded():
        thread = threading.Thread(target=act)
        thread.start()
    built.set()
    assert "building the model read" in found.get(timeout=10)
    thread.join()
    assert threading.Thread.start is before
    assert (there / "secret").read_text() == "mine"


def test_guards_within_guards(there, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own").write_text("own")
    with guarded(there):
        with guarded(tmp_path / "model"):
            assert (tmp_path / "model" / "own").read_text() == "own"
        assert (there / "secret").read_text() == "mine"


def test_importing_the_package_installs_no_hook():
    """A hook stays until the process ends, so it comes with the first build."""
    script = (
        "import sys; sys.addaudithook = exit; import mlflow_safeflavor.load.load, "
        "mlflow_safeflavor.module.guarded"
    )
    assert subprocess.run([sys.executable, "-c", script + "; sys.exit(7)"]).returncode == 7
