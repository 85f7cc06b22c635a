"""What a skilled user writes instead.

ONNX Runtime and tokenizers behind ``mlflow.pyfunc``, without this project.

Texts are sorted by length and run in batches of 32. Nothing is checked, pinned or compared.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel

BATCH = 32


class Classifier(PythonModel):
    """A text classifier; its file and its tokenizer are artifacts."""

    def load_context(self, context: Any) -> None:
        """Open both, with as many threads as cores."""
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self.session = onnxruntime.InferenceSession(context.artifacts["model"], options)
        self.tokenizer = Tokenizer.from_file(context.artifacts["tokenizer"])
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(512)
        self.names = [known.name for known in self.session.get_inputs()]

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Label and score of each row."""
        texts = model_input["text"].tolist()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: np.ndarray = np.zeros((len(texts), 2), np.float32)
        for start in range(0, len(texts), BATCH):
            places = order[start : start + BATCH]
            encoded = self.tokenizer.encode_batch([texts[i] for i in places])
            columns = {"ids": [e.ids for e in encoded], "mask": [e.attention_mask for e in encoded]}
            arrays = {name: np.array(rows, np.int64) for name, rows in columns.items()}
            inputs = {
                "input_ids": arrays["ids"],
                "attention_mask": arrays["mask"],
                "token_type_ids": arrays["ids"] * 0,
            }
            (logits,) = self.session.run(["logits"], {name: inputs[name] for name in self.names})
            powers = np.exp(logits - logits.max(1, keepdims=True))
            found[places] = powers / powers.sum(1, keepdims=True)
        best = found.argmax(1)
        return pd.DataFrame(
            {"label": [f"LABEL_{i}" for i in best], "score": found[np.arange(len(texts)), best]}
        )


class Nothing(PythonModel):
    """Answers at once: what a request costs without any model."""

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One label for every row."""
        return pd.DataFrame(
            {"label": ["LABEL_0"] * len(model_input), "score": [1.0] * len(model_input)}
        )


def save_nothing(folder: Path) -> Path:
    """A model that answers at once."""
    example = pd.DataFrame({"text": ["a text"]})
    mlflow.pyfunc.save_model(
        folder,
        python_model=Nothing(),
        code_paths=[__file__],
        signature=mlflow.models.infer_signature(example),
    )
    return folder


def save(module: Any, tokenizer: Any, folder: Path) -> Path:
    """Export as the documentation of torch says, and save with ``mlflow.pyfunc``."""
    import torch

    folder.mkdir(parents=True)
    inputs = dict(
        tokenizer(["one text", "another, longer text"], padding=True, return_tensors="pt")
    )
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    names = list(inputs)
    torch.onnx.export(
        module,
        (),
        folder / "model.onnx",
        kwargs=inputs,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes={name: {0: rows, 1: length} for name in names},
        dynamo=True,
        verbose=False,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "about.json").write_text(json.dumps({"names": names}))
    artifacts = {
        "model": str(folder / "model.onnx"),
        "tokenizer": str(folder / "tokenizer" / "tokenizer.json"),
    }
    # One file: an artifact is copied by itself, and its external data would stay behind.
    import onnx

    onnx.save(onnx.load(folder / "model.onnx"), folder / "model.onnx", save_as_external_data=False)
    for left in folder.glob("*.data"):
        left.unlink()
    example = pd.DataFrame({"text": ["a text"]})
    mlflow.pyfunc.save_model(
        folder / "pyfunc", python_model=Classifier(), artifacts=artifacts, input_example=None,
        code_paths=[__file__],
        signature=mlflow.models.infer_signature(example),
    )  # fmt: skip
    return folder / "pyfunc"
