"""The dashboard that is shipped is the one that its tool makes."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2]


def test_the_file_is_up_to_date(tmp_path):
    file = tmp_path / "grafana.json"
    subprocess.run([sys.executable, HERE / "tools" / "dashboard.py", file], check=True)
    assert file.read_text() == (HERE / "docs" / "grafana.json").read_text()
    panels = json.loads(file.read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels) == 9
