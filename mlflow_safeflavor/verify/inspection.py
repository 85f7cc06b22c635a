"""The facts of a saved model, printed for ``mlflow-safeflavor inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.errors import plain
from mlflow_safeflavor.graph.file import format_graph, read_graph
from mlflow_safeflavor.graph.graph import lines_of
from mlflow_safeflavor.load.saved import Saved
from mlflow_safeflavor.tasks.table import task_class

__all__ = ["say", "show"]

_UNNAMED = "one column of any name"
_RUNS = {"import": "its own code", "pickle": "a pickle", "graph": "no code"}


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text as it is."""
    # Words of an artifact or a server may look like rich's markup, and draw or hide anything.
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def show(console: Console, uri: str, saved: Saved, *, pins: bool, rows: bool, calls: bool) -> None:
    """Print the facts of a saved model, and where asked its pins, tensors and graph's nodes."""
    layout, spec, environment = saved.layout, saved.spec, saved.environment
    table = Table(show_header=False, title=Text(plain(uri)), title_justify="left")
    for name, value in {
        "task": spec.task,
        **task_class(spec.task).metadata(spec.task_config),
        "model class": spec.model_class,
        "structure": f"{spec.structure} (runs {_RUNS.get(spec.structure, 'no code of its own')})",
        **format_graph(layout),
        "serving dtype": spec.dtype
        + (f", cast from {spec.cast_from}: no dtype was given" if spec.cast_from else ""),
        "input columns": ", ".join(
            f"{field} ← {column or _UNNAMED}" for field, column in spec.input_columns.items()
        ),
        "tensors": f"{len(saved.inventory.rows)} in {len(saved.inventory.data)} alias groups",
        "weights": _megabytes(saved.files[name] for name in saved.files if layout.is_weights(name)),
        "all files": _megabytes(saved.files.values()),
        "python": f"{environment.implementation} {environment.python}, {environment.system} "
        f"{environment.machine}",
        "pins": f"{len(environment.distributions)} distributions",
        "torch": environment.torch_build.get("version"),
        "run-time options": ", ".join(f"{k}={v!r}" for k, v in spec.model_config.items()),
        **({"tolerated": "; ".join(saved.tolerated)} if saved.tolerated else {}),
        "saved by": f"mlflow-safeflavor {spec.loader_version}, format {spec.format_version}",
    }.items():
        table.add_row(name, Text(plain(value)))
    console.print(table)
    if pins:
        for distribution, version in environment.distributions.items():
            say(console, f"{distribution}=={version}")
    if rows:
        console.print(_tensor_table(saved.inventory))
    if calls:
        for line in lines_of(read_graph(layout)):
            say(console, plain(line))


def _megabytes(entries: Iterable[Mapping[str, Any]]) -> str:
    return f"{sum(entry['size'] for entry in entries) / 1e6:.1f} MB"


def _tensor_table(inventory: Inventory) -> Table:
    table = Table("tensor", "kind", "dtype", "shape", "shares memory with")
    for row in inventory.rows.values():
        kind = row.kind if row.persistent else f"non-persistent {row.kind}"
        shared = row.data if row.data != row.path else ""
        cells = (row.path, kind, row.dtype, [*row.shape], shared)
        table.add_row(*(Text(plain(cell)) for cell in cells))
    return table
