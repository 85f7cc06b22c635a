"""How long loading takes, side by side with other ways, and how much memory it needs.

    python benchmarks/load.py [--rounds 9] [--starts 7] [--large] [--only
    rebuild,digests,start,workers] [--json FILE]

Candidates run in turn (A B A B …) in one go, so ratios can be trusted more than times. What the
tables mean, and what was seen, is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# No loader may ask a hub or report usage while the clock runs, here or in the processes started
# here.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import by_hand
from _common import (
    SIZES,
    Spent,
    alternate,
    machine,
    median_and_spread,
    minilm_classifier,
    ratio,
    roberta_checkpoint,
    save_ours,
    save_peer,
    timed_process,
    tokenizer,
)
from rich.console import Console
from rich.table import Table

RESULTS: list[dict[str, Any]] = []
console = Console(width=None if sys.stdout.isatty() else 140)


def report(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], note: str = ""
) -> None:
    """Print a table and keep it for ``--json``."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    RESULTS.append(
        {
            "table": title,
            "note": note,
            "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        }
    )


def against(value: float, goal: float) -> str:
    """A goal, and whether it is met."""
    return f"≤ {goal:g} {'met' if value <= goal else 'missed'}"


def ratio_cell(ours: list[float], theirs: list[float]) -> str:
    """``0.25 (0.24–0.27)``."""
    middle, low, high = ratio(ours, theirs)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


# --- rebuild and fill ----------------------------------------------------------------------------


def rebuild(size: str, dtype: str, rounds: int, cache: Path) -> None:
    """Build and fill a module in a warm process, against ``AutoModel.from_pretrained``."""
    import torch
    from transformers import AutoModel

    from mlflow_safeflavor.artifact import inventory_file
    from mlflow_safeflavor.artifact.layout import Layout
    from mlflow_safeflavor.artifact.spec import read_spec
    from mlflow_safeflavor.module import inventory, structure, tensors
    from mlflow_safeflavor.module.build import build
    from mlflow_safeflavor.module.fill import fill

    checkpoint, layout = (
        roberta_checkpoint(size, dtype, cache),
        Layout(our_roberta(size, dtype, cache)),
    )
    spec, _ = read_spec(layout)  # MLmodel, which from_pretrained has no counterpart of

    def filled() -> tuple[torch.nn.Module, inventory_file.Inventory]:
        recorded = inventory_file.read_inventory(layout)
        module = build(structure.read_structure(layout, spec), inventory=recorded)
        fill(module, recorded, tensors.read_tensors(recorded, layout))
        return module, recorded

    def fill_and_compare() -> torch.nn.Module:
        module, recorded = filled()
        if differences := list(inventory.find_differences(module, recorded)):
            raise SystemExit(f"The rebuilt module differs: {differences[0]}")
        return module

    times = alternate(
        {
            "peer": lambda: AutoModel.from_pretrained(checkpoint, dtype=getattr(torch, dtype)),
            "fill": lambda: list(filled()),
            "compare": fill_and_compare,
        },
        rounds,
    )
    peer = times["peer"].wall
    rows = [("AutoModel.from_pretrained", median_and_spread(peer, 1e3), "1", "")]
    for name, what in (
        ("fill", "ours: build, fill"),
        ("compare", "ours: build, fill, compare every tensor's facts"),
    ):
        wall = times[name].wall
        rows.append(
            (
                what,
                median_and_spread(wall, 1e3),
                ratio_cell(wall, peer),
                against(ratio(wall, peer)[0], 0.3),
            )
        )
    gigabytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e9
    report(
        f"Rebuild a RoBERTa of {gigabytes:.2f} GB, {dtype}, in a warm process",
        ("what", "ms", "ratio", "goal"),
        rows,
    )


def our_roberta(size: str, dtype: str, cache: Path) -> Path:
    """Our artifact of that checkpoint; saved anew in each run, with the loader that is measured."""
    folder = cache / f"ours-{size.replace(' ', '')}-{dtype}"
    if folder not in _saved:
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(
            roberta_checkpoint(size, dtype, cache), dtype=getattr(torch, dtype)
        )
        _saved.add(save_ours(model, folder, dtype))
    return folder


_saved: set[Path] = set()


# --- digests -------------------------------------------------------------------------------------


def digests(size: str, dtype: str, rounds: int, cache: Path) -> None:
    """Hash the weights as a load with ``verify="full"`` does, against plain SHA-256 of memory."""
    from mlflow_safeflavor.artifact import digests as ours
    from mlflow_safeflavor.artifact import inventory_file
    from mlflow_safeflavor.artifact.layout import Layout

    layout = Layout(our_roberta(size, dtype, cache))
    files = sorted(layout.data.glob("model*.safetensors"))
    size_of = {"hashlib": 256 * 2**20, "ours": sum(file.stat().st_size for file in files)}
    block = bytes(size_of["hashlib"])
    inventory = inventory_file.read_inventory(layout)
    os.environ["XDG_CACHE_HOME"] = str(cache / "host")

    def first() -> None:
        shutil.rmtree(cache / "host", ignore_errors=True)
        inventory_file.hold_weights(inventory, layout)

    times = alternate(
        {
            "hashlib": lambda: hashlib.sha256(block).hexdigest(),
            "ours": lambda: [ours.digests_of(file) for file in files],
            "first": first,
            "remembered": lambda: inventory_file.hold_weights(inventory, layout),
        },
        rounds,
    )

    def per_gigabyte(name: str, values: list[float]) -> list[float]:
        return [value / size_of[name] * 1e9 for value in values]

    names = {
        "hashlib": "hashlib.sha256 of 256 MB of memory, one thread",
        "ours": f"ours: weights of {size_of['ours'] / 1e9:.2f} GB, digests tensor by tensor",
    }
    rows = []
    for name, what in names.items():
        wall, cpu = per_gigabyte(name, times[name].wall), per_gigabyte(name, times[name].cpu)
        goal = (
            against(sorted(cpu)[len(cpu) // 2], 1.0)
            if name == "ours"
            else "the machine's own speed"
        )
        rows.append((what, median_and_spread(wall, 1, 2), median_and_spread(cpu, 1, 2), goal))
    for name, what in (
        ("first", "ours, and a private copy"),
        ("remembered", "ours, once the host has the copy"),
    ):
        rows.append((what, f"{median_and_spread(times[name].wall, 1e3, 1)} ms in all", "", ""))
    report(
        f"SHA-256 of {dtype} weights, from the page cache",
        ("what", "s per GB", "s per GB per core", "goal"),
        rows,
        "Per core: CPU seconds of all threads for one GB, which is what one core alone would take.",
    )


# --- start ---------------------------------------------------------------------------------------

IMPORTS = """
import sys
import pandas, torch
import mlflow.pyfunc
from transformers import BertForSequenceClassification
"""
PREDICT = """
import sys
import pandas
import mlflow.pyfunc
options = {"model_config": {"engine": sys.argv[2]}} if sys.argv[2:] else {}
model = mlflow.pyfunc.load_model(sys.argv[1], **options)
model.predict(pandas.DataFrame({"text": ["hello world"]}))
"""
EMPTY_LOADER = """
class Empty:
    def predict(self, rows, params=None):
        return rows


def _load_pyfunc(path, model_config=None):
    return Empty()
"""


def start(rounds: int, cache: Path) -> None:
    """From nothing to the first prediction, each time in a fresh process."""
    model = minilm_classifier()
    ours = save_ours(model, cache / "ours-minilm")
    peer = save_peer(model, "text-classification", cache / "peer-minilm")
    empty = _empty_model(ours, cache / "empty")
    shutil.rmtree(cache / "hand-minilm", ignore_errors=True)
    hand = by_hand.save(model, tokenizer(), cache / "hand-minilm")
    commands: dict[str, tuple[str, ...]] = {
        "imports": (IMPORTS,),
        "empty": (IMPORTS + PREDICT, str(empty)),
        "ours": (PREDICT, str(ours), "module"),
        "onnx": (PREDICT, str(ours), "onnx"),
        "hand": (PREDICT, str(hand)),
        "peer": (PREDICT, str(peer)),
    }
    times = alternate({name: _timed(*command) for name, command in commands.items()}, rounds)
    names = {
        "imports": "bare imports: mlflow.pyfunc, torch, the model's class",
        "empty": "the same, and MLflow loading nothing with our pins",
        "ours": "ours, module engine: digests, rebuild, compare, golden rows, predict",
        "onnx": "ours, engine onnx",
        "hand": "ONNX Runtime by hand: by_hand.py",
        "peer": "mlflow.transformers: load, predict",
    }
    rows = [
        (
            what,
            median_and_spread(times[name].wall, 1, 2),
            median_and_spread(times[name].cpu, 1, 2),
            "" if name == "ours" else ratio_cell(times["ours"].wall, times[name].wall),
            "" if name == "onnx" else ratio_cell(times["onnx"].wall, times[name].wall),
            against(ratio(times["onnx"].wall, times["peer"].wall)[0], 0.32)
            if name == "peer"
            else "",
        )
        for name, what in names.items()
    ]
    report(
        "Process to first prediction: a MiniLM classifier, one row, through mlflow.pyfunc",
        ("what", "s", "CPU s", "module / this", "onnx / this", "goal of onnx"),
        rows,
    )


def _timed(*command: str) -> Callable[[], Spent]:
    return lambda: timed_process(*command)


def _empty_model(ours: Path, folder: Path) -> Path:
    """An artifact with our MLmodel and our pins, whose loader does nothing.

    What MLflow itself takes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "empty_loader.py").write_text(EMPTY_LOADER)
    mlmodel = (
        (ours / "MLmodel")
        .read_text()
        .replace("loader_module: mlflow_safeflavor", "loader_module: empty_loader")
    )
    (folder / "MLmodel").write_text(mlmodel)
    shutil.copy(ours / "requirements.txt", folder)
    return folder


# --- workers -------------------------------------------------------------------------------------

WORKERS = 4
# Four stops: after imports, after loading and reading every weight, once all have, and the end.
WORKER = """
import json, sys
import mlflow.pyfunc, mlflow.transformers, onnxruntime, torch
from transformers import RobertaModel, pipeline
import mlflow_safeflavor
how, path = sys.argv[1:]
print(json.dumps([]), flush=True)
input()
if how == "onnx":
    model = mlflow_safeflavor.load_model(path, model_config={"engine": "onnx"})
    for _ in range(2):  # a server goes on answering once others have started
        model.predict(["some words " * 20])
        print("[]", flush=True)
        input()
    sys.exit()
if how == "ours":
    module = mlflow_safeflavor.load_model(path).module
else:
    module = mlflow.transformers.load_model(path, dtype=getattr(torch, how)).model
seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}
total = sum(float(t.float().sum()) for t in module.parameters())
for _ in range(2):
    print(json.dumps(sorted(seen.items())), flush=True)
    input()
"""


def workers(cache: Path) -> None:
    """Four processes on one artifact: how much memory their weights take together."""
    import torch
    from transformers import AutoModel

    size = "0.5 GB"
    peer = cache / "peer-0.5GB-float32"
    model = AutoModel.from_pretrained(
        roberta_checkpoint(size, "float32", cache), dtype=torch.float32
    )
    save_peer(model, "feature-extraction", peer)
    ours = {
        dtype: save_ours(model, cache / f"ours-cast-{dtype}", dtype)
        for dtype in ("float32", "bfloat16")
    }
    count = sum(parameter.numel() for parameter in model.parameters())
    del model
    rows = []
    for what, how, folder, width in (
        ("ours, engine onnx", "onnx", ours["float32"], 4),
        ("ours, module, saved in float32", "ours", ours["float32"], 4),
        ("ours, module, saved in bfloat16", "ours", ours["bfloat16"], 2),
        ("mlflow.transformers, float32 as saved", "float32", peer, 4),
        ("mlflow.transformers, cast to bfloat16", "bfloat16", peer, 2),
    ):
        copy = count * width
        weights, growth = _memory_of_workers(how, folder)
        goal = (
            against((growth if how == "onnx" else weights) / copy, 1.1)
            if what.startswith("ours")
            else ""
        )
        # its memory has no addresses that are told
        known = "" if how == "onnx" else f"{weights / copy:.2f}"
        rows.append((what, f"{copy / 1e6:.0f}", known, f"{growth / copy:.2f}", goal))
    report(
        f"Proportional memory of {WORKERS} processes on one artifact of 125 M parameters",
        ("what", "one copy, MB", "weights, copies", "all growth, copies", "goal"),
        rows,
        "Weights: proportional set size (PSS) of the memory that parameters lie in. All growth: "
        "PSS of the\n"
        "processes after loading, less that before; it also holds the rest of the loader and its "
        "libraries.",
    )


def sessions(rounds: int, folder: Path) -> None:
    """Opening a graph: with its weights as arrays, as files, and packed by another process."""
    from mlflow_safeflavor.artifact import inventory_file
    from mlflow_safeflavor.artifact.layout import Layout
    from mlflow_safeflavor.graph.file import open_graph
    from mlflow_safeflavor.graph.onnx_engine import RUNTIME, Session
    from mlflow_safeflavor.graph.packed_weights import PackedWeights

    layout = Layout(folder)
    inventory = inventory_file.read_inventory(layout)
    weights, _ = inventory_file.hold_weights(inventory, layout)
    files = dict(zip(inventory.files, weights, strict=True))
    graph, arrays = open_graph(inventory.files, layout)

    def shared() -> Session:
        packed = PackedWeights(graph.content, weights, RUNTIME)
        return Session(graph, arrays, threads=1, files=files, packed=packed)

    company = [shared() for _ in range(2)]
    times = alternate(
        {
            "arrays": lambda: Session(graph, arrays, threads=1),
            "files": lambda: Session(graph, arrays, threads=1, files=files),
            "shared": shared,
        },
        rounds,
    )
    report(
        f"A session of ONNX Runtime, {sum(array.nbytes for array in arrays.values()) / 1e6:.0f} "
        "MB of weights",
        ("weights", "ms", "CPU ms"),
        [
            (
                what,
                median_and_spread(times[name].wall, 1e3, 0),
                median_and_spread(times[name].cpu, 1e3, 0),
            )
            for name, what in (
                ("arrays", "arrays, packed for it alone"),
                ("files", "mapped from their files, packed for it alone"),
                ("shared", "mapped, packed by another process"),
            )
        ],
    )
    del company


def _memory_of_workers(how: str, folder: Path) -> tuple[float, float]:
    """Bytes that the weights take in all workers together, and by how much the workers grew."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, how, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # some lines of warnings, read only if it fails
            text=True,
        )
        for _ in range(WORKERS)
    ]
    try:
        for process in processes:
            _answer(process)
        before = sum(_pss(process.pid, None) for process in processes)
        for _ in range(2):
            for process in processes:
                _go_on(process)
            storages = [_answer(process) for process in processes]
        after = sum(_pss(process.pid, None) for process in processes)
        weights = sum(
            _pss(process.pid, seen) for process, seen in zip(processes, storages, strict=True)
        )
        return weights, after - before
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _answer(process: subprocess.Popen[str]) -> list[tuple[int, int]]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"A worker failed:\n{process.communicate()[1]}")
    return [(first, size) for first, size in json.loads(line)]


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _pss(pid: int, ranges: list[tuple[int, int]] | None) -> float:
    """Proportional set size in bytes.

    Of the whole process, or of the maps that cover the ranges.
    """
    if ranges is None:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    total = 0.0
    for first, stop, pss in _maps(pid):
        covered = sum(max(0, min(stop, start + size) - max(first, start)) for start, size in ranges)
        total += pss * covered / (stop - first)
    return total


def _maps(pid: int) -> Iterator[tuple[int, int, float]]:
    """First address, end and PSS of each map of a process."""
    first = stop = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):
            first, stop = (int(part, 16) for part in key.split("-"))
        elif key == "Pss:":
            yield first, stop, float(line.split()[1]) * 1024


# --- all of it -----------------------------------------------------------------------------------


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="of what runs in one warm process")
    parser.add_argument("--starts", type=int, default=7, help="fresh processes of each kind")
    parser.add_argument(
        "--large", action="store_true", help="also 2 and 7 GB; needs 20 GB of disk and of memory"
    )
    parser.add_argument(
        "--only", default="rebuild,digests,start,workers", help="parts, separated by commas"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "mlflow-safeflavor-bench"
    )
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    parts, cache = options.only.split(","), options.cache
    cache.mkdir(parents=True, exist_ok=True)
    facts = machine()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for size in SIZES if options.large else list(SIZES)[:1]:
        for dtype in ("float32", "bfloat16"):
            if "rebuild" in parts:
                rebuild(size, dtype, options.rounds, cache)
            if "digests" in parts and dtype == "float32":
                digests(size, dtype, options.rounds, cache)
            if size != next(iter(SIZES)):
                _remove_large(size, cache)
    if "start" in parts:
        start(options.starts, cache)
    if "workers" in parts:
        workers(cache)
        sessions(options.rounds, cache / "ours-cast-float32")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": facts, "results": RESULTS}, indent=1, ensure_ascii=False) + "\n"
        )


def _remove_large(size: str, cache: Path) -> None:
    """Large models are made anew rather than kept."""
    for folder in cache.glob(f"*-{size.replace(' ', '')}-*"):
        shutil.rmtree(folder)
        _saved.discard(folder)


if __name__ == "__main__":
    main()
