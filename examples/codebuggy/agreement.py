"""Do host, ``mlflow models serve`` and the service say the same of the same pairs, bit for bit?

    python agreement.py models:/codebuggy@champion heldout.jsonl --endpoint http://127.0.0.1:5000
    --app http://127.0.0.1:8080

A container is one more ``--endpoint``: ``mlflow-safeflavor verify`` compares any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd
import requests
import torch

import mlflow_safeflavor

TRUST = frozenset({"code", "pickle"})


@dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        labels: What the model says here, one a row.
        server: How many rows, golden ones included, the scoring server answers with the same bits,
            and of how many.
        app: The same of the service, without golden rows.
        first_difference: In words; None if there is none.
    """

    labels: tuple[str, ...]
    server: tuple[int, int]
    app: tuple[int, int]
    first_difference: str | None

    @property
    def same(self) -> bool:
        """Whether all bits are the same."""
        return self.server[0] == self.server[1] and self.app[0] == self.app[1]

    @property
    def text(self) -> str:
        """Two lines, or three."""
        lines = [
            f"{who}: {same} of {rows} rows answered as here, bit for bit"
            for who, (same, rows) in {
                "mlflow models serve": self.server,
                "service": self.app,
            }.items()
        ]
        return "\n".join([*lines, *([self.first_difference] if self.first_difference else [])])


def compare(
    model_uri: str, endpoint: str, app: str, rows: Sequence[Mapping[str, Any]]
) -> Agreement:
    """Answer ``rows`` by the model loaded here, a server, and the service's ``POST /predict``."""
    # as servers do, by the model's `num_threads`: more threads round sums in another order
    torch.set_num_threads(1)
    frame = pd.DataFrame(
        [{name: row[name] for name in ("buggy_code", "fixed_code")} for row in rows]
    )
    report = mlflow_safeflavor.verify_model(model_uri, endpoint=endpoint, rows=frame, trust=TRUST)
    here = (
        mlflow_safeflavor.load_model(model_uri, trust=TRUST)
        .predict(frame)
        .to_dict(orient="records")
    )
    there = [ask(app, row) for row in frame.to_dict(orient="records")]
    # JSON carries a double with all its bits.
    equal = [
        a["label"] == b["label"] and a["score"] == b["score"]
        for a, b in zip(here, there, strict=True)
    ]
    first = report.first_difference
    if first is None and not all(equal):
        i = equal.index(False)
        first = f"row {i}: the service says {there[i]}, here {here[i]}"
    return Agreement(
        labels=tuple(answer["label"] for answer in here),
        server=(sum(row.bit_identical for row in report.rows), len(report.rows)),
        app=(sum(equal), len(equal)),
        first_difference=first,
    )


def ask(app: str, row: Mapping[str, str]) -> dict[str, Any]:
    """``POST /predict``; raises for any answer but 200."""
    response = requests.post(f"{app}/predict", json=row, timeout=60)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


@click.command()
@click.argument("model_uri")
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--endpoint", required=True, metavar="URL", help="A running MLflow scoring server.")
@click.option("--app", required=True, metavar="URL", help="The running service.")
@click.option("--count", default=200, show_default=True, help="Rows of the file to ask about.")
def main(model_uri: str, rows: Path, endpoint: str, app: str, count: int) -> None:
    """Compare; the exit status is 1 if any bit differs."""
    lines = rows.read_text(encoding="utf-8").splitlines()[:count]
    found = compare(model_uri, endpoint, app, [json.loads(line) for line in lines])
    click.echo(found.text)
    sys.exit(0 if found.same else 1)


if __name__ == "__main__":
    main()
