"""What importing costs: modules that run before torch, or without it, may not load it."""

import json
import pkgutil
import subprocess
import sys

import pytest

from mlflow_safeflavor import tasks

# The last two are what loading starts with: they import torch only after the environment was judged.
LIGHT = ["errors", "artifact", "spec", "environment", "trust", "cpu", "options", "report", "load", "pyfunc"]
HEAVY = {"torch", "transformers"}
# What answers, whatever the engine.
ANSWERS = ["answers", "batching", "engine", "model", "parity", "rows", "scheduler", "tasks"]
ANSWERS += [f"tasks.{module.name}" for module in pkgutil.iter_modules(tasks.__path__)]


@pytest.mark.parametrize("module", ["mlflow_safeflavor", *(f"mlflow_safeflavor.{name}" for name in LIGHT)])
def test_importing_loads_neither_torch_nor_transformers(module):
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert module in imported
    assert not HEAVY & imported


WITHOUT = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing either is an ImportError from here on

import importlib, json
import numpy as np

for name in json.loads(sys.argv[1]):
    importlib.import_module(f"mlflow_safeflavor.{name}")

from mlflow_safeflavor.answers import predict_rows
from mlflow_safeflavor.scheduler import Scheduler
from mlflow_safeflavor.tasks import TASKS


class Doubling:
    name, on_cpu = "doubling", True

    def __call__(self, inputs):
        return {"twice": 2 * inputs["x"]}


config = {"arguments": ["x"], "single": "x", "form": "array", "columns": None}
raw = TASKS["raw"](config, {})
rows = raw.rows(np.arange(3.0))
(answer,), _ = predict_rows(raw, Scheduler(raw, Doubling()), rows)
print(answer["twice"].tolist())
"""


def test_what_answers_runs_where_there_is_no_torch():
    command = [sys.executable, "-c", WITHOUT, json.dumps(ANSWERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0.0, 2.0, 4.0]\n"
