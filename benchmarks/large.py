"""A large model logged to and loaded from a real store: peak memory, seconds and MB/s of each part.

    python benchmarks/large.py [--gigabytes 7] [--keep FOLDER]

A Qwen2 of random weights in bfloat16 goes through an MLflow tracking server to SeaweedFS (S3) and
comes back, in a process for each part. Peak memory is resident (VmHWM), mapped files included, and
is told in multiples of "the model and its largest file"; what of it is private is sampled. Memory
needs twice the model, and the disk three times. Everything is removed afterwards. What was seen is
in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    TRANSFORMERS_VERBOSITY="error",
)

GOAL = 1.2
URI = "models:/large/1"
HIDDEN = 2048
STEPS = ("make", "save", "upload", "download", "digests", "load", "verify")


# --- what each process measures -------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes that the kernel tells of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def measured(step: str, into: dict[str, dict[str, float]]) -> Iterator[None]:
    """Seconds, peak of resident memory, and peak of what is private, while the block runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    over, private = threading.Event(), [0]

    def sample() -> None:
        while not over.wait(0.05):
            private[0] = max(private[0], _status("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        over.set()
        thread.join()
    into[step] = {"seconds": seconds, "peak": _status("VmHWM"), "private": private[0]}


def make(gigabytes: float) -> Any:
    """A Qwen2 of about so many GB, whose weights are drawn once, in bfloat16, where they stay."""
    import torch
    from _common import tokenizer
    from transformers import AutoModelForCausalLM, Qwen2Config

    words: Any = tokenizer()
    # Of two bytes each: the embedding and the head; in a layer two squares of attention, two that
    # are eight times narrower, and three rectangles of the MLP, four times as long.
    ends, layer = 4 * len(words) * HIDDEN, 2 * 14.25 * HIDDEN**2
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - ends) / layer)),
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.max_new_tokens = 4
    return model


def log(gigabytes: float, folder: Path) -> dict[str, dict[str, float]]:
    """Make, save with a rehearsal, and upload."""
    import mlflow
    import torch
    from _common import tokenizer

    import mlflow_safeflavor
    from mlflow_safeflavor.save import logged

    found: dict[str, dict[str, float]] = {}
    with measured("make", found):
        model = make(gigabytes)
    save, upload = logged.NotedFlavor.save_model, contextlib.ExitStack()

    # The moment between MLflow's two steps, which no option of log_model tells.
    def watched(self: Any, path: str, mlflow_model: Any, **arguments: Any) -> None:
        with measured("save", found):
            save(self, path, mlflow_model, **arguments)
        sizes = {file: file.stat().st_size for file in Path(path).rglob("*") if file.is_file()}
        facts = {"bytes": sum(sizes.values()), "largest": max(sizes.values())}
        (folder / "sizes.json").write_text(json.dumps(facts))
        upload.enter_context(measured("upload", found))

    logged.NotedFlavor.save_model = watched  # type: ignore[method-assign]
    with mlflow.start_run(), torch.inference_mode(), upload:
        mlflow_safeflavor.log_model(
            model,
            "model",
            tokenizer=tokenizer(),
            task="text-generation",
            dtype="bfloat16",
            # Measured, it takes forwards of full batches, whose caches are memory as well.
            model_config={"forward_cost": 512},
            registered_model_name="large",
        )
    return found


def one(step: str, gigabytes: float, folder: Path) -> dict[str, dict[str, float]]:
    """What one process does."""
    if step == "log":
        return log(gigabytes, folder)
    import mlflow_safeflavor
    from mlflow_safeflavor.load.download import located
    from mlflow_safeflavor.load.saved import read_saved

    def download() -> None:
        with located(URI, folder / "there"):
            pass

    here = folder / "there"
    todo: dict[str, Callable[[], object]] = {
        "download": download,
        "digests": lambda: read_saved(here, weights=True),
        "load": lambda: mlflow_safeflavor.load_model(here).predict(["a cat"]),
        "verify": lambda: mlflow_safeflavor.verify_model(here, rehash=True),
    }
    found: dict[str, dict[str, float]] = {}
    with measured(step, found):
        todo[step]()
    return found


# --- all of them ----------------------------------------------------------------------------------


def measure(gigabytes: float, folder: Path, environ: dict[str, str]) -> dict[str, Any]:
    """Facts of every step, each measured in a process of its own."""
    found: dict[str, Any] = {}
    for step in ("log", *STEPS[3:]):
        command = [sys.executable, __file__, "--step", step, "--gigabytes", str(gigabytes)]
        done = subprocess.run(
            [*command, "--keep", str(folder)],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        if done.returncode:
            raise SystemExit(f"{step} failed with status {done.returncode}")
        found.update(json.loads(done.stdout.splitlines()[-1]))
        print(step, found, file=sys.stderr)
    return found


def show(found: dict[str, Any], sizes: dict[str, int]) -> None:
    """A table, and the machine."""
    from _common import machine
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    whole, unit = sizes["bytes"], sizes["bytes"] + sizes["largest"]
    console.print(machine())
    console.print(f"artifact {whole / 1e9:.2f} GB, largest file {sizes['largest'] / 1e9:.2f} GB")
    table = Table("", "s", "MB/s", "peak GB", "of model + file", f"goal {GOAL}", "private GB")
    for step in STEPS:
        facts = found[step]
        ratio = facts["peak"] / unit
        table.add_row(
            step,
            f"{facts['seconds']:.1f}",
            f"{whole / 1e6 / facts['seconds']:.0f}",
            f"{facts['peak'] / 1e9:.2f}",
            f"{ratio:.2f}",
            "met" if ratio <= GOAL else "missed",
            f"{facts['private'] / 1e9:.2f}",
        )
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=7.0)
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(one(given.step, given.gigabytes, given.keep)))
        return
    # The parts of the example are a real PostgreSQL, S3 and tracking server on loopback.
    sys.path.append(str(Path(__file__).parents[1] / "examples" / "codebuggy"))
    from parts import LocalParts

    folder = given.keep or Path(tempfile.mkdtemp(prefix="large-"))
    folder.chmod(0o755)  # where this is root, PostgreSQL's user has to enter it
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    environ = {"TMPDIR": str(folder / "tmp"), "MLFLOW_SAFEFLAVOR_CACHE": str(folder / "cache")}
    try:
        with LocalParts(folder / "parts", server_environ=environ) as parts:
            tracking = {"MLFLOW_TRACKING_URI": parts.tracking_uri, **environ}
            found = measure(given.gigabytes, folder, tracking)
        show(found, json.loads((folder / "sizes.json").read_text()))
    finally:
        if not given.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
