"""What a save costs, step by step, beside ``mlflow.transformers``, and how it grows.

    python benchmarks/save.py [--rounds 3] [--sizes 20,100,400] [--only steps,peer,growth]

CPU seconds of all threads, and seconds on the clock. Every save is one of a warm process, which has
imported and traced before.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from _common import (
    Spent,
    alternate,
    machine,
    median_and_spread,
    minilm_classifier,
    ratio,
    save_peer,
    tokenizer,
)

_ROOM = "mlflow_safeflavor.save."
# Step → where its functions are looked up. Seconds of a step that another contains count there.
STEPS = {
    "describe, and construct again": [("save", "_described")],
    "look for damage": [("save", "require_undamaged")],
    "write tensors": [("save", "write_module")],
    "trace and translate": [("graph", "export")],
    "prove": [("graph", "prove")],
    "record answers": [("save", "write_parity")],
    "pins": [("save", "needs_of"), ("pinning", "Pinning.write"), ("pinning", "Pinning.finish")],
    "manifest": [("save", "seal")],
    "wait for the rehearsal": [("rehearsal", "Rehearsal.load")],
}
REST, CLEAN = "all the rest", "the rehearsal's process"


class Clock:
    """Seconds by step, without those of steps inside of it."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._inside: list[list[float]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``."""
        began = time.process_time(), time.perf_counter()
        self._inside.append([0.0, 0.0])
        try:
            yield
        finally:
            whole = time.process_time() - began[0], time.perf_counter() - began[1]
            for i, inside in enumerate(self._inside.pop()):
                self.spent[name][i] += whole[i] - inside
                if self._inside:
                    self._inside[-1][i] += whole[i]

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.step(name):
                return function(*args, **kwargs)

        return run


def save_by_step(model: Any, folder: Path, **given: Any) -> dict[str, Spent]:
    """Save a model anew; seconds by step, and of the clean process."""
    import mlflow_safeflavor

    shutil.rmtree(folder, ignore_errors=True)
    clock, before = Clock(), resource.getrusage(resource.RUSAGE_CHILDREN)
    patches = []
    for step, places in STEPS.items():
        for file, name in places:
            *of, last = name.split(".")
            owner = importlib.import_module(f"{_ROOM}{file}")
            owner = getattr(owner, of[0]) if of else owner
            patches.append(mock.patch.object(owner, last, clock.around(step, getattr(owner, last))))
    for patch in patches:
        patch.start()
    try:
        with clock.step(REST):
            mlflow_safeflavor.save_model(model, folder, tokenizer=tokenizer(), **given)
    finally:
        mock.patch.stopall()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock.spent[CLEAN][0] = sum(after[:2]) - sum(before[:2])
    return {name: Spent(wall, cpu) for name, (cpu, wall) in clock.spent.items()}


def show_steps(model: Any, folder: Path, rounds: int) -> None:
    """Print each step of the save of a model, rehearsed."""
    seen: dict[str, list[Spent]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, spent in save_by_step(model, folder).items():
            if turn:
                seen[name].append(spent)
    print("\n| step of a save of MiniLM | CPU s | s |\n|---|---|---|")
    for name in [*STEPS, REST, CLEAN]:
        cpu, wall = ([getattr(one, kind) for one in seen[name]] for kind in ("cpu", "wall"))
        shown = "beside the others" if name == CLEAN else median_and_spread(wall, digits=2)
        print(f"| {name} | {median_and_spread(cpu, digits=2)} | {shown} |")


def whole(model: Any, folder: Path, **given: Any) -> Spent:
    """Seconds of one save, those of its clean process among the CPU's."""
    began = time.perf_counter()
    parts = save_by_step(model, folder, **given)
    return Spent(time.perf_counter() - began, sum(part.cpu for part in parts.values()))


def show_peer(model: Any, folder: Path, rounds: int) -> None:
    """Print whole saves of both flavors, in turn."""
    ours: dict[str, Callable[[], object]] = {
        "ours": lambda: whole(model, folder),
        "… without the rehearsal": lambda: whole(model, folder, rehearse=False),
        "… without a graph": lambda: whole(model, folder, graph="no"),
        "… without either": lambda: whole(model, folder, graph="no", rehearse=False),
    }
    peer = "`mlflow.transformers`, which proves nothing"
    runs = {**ours, peer: lambda: save_peer(model, "text-classification", folder / "peer")}
    times = alternate(runs, rounds)
    print("\n| a save of MiniLM | CPU s | s | to the peer's CPU |\n|---|---|---|---|")
    for name, found in times.items():
        middle, low, high = ratio(found.cpu, times[peer].cpu)
        print(
            f"| {name} | {median_and_spread(found.cpu, digits=2)} "
            f"| {median_and_spread(found.wall, digits=2)} "
            f"| {middle:.1f} ({low:.1f}–{high:.1f}) |"
        )


def bert(megabytes: int) -> Any:
    """A classifier of about that many MB of seeded weights, MiniLM's vocabulary not among them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    # a layer of width h has 12 h² weights of four bytes
    hidden, layers = (384, 3) if megabytes < 50 else (768, max(1, round(megabytes / 28)))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=128,
    )
    return BertForSequenceClassification(config).eval()


def show_growth(sizes: list[int], folder: Path, rounds: int) -> None:
    """Print how the parts that grow do so with the weights."""
    print(
        "\n| weights of the layers, and all | trace and translate, CPU s | prove | the rest | sum |"
    )
    print("|---|---|---|---|---|")
    save_by_step(bert(1), folder, rehearse=False)  # the imports
    for size in sizes:
        model = bert(size)
        whole_mb = sum(tensor.nbytes for tensor in model.parameters()) / 1e6
        seen = [save_by_step(model, folder, rehearse=False) for _ in range(rounds)]
        parts: list[list[float]] = [[], [], [], []]
        for one in seen:
            graph, proof = one["trace and translate"].cpu, one["prove"].cpu
            total = sum(part.cpu for part in one.values())
            for values, value in zip(
                parts, (graph, proof, total - graph - proof, total), strict=True
            ):
                values.append(value)
        cells = " | ".join(median_and_spread(values, digits=1) for values in parts)
        print(f"| {size} MB, {whole_mb:.0f} MB | {cells} |")


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="20,100,400")
    parser.add_argument("--only", default="steps,peer,growth")
    asked = parser.parse_args()
    wanted = asked.only.split(",")
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = minilm_classifier()
        if "steps" in wanted:
            show_steps(model, folder, asked.rounds)
        if "peer" in wanted:
            show_peer(model, folder, asked.rounds)
        if "growth" in wanted:
            show_growth([int(size) for size in asked.sizes.split(",")], folder, asked.rounds)


if __name__ == "__main__":
    main()
