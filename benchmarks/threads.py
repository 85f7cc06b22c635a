"""How long idle OpenMP threads should spin.

A forward of MiniLM, on an idle machine and beside another busy process.

    python benchmarks/threads.py [--rounds 9]

Each setting is a process of its own, since OpenMP reads its variables once; all are asked in turn,
round by round. What was seen is in docs/benchmarks.md;
`mlflow_safeflavor.environment.threads.SPIN_COUNT` is what was chosen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from _common import machine
from rich.console import Console
from rich.table import Table

from mlflow_safeflavor.environment.threads import SPIN_COUNT

TOKENS = (12, 182, 512)
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "100000": {"GOMP_SPINCOUNT": "100000"},
    str(SPIN_COUNT): {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}

# Answers each line "TOKENS REPEATS" with the median milliseconds of so many forwards.
ASKED = """
import statistics, sys, time, torch
from _common import minilm_folder
from transformers import AutoModel
model = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32).eval()
print("ready", flush=True)
for line in sys.stdin:
    tokens, repeats = map(int, line.split())
    ids, times = torch.randint(5, 30000, (1, tokens)), []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(ids)
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


def measure(rounds: int, repeats: int) -> dict[tuple[str, str, int], list[float]]:
    """Milliseconds by neighbour, setting and tokens, one a round.

    Only one process is asked at a time.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    cores = str(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(ASKED, **{"OMP_NUM_THREADS": cores, **environ}))
            for name, environ in SETTINGS.items()
        }
        for process in processes.values():
            _read_line(process)
        for neighbour in ("idle", "busy"):
            with ExitStack() as beside:
                if neighbour == "busy":
                    beside.enter_context(_process("while True: pass"))
                for _ in range(rounds):
                    for tokens in TOKENS:
                        for name, process in processes.items():
                            print(tokens, repeats, file=process.stdin, flush=True)
                            found.setdefault((neighbour, name, tokens), []).append(
                                float(_read_line(process))
                            )
    return found


def main() -> None:
    """Print one table: rows are settings, columns are neighbour and tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10, help="forwards in one round")
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.repeats)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    table = Table("spinning", *(f"{n}, {t} tokens" for n in ("idle", "busy") for t in TOKENS))
    for name in SETTINGS:
        cells = []
        for neighbour in ("idle", "busy"):
            for tokens in TOKENS:
                times = found[neighbour, name, tokens]
                against = statistics.median(times) / statistics.median(
                    found[neighbour, "default", tokens]
                )
                cells.append(
                    f"{statistics.median(times):.1f} ms ({min(times):.1f}–{max(times):.1f}), "
                    f"{against:.2f}×"
                )
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
