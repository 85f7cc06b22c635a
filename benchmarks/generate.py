"""Tokens a second of a decoder: `transformers.generate` by hand, mlflow.transformers, and ours.

    python benchmarks/generate.py [--rounds 5] [--tokens 32] [--small]

GPT-2 as it comes (124 million weights, seeded), greedy; no prompt ends before its last token, so
that all write the same number. By hand means one call of `generate` with the prompts padded on the
left; mlflow.transformers and ours are asked through `mlflow.pyfunc`. All take turns, and must write
the same text. What was seen is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", TRANSFORMERS_VERBOSITY="error"
)

import mlflow
import pandas as pd
import torch
from _common import alternate, machine, median_and_spread, ratio, save_peer, tokenizer
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import mlflow_safeflavor

SENTENCE = "the quick brown fox jumps over the lazy dog and sleeps in the warm sun until noon "
PREFIX = SENTENCE * 4
PROMPTS = {
    "one prompt of 16 tokens": [SENTENCE],
    "8 prompts of 8 to 64 tokens": [" ".join((SENTENCE * 4).split()[: 8 * i]) for i in range(1, 9)],
    "8 prompts that begin alike": [f"{PREFIX} {word}" for word in SENTENCE.split()[:8]],
}

console = Console(width=None if sys.stdout.isatty() else 120)


def decoder(*, small: bool) -> GPT2LMHeadModel:
    """GPT-2 with seeded weights that ends no text."""
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 64, "n_head": 2} if small else {}
    words: Any = tokenizer()
    config = GPT2Config(vocab_size=len(words), eos_token_id=None, bos_token_id=None, **size)
    model = GPT2LMHeadModel(config).eval()
    # Weights as they are drawn write one word for ever, of which the first token decides.
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)
    model.generation_config.pad_token_id = words.pad_token_id
    return model


def by_hand(model: GPT2LMHeadModel, prompts: list[str], tokens: int) -> list[str]:
    """What a skilled user writes."""
    words: Any = tokenizer()
    words.padding_side = "left"
    read = words(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        written = model.generate(**read, max_new_tokens=tokens, do_sample=False)
    new = written[:, read["input_ids"].shape[1] :]
    return [words.decode(line, skip_special_tokens=True) for line in new]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this script")
    given = parser.parse_args()
    console.print(machine())
    model = decoder(small=given.small)
    table = Table(
        "", "ours, tokens/s", "by hand", "ours to it", "mlflow.transformers", "ours to it"
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mlflow_safeflavor.save_model(model, folder / "ours", tokenizer=tokenizer(), rehearse=False)
        ours = mlflow.pyfunc.load_model(str(folder / "ours"))
        params = {"max_new_tokens": given.tokens, "return_full_text": False}
        theirs = mlflow.pyfunc.load_model(
            str(save_peer(model, "text-generation", folder / "theirs", params))
        )
        for what, prompts in PROMPTS.items():
            asked = pd.DataFrame({"text": prompts})
            runs = {
                "ours": partial(ours.predict, asked, params=params),
                "hand": partial(by_hand, model, prompts, given.tokens),
                "theirs": partial(theirs.predict, prompts),
            }
            wanted = runs["hand"]()
            if [*runs["ours"]()["generated_text"]] != wanted:
                console.print(f"{what}: ours writes another text than generate")
            times = alternate(runs, given.rounds)
            wrote = len(prompts) * given.tokens
            rates = {who: [wrote / one for one in found.wall] for who, found in times.items()}
            table.add_row(
                what,
                median_and_spread(rates["ours"]),
                *(
                    cell
                    for who in ("hand", "theirs")
                    for cell in (
                        median_and_spread(rates[who]),
                        "{:.2f} ({:.2f}–{:.2f})".format(*ratio(rates["ours"], rates[who])),
                    )
                ),
            )
    console.print(table)


if __name__ == "__main__":
    main()
