"""The table of hints: each has its row, and no row is of a message that is gone."""

from __future__ import annotations

import importlib
from pathlib import Path

from hint_rows import FOLLOWED
from sites import all_sites


def rows():
    for path in Path(__file__).parent.glob("test_hints_of_*.py"):
        importlib.import_module(path.stem)
    return FOLLOWED


def test_every_row_is_of_a_hint_that_is_given():
    assert [str(site) for site in rows() if site not in all_sites()] == []
