"""After: the classifier of ``before.py``, nested ``from_pretrained`` and buffer, by this flavor.

    python after.py

It is saved, loaded in another process, and answers the same there to the last bit; its ``__init__``
is not called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import transformers
from before import AFTER, BEFORE, TEMPERATURE, answer, checkpoint, console, make
from plain import Nested
from transformers import AutoTokenizer

import mlflow_safeflavor

ROWS = [{"buggy_code": BEFORE, "fixed_code": AFTER}]
TRUST = {"code", "pickle"}
# Another process, isolated: of the model's code it can import what the saved model brings, and
# nothing else.
LOAD = """
import json, sys
import mlflow_safeflavor

model = mlflow_safeflavor.load_model(sys.argv[1], trust={"code", "pickle"})
answers = model.predict(json.loads(sys.argv[2]), params={"function_to_apply": "none"})
answer = answers.iloc[0].to_dict()
facts = {"temperature": model.module.temperature.item(), "tensors": model.report.tensors}
print(json.dumps({"answer": answer, **facts}))
"""


def save(tokenizer: Any, path: str) -> None:
    """The classifier that ``before.py`` wraps."""
    model = make(Nested, tokenizer)
    console.print(f"saved, when it answered {answer(model, tokenizer)}")
    mlflow_safeflavor.save_model(
        model.classifier,
        path,
        tokenizer=tokenizer,
        task="text-classification",
        input_columns={"text": "buggy_code", "text_pair": "fixed_code"},
        code_paths=[str(Path(__file__).with_name("model.py"))],
        allow_pickle=True,
        model_config={"num_threads": 1},
    )


def load_elsewhere(path: str) -> dict[str, Any]:
    """What the other process found."""
    command = [sys.executable, "-I", "-c", LOAD, path, json.dumps(ROWS)]
    done = subprocess.run(command, cwd=path, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Save, load twice, compare; the exit status is 1 if anything differs."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model"))
        save(tokenizer, path)
        there = load_elsewhere(path)
        here = mlflow_safeflavor.load_model(path, trust=TRUST)
        wanted = here.predict(ROWS, params={"function_to_apply": "none"}).iloc[0].to_dict()
    same = (
        there["answer"] == wanted
        and there["temperature"] == here.module.get_buffer("temperature").item()
    )
    console.print(f"loaded in another process: no error, {there['tensors']} tensors as saved")
    console.print(f"temperature: {there['temperature']:g}, saved was {TEMPERATURE}")
    console.print(f"answers: {there['answer']}, in this process {wanted}")
    console.print("[green]the same to the last bit[/]" if same else "[red]NOT the same[/]")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
