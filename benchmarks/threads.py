"""How long idle threads should wait busily before they sleep: torch's, and ONNX Runtime's.

A forward of MiniLM on an idle machine, one forward after the other and each after a pause, and
beside another busy process.

    python benchmarks/threads.py [--engine torch | onnx] [--rounds 9]

Each setting is a process of its own, since OpenMP reads its variables once; all are asked in turn,
round by round. What was seen is in docs/benchmarks.md; `environment.threads.SPIN_COUNT` and
`graph.onnx_engine._SPIN` are what was chosen.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import by_hand
from _common import in_turn, machine, median_and_spread, minilm_classifier, ratio, tokenizer
from rich.console import Console
from rich.table import Table

from mlflow_safeflavor.environment.threads import SPIN_COUNT

TOKENS = (12, 182, 512)
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "torch": {
        "default": {},
        "100000": {"GOMP_SPINCOUNT": "100000"},
        str(SPIN_COUNT): {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
        "1000": {"GOMP_SPINCOUNT": "1000"},
        "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    },
    "onnx": {
        "default": {},
        **{
            f"{spin} µs": {"spin_duration_us": str(spin), "spin_backoff_max": "8"}
            for spin in (1000, 400, 200, 50)
        },
        "not at all": {"allow_spinning": "0"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    },
}
# Neighbour → seconds before each forward, and whether another process is busy.
NEIGHBOURS = {"idle": (0.0, False), "after 5 ms": (0.005, False), "busy": (0.0, True)}

# Defines a forward of so many tokens.
ENGINES = {
    "torch": """
import torch
from _common import minilm_folder
from transformers import AutoModel
model = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32).eval()
def forward(tokens):
    with torch.inference_mode():
        model(torch.full((1, tokens), 2000))
""",
    "onnx": """
import os
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
for name in ("allow_spinning", "spin_duration_us", "spin_backoff_max"):
    if name in os.environ:
        options.add_session_config_entry(f"session.intra_op.{name}", os.environ[name])
session = onnxruntime.InferenceSession(os.environ["GRAPH"], options)
def forward(tokens):
    values = {"input_ids": 2000, "attention_mask": 1, "token_type_ids": 0}
    names = [known.name for known in session.get_inputs()]
    session.run(None, {name: numpy.full((1, tokens), values[name]) for name in names})
""",
}
# Answers each line "TOKENS REPEATS PAUSE" with the median milliseconds of so many forwards.
ASKED = """
import statistics, sys, time
print("ready", flush=True)
for line in sys.stdin:
    tokens, repeats, pause = line.split()
    times = []
    for _ in range(int(repeats) + 1):
        time.sleep(float(pause))
        start = time.perf_counter()
        forward(int(tokens))
        times.append((time.perf_counter() - start) * 1e3)
    print(statistics.median(times[1:]), flush=True)
"""


@contextmanager
def _process(code: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code]
    here = {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__)), "HF_HUB_OFFLINE": "1"}
    quiet = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "MKL_"))
    }
    with subprocess.Popen(
        command,
        env={**quiet, **here, **environ},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def measure(
    engine: str, rounds: int, repeats: int, graph: Path
) -> dict[tuple[str, str, int], list[float]]:
    """Milliseconds by neighbour, setting and tokens, one a round.

    Only one process is asked at a time.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    always = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "GRAPH": str(graph)}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(ENGINES[engine] + ASKED, **{**always, **environ}))
            for name, environ in SETTINGS[engine].items()
        }
        for process in processes.values():
            _read_line(process)
        for neighbour, (pause, busy) in NEIGHBOURS.items():
            with ExitStack() as beside:
                if busy:
                    beside.enter_context(_process("while True: pass"))
                for turn, tokens in product(range(rounds), TOKENS):
                    for name in in_turn(processes, turn):
                        print(tokens, repeats, pause, file=processes[name].stdin, flush=True)
                        found.setdefault((neighbour, name, tokens), []).append(
                            float(_read_line(processes[name]))
                        )
    return found


def main() -> None:
    """Print one table: rows are settings, columns are neighbour and tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(SETTINGS), default="torch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10, help="forwards in one round")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        graph = Path(folder) / "model" / "model.onnx"
        if given.engine == "onnx":
            by_hand.save(minilm_classifier(), tokenizer(), graph.parent)
        found = measure(given.engine, given.rounds, given.repeats, graph)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    table = Table("waits", *(f"{n}, {t} tokens" for n in NEIGHBOURS for t in TOKENS))
    for name in SETTINGS[given.engine]:
        cells = []
        for neighbour, tokens in product(NEIGHBOURS, TOKENS):
            times = found[neighbour, name, tokens]
            against = ratio(times, found[neighbour, "default", tokens])[0]
            cells.append(f"{median_and_spread(times, digits=1)} ms, {against:.2f}×")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
