"""CodeBuggy, the example application.

Its pairs, its model, and the whole way from ``mlflow run`` to a browser.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import after
import before
import data
import mlflow
import pandas as pd
import pytest
import requests
import serve
import servers
import torch
import yaml
from click.testing import CliRunner
from data import MUTATIONS, REWORDINGS, make_pairs
from filelock import FileLock
from mlflow.projects.utils import load_project
from model import LABELS, FixClassifier, split
from train import log
from training import Recipe, ask, calibrate, fit
from transformers import AutoTokenizer

import mlflow_safeflavor

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "codebuggy"
PAIRS = 1400  # of which 210 are held out


# Pairs

RULES = {
    "swap_comparison": ("a < b", {"a <= b", "a > b"}),
    "swap_operator": ("a + b", {"a - b"}),
    "shift_by_one": ("range(n)", {"range(n - 1)", "range(n + 1)"}),
    "negate_condition": ("a if b else c", {"a if not b else c"}),
    "drop_not": ("not a", {"a"}),
    "swap_arguments": ("f(a, b)", {"f(b, a)"}),
    "change_default": ("lambda a=True: a", {"lambda a=False: a"}),
    "mirror_comparison": ("a <= 1", {"1 >= a"}),
    "reword_negation": ("a not in b", {"not a in b"}),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_changes_what_it_says(name):
    rule = next(rule for rule in (*MUTATIONS, *REWORDINGS) if rule.__name__ == name)
    code, wanted = RULES[name]
    tree: Any = ast.parse(code)  # whatever has expressions
    before = ast.dump(tree)
    found = {data.apply(rule, tree, random.Random(seed)) for seed in range(20)}
    assert found == wanted
    assert ast.dump(tree) == before, "the original was changed"


SAMPLE = """
def sample(a, b, flag=True):
    total = 0
    for i in range(a):
        if i not in b and flag:
            total = total + b[i - 1] if a is not None else 2
        else:
            total -= max(i, a) // 2
    if not flag:
        return divmod(total, 3)
    return total
"""


@pytest.mark.parametrize("rule", MUTATIONS, ids=lambda rule: rule.__name__)
def test_a_mutation_makes_another_function(rule):
    function = ast.parse(SAMPLE).body[0]
    assert isinstance(function, ast.FunctionDef)
    for seed in range(10):
        changed = data.apply(rule, function, random.Random(seed))
        assert changed is not None
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(ast.unparse(function)))


REWORDED = """
def sample(a, b):
    total = 0
    for i in a:
        if i not in b:
            total += i
        else:
            total -= 1
    if total < 3:
        total = total * 2
    return (total, b is not None, 1 == total)
"""


@pytest.mark.parametrize("rule", REWORDINGS, ids=lambda rule: rule.__name__)
def test_a_rewording_does_the_same(rule):
    function = ast.parse(REWORDED).body[0]
    assert isinstance(function, ast.FunctionDef)
    for seed in range(10):
        changed = data.apply(rule, function, random.Random(seed))
        assert changed is not None
        assert changed != ast.unparse(function)
        for a, b in (([1, 2, 3], [2]), ([], []), ([5], [5, 6]), ([1], [])):
            assert run(changed, a, b) == run(REWORDED, a, b), changed


def run(code: str, *arguments: object) -> object:
    names: dict[str, Any] = {}
    exec(code, names)
    return names["sample"](*arguments)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Some files of the standard library, one of them twice."""
    root = tmp_path_factory.mktemp("library")
    names = (
        "argparse calendar configparser difflib fractions gzip heapq optparse random shlex "
        "statistics tarfile"
    )
    for name in names.split():
        file = data.standard_library() / f"{name}.py"
        if file.exists():
            shutil.copy(file, root)
    shutil.copy(root / "argparse.py", root / "twin.py")
    return root


@pytest.fixture(scope="module")
def splits(library):
    return make_pairs(300, root=library)


def test_the_same_seed_gives_the_same_pairs(library, splits):
    assert make_pairs(300, root=library) == splits
    assert make_pairs(300, root=library, seed=1) != splits


def test_no_file_and_no_function_is_in_two_splits(splits):
    assert all(splits.values())
    files = [{pair.file for pair in pairs} for pairs in splits.values()]
    code = [
        {code for pair in pairs for code in (pair.buggy_code, pair.fixed_code)}
        for pairs in splits.values()
    ]
    for groups in (files, code):
        assert sum(map(len, groups)) == len(set().union(*groups))


def test_labels_are_what_was_done(library, splits):
    originals = {code for file in library.glob("*.py") for _, code in data.read_functions(file)}
    pairs = [pair for pairs in splits.values() for pair in pairs]
    for pair in pairs:
        assert ast.dump(ast.parse(pair.buggy_code)) != ast.dump(ast.parse(pair.fixed_code))
        if pair.label:
            assert pair.fixed_code in originals
            assert pair.rule not in {rule.__name__ for rule in REWORDINGS}
        elif pair.rule not in {rule.__name__ for rule in REWORDINGS}:
            assert pair.buggy_code in originals
    assert 0.35 < sum(pair.label for pair in pairs) / len(pairs) < 0.6
    assert {pair.rule for pair in pairs} >= {rule.__name__ for rule in MUTATIONS}


# Model


@pytest.fixture
def checkpoint(tmp_path, tiny_bert, tiny_tokenizer) -> Path:
    folder = tmp_path / "tiny"
    tiny_bert(None).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_pair_becomes_two_texts():
    # [CLS]=1 [SEP]=2 <pad>=0, as BERT writes pairs, and RoBERTa, with two separators in between.
    bert = torch.tensor([[1, 5, 6, 2, 7, 2, 0, 0], [1, 5, 2, 7, 8, 9, 8, 2]])
    ids, mask = split(bert, (bert != 0).long(), 2)
    read = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert read == [[1, 5, 6, 2], [1, 5, 2], [1, 7, 2], [1, 7, 8, 9, 8, 2]]
    roberta = torch.tensor([[1, 5, 6, 2, 2, 7, 2, 0]])
    ids, mask = split(roberta, (roberta != 0).long(), 2)
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == [
        [1, 5, 6, 2],
        [1, 7, 2],
    ]


def test_a_pair_is_judged_as_in_training(checkpoint, tiny_tokenizer):
    model = FixClassifier(str(checkpoint), tiny_tokenizer.sep_token_id).eval()
    pairs = [
        data.Pair("x = y", "x = y + x", 1, "r", "f"),
        data.Pair("if x : return y", "if y :", 0, "r", "f"),
    ]
    texts = ([pair.buggy_code for pair in pairs], [pair.fixed_code for pair in pairs])
    encoded = tiny_tokenizer(*texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(encoded["input_ids"], encoded["attention_mask"])["logits"]
    torch.testing.assert_close(logits, ask(model, tiny_tokenizer, pairs))


def test_it_can_learn(checkpoint, tiny_tokenizer):
    """A rule that is easy to see: the longer one is the fix."""
    rng = random.Random(0)
    short, long = "x = y", "x = y + x - y"
    sides = [rng.sample((short, long), 2) for _ in range(96)]
    pairs = [
        data.Pair(before, after, int(after == long), "drop_not", "f") for before, after in sides
    ]
    torch.manual_seed(0)
    model = FixClassifier(str(checkpoint), tiny_tokenizer.sep_token_id)
    losses = []
    fit(
        model,
        tiny_tokenizer,
        pairs,
        Recipe(epochs=8, rate=1e-3, frozen=1, bfloat16=False, seed=0),
        lambda step, steps, loss: losses.append(loss),
        lambda epoch: None,
    )
    assert len(losses) == 24
    assert not model.training
    assert (
        ask(model, tiny_tokenizer, pairs).argmax(1) == torch.tensor([pair.label for pair in pairs])
    ).all()


def test_the_temperature_tells_how_sure_one_may_be():
    labels = torch.tensor([0, 1] * 50)
    said = torch.nn.functional.one_hot(labels, 2).float()
    said[:20] = said[:20].flip(1)  # wrong in one of five
    temperature = calibrate(8 * said, labels)
    assert torch.softmax(8 * said[-1] / temperature, 0).max() == pytest.approx(0.8, abs=0.02)


# The project file


def test_every_entry_point_has_typed_parameters_and_a_command_that_exists():
    project = load_project(str(REPOSITORY))
    entries = yaml.safe_load((REPOSITORY / "MLproject").read_text())["entry_points"]
    assert entries.keys() == {"main", "serve", "verify", "bench"}
    for name, entry in entries.items():
        given = {key: "x" for key, said in entry["parameters"].items() if isinstance(said, str)}
        command = project.get_entry_point(name).compute_command(given, None)
        program = command.split()[1 if command.startswith("python ") else 0]
        assert (REPOSITORY / program).is_file() or shutil.which(
            program, path=str(Path(sys.executable).parent)
        )
        assert all(
            set(said) == {"type", "default"}
            for said in entry["parameters"].values()
            if said != "string"
        )


@pytest.mark.parametrize("what", ["predict", "load", "threads"])
def test_bench_takes_its_parameters(what):
    assert 'add_argument("--rounds"' in (REPOSITORY / "benchmarks" / f"{what}.py").read_text()


# The whole way


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What ``mlflow run`` of this project leaves behind.

    A tiny model, trained once for all processes that test.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "codebuggy"
    with FileLock(f"{folder}.lock"):
        if not (folder / "result.json").exists():
            (folder / "encoder").mkdir(parents=True)
            make_tiny_encoder(folder / "encoder")
            (folder / "result.json").write_text(json.dumps(train(folder)))
    return {
        "folder": folder,
        "env": environment(folder),
        **json.loads((folder / "result.json").read_text()),
    }


def make_tiny_encoder(folder: Path) -> None:
    """The real tokenizer, and a BERT of two narrow layers with seeded weights."""
    from transformers import BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(before.checkpoint())
    tokenizer.save_pretrained(folder)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    store = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**kept, **store, **servers.TRUST, "PATH": path, "PYTHONPATH": str(REPOSITORY)}


def mlflow_run(entry: str, parameters: dict[str, object]) -> list[str]:
    given = [part for name, value in parameters.items() for part in ("-P", f"{name}={value}")]
    return [
        sys.executable,
        "-m",
        "mlflow",
        "run",
        str(REPOSITORY),
        "-e",
        entry,
        "--env-manager",
        "local",
        *given,
    ]


def train(folder: Path) -> dict[str, object]:
    parameters = {
        "encoder": folder / "encoder",
        "pairs": PAIRS,
        "epochs": 1,
        "frozen": 0,
        "registered_model_name": "codebuggy",
        "held_out": folder / "heldout.jsonl",
    }
    command = mlflow_run("main", parameters)
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def app(trained) -> Iterator[str]:
    """The service with the model in its process, started by ``mlflow run -e serve``."""
    port = servers.free_port()
    command = mlflow_run("serve", {"model_uri": "models:/codebuggy@champion", "port": port})
    log = trained["folder"] / f"app-{port}.log"
    with servers.running(
        command, f"http://127.0.0.1:{port}", "/health", log, trained["env"]
    ) as url:
        yield url


@pytest.fixture(scope="module")
def rows(trained) -> list[dict[str, object]]:
    return [
        json.loads(line) for line in (trained["folder"] / "heldout.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_training_logs_what_one_wants_to_see(trained, rows):
    client = mlflow.MlflowClient(trained["env"]["MLFLOW_TRACKING_URI"])
    run = client.get_run(trained["run_id"])
    metrics, params = run.data.metrics, run.data.params
    assert metrics["accuracy"] == pytest.approx(trained["accuracy"])
    assert trained["baseline"] == max(
        metrics["baseline_majority"], metrics["baseline_bag_of_tokens"]
    )
    assert metrics["margin"] == pytest.approx(trained["accuracy"] - trained["baseline"])
    assert {
        "loss",
        "validation_accuracy",
        "temperature",
        "accuracy_swap_comparison",
    } <= metrics.keys()
    assert len(client.get_metric_history(run.info.run_id, "loss")) > 1
    assert (params["pairs"], params["pairs_heldout"]) == (str(PAIRS), str(len(rows)))
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "curves.png",
        "confusion.png",
        "rules.png",
    }
    champion = client.get_model_version_by_alias("codebuggy", "champion")
    assert int(champion.version) == trained["version"]
    assert len(rows) == 0.15 * PAIRS
    assert all(row.keys() == {"buggy_code", "fixed_code", "label"} for row in rows)


@pytest.mark.slow
@pytest.mark.serve
def test_host_server_and_service_say_the_same_bits_of_200_pairs(trained, app):
    log, uri = trained["folder"] / f"mlflow-{os.getpid()}.log", "models:/codebuggy@champion"
    with servers.mlflow_server(uri, log, trained["env"]) as endpoint:
        command = [
            sys.executable,
            EXAMPLE / "agreement.py",
            uri,
            trained["folder"] / "heldout.jsonl",
        ]
        done = subprocess.run(
            [*command, "--endpoint", endpoint, "--app", app],
            env=trained["env"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "service: 200 of 200 rows answered as here, bit for bit" in done.stdout
        check_remote(endpoint, app, trained)


@pytest.mark.slow
@pytest.mark.serve
def test_as_a_graph_alone_it_is_served_without_its_class_and_without_trust(
    trained, rows, tmp_path, tracking, serve
):
    store = mlflow.MlflowClient(trained["env"]["MLFLOW_TRACKING_URI"])
    saved = store.get_logged_model(trained["model_uri"].removeprefix("models:/")).artifact_location
    native = mlflow_safeflavor.load_model(saved, trust={"code", "pickle"})
    tokenizer = AutoTokenizer.from_pretrained(trained["folder"] / "encoder")
    example = pd.DataFrame(rows[:6], columns=["buggy_code", "fixed_code"])
    # as `train.py --graph only` does
    module: Any = native.module
    logged = log(module, tokenizer, example, "only", "").model_uri
    graph = Path(mlflow.artifacts.download_artifacts(logged, dst_path=str(tmp_path / "graph")))
    assert not list(graph.rglob("*.pkl"))
    assert [entry.name for entry in (graph / "code").iterdir()] == ["mlflow_safeflavor"]
    wanted = native.predict(rows[:200]).to_dict(orient="records")
    with serve(graph, env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}) as server:
        answer = server.invoke({"dataframe_records": rows[:200]})
    assert answer.status == 200, answer.text
    assert answer.json()["predictions"] == wanted


def check_remote(endpoint: str, app: str, trained: dict[str, Any]) -> None:
    """The service that asks a server answers as one with the model, until the server is gone."""
    change = {
        "buggy_code": "def f(a):\n    return a[len(a)]",
        "fixed_code": "def f(a):\n    return a[-1]",
    }
    with servers.service(
        ["--endpoint", endpoint], trained["folder"] / f"remote-{os.getpid()}.log"
    ) as remote:
        answers = [
            requests.post(f"{url}/predict", json=change, timeout=60) for url in (app, remote)
        ]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
    gone = f"http://127.0.0.1:{servers.free_port()}"
    with pytest.raises(serve.Unavailable, match=f"{gone} cannot be reached"):
        serve.Remote(gone).predict(change)


@pytest.mark.slow
@pytest.mark.serve
def test_the_service_answers_or_says_what_is_wrong(app):
    good = {"buggy_code": "x = 1", "fixed_code": "x = 2"}
    answer = requests.post(f"{app}/predict", json=good, timeout=60).json()
    assert answer["label"] in LABELS
    assert answer["fixes_bug"] == (answer["label"] == "fix")
    assert 0.5 <= answer["score"] <= 1
    assert requests.get(f"{app}/health", timeout=60).json() == {"status": "ok"}
    bad = {
        "fixed_code: Field required": json.dumps({"buggy_code": "x"}),
        "buggy_code: Input should be a valid string": json.dumps({**good, "buggy_code": 1}),
        "fixed_code: String should match": json.dumps({**good, "fixed_code": " \n"}),
        "fixed_code: String should have at most": json.dumps({**good, "fixed_code": "x" * 20_001}),
        "more: Extra inputs": json.dumps({**good, "more": 1}),
        "JSON decode error": "{",
        "Input should be": "[]",
        "buggy_code: Input should be": '{"buggy_code": "\\ud800", "fixed_code": "x"}',
    }
    for said, body in bad.items():
        response = requests.post(
            f"{app}/predict", data=body, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert response.status_code == 422, (said, response.text)
        assert said in response.json()["error"]
        assert "Traceback" not in response.text
    assert requests.get(f"{app}/predict", timeout=60).status_code == 405


@pytest.mark.parametrize(
    "arguments", [[], ["--model-uri", "models:/a/1", "--endpoint", "http://127.0.0.1:1"]]
)
def test_a_service_needs_one_model(arguments):
    done = CliRunner().invoke(serve.main, arguments)
    assert done.exit_code == 2
    assert "say either --model-uri or --endpoint" in done.stderr


@pytest.mark.slow
def test_verify_through_mlflow_run(trained):
    command = mlflow_run("verify", {"model_uri": trained["model_uri"], "trust": "pickle"})
    done = subprocess.run(
        command, cwd=trained["folder"], env=trained["env"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical" in done.stdout


# Before and after


@pytest.fixture
def of_tiny_bert(monkeypatch, checkpoint, tiny_tokenizer):
    """Before and after, of an encoder that takes no time."""
    monkeypatch.setattr(before, "checkpoint", lambda: str(checkpoint))
    monkeypatch.setattr(after, "checkpoint", lambda: str(checkpoint))


def test_before(of_tiny_bert, capsys):
    before.main()
    nested, on_cpu, from_config = capsys.readouterr().out.split("\n\n")[1:]
    assert (
        "RuntimeError: You are using `from_pretrained` with a meta device context manager" in nested
    )
    assert "temperature: nan, saved was 1.7" in on_cpu
    assert "no error; keys that transformers misses or mistrusts: none" in from_config
    assert "temperature: nan, saved was 1.7" in from_config
    assert "answers: nan and nan" in from_config
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_after(of_tiny_bert, capsys):
    assert after.main() == 0
    said = capsys.readouterr().out
    assert "temperature: 1.7, saved was 1.7" in said
    assert "the same to the last bit" in said


# The page


@pytest.fixture
def browser():
    """Debian's chromium without a screen."""
    from selenium import webdriver

    binaries = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in binaries:
        message = "needs a browser: apt-get install chromium chromium-driver"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = str(binaries[0])
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1120,780",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(binaries[1]))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.serve
def test_two_snippets_are_pasted_and_a_verdict_is_read(app, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    snippets = {
        "buggy": "def last(a):\n    return a[len(a)]",
        "fixed": "def last(a):\n    return a[len(a) - 1]",
    }
    browser.get(app)
    for field, code in snippets.items():
        browser.find_element(By.ID, field).send_keys(code)
    browser.find_element(By.CSS_SELECTOR, "button").click()
    verdict = browser.find_element(By.ID, "verdict")
    WebDriverWait(browser, 60).until(lambda _: "sure" in verdict.text)
    wanted = requests.post(
        f"{app}/predict", json={f"{name}_code": code for name, code in snippets.items()}, timeout=60
    ).json()
    assert verdict.find_element(By.TAG_NAME, "strong").text == (
        "Fixes a bug" if wanted["fixes_bug"] else "Does not fix a bug"
    )
    assert f"{100 * wanted['score']:.1f} % sure" in verdict.text
    if path := os.environ.get("CODEBUGGY_SCREENSHOT"):
        browser.save_screenshot(path)
    browser.find_element(By.ID, "fixed").clear()
    browser.find_element(By.CSS_SELECTOR, "button").click()
    WebDriverWait(browser, 60).until(
        lambda _: "fixed_code: String should have at least 1 character" in verdict.text
    )
    # Nothing was asked of anybody else.
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert {address.startswith(app) for address in asked} == {True}
