"""Digests of weights: they are right, and cover every byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from artifacts import flip, read_header, write_header
from safetensors.numpy import save_file

from mlflow_safeflavor.artifact.digests import digests_of
from mlflow_safeflavor.errors import IntegrityError

TENSORS = {
    "a": np.arange(100, dtype=np.float32),
    "b": np.ones((3, 3), np.float32),
    "empty": np.empty(0, np.float32),
}


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


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


STREAMED = """
import resource, sys
from pathlib import Path
from mlflow_safeflavor.artifact.digests import digests_of
from mlflow_safeflavor.artifact.plain_files import digest_of_plain
path, used = Path(sys.argv[1]), int(Path("/proc/self/statm").read_text().split()[0]) * 4096
# Threads reserve their stacks and arenas; what is read has no room but a few buffers.
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
Path("/proc/self/clear_refs").write_text("5")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digests_of(path)
digest_of_plain(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    path, size = tmp_path / "model.safetensors", 2**30
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)  # sparse: it takes no room on the disk
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000, "kilobytes, of a file of 1 GB"
