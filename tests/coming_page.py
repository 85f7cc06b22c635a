"""The tables of ``docs/coming-from-mlflow.md``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["table"]

_PAGE = Path(__file__).parents[1] / "docs/coming-from-mlflow.md"


def table(title: str) -> list[list[str]]:
    """Cells of the rows below a title, without those that say what the columns are."""
    text = _PAGE.read_text(encoding="utf-8")
    (part,) = [part for part in text.split("\n## ") if part.partition("\n")[0] == title]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
