"""The two commands: what they say, how they exit, and that ``inspect`` runs nothing."""

from __future__ import annotations

import json
import re

import pytest
from artifacts import edit_json, edit_mlmodel, flip, reseal
from click.testing import CliRunner

import mlflow_safeflavor
from mlflow_safeflavor.cli import main

pytest_plugins = "saved_models"


@pytest.fixture
def run(monkeypatch):
    """Run ``mlflow-safeflavor ARGUMENTS`` in this process, on a terminal of 400 columns."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


def cells(output):
    """First cell of a line of a table → the second."""
    lines = [re.split(r"\s*[│┃|]\s*", line.strip(" │┃|")) for line in output.splitlines()]
    return {line[0].strip(): line[1].strip() for line in lines if len(line) > 1}


# inspect


def test_inspect_says_what_the_model_is(run, saved):
    done = run("inspect", saved)
    assert done.exit_code == 0, done.output
    facts = cells(done.output)
    assert facts["task"] == "text-classification"
    assert facts["model class"].endswith("BertForSequenceClassification")
    assert facts["structure"].startswith("transformers")
    assert facts["serving dtype"] == "float32"
    assert facts["input columns"] == "text ← one column of any name"
    recorded = json.loads((saved / "safeflavor" / "environment.json").read_text())
    assert facts["pins"] == f"{len(recorded['distributions'])} distributions"
    assert facts["torch"] == recorded["torch_build"]["version"]
    assert recorded["python"] in facts["python"]
    inventory = json.loads((saved / "safeflavor" / "tensors.json").read_text())
    assert facts["tensors"].startswith(str(len(inventory["tensors"])))
    assert "max_batch_tokens=512" in facts["run-time options"]
    assert facts["saved by"] == f"mlflow-safeflavor {mlflow_safeflavor.__version__}, format 1"


def test_inspect_lists_pins(run, saved):
    done = run("inspect", saved, "--pins")
    recorded = json.loads((saved / "safeflavor" / "environment.json").read_text())["distributions"]
    assert {f"{name}=={version}" for name, version in recorded.items()} <= set(done.output.split())


def test_inspect_lists_tensors(run, saved):
    done = run("inspect", saved, "--tensors")
    inventory = json.loads((saved / "safeflavor" / "tensors.json").read_text())
    for row in inventory["tensors"]:
        assert row["path"] in done.output
    assert "non-persistent buffer" in done.output
    assert "[30, 32]" in done.output


INSPECT = """
import runpy, sys
sys.argv = ["mlflow-safeflavor", "inspect", sys.argv[1], "--pins", "--tensors"]
from mlflow_safeflavor.cli import main
try:
    main()
except SystemExit as left:
    assert left.code == 0, left.code
heavy = {"torch", "transformers", "mlflow_safeflavor.module.structure", "evil"}
print("imported:", sorted(heavy & sys.modules.keys()))
"""


def test_inspect_imports_neither_torch_nor_transformers_and_runs_no_code(
    clean_process, copied, tmp_path
):
    ran = tmp_path / "ran"
    for name in ("mlflow_safeflavor/__init__.py", "evil.py"):
        (copied / "code" / name).unlink(missing_ok=True)
        (copied / "code" / name).write_text(f"open({str(ran)!r}, 'w')\n")
    reseal(copied)
    done = clean_process(INSPECT, str(copied))
    assert "text-classification" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert not ran.exists()


def test_inspect_needs_no_trust(run, copied):
    edit_mlmodel(
        copied,
        lambda content: content["flavors"]["safeflavor"].update(
            structure="pickle", runs=["pickle"]
        ),
    )
    reseal(copied)
    done = run("inspect", copied)
    assert done.exit_code == 0, done.output
    assert "pickle" in cells(done.output)["structure"]


# verify


def test_verify_says_yes_with_status_0(run, saved):
    done = run("verify", saved)
    assert done.exit_code == 0, done.output
    rows = json.loads((saved / "safeflavor" / "parity.json").read_text())["rows"]
    verdicts = {row: cell for row, cell in cells(done.output).items() if row.isdigit()}
    assert verdicts == {str(i): "0" for i in range(len(rows))}
    assert done.output.count("bit-identical") == len(rows)
    assert "tolerance: atol 0.0001" in done.output


def test_verify_says_no_with_status_1_and_names_the_row(run, copied):
    def change(content):
        content["answers"][1]["score"] += 0.01

    edit_json(copied / "safeflavor" / "parity.json", change)
    reseal(copied)
    done = run("verify", copied)
    assert done.exit_code == 1, done.output
    assert "row 1, score" in done.output
    assert (
        done.output.count("bit-identical")
        == len(json.loads((copied / "safeflavor/parity.json").read_text())["rows"]) - 1
    )


def test_verify_takes_a_device(run, saved):
    assert run("verify", saved, "--device", "cpu").exit_code == 0


def test_verify_of_a_server_that_is_not_there(run, saved):
    # tests/integration/test_parity_endpoint.py asks those that are.
    done = run("verify", saved, "--endpoint", "http://127.0.0.1:1")
    assert done.exit_code == 2, done.output
    assert (
        "SafeFlavorError: The server cannot be reached\n  where: http://127.0.0.1:1/invocations"
        in done.stderr
    )
    assert "Traceback" not in done.output
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "nothing.csv"], "does not exist"),
        (["--timeout", "0"], "--timeout"),
        (["--trust", "everything"], "TrustError"),
    ],
    ids=["a file that is not there", "no time", "an unknown kind"],
)
def test_verify_with_options_that_are_none(run, saved, options, said):
    done = run("verify", saved, *options)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output


# Errors: status 2, on stderr, without a traceback


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_without_a_model(run, tmp_path, command):
    done = run(command, tmp_path)
    assert done.exit_code == 2, done.output
    assert "IntegrityError: There is no MLflow model" in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_verify_of_a_damaged_model(run, copied):
    flip(copied / "safeflavor" / "config.json")
    done = run("verify", copied)
    assert done.exit_code == 2, done.output
    assert "IntegrityError" in done.stderr
    assert "safeflavor/config.json" in done.stderr
    assert "Traceback" not in done.output


def test_verify_on_a_device_that_is_not_there(run, saved):
    done = run("verify", saved, "--device", "tpu")
    assert done.exit_code == 2, done.output
    assert "PlacementError" in done.stderr


@pytest.mark.parametrize("name", ["environment.json", "tensors.json"])
def test_inspect_of_a_model_with_a_missing_file(run, copied, name):
    (copied / "safeflavor" / name).unlink()
    done = run("inspect", copied)
    assert done.exit_code == 2, done.output
    assert name in done.stderr


@pytest.mark.parametrize("content", [[], None, {}, {"tensors": 1, "data": 2}], ids=repr)
def test_inspect_of_a_model_with_a_malformed_inventory(run, copied, content):
    edit_json(
        copied / "safeflavor" / "tensors.json", lambda _: content if content is not None else "null"
    )
    done = run("inspect", copied)
    assert done.exit_code == 2, f"{done.output} {done.exception!r}"
    assert "tensors.json" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_model_that_is_not_in_the_store(run, tracking, command):
    done = run(command, "models:/nothing/1")
    assert done.exit_code == 2, f"{done.output} {done.exception!r}"
    assert "nothing" in done.stderr
    assert "Traceback" not in done.output


def test_a_command_that_is_none(run):
    done = run("destroy")
    assert done.exit_code == 2
    assert "No such command" in done.output


def test_the_version(run):
    assert mlflow_safeflavor.__version__ in run("--version").output


def test_the_help_names_the_commands(run):
    assert {"inspect", "verify"} <= set(run("--help").output.split())
