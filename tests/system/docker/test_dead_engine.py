"""What a killed engine of the tests leaves behind does not get in the way of the next one."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from system.docker import engine as engines

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a network, which takes root"),
]


def test_networks_of_a_killed_engine_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # not where one may be running
    network = tmp_path / f"{engines.FOLDER}killed" / "exec" / "netns" / "of-a-container"
    network.parent.mkdir(parents=True)
    network.touch()
    subprocess.run(["unshare", f"--net={network}", "true"], check=True)
    assert str(network) in Path("/proc/mounts").read_text()
    (tmp_path / "somebody-elses").mkdir()
    engines._remove_dead_engines()
    assert str(network) not in Path("/proc/mounts").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]
