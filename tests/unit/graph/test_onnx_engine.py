"""ONNX Runtime as this package imports it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
from mlflow_safeflavor.graph import onnx_engine
import onnxruntime
assert onnx_engine.onnxruntime is onnxruntime
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize("chosen", [None, "true"])
def test_its_makers_are_told_nothing(tmp_path, chosen):
    """It keeps an id of the machine at home and an id of the process among temporary files."""
    environ = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    for name in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
        environ.pop(name, None)
    if chosen:
        environ["ORT_DISABLE_TELEMETRY"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(chosen), "as it was before"
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []
