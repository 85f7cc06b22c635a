"""What importing costs: neither the package nor the modules that run before torch may load it."""

import subprocess
import sys

import pytest

# The last two are what loading starts with: they import torch only after the environment was judged.
LIGHT = ["errors", "artifact", "spec", "environment", "trust", "cpu", "options", "report", "load", "pyfunc"]
HEAVY = {"torch", "transformers"}


@pytest.mark.parametrize("module", ["mlflow_safeflavor", *(f"mlflow_safeflavor.{name}" for name in LIGHT)])
def test_importing_loads_neither_torch_nor_transformers(module):
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert module in imported
    assert not HEAVY & imported
