"""README and guide do what they say: their Python runs, make targets and links exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs" / "guide.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path):
    # In a process of its own, as a reader would, in a folder of its own: the blocks write there.
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    # MLflow leaves the last test's experiment in the environment.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_there_is_python_to_run():
    assert blocks("python")


def test_make_targets_exist():
    named = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("bash")), re.MULTILINE))
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_commands_exist():
    from mlflow_safeflavor.cli import main

    named = set(
        re.findall(r"^mlflow-safeflavor ([a-z-]+)", "\n".join(blocks("bash")), re.MULTILINE)
    )
    assert named
    assert named <= set(main.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").split()) < 700
