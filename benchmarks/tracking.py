"""A tracking store that fills: seconds of a log, of a search and of a load by alias.

    python benchmarks/tracking.py [--models 1000] [--names 10] [--uri URI]

A module of two small layers is logged again and again, without graph and rehearsal, in a run of its
own with a metric, as a version of one of some registered models; the newest version of each has the
alias "champion". So what is timed is what a log costs beside proofs. What MLflow's own part of it
is, is told by logs of the same folder through MLflow alone, with the store as full. What was seen
is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
)

import mlflow
import numpy as np
import torch
from _common import machine, median_and_spread
from rich.console import Console
from rich.table import Table

import mlflow_safeflavor

console = Console(width=None if sys.stdout.isatty() else 120)


class Store:
    """Models logged one after the other.

    Args:
        experiment: Its id.
        names: Number of registered models.
    """

    def __init__(self, experiment: str, names: int) -> None:
        self.experiment, self.names = experiment, names
        self.client = mlflow.MlflowClient()
        mlflow.set_experiment(experiment_id=experiment)
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ).eval()
        self.given: dict[str, Any] = {
            "task": "raw",
            "input_example": {"input": np.ones((2, 4), "float32")},
            "graph": "no",
            "rehearse": False,
            "model_config": {"forward_cost": 64},
        }

    def log(self, i: int) -> None:
        """Log, register and give the alias, as somebody does who trains again."""
        name = f"scorer-{i % self.names}"
        with mlflow.start_run():
            info = mlflow_safeflavor.log_model(
                self.module, name="model", registered_model_name=name, **self.given
            )
            mlflow.log_metric("f1", (i * 7919 % 1000) / 1000, model_id=info.model_id)
        version = str(info.registered_model_version)
        self.client.set_registered_model_alias(name, "champion", version)

    def log_by_mlflow(self, folder: Path) -> None:
        """MLflow's own part: a run, the upload of the same files, a version and its alias."""
        with mlflow.start_run():
            model = mlflow.initialize_logged_model("model")
            self.client.log_model_artifacts(model.model_id, str(folder))
            mlflow.finalize_logged_model(model.model_id, "READY")
            version = mlflow.register_model(f"models:/{model.model_id}", "by-mlflow")
            mlflow.log_metric("f1", 0.0, model_id=model.model_id)
        self.client.set_registered_model_alias("by-mlflow", "champion", version.version)


def seconds(act: Callable[[], object], times: int) -> list[float]:
    """Wall time of each of so many calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--names", type=int, default=10)
    parser.add_argument("--uri", help="tracking store; by default a database in a new folder")
    given = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    console.print(machine())
    with TemporaryDirectory() as scratch:
        mlflow.set_tracking_uri(given.uri or f"sqlite:///{scratch}/mlflow.db")
        experiment = mlflow.create_experiment(
            f"tracking {time.time_ns()}",
            artifact_location=None if given.uri else f"{scratch}/artifacts",
        )
        measure(Store(experiment, given.names), given.models, Path(scratch))


def measure(store: Store, models: int, scratch: Path) -> None:
    """Fill the store; then search in it and load from it."""
    rows: list[tuple[str, Sequence[float]]] = []
    saved, part = scratch / "saved", min(100, models // 3)
    alone = "… the same files by MLflow alone"
    mlflow_safeflavor.save_model(store.module, saved, **store.given)
    store.log(0)  # imports, and tables that are made at the first use
    numbers = iter(range(1, models))
    rows.append((f"log, of the first {part}", seconds(lambda: store.log(next(numbers)), part)))
    rows.append((alone, seconds(lambda: store.log_by_mlflow(saved), 10)))
    between = seconds(lambda: store.log(next(numbers)), models - 1 - 2 * part)
    rows.append((f"log, of the last {part}", seconds(lambda: store.log(next(numbers)), part)))
    rows.append((alone, seconds(lambda: store.log_by_mlflow(saved), 10)))

    def best() -> object:
        return store.client.search_logged_models(
            [store.experiment],
            "metrics.f1 >= 0.99",
            order_by=[{"field_name": "metrics.f1", "ascending": False}],
        )

    def versions() -> object:
        return store.client.search_model_versions("name = 'scorer-0'")

    def load() -> object:
        return mlflow_safeflavor.load_model("models:/scorer-0@champion")

    def load_pyfunc() -> object:
        return mlflow.pyfunc.load_model("models:/scorer-0@champion")

    for what, act in (
        ("search of logged models by a metric", best),
        ("search of the versions of a registered model", versions),
        ("load by alias", load),
        ("… through pyfunc", load_pyfunc),
    ):
        act()
        rows.append((what, seconds(act, 20)))
    every = [second for _, spent in rows[:4] for second in spent] + between
    table = Table("", "ms", title=f"{models} models, {sum(every):.0f} s of logs")
    for what, spent in rows:
        table.add_row(what, median_and_spread(list(spent), 1e3))
    console.print(table)


if __name__ == "__main__":
    main()
