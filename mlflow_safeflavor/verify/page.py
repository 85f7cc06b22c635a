"""A parity report as one HTML page that needs neither network nor script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import plain
from mlflow_safeflavor.predict.parity import ParityReport, Replayed

__all__ = ["render"]

_UNTOLD = "not told"
_PIN = "pin "
_SIDES = {"saved": "when it was saved", "here": "here", "server": "server"}
_MOST_ROWS = 200
# Powers of ten that have a bar of their own; what lies beyond joins the outermost.
_SMALLEST, _LARGEST = -12, 6

_BUDGET = {
    "cores": "CPU cores",
    "quota": "CPU quota",
    "workers": "server workers",
    "threads": "threads chosen",
    "source": "chosen by",
    "spin_count": "turns before idle threads sleep",
}
_WIDTH, _HEIGHT, _MARGIN, _FOOT = 760, 220, 36, 44


def render(report: ParityReport, *, model: str, endpoint: str | None = None) -> str:
    """Render the report as a page.

    Args:
        report: Result of ``verify_model``.
        model: Name or URI of the model.
        endpoint: Address of the server; None where the model was loaded here.

    Returns:
        HTML. Every value is escaped: texts of rows and all that a server says are a stranger's.
    """
    from jinja2 import Environment  # for a page alone; a dependency of MLflow

    # autoescape: whatever a server or an artifact says stays text. finalize runs before it.
    facts, more = _environment_rows(report.environments)
    # The worst first, so that those left out are no worse than any that is shown.
    shown = sorted(report.rows, key=lambda row: (row.problem is None, row.bit_identical))[
        :_MOST_ROWS
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_plain)
        .from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
        .render(
            report=report,
            model=model,
            endpoint=endpoint,
            counts=_counts(report.rows),
            sides=[_SIDES.get(side, side) for side in report.environments],
            untold=[side for side, told in report.environments.items() if told is None],
            facts=facts,
            pins=more,
            plot=_plot(report.rows),
            rows=sorted(shown, key=lambda row: (not row.golden, row.row)),
            hidden=len(report.rows) - len(shown),
        )
    )


def _plain(value: object) -> object:
    """Escape control characters, some of which reverse the order in which a text is shown."""
    return plain(value) if isinstance(value, str) else value


def _counts(rows: Sequence[Replayed]) -> list[tuple[str, Counter[str]]]:
    """Origin of rows → verdict → count."""
    origins = {"golden rows": True, "your rows": False}
    counted = (
        (name, Counter(row.verdict for row in rows if row.golden is g))
        for name, g in origins.items()
    )
    return [(name, counts) for name, counts in counted if counts]


# Environments side by side


@dataclass(frozen=True)
class _Fact:
    """One line of the table: a text for each side, and whether those that tell it agree."""

    name: str
    told: list[str]
    differs: bool


def _environment_rows(
    environments: Mapping[str, Mapping[str, Any] | None],
) -> tuple[list[_Fact], list[_Fact]]:
    """Facts with the distributions that differ; and apart the distributions that are the same."""
    sides = [(None if facts is None else _flat(facts)) for facts in environments.values()]
    names = dict.fromkeys(name for side in sides if side for name in side)
    lines = []
    for name in names:
        told = [_text(name, side) for side in sides]
        lines.append(
            _Fact(name, told, len({text for text in told if text not in (_UNTOLD, "")}) > 1)
        )
    return (
        [line for line in lines if line.differs or not line.name.startswith(_PIN)],
        [line for line in lines if not line.differs and line.name.startswith(_PIN)],
    )


def _text(name: str, side: Mapping[str, str] | None) -> str:
    if side is None:
        return _UNTOLD
    return side.get(name, "not installed" if name.startswith(_PIN) else "")


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as name → text."""

    # A server may tell anything: facts of another shape are left out, and none is an error.
    def part(*keys: str) -> Mapping[str, Any]:
        value: Any = facts
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, Mapping) else {}

    environment, budget = part("environment"), part("budget")
    flat = {
        name: environment.get(name, "")
        for name in ("python", "implementation", "system", "machine", "libc")
    }
    flat |= {f"torch {name}": value for name, value in part("environment", "torch_build").items()}
    flat |= {
        "mlflow-safeflavor": facts.get("loader_version", ""),
        "device": facts.get("device", ""),
    }
    flat |= {name: budget[key] for key, name in _BUDGET.items() if key in budget}
    flat |= {f"{_PIN}{name}": value for name, value in part("environment", "distributions").items()}
    if flat.get(_BUDGET["spin_count"], "") is None:
        flat[_BUDGET["spin_count"]] = "left as it was"
    # Texts and numbers alone: a dict of a server's would be shown as Python writes it.
    told = {name: "none" if value is None else value for name, value in flat.items()}
    return {
        name: str(value) for name, value in told.items() if isinstance(value, (str, int, float))
    }


# Distribution of the differences


@dataclass(frozen=True)
class _Bar:
    x: float
    width: float
    y: float
    height: float
    label: str
    count: int
    kind: str


def _plot(rows: Sequence[Replayed]) -> dict[str, Any]:
    """Bars of a histogram: equal values, differences by powers of ten, and values without one."""
    values = np.concatenate([np.zeros(0), *(row.differences for row in rows)])
    finite = values[np.isfinite(values) & (values > 0)]
    powers = Counter(
        min(max(math.floor(power), _SMALLEST), _LARGEST) for power in np.log10(finite).tolist()
    )
    bins = [("0", int((values == 0).sum()), "same")]
    if powers:
        bins += [(_power(p), powers[p], "some") for p in range(min(powers), max(powers) + 1)]
    # Other texts, shapes and NaN count as infinitely different.
    if other := int(np.isinf(values).sum()):
        bins.append(("other", other, "other"))
    highest = max(1, max(count for _, count, _ in bins))
    step = (_WIDTH - 2 * _MARGIN) / len(bins)
    bars = []
    for i, (label, count, kind) in enumerate(bins):
        # Fourth roots, so that one value that differs is seen beside a million that do not.
        height = (_HEIGHT - _FOOT - _MARGIN) * (count / highest) ** 0.25
        x = _MARGIN + i * step + step * 0.12
        bars.append(_Bar(x, step * 0.76, _HEIGHT - _FOOT - height, height, label, count, kind))
    return {
        "bars": bars,
        "width": _WIDTH,
        "height": _HEIGHT,
        "floor": _HEIGHT - _FOOT,
        "total": len(values),
    }


def _power(power: int) -> str:
    return f"{'≤ ' if power == _SMALLEST else '≥ ' if power == _LARGEST else ''}1e{power}"
