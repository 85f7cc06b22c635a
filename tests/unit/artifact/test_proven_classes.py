"""The table of classes that load without agreement, and what writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep import report

from mlflow_safeflavor.artifact import trust
from mlflow_safeflavor.artifact.trust import is_proven

TABLE = Path(trust.__file__).with_name("proven_classes.txt")


def row(name, float32, bfloat16):
    return {"class": name, "float32": {"result": float32}, "bfloat16": {"result": bfloat16}}


RESULTS = [
    ("equal", "equal", True),
    ("equal", "left out", True),  # it cannot run in bfloat16 at all
    ("equal", "differs", False),
    ("equal", "refused", False),
    ("left out", "left out", False),
    ("refused", "equal", False),
    ("differs", "equal", False),
]


@pytest.mark.parametrize(("float32", "bfloat16", "proven"), RESULTS)
@pytest.mark.parametrize("known", [True, False])
def test_what_was_swept_is_as_it_was_seen_and_all_else_as_it_was(
    tmp_path, float32, bfloat16, proven, known
):
    table = tmp_path / "proven_classes.txt"
    table.write_text(f"# Classes\nBertModel{' AClass' * known}\nZClass\n")
    report.write_proven(table, [row("AClass", float32, bfloat16)])
    names = table.read_text().split("\n", 2)[2].split()
    assert names == sorted({"BertModel", "ZClass"} | ({"AClass"} if proven else set()))


def test_the_table_is_what_its_writer_writes(tmp_path):
    copy = tmp_path / "copy"
    copy.write_text(TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    report.write_proven(copy, [])
    assert copy.read_text(encoding="utf-8") == TABLE.read_text(encoding="utf-8")
    assert is_proven("BertModel")
    assert not is_proven("#")
