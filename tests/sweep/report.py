"""What a sweep found, as text."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = ("equal", "left out", "refused", "differs")


def read(*files: Path) -> list[Row]:
    """Rows of some results; a later row of a class replaces an earlier one."""
    rows: dict[str, Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["class"]] = row
    return list(rows.values())


def equal(rows: list[Row]) -> list[str]:
    """Classes that came back bit for bit in both dtypes."""
    return [
        row["class"]
        for row in rows
        if row["float32"]["result"] == row["bfloat16"]["result"] == "equal"
    ]


def write_proven(table: Path, rows: list[Row]) -> None:
    """Write ``proven_classes.txt``.

    What it said before, but of the classes in ``rows`` what was seen now.

    Proven is what came back bit for bit in float32, and not with other bits in bfloat16.
    """
    lines = table.read_text(encoding="utf-8").splitlines()
    before = set(" ".join(line for line in lines if not line.startswith("#")).split())
    found = {
        row["class"]
        for row in rows
        if row["float32"]["result"] == "equal"
        and row["bfloat16"]["result"] in ("equal", "left out")
    }
    names = " ".join(sorted((before - {row["class"] for row in rows}) | found))
    table.write_text(
        _PROVEN + textwrap.fill(names, width=100, break_on_hyphens=False) + "\n", encoding="utf-8"
    )


_PROVEN = """\
# Classes of transformers that `make sweep` saved, loaded in a clean process and found equal to the
# bit in float32. Written by `make sweep`; others are built only for an artifact that is trusted.
"""


def wrong(rows: list[Row]) -> list[str]:
    """Classes with a bug of the package to look at.

    Another result, or an alarm about a sound module.
    """
    return [
        row["class"]
        for row in rows
        if any(
            row[dtype]["result"] == "differs" or "alarm" in row[dtype]
            for dtype in ("float32", "bfloat16")
        )
    ]


def as_text(rows: list[Row]) -> str:
    """Counts, and every class that is not equal in both dtypes, with the reason."""
    lines = [
        "# Results of the sweep",
        "",
        f"{len(rows)} classes.",
        "",
        "| | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    counts = {
        dtype: Counter(row[dtype]["result"] for row in rows) for dtype in ("float32", "bfloat16")
    }
    lines += [
        f"| {name} | {counts['float32'][name]} | {counts['bfloat16'][name]} |" for name in RESULTS
    ]
    same = Counter(row["bfloat16"].get("from_pretrained", "").partition(":")[0] for row in rows)
    lines += [
        "",
        f"Equal in both dtypes: {len(equal(rows))}. Of those in bfloat16, "
        f"`from_pretrained(dtype=torch.bfloat16)` gives the same tensors for {same['equal']}.",
    ]
    rounded = [row["class"] for row in rows if row["float32"].get("without_gradients")]
    if rounded:
        lines += [
            "",
            "Equal in float32 once the original's parameters require no gradients, "
            f"{len(rounded)}: {', '.join(rounded)}.",
        ]
    lines += [
        "",
        "Classes that were built small but could not be fed: "
        f"{sum(row['built'] and row['float32']['result'] == 'left out' for row in rows)}.",
        "",
    ]
    for dtype in ("float32", "bfloat16"):
        for result in RESULTS[1:]:
            lines += _grouped(rows, dtype, result)
    return "\n".join(lines) + "\n"


def _grouped(rows: list[Row], dtype: str, result: str) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row[dtype]["result"] == result and (
            dtype == "float32" or row["float32"]["result"] != result
        ):
            groups[_short(row[dtype].get("reason", ""))].append(row["class"])
    if not groups:
        return []
    title = f"## {result.capitalize()} in {dtype}" + (" only" if dtype != "float32" else "")
    body = [f"- {reason}: {', '.join(names)}" for reason, names in sorted(groups.items())]
    return [title, "", *body, ""]


def _short(reason: str) -> str:
    """The first line, without numbers that differ between classes."""
    line = re.sub(r"^(fixed|divided|short)\w*: ", "", reason.partition("\n")[0])
    return re.sub(r"\d+ million parameters", "more than 20 million parameters", line)[:160].rstrip(
        ".: "
    )
