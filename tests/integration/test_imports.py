"""What importing costs: modules that run before torch, or without it, may not load it."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_safeflavor

LIGHT = ("artifact", "environment", "graph", "load", "predict", "server", "tasks")
"""Rooms that can be had without torch and transformers; functions of theirs may import them."""
# which a save needs
BUT = {f"mlflow_safeflavor.graph.{name}" for name in ("decompositions", "export", "trace")}
HEAVY = {"torch", "transformers"}
UNIT = Path(__file__).parents[1] / "unit"


def light_modules():
    """Each of a light room, and those beside the rooms."""
    found = pkgutil.walk_packages(mlflow_safeflavor.__path__, "mlflow_safeflavor.")
    modules = {
        module.name
        for module in found
        if module.name.count(".") == 1 or module.name.split(".")[1] in LIGHT
    }
    return sorted(modules - BUT)


@pytest.mark.parametrize("module", ["mlflow_safeflavor", "mlflow_safeflavor.load.pyfunc"])
def test_importing_loads_neither_torch_nor_transformers(module):
    """Where they are installed."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    imported = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert module in imported
    assert not HEAVY & imported


WITHOUT = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # to import either is an ImportError

import importlib, json
import numpy as np

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)

from mlflow_safeflavor.predict.answers import predict_rows
from mlflow_safeflavor.predict.scheduler import Scheduler
from mlflow_safeflavor.tasks.table import TASKS


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


def test_light_rooms_answer_where_there_is_no_torch():
    command = [sys.executable, "-c", WITHOUT, json.dumps(light_modules())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0.0, 2.0, 4.0]\n"


def test_the_environment_is_judged_without_torch_and_transformers():
    """Where they are installed."""
    code = (
        "import sys;"
        "from mlflow_safeflavor.environment.differences import find_differences;"
        "from mlflow_safeflavor.environment.record import record;"
        "find_differences(record(['torch'], torch_build={}));"
        "sys.exit(', '.join(sys.modules.keys() & {'torch', 'transformers'}) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "")


COLLECT = """
import sys, pytest
status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]])
assert status == 0, status
print(sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_unit_tests_of_light_rooms_import_neither():
    """`make unit ROOM=...` is the loop to work in, and torch takes seconds."""
    rooms = [str(UNIT / room) for room in LIGHT if (UNIT / room).is_dir()]
    assert len(rooms) > 5
    command = [sys.executable, "-c", COLLECT, *rooms]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n[]\n")


def test_unit_tests_are_named_for_files_of_their_room():
    """One that is about a part of a file has more behind the name: `test_layers_of_torch.py`."""
    package = Path(mlflow_safeflavor.__file__).parent
    strangers = []
    for test in UNIT.glob("*/test_*.py"):
        names = [file.stem for file in (package / test.parent.name).rglob("*.*")]
        said = test.stem.removeprefix("test_") + "_"
        strangers += [] if any(said.startswith(f"{name}_") for name in names) else [test.name]
    assert strangers == []


def test_no_file_is_longer_than_one_subject_takes():
    files = Path(mlflow_safeflavor.__file__).parent.rglob("*.py")
    assert [file.name for file in files if len(file.read_text().splitlines()) > 350] == []


PARCEL = re.compile(r"\w+(?:Options|Report)\b")


def test_no_story_hands_its_options_or_report_through_many_functions():
    """A function takes the values that it uses; the page shows a report when the story is over."""
    package = Path(mlflow_safeflavor.__file__).parent
    takers = {"LoadOptions": set(), "LoadReport": set(), "ParityReport": set()}
    for room in ("save", "load", "verify", "predict"):
        for file in sorted({*(package / room).rglob("*.py")} - {package / "verify" / "page.py"}):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    said = " ".join(ast.unparse(one.annotation) for one in given if one.annotation)
                    for parcel in PARCEL.findall(said):
                        takers.setdefault(parcel, set()).add(f"{file.stem}.{node.name}")
    assert {parcel: found for parcel, found in takers.items() if len(found) > 2} == {}
    assert takers["LoadOptions"]
