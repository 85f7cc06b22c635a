"""What is served by its graph needs an environment without torch.

Made from the artifact's own pins, and asked.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from transformers import BertConfig

import mlflow_safeflavor

pytestmark = pytest.mark.slow

TEXTS = ["a cat on the mat", "", "naïve Straße 你好 🙂", "the dog sat"]
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "scipy",
    "pyarrow",
    "sklearn",
    "matplotlib",
    "sqlalchemy",
)
BODIES: dict[str, dict[str, Any]] = {
    "classifier": {"dataframe_records": [{"text": text} for text in TEXTS]},
    "embedding": {"inputs": TEXTS},
    "tokens": {"dataframe_records": [{"text": text} for text in TEXTS]},
    "answers": {
        "dataframe_records": [
            {"question": "who sat", "context": text} for text in ("the dog sat", "a cat")
        ]
    },
    "raw": {"inputs": {"ids": [[4, 5, 6], [7, 8, 0]], "mask": [[1, 1, 1], [1, 1, 0]]}},
}

BOTH = """
import json, mlflow_safeflavor
model = mlflow_safeflavor.load_model(sys.argv[1], environment="error")
rows = model.predict(json.loads(sys.argv[2])).to_dict("records")
try:
    model.module
except mlflow_safeflavor.errors.EnvironmentMismatchError as error:
    print(json.dumps({"rows": rows, "refused": str(error)}))
"""
"""Loads a model that has both forms where there is no torch, and asks for its module."""


class Nested(torch.nn.Module):
    """An encoder inside, and more than one answer."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, 3)

    def forward(self, ids, mask):
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"labels": self.head(hidden[:, 0]), "all": {"hidden": hidden}}


@pytest.fixture(scope="module")
def models(minilm_folder, tmp_path_factory):
    """Five models, each of its graph alone, and one that has its module, too."""
    folder, tokenizer = (
        tmp_path_factory.mktemp("lean"),
        transformers.AutoTokenizer.from_pretrained(minilm_folder),
    )
    torch.manual_seed(0)

    def make(head):
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, initializer_range=0.5,
        )  # fmt: skip
        return getattr(transformers, f"Bert{head}")(config).eval()

    heads = {
        "classifier": "ForSequenceClassification",
        "embedding": "Model",
        "tokens": "ForTokenClassification",
        "answers": "ForQuestionAnswering",
    }
    for name, head in heads.items():
        # With its rehearsal, the first; what that finds must be no more than what libraries take
        # where it is.
        options = {"tokenizer": tokenizer, "rehearse": name == "classifier"}
        mlflow_safeflavor.save_model(make(head), folder / name, graph="only", **options)
    both = make("ForSequenceClassification")
    mlflow_safeflavor.save_model(
        both, folder / "both", tokenizer=tokenizer, graph="require", rehearse=False
    )
    example = {name: np.array(rows) for name, rows in BODIES["raw"]["inputs"].items()}
    mlflow_safeflavor.save_model(
        Nested(make("Model")).eval(),
        folder / "raw",
        task="raw",
        input_example=example,
        graph="only",
        rehearse=False,
    )
    return folder


def pins_of(model, name="requirements.txt"):
    lines = (model / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("--"))


def test_pins_are_what_serves_a_graph(models):
    pins = {name: pins_of(models / name) for name in BODIES}
    wanted = {"mlflow-skinny", "numpy", "pandas", "onnxruntime", "tokenizers", "fastapi", "uvicorn"}
    for name, found in pins.items():
        assert wanted <= found.keys(), name
        assert not {"mlflow", "scikit-learn", *HEAVY} & found.keys(), name
    assert pins["embedding"] == pins["tokens"] == pins["answers"] == pins["raw"]
    assert pins["embedding"].items() <= pins["classifier"].items()
    assert len(pins["classifier"]) < len(pins["embedding"]) + 6, (
        "small ones that somebody takes where they are"
    )
    assert {"torch", "transformers", "mlflow"} <= pins_of(models / "both").keys()
    assert pins_of(models / "both", "requirements-onnx.txt") == pins["embedding"]


HOOKS = """
def preprocess(rows, tokenizer):
    import numpy as np
    from scipy.special import expit

    return {"input": np.array([[expit(row["a"]), 1.0] for row in rows], dtype=np.float32)}

def postprocess(outputs, rows):
    (scores,) = outputs.values()
    return [{"score": float(row[0])} for row in scores]
"""


def test_what_a_hook_takes_of_all_that_mlflow_brings_is_pinned(user_code, tmp_path):
    """While MLflow is imported scipy is hidden from the rehearsal, and afterwards it is not."""
    hooks, file = user_code("hooks_with_scipy", HOOKS)
    given = {"preprocess": hooks.preprocess, "postprocess": hooks.postprocess, "code_paths": [file]}
    example = [{"a": 0.5}, {"a": -2.0}]
    model = torch.nn.Linear(2, 1)
    mlflow_safeflavor.save_model(
        model, tmp_path / "m", task="custom", input_example=example, graph="only", **given
    )
    pins = pins_of(tmp_path / "m")
    assert "scipy" in pins
    assert not {"torch", "mlflow", "pyarrow"} & pins.keys()


def test_five_models_are_served_where_torch_is_not(models, serve, tmp_path):
    """`mlflow models serve` makes the environment from the pins.

    Answers are the host's, bit for bit.
    """
    env = {
        "MLFLOW_ENV_ROOT": str(tmp_path / "envs"),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # as pip looks
        "OMP_NUM_THREADS": "1",
        "MLFLOW_SAFEFLAVOR_ENVIRONMENT": "error",
    }
    for name in ("embedding", "tokens", "answers", "raw", "classifier"):
        model = mlflow.pyfunc.load_model(str(models / name))
        rows = infer_and_parse_data(BODIES[name], model.metadata.get_input_schema())
        wanted = model.predict(rows)
        wanted = wanted.to_dict("records") if isinstance(wanted, pd.DataFrame) else wanted
        with serve(models / name, env_manager="uv", env=env, timeout=600) as server:
            answer = server.invoke(BODIES[name])
            assert answer.status == 200, answer.text
            found = answer.json()["predictions"]
        assert found == json.loads(json.dumps(wanted, default=lambda array: array.tolist())), name
    environments = sorted((tmp_path / "envs").glob("**/bin/python"))
    assert len(environments) == 2, "one for the four, and one for what the rehearsal found"
    for python in environments:
        look = (
            f"import importlib.util as u; print([name for name in {HEAVY!r} if u.find_spec(name)])"
        )
        done = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
    script = "import sys; sys.path.insert(0, sys.argv[1] + '/code')" + BOTH
    command = [environments[0], "-c", script, models / "both", json.dumps(TEXTS)]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["rows"] == mlflow_safeflavor.load_model(str(models / "both")).predict(
        TEXTS
    ).to_dict("records")
    assert "torch" in told["refused"]
    assert "requirements.txt of the model" in told["refused"]
