"""The dashboard for Grafana: made from a table of panels, and drawn from what Prometheus answers.

    python tools/dashboard.py docs/grafana.json
    python tools/dashboard.py --draw docs/dashboard.svg --prometheus HOST:PORT [--minutes 10]

Grafana itself is not needed: each panel's own queries are asked of a Prometheus that has scraped a
server of ours, and the answers are drawn.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

# Where a query has a rate: over the width of Grafana's points, at least.
RATE = "$__rate_interval"


class Panel(NamedTuple):
    """One graph: a unit of Grafana's, and legend → query in PromQL."""

    title: str
    unit: str
    queries: dict[str, str]


def _quantile(q: float, name: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (rate(safeflavor_{name}_bucket[{RATE}])))"


def _rate(name: str) -> str:
    return f"sum(rate(safeflavor_{name}[{RATE}]))"


def _quantiles(name: str) -> dict[str, str]:
    return {f"p{round(100 * q)}": _quantile(q, name) for q in (0.5, 0.9, 0.99)}


_REAL, _PADDING = _rate("tokens_total"), _rate("padding_tokens_total")
_MEMORY = 'safeflavor_memory_bytes{{kind="{}"}}'
PANELS = (
    Panel(
        "Requests by status",
        "reqps",
        {"{{status}}": f"sum by (status) (rate(safeflavor_requests_total[{RATE}]))"},
    ),
    Panel("Latency", "s", _quantiles("request_seconds")),
    Panel("Time before the first forward", "s", _quantiles("queue_seconds")),
    Panel("Time of a forward", "s", _quantiles("forward_seconds")),
    Panel(
        "Rows and tokens a second",
        "short",
        {"rows": _rate("rows_total"), "tokens": _rate("tokens_total")},
    ),
    Panel(
        "Pieces of a forward, mean",
        "short",
        {"pieces": f"{_rate('batch_pieces_sum')} / {_rate('batch_pieces_count')}"},
    ),
    Panel("Share of padding", "percentunit", {"padding": f"{_PADDING} / ({_REAL} + {_PADDING})"}),
    Panel(
        "Memory of all workers",
        "bytes",
        {"shared once (PSS)": _MEMORY.format("pss"), "resident (RSS)": _MEMORY.format("rss")},
    ),
    Panel("Workers", "short", {"workers": "safeflavor_workers"}),
)


def dashboard() -> dict[str, Any]:
    """The file that Grafana imports; it asks which Prometheus to use."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": panel.title,
            "datasource": source,
            "gridPos": {"h": 8, "w": 8, "x": 8 * (i % 3), "y": 8 * (i // 3)},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(65 + j), "expr": query, "legendFormat": legend, "datasource": source}
                for j, (legend, query) in enumerate(panel.queries.items())
            ],
        }
        for i, panel in enumerate(PANELS)
    ]
    variable = {
        "name": "source",
        "type": "datasource",
        "query": "prometheus",
        "label": "Prometheus",
    }
    return {
        "title": "mlflow-safeflavor",
        "uid": "mlflow-safeflavor",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": panels,
    }


def draw(file: Path, prometheus: str, minutes: float) -> None:
    """Ask each panel's queries of the last minutes, and draw the answers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    end = time.time()
    figure, grid = pyplot.subplots(3, 3, figsize=(13, 8), constrained_layout=True)
    for panel, axes in zip(PANELS, grid.flat, strict=True):
        for legend, query in panel.queries.items():
            asked = {
                "query": query.replace(RATE, "20s"),
                "start": end - 60 * minutes,
                "end": end,
                "step": 5,
            }
            url = f"http://{prometheus}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                series = json.load(answer)["data"]["result"]
            if not series:
                raise SystemExit(f"no data: {query}")
            for found in series:
                name = legend.replace("{{status}}", found["metric"].get("status", ""))
                times = [(moment - end) / 60 for moment, _ in found["values"]]
                axes.plot(times, [float(value) for _, value in found["values"]], label=name)
        axes.set_title(f"{panel.title} [{panel.unit}]", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.supxlabel("minutes", fontsize=8)
    figure.savefig(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--prometheus", default="127.0.0.1:9090", metavar="HOST:PORT")
    parser.add_argument("--minutes", type=float, default=10)
    asked = parser.parse_args()
    if asked.file:
        asked.file.write_text(json.dumps(dashboard(), indent=1) + "\n")
    if asked.draw:
        draw(asked.draw, asked.prometheus, asked.minutes)


if __name__ == "__main__":
    main()
