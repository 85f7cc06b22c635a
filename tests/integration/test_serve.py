"""Real servers, and a really separate environment.

The same rows as in this process, and 400 for what is no row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from artifacts import TEXTS, forms_of
from system.docker.pip_settings import pip_settings

import mlflow_safeflavor

pytest_plugins = "saved_models"
pytestmark = pytest.mark.serve

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MLFLOW_SAFEFLAVOR_NUM_THREADS": "1"}


@pytest.fixture
def wanted(saved):
    """What pyfunc answers in this process, as a server's JSON has it."""
    answers = mlflow.pyfunc.load_model(str(saved)).predict(pd.DataFrame({"text": TEXTS}))
    return json.loads(answers.to_json(orient="records", double_precision=15))


def require_same_rows(found, expected):
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx(
        [row["score"] for row in expected], abs=1e-6
    )


GOOD = {"dataframe_records": [{"text": text} for text in TEXTS]}


def test_a_server_answers_as_pyfunc_does(serve, saved, wanted):
    with serve(saved, env=ONE_THREAD) as server:
        for form, (_, body, count) in forms_of(TEXTS).items():
            if body is not None:
                answer = server.invoke(body)
                assert answer.status == 200, f"{form}: {answer.text}"
                require_same_rows(answer.json()["predictions"], wanted[:count])
        answer = server.invoke(f"text\n{TEXTS[0]}\n".encode(), content_type="text/csv")
        assert answer.status == 200, answer.text
        require_same_rows(answer.json()["predictions"], wanted[:1])
        answer = server.invoke({**GOOD, "params": {"top_k": 2}})
        assert [len(row["labels"]) for row in answer.json()["predictions"]] == [2] * len(TEXTS), (
            answer.text
        )

        def ask(i):
            rows = [{"text": TEXTS[(i + j) % len(TEXTS)]} for j in range(1 + i % 5)]
            return server.invoke({"dataframe_records": rows})

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(64)))
        for i, answer in enumerate(answers):
            assert answer.status == 200, answer.text
            expected = [wanted[(i + j) % len(TEXTS)] for j in range(1 + i % 5)]
            require_same_rows(answer.json()["predictions"], expected)


# Body → what the answer has to name. MLflow itself refuses some of these before the model sees
# them.
BAD = {
    "None": ({"dataframe_records": [{"text": "a"}, {"text": None}]}, "text"),
    "NaN": (b'{"dataframe_records": [{"text": "a"}, {"text": NaN}]}', "text"),
    "a number": ({"dataframe_records": [{"text": 3}]}, "text"),
    "a text and a number": ({"dataframe_records": [{"text": "a"}, {"text": 3}]}, "text"),
    "a nested list": ({"dataframe_records": [{"text": ["a"]}, {"text": ["b"]}]}, "text"),
    "a dict": ({"dataframe_records": [{"text": {"a": 1}}]}, "text"),
    "no columns": ({"dataframe_records": [{}]}, "inputs"),
    "columns as inputs": ({"inputs": {"text": ["a"]}}, "un-named"),  # MLflow's own
    "no rows": ({"dataframe_records": []}, ""),
    "no values": ({"inputs": []}, ""),
    "no texts": ({"dataframe_split": {"columns": ["text"], "data": []}}, ""),
    "half a surrogate pair": (b'{"dataframe_records": [{"text": "\\ud800"}]}', "surrogate"),
    "too long": ({"inputs": ["the " * 99], "params": {"truncation": False}}, "row 0"),
    "a param out of range": ({"inputs": ["a"], "params": {"top_k": -7}}, "top_k"),
    "a param of another type": ({"inputs": ["a"], "params": {"top_k": "many"}}, "top_k"),
    "params that are none": ({"inputs": ["a"], "params": [1]}, "param"),
    "no JSON": (b"{", ""),
    "no bytes": (b"", ""),
    "bytes": (b"\xff\xfe\x00", ""),
    "no known key": ({"data": ["a"]}, ""),
    "a list": ([1, 2], ""),
    "columns that are lists": (
        {"dataframe_split": {"columns": ["text", []], "data": False}},
        "",
    ),
    "two kinds of input": ({"inputs": ["a"], "dataframe_records": [{"text": "a"}]}, ""),
}


def test_what_is_no_row_is_answered_with_400_and_nothing_of_the_server(serve, saved, wanted):
    with serve(saved, env=ONE_THREAD) as server:
        wrong = []
        for name, (body, named) in [*BAD.items(), ("a CSV", (b'a,b\n"1', ""))]:
            kind = "text/csv" if name == "a CSV" else "application/json"
            answer = server.invoke(body, content_type=kind)
            problems = [
                f"status {answer.status}" if answer.status != 400 else "",
                "a traceback" if "Traceback" in answer.text or 'File "' in answer.text else "",
                "a path"
                if re.search(r"/\S+\.py\b|site-packages", answer.text)
                or str(saved.parent) in answer.text
                else "",
                f"no {named}" if named.lower() not in answer.text.lower() else "",
            ]
            if any(problems):
                wrong.append(f"{name}: {', '.join(filter(None, problems))}: {answer.text[:300]}")
            after = server.invoke(GOOD)
            assert after.status == 200, (
                f"after {name} the server does not answer any more: {after.text}"
            )
            require_same_rows(after.json()["predictions"], wanted)
        assert wrong == []


def test_a_damaged_model_is_not_served(copied):
    path = copied / "safeflavor" / "config.json"
    content = path.read_bytes().replace(b"gelu", b"relu")
    path.unlink()
    path.write_bytes(content)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "--env-manager",
        "local",
        "--model-uri",
        str(copied),
    ]
    done = subprocess.run(
        command,
        input=json.dumps(GOOD),
        capture_output=True,
        text=True,
        env=with_this_python_first(),
    )
    assert done.returncode != 0
    assert "IntegrityError" in done.stderr
    assert "safeflavor/config.json" in done.stderr
    assert "predictions" not in done.stdout


# A separate environment, made from the artifact's own requirements


def with_this_python_first():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path}


@pytest.fixture
def wheel_folder():
    """A folder that pip is configured to look in and that holds the installed torch.

    None where there is none.
    """
    version = mlflow_safeflavor.get_default_pip_requirements(torch_index=None)
    name = next(line for line in version if line.startswith("torch==")).replace("==", "-")
    folders = [Path(folder) for folder in pip_settings().get("find-links", "").split()]
    return next((folder for folder in folders if any(folder.glob(f"{name}*.whl"))), None)


@pytest.mark.slow
def test_a_separate_environment_gives_the_same_rows(
    tmp_path, tiny_bert, tiny_tokenizer, wheel_folder
):
    path = tmp_path / "model"
    index = "auto" if wheel_folder is None else str(wheel_folder)
    model = tiny_bert(initializer_range=0.5)
    mlflow_safeflavor.save_model(
        model, path, tokenizer=tiny_tokenizer, torch_index=index, rehearse=False, graph="no"
    )
    assert "mlflow-safeflavor" not in (path / "requirements.txt").read_text()
    expected = mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame({"text": TEXTS}))
    (tmp_path / "rows.json").write_text(json.dumps(GOOD))
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "--env-manager",
        "uv",
        "--model-uri",
        str(path),
    ]
    command += [
        "--input-path",
        str(tmp_path / "rows.json"),
        "--output-path",
        str(tmp_path / "answers.json"),
    ]
    environment = with_this_python_first() | {
        "PYTHONVERBOSE": "1",  # says from where each module comes
        # as pip looks: at all indexes, for the pinned version
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        **({} if wheel_folder is None else {"UV_FIND_LINKS": str(wheel_folder)}),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=900
    )
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith(("import ", "# "))]
    assert done.returncode == 0, "\n".join(said[-60:])
    found = json.loads((tmp_path / "answers.json").read_text())["predictions"]
    require_same_rows(found, json.loads(expected.to_json(orient="records", double_precision=15)))
    loaded_from = [
        line for line in lines if "mlflow_safeflavor/load/load.py" in line and line.startswith("# ")
    ]
    assert loaded_from, "no loader was imported at all"
    assert [
        line for line in loaded_from if f"{path}/code/mlflow_safeflavor/load/load.py" not in line
    ] == []
    assert [line for line in lines if str(Path(mlflow_safeflavor.__file__).parent) in line] == []
