"""Images side by side.

`mlflow models build-docker` of mlflow.transformers' model, and ours of the same weights.

    python benchmarks/docker.py [--only images,starts,latency,memory] [--requests 40] [--rounds 5]
    [--changes 3]

Needs a Docker engine, or root and an installed dockerd. Both containers run as they come, and are
asked in turn, one request at a time. What the tables mean, and what was seen, is in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", MLFLOW_DISABLE_TELEMETRY="true"
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# This folder last: MLflow imports a library that has the name of this file.
sys.path.append(sys.path.pop(0))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import requests
from _common import (
    SIZES,
    machine,
    median_and_spread,
    minilm_classifier,
    ratio,
    save_peer,
    tokenizer,
)
from rich.console import Console
from rich.table import Table
from system.docker.base_image import TAG, base_image
from system.docker.containers import Container, running
from system.docker.engine import IMAGES, Engine, running_engine
from system.docker.pip_settings import torch_wheels, wheels_of_installed

WHO = ("ours", "mlflow.transformers")
SHORT = "the cat sat on the mat, and then it slept"
LONG = " ".join(f"def function_{i}(x): return x + {i}" for i in range(40))

console = Console(width=None if sys.stdout.isatty() else 140)


def save_both(model: Any, folder: Path, torch_index: str) -> dict[str, Path]:
    """The same weights, as each flavor saves them."""
    import mlflow_safeflavor

    ours = folder / "ours"
    mlflow_safeflavor.save_model(
        model, ours, tokenizer=tokenizer(), torch_index=torch_index, rehearse=False
    )
    peer = save_peer(model, "text-classification", folder / "peer")
    lines = (peer / "requirements.txt").read_text().splitlines()
    if torch_index != "auto":  # so that pip finds torch's build in the image
        lines.insert(0, f"--find-links {torch_index}")
    (peer / "requirements.txt").write_text("\n".join(lines) + "\n")
    return dict(zip(WHO, (ours, peer), strict=True))


def roberta_classifier() -> Any:
    """Seeded, of the shape of RoBERTa-base: 498 MB."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    hidden, layers, heads = SIZES["0.5 GB"]
    config = RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * hidden,
    )  # fmt: skip
    torch.manual_seed(0)
    return RobertaForSequenceClassification(config).eval()


# --- images --------------------------------------------------------------------------------------


def build_peer(engine: Engine, model: Path) -> str:
    """As `mlflow models build-docker` does it, with plain pip."""
    image = f"{IMAGES}:bench-peer"
    command = [sys.executable, "-m", "mlflow", "models", "build-docker", "--env-manager", "local"]
    command += ["--model-uri", str(model), "--name", image]
    subprocess.run(command, env=engine.environ, check=True, capture_output=True)
    return image


def build_ours(engine: Engine, model: Path) -> str:
    """Our folder, and `docker build`."""
    import mlflow_safeflavor

    image = f"{IMAGES}:bench-ours"
    with TemporaryDirectory() as folder:
        path = mlflow_safeflavor.generate_dockerfile(str(model), Path(folder, "image"))
        engine.docker("build", "--tag", image, path.parent, timeout=1800)
    return image


BUILD: dict[str, Callable[[Engine, Path], str]] = {WHO[0]: build_ours, WHO[1]: build_peer}


def timed(run: Callable[[], str]) -> tuple[float, str]:
    """Seconds, and what it gave."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


# --- asking --------------------------------------------------------------------------------------


def latencies(containers: dict[str, Container], text: str, count: int) -> dict[str, list[float]]:
    """Milliseconds of single requests, the containers in turn."""
    urls = {name: f"{container.url()}/invocations" for name, container in containers.items()}
    body = {"dataframe_records": [{"text": text}]}
    times: dict[str, list[float]] = {name: [] for name in urls}
    with requests.Session() as session:
        for turn in range(count + 5):
            for name, url in urls.items():
                start = time.perf_counter()
                session.post(url, json=body, timeout=120).raise_for_status()
                if turn >= 5:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def memory_of(container: Container) -> float:
    """Proportional set size of all processes of a container, in MB."""
    lines = container.engine.docker("top", container.name, "-eo", "pid").split()[1:]
    total = 0
    for pid in lines:
        rollup = Path("/proc", pid, "smaps_rollup").read_text()
        total += next(
            int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")
        )
    return total / 1e3


def size_of(engine: Engine, image: str) -> float:
    """Size of an image, in MB."""
    found = engine.inspect("image", image)
    assert found is not None, f"there is no image {image}"
    return int(found["Size"]) / 1e6


@contextmanager
def both(
    engine: Engine, images: dict[str, str], *options: str, **more: Any
) -> Iterator[dict[str, Container]]:
    """Containers of both images, serving."""
    with ExitStack() as stack:
        containers = {
            name: stack.enter_context(
                running(engine, image, *options, *more.get("mounts", {}).get(name, ()))
            )
            for name, image in images.items()
        }
        for container in containers.values():
            container.wait_until_serving(timeout=600)
        yield containers


# --- the story -----------------------------------------------------------------------------------


Row = tuple[str, ...]


def row(
    what: str, sides: Iterable[list[float]], unit: str, digits: int = 0, goal: float = 0
) -> Row:
    """Cells of a table: median and spread of both sides, and their ratio."""
    ours, theirs = sides
    middle, low, high = ratio(ours, theirs)
    verdict = f"≤ {goal:g} {'met' if middle <= goal else 'missed'}" if goal else ""
    cells = (f"{median_and_spread(values, digits=digits)} {unit}" for values in (ours, theirs))
    return (what, *cells, f"{middle:.2f} ({low:.2f}–{high:.2f})", verdict)


def start(engine: Engine, image: str) -> float:
    """Seconds from `docker run` to the first answer, of one worker."""
    begin = time.perf_counter()
    with running(engine, image, env={"MLFLOW_MODELS_WORKERS": "1"}) as container:
        container.wait_until_serving(timeout=600)
        container.invoke({"dataframe_records": [{"text": SHORT}]})
        return time.perf_counter() - begin


def compare(engine: Engine, torch_index: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Our image, and that of the other flavor, a row of the table at a time."""
    with TemporaryDirectory() as folder:
        model = minilm_classifier()
        first = save_both(model, Path(folder, "first"), torch_index)
        built = {name: timed(partial(BUILD[name], engine, first[name])) for name in WHO}
        images = {name: built[name][1] for name in WHO}
        if "images" in arguments.only:
            yield row("first build", ([built[name][0]] for name in WHO), "s")
            sizes = [size_of(engine, images[name]) for name in WHO]
            below = size_of(engine, TAG)
            yield row("size of the image", ([size] for size in sizes), "MB", goal=0.27)
            yield row(
                f"without its base of {below:.0f} MB", ([size - below] for size in sizes), "MB"
            )
            if torch_index != "auto":  # a stand-in for the base; Python's has no wheels
                wheels = sum(wheel.stat().st_size for wheel in wheels_of_installed()) / 1e6
                without = ([size - wheels] for size in sizes)
                yield row(f"without its {wheels:.0f} MB of wheels", without, "MB", goal=0.27)
        if "starts" in arguments.only:
            ready: dict[str, list[float]] = {name: [] for name in WHO}
            # the first reads the image from disk, and does not count
            for turn in range(arguments.rounds + 1):
                for name, image in images.items():
                    seconds = start(engine, image)
                    ready[name] += [seconds] if turn else []
            yield row("`docker run` to the first answer", ready.values(), "s", 1, 0.4)
        if "latency" in arguments.only:
            with both(engine, images, "--cpus=1") as containers:
                for what, text, goal in (
                    ("one short text", SHORT, 0.4),
                    ("one long text", LONG, 0.55),
                ):
                    times = latencies(containers, text, arguments.requests)
                    yield row(f"{what}, --cpus=1", times.values(), "ms", 1, goal)
        if "images" in arguments.only:
            again: dict[str, list[float]] = {name: [] for name in WHO}
            for turn in range(arguments.changes):
                model.classifier.weight.data.add_(0.01)
                changed = save_both(model, Path(folder, f"changed-{turn}"), torch_index)
                for name in WHO:
                    again[name].append(timed(partial(BUILD[name], engine, changed[name]))[0])
            yield row("build after a change of weights", again.values(), "s", 1, 0.1)
        if "memory" in arguments.only:
            large = save_both(roberta_classifier(), Path(folder, "large"), torch_index)
            mounts = {
                name: ("--volume", f"{path}:/opt/ml/model:ro") for name, path in large.items()
            }
            four = ("--env", "MLFLOW_MODELS_WORKERS=4")
            with both(engine, images, *four, mounts=mounts) as containers:
                for _ in range(12):  # every worker has answered
                    latencies(containers, SHORT, 1)
                memory = ([memory_of(containers[name])] for name in WHO)
                yield row("memory of four workers, 498 MB", memory, "MB", goal=0.5)


def main() -> None:
    """Build, run and ask; print each row as it is known, and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        default="images,starts,latency,memory",
        help="what to compare, separated by commas",
    )
    parser.add_argument("--requests", type=int, default=40, help="requests of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each image")
    parser.add_argument("--changes", type=int, default=3, help="changes of weights")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    table, rows = Table("what", *WHO, "ratio", "goal"), []
    with running_engine() as engine, base_image(engine) as stands_in:
        wheels = torch_wheels() if stands_in else None
        index = "auto" if wheels is None else str(wheels)
        for cells in compare(engine, index, arguments):
            print(*cells, sep=" | ", flush=True)
            table.add_row(*cells)
            rows.append(cells)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    console.print(table)
    if arguments.json:
        facts = {"machine": machine(), "sides": WHO, "rows": rows}
        arguments.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
