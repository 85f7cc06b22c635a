"""The whole story in one command.

Train, log, serve, and ask the service about code that the model has never seen.

    python examples/codebuggy/demo.py [--pairs 7000] [--epochs 2]

Everything it makes lies in ``.demo/codebuggy``. The exit status is 1 if the held-out pair is
answered wrongly, or if host, ``mlflow models serve`` and service do not agree bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import click
import requests
from agreement import compare
from rich.console import Console
from rich.syntax import Syntax
from servers import HERE, TRUST, mlflow_server, service

FOLDER = HERE.parent.parent / ".demo" / "codebuggy"
console = Console()


def train(folder: Path, heldout: Path, pairs: int, epochs: int) -> dict[str, Any]:
    """Run ``train.py``; returns what its last line says."""
    command = [sys.executable, str(HERE / "train.py"), "--registered-model-name", "codebuggy"]
    command += ["--held-out", str(heldout), "--pairs", str(pairs), "--epochs", str(epochs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(row: dict[str, Any], url: str) -> bool:
    """Ask ``POST /predict`` about one held-out pair; returns whether the answer is right."""
    body = {"buggy_code": row["buggy_code"], "fixed_code": row["fixed_code"]}
    answer = requests.post(f"{url}/predict", json=body, timeout=60).json()
    for title, code in (("before", row["buggy_code"]), ("after", row["fixed_code"])):
        console.print(f"\n[bold]{title}[/]")
        console.print(Syntax(code, "python", background_color="default"))
    right = bool(answer["fixes_bug"]) == bool(row["label"])
    console.print(f"\nPOST {url}/predict → {json.dumps(answer)}", soft_wrap=True)
    console.print("[green]✓ right[/]" if right else "[red]✗ wrong[/]")
    return right


@click.command()
@click.option("--pairs", default=7000, show_default=True)
@click.option("--epochs", default=2, show_default=True)
@click.option(
    "--folder",
    default=FOLDER,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where all of it goes.",
)
def main(pairs: int, epochs: int, folder: Path) -> None:
    """Train, log, serve, ask, compare."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    os.environ.update(TRUST)
    heldout = folder / "heldout.jsonl"
    result = train(folder, heldout, pairs, epochs)
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()][:200]
    uri = f"models:/codebuggy/{result['version']}"
    with (
        mlflow_server(uri, folder / "mlflow.log") as endpoint,
        service(["--model-uri", uri], folder / "app.log") as app,
    ):
        found = compare(uri, endpoint, app, rows)
        console.print(found.text)
        # One that the model is right about on this host: the question is whether the service says
        # so, too.
        right = show(
            next(
                rows[i]
                for i, label in enumerate(found.labels)
                if (label == "fix") == rows[i]["label"]
            ),
            app,
        )
    sys.exit(0 if right and found.same else 1)


if __name__ == "__main__":
    main()
