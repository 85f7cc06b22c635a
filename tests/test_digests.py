"""Digests of weights: right, counted once for each file, and remembered only where nobody else can write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from artifacts import flip, read_header, write_header
from safetensors.torch import save_file

from mlflow_safeflavor import digests
from mlflow_safeflavor.digests import FileDigests, cached_digests_of, digests_of
from mlflow_safeflavor.errors import IntegrityError

pytest_plugins = "saved_models"


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100.0), "b": torch.ones(3, 3), "empty": torch.empty(0)}, path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's folder; files of any size and age are worth it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_WORTH_CACHING", 0)
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    return tmp_path / "cache" / "mlflow-safeflavor"


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """Every file that was hashed in this process, in order."""
    calls: list[Path] = []

    def counting(path: Path) -> FileDigests:
        calls.append(path)
        return digests_of(path)

    monkeypatch.setattr(digests, "digests_of", counting)
    return calls


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.json"))


def replace_by(path: Path, content: bytes) -> None:
    """As a download does: another file under the same name."""
    other = path.with_suffix(".other")
    other.write_bytes(content)
    os.replace(other, path)


# The digests themselves


def test_they_are_those_of_the_header_and_of_each_tensors_bytes(weights):
    header, data = read_header(weights)
    found = digests_of(weights)
    content = weights.read_bytes()
    assert found.header == hashlib.sha256(content[: len(content) - len(data)]).hexdigest()
    assert found.tensors == {
        name: hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest()
        for name, entry in header.items()
        if name != "__metadata__"
    }
    assert found.tensors["empty"] == hashlib.sha256().hexdigest()


def test_any_byte_counts(weights):
    """Header and tensors together are the whole file: no byte can change unseen."""
    original, size = digests_of(weights), weights.stat().st_size
    for position in range(0, size, 7):
        flip(weights, position)
        with contextlib.suppress(IntegrityError):  # no header any more
            assert digests_of(weights) != original, f"byte {position} of {size} went unseen"
        flip(weights, position)
    assert digests_of(weights) == original


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_file_that_is_cut_short_is_named(weights, size):
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(IntegrityError) as caught:
        digests_of(weights)
    assert caught.value.where == "model.safetensors"


@pytest.mark.parametrize(
    "offsets", [[0, 10**9], [-4, 4], [8, 4], [0.0, 4.0], ["0", "4"], [0], None, [True, 4]], ids=str
)
def test_offsets_that_cannot_be_are_refused(weights, offsets):
    header, data = read_header(weights)
    header["a"]["data_offsets"] = offsets
    write_header(weights, header, data)
    with pytest.raises(IntegrityError, match="header is malformed") as caught:
        digests_of(weights)
    assert caught.value.where == "model.safetensors"


# The cache


def test_a_file_is_hashed_once(weights, cache, hashed):
    first = cached_digests_of(weights)
    assert first == digests_of(weights)
    assert cached_digests_of(weights) == first
    assert hashed == [weights], "the second look hashed again, or the first did not"
    assert len(entries(cache)) == 1


def test_two_files_are_two_entries(weights, cache, hashed, tmp_path):
    copy = Path(shutil.copy(weights, tmp_path / "copy.safetensors"))
    assert cached_digests_of(weights) == cached_digests_of(copy)
    assert hashed == [weights, copy]
    assert len(entries(cache)) == 2


def test_another_way_to_the_same_file_is_the_same_entry(weights, cache, hashed, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(weights)
    assert cached_digests_of(weights) == cached_digests_of(link)
    assert hashed == [weights]


def test_changed_bytes_are_hashed_again_even_with_the_old_times(weights, cache, hashed):
    original, times = cached_digests_of(weights), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    with weights.open("r+b") as file:  # in place: same inode, same size
        file.write(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_ino == times.st_ino
    assert weights.stat().st_mtime_ns == times.st_mtime_ns
    assert cached_digests_of(weights) != original
    assert len(hashed) == 2


def test_a_replaced_file_is_hashed_again(weights, cache, hashed):
    original = cached_digests_of(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    replace_by(weights, bytes(content))
    assert cached_digests_of(weights) != original
    assert len(hashed) == 2


def test_a_touched_file_is_hashed_again(weights, cache, hashed):
    original = cached_digests_of(weights)
    os.utime(weights, (1, 1))
    assert cached_digests_of(weights) == original
    assert len(hashed) == 2


CORRUPT = {
    "empty": b"",
    "cut": b'{"header": "ab", "ten',
    "no text": b"\xff\xfe\x00",
    "null": b"null",
    "list": b"[1, 2]",
    "other keys": b'{"head": "", "tensors": {}}',
    "more keys": b'{"header": "", "tensors": {}, "x": 1}',
    "header of another type": b'{"header": 1, "tensors": {}}',
    "tensors of another type": b'{"header": "", "tensors": []}',
    "digests of another type": b'{"header": "", "tensors": {"a": 1}}',
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_entry_is_computed_anew(weights, cache, hashed, kind):
    expected = cached_digests_of(weights)
    entries(cache)[0].write_bytes(CORRUPT[kind])
    assert cached_digests_of(weights) == expected
    assert len(hashed) == 2
    assert cached_digests_of(weights) == expected
    assert len(hashed) == 2, "the entry was not mended"


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(weights, cache, hashed, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digests.os, "replace", full)
    assert cached_digests_of(weights) == digests_of(weights)


def test_small_files_are_not_worth_it(weights, cache, hashed, monkeypatch):
    monkeypatch.setattr(digests, "_WORTH_CACHING", weights.stat().st_size + 1)
    cached_digests_of(weights)
    cached_digests_of(weights)
    assert hashed == [weights, weights]
    assert entries(cache) == []


def test_a_file_that_just_changed_could_change_again_unseen(weights, cache, hashed, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED", 3600.0)
    cached_digests_of(weights)
    cached_digests_of(weights)
    assert hashed == [weights, weights]
    assert entries(cache) == []


def test_the_constants_themselves():
    assert digests._WORTH_CACHING <= 10**8, "a model of 100 MB is hashed by every worker"
    assert digests._SETTLED >= 1, "some file systems keep times to the second"


# Whose folder


def test_a_new_folder_is_for_its_owner_alone(weights, cache):
    cached_digests_of(weights)
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777], ids=oct)
def test_a_folder_that_others_may_write_is_not_believed(weights, cache, hashed, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = cached_digests_of(weights)
    lie = FileDigests("0" * 64, dict.fromkeys(expected.tensors, "0" * 64))
    entries(cache)[0].write_text(json.dumps({"header": lie.header, "tensors": lie.tensors}))
    assert cached_digests_of(weights) == lie, "the test is void: the lie would not be believed anyway"
    cache.chmod(mode)
    assert cached_digests_of(weights) == expected
    assert (tmp_path / "home" / ".cache" / "mlflow-safeflavor").is_dir(), "the next candidate is the home folder"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_believed(weights, cache, hashed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cached_digests_of(weights)
    os.chown(cache, 12345, -1)
    cached_digests_of(weights)
    assert hashed == [weights, weights]


def test_a_link_is_no_folder(weights, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    cached_digests_of(weights)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_read_only_home_falls_back_to_the_temporary_folder(weights, cache, hashed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")  # nothing can be made below a file, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(digests.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    cached_digests_of(weights)
    cached_digests_of(weights)
    assert hashed == [weights]
    assert len(entries(tmp_path / "tmp" / f"mlflow-safeflavor-{os.getuid()}")) == 1


def test_no_folder_at_all_means_no_cache(weights, cache, hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_is_private", lambda folder: False)
    cached_digests_of(weights)
    cached_digests_of(weights)
    assert hashed == [weights, weights]


def test_a_relative_cache_home_is_ignored(weights, cache, tmp_path, monkeypatch):
    """The working folder may be anybody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cached_digests_of(weights)
    assert not (tmp_path / "here").exists()
    assert len(entries(tmp_path / "home" / ".cache" / "mlflow-safeflavor")) == 1


# Many at once


def test_many_threads_hash_once(weights, cache, monkeypatch):
    started = threading.Barrier(8)
    calls = []

    def slow(path: Path) -> FileDigests:
        calls.append(path)
        time.sleep(0.2)
        return digests_of(path)

    def look(_: int) -> FileDigests:
        started.wait()
        return cached_digests_of(weights)

    monkeypatch.setattr(digests, "digests_of", slow)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, range(8)))
    assert calls == [weights]
    assert all(each == digests_of(weights) for each in found)


WORKER = """
import sys, time
from pathlib import Path
from mlflow_safeflavor import digests

weights, log, go = map(Path, sys.argv[1:])
digests._WORTH_CACHING, digests._SETTLED, original = 0, -1.0, digests.digests_of

def counting(path):
    with log.open("a") as file:
        file.write("hashed\\n")
    time.sleep(1)
    return original(path)

digests.digests_of = counting
with log.open("a") as file:
    file.write("ready\\n")
while not go.exists():
    time.sleep(0.01)
print(digests.cached_digests_of(weights).header)
"""


def test_several_processes_that_start_at_once_hash_once(weights, tmp_path):
    log, go = tmp_path / "log", tmp_path / "go"
    log.touch()
    command = [sys.executable, "-c", WORKER, str(weights), str(log), str(go)]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    workers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 120
    while log.read_text().count("ready") < len(workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    go.touch()
    found = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    assert found == [digests_of(weights).header] * len(workers)
    assert log.read_text().splitlines().count("hashed") == 1


def test_loading_uses_the_cache(tmp_path, monkeypatch, cache, hashed, tiny_bert, tiny_tokenizer):
    """And what the cache says is compared with the artifact, which the cache knows nothing of."""
    import mlflow_safeflavor

    path = tmp_path / "model"
    mlflow_safeflavor.save_model(tiny_bert(), path, tokenizer=tiny_tokenizer, rehearse=False)
    before = len(hashed)
    for _ in range(2):
        mlflow_safeflavor.load_model(str(path))
    assert len(hashed) == before + 1
    mlflow_safeflavor.load_model(str(path), verify="structure")
    assert len(hashed) == before + 1
    content = bytearray((path / "safeflavor" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "safeflavor" / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="Weights are not the ones"):
        mlflow_safeflavor.load_model(str(path))
