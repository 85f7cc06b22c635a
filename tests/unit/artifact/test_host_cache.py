"""What is kept on this host: for its owner alone, made once, swept.

And whatever fails costs time and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mlflow_safeflavor.artifact import host_cache
from mlflow_safeflavor.artifact.host_cache import (
    VARIABLE,
    cache_folder,
    entry,
    has_room,
    in_use,
    sweep,
)


@pytest.fixture
def homes(tmp_path, monkeypatch) -> Path:
    """A home and a cache home of this test; the temporary folder is one, too."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture
def root(homes, monkeypatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(homes / "cache"))
    return homes / "cache"


def fill(name: str, nbytes: int = 10) -> Path:
    with entry(name) as folder:
        assert folder is not None
        (folder / "content").write_bytes(bytes(nbytes))
        return folder


# Whose folder


def test_a_new_folder_is_for_its_owner_alone(root):
    folder = fill("a")
    assert folder == root / "a"
    assert [path.stat().st_mode & 0o777 for path in (root, folder)] == [0o700, 0o700]


def test_the_cache_home_comes_before_the_home_and_the_temporary_folder(homes):
    assert cache_folder() == homes / "xdg" / "mlflow-safeflavor"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777], ids=oct)
def test_a_folder_that_others_may_write_is_not_believed(homes, mode):
    fill("a").parent.chmod(mode)
    assert cache_folder() == homes / "home" / ".cache" / "mlflow-safeflavor"


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away"
)
def test_a_folder_of_another_user_is_not_believed(homes):
    os.chown(fill("a").parent, 12345, -1)
    assert cache_folder() == homes / "home" / ".cache" / "mlflow-safeflavor"


def test_a_link_is_no_folder(homes):
    (homes / "elsewhere").mkdir(mode=0o700)
    (homes / "xdg").mkdir()
    (homes / "xdg" / "mlflow-safeflavor").symlink_to(homes / "elsewhere")
    fill("a")
    assert list((homes / "elsewhere").iterdir()) == []


def test_a_read_only_home_falls_back_to_the_temporary_folder(homes, monkeypatch):
    (homes / "file").write_text("")  # nothing can be made below a file, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(homes / "file" / "cache"))
    monkeypatch.setenv("HOME", str(homes / "file" / "home"))
    assert cache_folder() == homes / "tmp" / f"mlflow-safeflavor-{os.getuid()}"


def test_a_relative_cache_home_is_ignored(homes, monkeypatch):
    """The working folder may be anybody's."""
    monkeypatch.chdir(homes)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == homes / "home" / ".cache" / "mlflow-safeflavor"


@pytest.mark.parametrize("value", ["off", "OFF", "relative/path"])
def test_it_can_be_switched_off(homes, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    assert cache_folder() is None
    with entry("a") as folder:
        assert folder is None
    sweep()


# What fails


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_home_without_locks_is_passed_over(homes, monkeypatch, number):
    """NFS, Lustre and CIFS may have none; another folder may."""
    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if "xdg" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert cache_folder() == homes / "home" / ".cache" / "mlflow-safeflavor"


def no_locks(*args: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "name", "how"), [("fcntl", "flock", no_locks), ("os", "open", full)]
)
def test_no_folder_at_all_means_no_cache(homes, monkeypatch, where, name, how):
    monkeypatch.setattr(getattr(host_cache, where), name, how)
    with entry("a") as folder:
        assert folder is None


def test_junk_in_the_place_of_a_lock_means_no_cache(root):
    fill("a")
    (root / "b.lock" / "nested").mkdir(parents=True)
    with entry("b") as folder:
        assert folder is None
    sweep()


def test_a_file_in_the_place_of_an_entry_is_replaced(root):
    fill("a")
    (root / "b").write_text("junk")
    assert fill("b").is_dir()


# Many at once

HOLDER = """
import os, signal, sys, time
from mlflow_safeflavor.artifact.host_cache import entry
with entry("a") as folder:
    (folder / "held").touch()
    if sys.argv[1] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(float(sys.argv[2]))
"""


def hold(root: Path, how: str, seconds: float = 0.0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, how, str(seconds)])
    while not (root / "a" / "held").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_one_who_works_is_waited_for(root):
    holder = hold(root, "work", 2.5)
    with entry("a") as folder:
        assert folder is not None
        assert holder.poll() == 0 or holder.wait(5) == 0
    holder.wait()


def test_one_who_shows_no_sign_of_life_is_waited_for_a_second(root):
    holder = hold(root, "stop")
    try:
        began = time.monotonic()
        with entry("a") as folder:
            assert folder is None
        assert 0.9 < time.monotonic() - began < 5
    finally:
        holder.kill()
        holder.wait()
    fill("a")  # the kernel gave its lock back


# Room


def test_the_least_recently_used_go_first(root, monkeypatch):
    for i, name in enumerate(("a", "b", "c")):
        os.utime(fill(name, 100), (time.time() - 1000 + i,) * 2)
    with entry("a"):  # and so it was used last
        pass
    monkeypatch.setattr(host_cache, "_MOST_BYTES", 250)
    sweep()
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["a", "c"]
    assert not (root / "b.lock").exists()


def test_what_nobody_used_for_a_month_goes(root):
    os.utime(fill("a"), (time.time() - 31 * 86400,) * 2)
    fill("b")
    sweep()
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["b"]


def test_what_is_in_use_or_being_made_stays(root, monkeypatch):
    used, made = fill("used"), fill("made")
    descriptor = in_use(used)
    monkeypatch.setattr(host_cache, "_MOST_BYTES", 0)
    with entry("made"):
        sweep()
        assert used.is_dir()
        assert made.is_dir()
    os.close(descriptor)
    sweep()
    assert not used.exists()
    assert not made.exists()


def test_room_is_made_and_some_is_left_on_the_disk(root, monkeypatch):
    old, new = fill("old", 100), fill("new")
    os.utime(old, (1e9, 1e9))
    monkeypatch.setattr(host_cache, "_MOST_BYTES", 150)
    assert has_room(new, 100)
    assert not old.exists()
    assert not has_room(new, 200)
    monkeypatch.setattr(host_cache, "_SPARE_BYTES", 10**18)
    assert not has_room(new, 1)
