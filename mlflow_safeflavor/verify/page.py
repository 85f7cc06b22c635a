"""A parity report as one HTML page that needs neither network nor script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import plain
from mlflow_safeflavor.predict.parity import ParityReport

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
    facts, more = _environment_rows(report)
    # The worst first, so that those left out are no worse than any that is shown.
    shown = sorted(report.rows, key=lambda row: (row.problem is None, row.bit_identical))[
        :_MOST_ROWS
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_plain)
        .from_string(_PAGE)
        .render(
            report=report,
            model=model,
            endpoint=endpoint,
            counts=_counts(report),
            sides=[_SIDES.get(side, side) for side in report.environments],
            untold=[side for side, told in report.environments.items() if told is None],
            facts=facts,
            pins=more,
            plot=_plot(report),
            rows=sorted(shown, key=lambda row: (not row.golden, row.row)),
            hidden=len(report.rows) - len(shown),
        )
    )


def _plain(value: object) -> object:
    """Escape control characters, some of which reverse the order in which a text is shown."""
    return plain(value) if isinstance(value, str) else value


def _counts(report: ParityReport) -> list[tuple[str, Counter[str]]]:
    """Origin of rows → verdict → count."""
    origins = {"golden rows": True, "your rows": False}
    counted = (
        (name, Counter(row.verdict for row in report.rows if row.golden is g))
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


def _environment_rows(report: ParityReport) -> tuple[list[_Fact], list[_Fact]]:
    """Facts with the distributions that differ; and apart the distributions that are the same."""
    sides = [(None if facts is None else _flat(facts)) for facts in report.environments.values()]
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


def _plot(report: ParityReport) -> dict[str, Any]:
    """Bars of a histogram: equal values, differences by powers of ten, and values without one."""
    values = np.concatenate([np.zeros(0), *(row.differences for row in report.rows)])
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


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ report.verdict }}: parity of {{ model }}</title>
<style>
:root { color-scheme: light dark; --line: #8886; --good: #1a7f37; --fair: #9a6700; --bad: #cf222e; --bar: #4078c0; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --fair: #d29922; --bad: #f85149; --bar: #79a8e0; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, td, th { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
#rows td:not(:last-child), #environments td:first-child { white-space: nowrap; }
.verdict { font-size: 1.2rem; font-weight: 600; padding: .6rem .9rem; border-left: .4rem solid; }
.bit-identical { color: var(--good); } .within { color: var(--fair); } .different { color: var(--bad); }
tr.differs td { background: #d2992233; } tr.differs td:first-child::before { content: "\\2260\\00a0"; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; text-anchor: middle; }
.same { fill: var(--good); } .some { fill: var(--bar); } .other { fill: var(--bad); }
.note { opacity: .75; }
</style>
</head>
<body>
<h1>Parity of <code>{{ model }}</code></h1>
<p class="note">{% if endpoint %}Server <code>{{ endpoint }}</code> against what was recorded\
{% if report.environments.here %}, and against the model loaded here{% endif %}.\
{% else %}Loaded here, against what was recorded.{% endif %}</p>
<p class="verdict {{ report.verdict.split()[0] }}" id="verdict">{{ report.verdict }}</p>
<ul>
{% for name, counts in counts %}
<li>{{ name }}: {% for verdict, count in counts.items() %}{{ count }} {{ verdict }}{{ "" if loop.last else ", " }}\
{% endfor %}</li>
{% endfor %}
<li>largest difference {{ "%.3g"|format(report.max_difference) }}; tolerated: {{ "%g"|format(report.atol) }} \
+ {{ "%g"|format(report.rtol) }} × the wanted value</li>
{% if report.first_difference %}
<li id="first">first difference: <code>{{ report.first_difference }}</code></li>
{% endif %}
</ul>

<h2>Differences</h2>
<svg viewBox="0 0 {{ plot.width }} {{ plot.height }}" role="img" aria-label="Distribution of absolute differences">
{% for bar in plot.bars %}
<rect class="{{ bar.kind }}" x="{{ "%.1f"|format(bar.x) }}" y="{{ "%.1f"|format(bar.y) }}" \
width="{{ "%.1f"|format(bar.width) }}" height="{{ "%.1f"|format(bar.height) }}"/>
<text x="{{ "%.1f"|format(bar.x + bar.width / 2) }}" y="{{ "%.1f"|format(bar.y - 6) }}">{{ bar.count }}</text>
<text x="{{ "%.1f"|format(bar.x + bar.width / 2) }}" y="{{ plot.floor + 16 }}">{{ bar.label }}</text>
{% endfor %}
<line x1="0" x2="{{ plot.width }}" y1="{{ plot.floor }}" y2="{{ plot.floor }}" stroke="currentColor"/>
<text x="{{ plot.width / 2 }}" y="{{ plot.floor + 36 }}">absolute difference, by powers of ten</text>
</svg>
<p class="note">{{ plot.total }} values. Bars grow with the fourth root of their number, so that a single one is \
seen. “0” is equal; “other” is another text, another shape or no number.</p>

<h2>Environments</h2>
{% if untold %}
<p class="note" id="untold">The server does not tell what it runs on. Start it with \
<code>MLFLOW_SAFEFLAVOR_TELL_ENVIRONMENT=true</code> to see it here.</p>
{% endif %}
<table id="environments">
<tr><th></th>{% for side in sides %}<th>{{ side }}</th>{% endfor %}</tr>
{% for fact in facts %}
<tr{% if fact.differs %} class="differs"{% endif %}><td>{{ fact.name }}</td>\
{% for text in fact.told %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% if pins %}
<details><summary>{{ pins|length }} distributions that do not differ</summary>
<table>
{% for fact in pins %}
<tr><td>{{ fact.name }}</td>{% for text in fact.told %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table></details>
{% endif %}

<h2>Rows</h2>
<table id="rows">
<tr><th>row</th><th>largest difference</th><th>verdict</th><th>first difference</th></tr>
{% for row in rows %}
<tr><td>{{ "golden" if row.golden else "your" }} row {{ row.row }}</td><td>{{ "%.3g"|format(row.max_difference) }}</td>\
<td class="{{ row.verdict.split()[0] }}">{{ row.verdict }}</td><td>{{ row.problem or row.first or "" }}</td></tr>
{% endfor %}
</table>
{% if hidden %}
<p class="note">{{ hidden }} more rows, none of them worse.</p>
{% endif %}
</body>
</html>
"""
