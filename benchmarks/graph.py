"""The graph engine side by side with the module engine and mlflow.transformers, of the same weights.

    python benchmarks/graph.py [--rounds 9] [--starts 7] [--only start,rows] [--json FILE]

All candidates run in turn (A B A B …). What was seen is in docs/graph.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", MLFLOW_DISABLE_TELEMETRY="true")
os.environ.update(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# This folder last: MLflow imports a library that has the name of a file here.
sys.path.append(sys.path.pop(0))

# ruff: noqa: E402  (torch reads these variables once, when it is imported)
from mlflow_safeflavor import cpu

cpu.limit_threads()

import torch
from _common import alternate, machine, median_and_spread, minilm_classifier, ratio, save_ours, save_peer, timed_process
from rich.console import Console
from rich.table import Table

import mlflow_safeflavor
from mlflow_safeflavor import load
from mlflow_safeflavor.artifact import Layout

console = Console(width=None if sys.stdout.isatty() else 140)

_START = """
import sys
import mlflow.pyfunc, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1], **({"model_config": {"engine": sys.argv[2]}} if sys.argv[2] else {}))
model.predict(pd.DataFrame({"text": ["Does it answer?"]}))
"""


def start(ours: Path, peer: Path, rounds: int) -> list[tuple[str, list[float], list[float], str, float]]:
    """A fresh process, from nothing to the first prediction."""
    times = alternate(
        {
            "graph": lambda: timed_process(_START, str(ours), "graph"),
            "module": lambda: timed_process(_START, str(ours), "module"),
            "peer": lambda: timed_process(_START, str(peer), ""),
        },
        rounds,
    )
    wall = {name: found.wall for name, found in times.items()}
    return [
        ("process to first prediction, against mlflow.transformers", wall["graph"], wall["peer"], "s", 0.5),
        ("process to first prediction, against the module engine", wall["graph"], wall["module"], "s", 0.0),
    ]


def rows(ours: Path, rounds: int) -> list[tuple[str, list[float], list[float], str, float]]:
    """Bare forwards of both engines on the same tensors; 40 short ones or 3 long ones a round."""
    module = mlflow_safeflavor.load_model(str(ours)).engine
    graph = mlflow_safeflavor.load_model(str(ours), model_config={"engine": "onnx"}).engine
    found = []
    for count, length, calls, goal in ((1, 5, 40, 0.85), (1, 12, 40, 0.85), (1, 16, 40, 0.85), (8, 256, 3, 1.02)):
        ids = torch.randint(1000, 20000, (count, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        if not torch.equal(graph(inputs)["logits"], module(inputs)["logits"]):
            raise SystemExit("The engines give different bits")
        runs = {
            name: lambda engine=engine, inputs=inputs, calls=calls: [engine(inputs) for _ in range(calls)] and None
            for name, engine in (("graph", graph), ("module", module))
        }
        times = alternate(runs, rounds)
        ms = {name: [seconds / calls for seconds in spent.wall] for name, spent in times.items()}
        what = f"{count} row{'s' if count > 1 else ''} of {length} tokens, bare forward"
        found.append((what, ms["graph"], ms["module"], "ms", goal))
    return found


def load_time(ours: Path, rounds: int) -> list[tuple[str, list[float], list[float], str, float]]:
    """In a warm process: read and check the graph against building and filling the module."""
    layout = Layout(ours)
    from mlflow_safeflavor import inventory_file

    inventory = inventory_file.read_inventory(layout)
    spec, _ = load.read_spec(layout)
    times = alternate(
        {
            "graph": lambda: load._read_graph(inventory, spec, layout, load.LoadOptions(), load.LoadReport()),
            "module": lambda: load.rebuild(inventory, spec, layout, load.LoadOptions(), load.LoadReport()),
        },
        rounds,
    )
    return [("rebuild, in a warm process", times["graph"].wall, times["module"].wall, "ms", 0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--only", default="start,rows", help="parts to run, separated by commas")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    arguments = parser.parse_args()
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    console.print(str(cpu.find_budget()))
    parts = arguments.only.split(",")
    results = []
    with TemporaryDirectory() as folder:
        module = minilm_classifier()
        ours = save_ours(module, Path(folder) / "ours")
        if "rows" in parts:
            results += [*rows(ours, arguments.rounds), *load_time(ours, arguments.rounds)]
        if "start" in parts:
            peer = save_peer(module, "text-classification", Path(folder) / "peer")
            results += start(ours, peer, arguments.starts)
    table = Table("what", "graph", "against", "ratio", "goal")
    for what, mine, theirs, unit, goal in results:
        scale, digits = (1e3, 1) if unit == "ms" else (1, 2)
        middle, low, high = ratio(mine, theirs)
        verdict = f"≤ {goal:g} {'met' if middle <= goal else 'missed'}" if goal else ""
        cells = [f"{median_and_spread(side, scale, digits)} {unit}" for side in (mine, theirs)]
        table.add_row(what, *cells, f"{middle:.2f} ({low:.2f}–{high:.2f})", verdict)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": results}, indent=1))


if __name__ == "__main__":
    main()
