"""Files of weights that are held.

Every byte hashed, once a host, and what was hashed is what is mapped.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlflow_safeflavor.artifact import host_cache, weights_files
from mlflow_safeflavor.artifact.digests import FileDigests, digests_of
from mlflow_safeflavor.artifact.weights_files import HeldFile, hold, require_unchanged
from mlflow_safeflavor.errors import IntegrityError

TENSORS = {
    "a": np.arange(2000, dtype=np.float32),
    "b": np.ones((3, 3), np.float32),
    "empty": np.empty(0, np.float32),
}


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's folder; files of any size and age are worth it."""
    monkeypatch.setenv(host_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weights_files, "_SMALL", -1)
    monkeypatch.setattr(weights_files, "_SETTLED", -1.0)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """What was hashed in this process, in order: names of files."""
    calls: list[str] = []

    def counting(descriptor: int, where: str) -> FileDigests:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        return digests_of(descriptor, where)

    monkeypatch.setattr(weights_files, "digests_of", counting)
    return calls


def held(path: Path, recorded: FileDigests | None = None, *, rehash: bool = False) -> HeldFile:
    file, problems = hold(path, path.name, recorded or digests_of(path), rehash=rehash)
    assert problems == []
    return file


def copy_in(cache: Path) -> Path:
    (copy,) = cache.glob("weights-*/model.safetensors")
    return copy


def flip_last(path: Path, times: bool = False) -> None:
    """Change the last byte in place, also of a file that nobody may write.

    With its old times if asked for.
    """
    before, mode = path.stat(), path.stat().st_mode
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    if times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(mode)


# Which way


def test_a_small_file_is_taken_into_memory(weights):
    content = weights.read_bytes()
    file = held(weights)
    flip_last(weights)
    assert (file.kind, file.path.read_bytes()) == ("memory", content)


def test_a_large_one_is_copied_for_this_host(weights, cache):
    content = weights.read_bytes()
    file = held(weights)
    flip_last(weights)
    weights.unlink()
    assert (file.kind, file.path.read_bytes()) == ("copy", content)
    assert copy_in(cache).stat().st_mode & 0o777 == 0o400
    require_unchanged([file])


@pytest.mark.parametrize("change", ["off", "no room", "sparse", "not hashed"])
def test_otherwise_it_is_the_artifacts_own_and_a_change_is_an_error(
    weights, cache, monkeypatch, change
):
    recorded: FileDigests | None = digests_of(weights)
    if change == "off":
        monkeypatch.setenv(host_cache.VARIABLE, "off")
    elif change == "no room":
        monkeypatch.setattr(host_cache, "_MOST_BYTES", 100)
    elif change == "sparse":
        monkeypatch.setattr(HeldFile, "is_sparse", True)
    else:
        recorded = None
    file, problems = hold(weights, "model.safetensors", recorded, rehash=False)
    assert (file.kind, problems) == ("file", [])
    require_unchanged([file])
    flip_last(weights, times=True)
    with pytest.raises(IntegrityError, match="changed since it was compared") as refused:
        require_unchanged([file])
    assert refused.value.where == "model.safetensors"
    assert not list(cache.glob("*/model.safetensors"))


@pytest.mark.parametrize("kind", ["memory", "copy", "file"])
def test_wrong_bytes_are_named_in_every_way(weights, cache, monkeypatch, kind):
    recorded = digests_of(weights)
    if kind == "memory":
        monkeypatch.setattr(weights_files, "_SMALL", 10**6)
    elif kind == "file":
        monkeypatch.setenv(host_cache.VARIABLE, "off")
    flip_last(weights)
    file, problems = hold(weights, "x.safetensors", recorded, rehash=False)
    assert file.kind == kind
    assert len(problems) == 1
    assert problems[0].startswith("x.safetensors, tensor")
    assert not list(cache.glob("*/model.safetensors")), "a wrong copy stayed"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(IntegrityError, match="cannot be read") as refused:
        hold(tmp_path / "none", "model.safetensors", None, rehash=False)
    assert refused.value.where == "model.safetensors"


def test_descriptors_are_closed_with_the_file(weights, cache):
    gc.collect()  # files of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    file = held(weights)
    assert len(os.listdir("/proc/self/fd")) > before
    del file
    assert len(os.listdir("/proc/self/fd")) == before


# What is remembered


def test_a_file_is_hashed_once(weights, cache, hashed):
    for _ in range(3):
        held(weights)
    assert hashed == ["new"], "the copy's own bytes, and nothing again"


def test_the_same_content_elsewhere_is_hashed_and_shares_the_copy(weights, cache, hashed, tmp_path):
    first = held(weights)
    other = Path(shutil.copy(weights, tmp_path / "other.safetensors"))
    second = held(other)
    assert os.path.samefile(first.path, second.path)
    assert hashed == ["new", "other.safetensors"]


def test_bytes_changed_in_place_are_seen_even_with_the_old_times(weights, cache, hashed):
    recorded = digests_of(weights)
    held(weights)
    flip_last(weights, times=True)
    assert len(hold(weights, "x", recorded, rehash=False)[1]) == 1
    assert len(hashed) == 2


def test_a_file_that_just_changed_could_change_again_unseen(weights, cache, hashed, monkeypatch):
    monkeypatch.setattr(weights_files, "_SETTLED", 3600.0)
    held(weights)
    held(weights)
    assert hashed == ["new", "model.safetensors"]


def test_rehash_believes_nothing(weights, cache, hashed):
    held(weights)
    held(weights, rehash=True)
    assert hashed == ["new", "model.safetensors", "model.safetensors"], (
        "the artifact's and the copy's"
    )


def test_marks_expire(weights, cache, hashed):
    held(weights)
    for mark in cache.glob("*/*.hashed"):
        os.utime(mark, (time.time() - 8 * 86400,) * 2)
    held(weights)
    assert len(hashed) == 3


def test_after_a_restart_nothing_is_believed(weights, cache, hashed, monkeypatch):
    """What a copy holds need not have reached the disk."""
    held(weights)
    monkeypatch.setattr(weights_files, "boot", lambda: "another")
    held(weights)
    assert len(hashed) == 3


def test_where_a_restart_cannot_be_told_nothing_is_remembered(weights, cache, hashed, monkeypatch):
    monkeypatch.setattr(weights_files, "boot", lambda: "")
    held(weights)
    held(weights)
    assert len(hashed) == 3


def test_a_copy_that_rotted_is_made_anew(weights, cache):
    content = weights.read_bytes()
    del content
    held(weights)
    flip_last(copy_in(cache))
    assert held(weights).path.read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("junk", ["entry", "copy", "scratch", "mark"])
def test_junk_in_the_cache_fails_no_load(weights, cache, junk):
    held(weights)
    folder = copy_in(cache).parent
    if junk == "entry":
        shutil.rmtree(folder)
        folder.write_text("junk")
    else:
        marks = list(folder.glob("*.hashed"))
        for path in {
            "copy": [folder / "model.safetensors"],
            "scratch": [folder / "new"],
            "mark": marks,
        }[junk]:
            path.unlink(missing_ok=True)
            (path / "nested").mkdir(parents=True)
            (path / "nested" / "deep.json").write_text("[" * 10_000)
    assert held(weights).path.read_bytes() == weights.read_bytes()


# Many at once


def test_many_threads_hash_once(weights, cache, hashed):
    recorded = digests_of(weights)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: held(weights, recorded), range(8)))
    assert hashed == ["new"]
    assert {file.kind for file in files} == {"copy"}


WORKER = """
import os, sys, time
from pathlib import Path
from mlflow_safeflavor.artifact import weights_files
from mlflow_safeflavor.artifact.digests import digests_of
weights, go = Path(sys.argv[1]), Path(sys.argv[2])
weights_files._SMALL, weights_files._SETTLED, hashed = -1, -1.0, []
recorded = digests_of(weights)
weights_files.digests_of = lambda *given: (time.sleep(1.5), hashed.append(1), digests_of(*given))[2]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.01)
file, problems = weights_files.hold(weights, "x", recorded, rehash=False)
print(file.kind, len(hashed), problems)
"""


@pytest.mark.slow
def test_several_processes_that_start_at_once_hash_once(weights, cache, tmp_path):
    command = [sys.executable, "-c", WORKER, str(weights), str(tmp_path / "go")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    found = sorted(worker.communicate(timeout=120)[0].strip() for worker in workers)
    assert found == ["copy 0 []", "copy 0 []", "copy 1 []"]
