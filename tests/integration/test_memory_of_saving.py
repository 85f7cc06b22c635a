"""A save takes memory for what it compares the weights with, and gives it back."""

from __future__ import annotations

import json
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status has the memory"),
]

# All in one process, the first for the imports alone. Texts are short: a proof is about
# tokens, and its memory about weights.
CODE = """
import json, sys, threading, time
import torch, transformers
import mlflow_safeflavor

def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

def save(name, layers):
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=768, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=3072, max_position_embeddings=8,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    size = sum(tensor.nbytes for tensor in model.parameters()) / 2**20
    before, seen, done = own(), [], threading.Event()
    def watch():
        while not done.wait(0.005):
            seen.append(own() - before)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    mlflow_safeflavor.save_model(
        model, f"{sys.argv[2]}/{name}", tokenizer=tokenizer, graph="require", rehearse=False
    )
    done.set()
    watcher.join()
    return {"size": size, "peak": max(seen), "left": own() - before}

tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print("FOUND", json.dumps([save(*of) for of in enumerate((1, 1, 4))]))
"""


def test_the_weights_are_held_once_more_and_no_more(tiny_tokenizer, tmp_path, clean_process):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    folders = str(tmp_path / "tokenizer"), str(tmp_path / "saved")
    printed = clean_process(CODE, *folders, env={"OMP_NUM_THREADS": "1"}).stdout
    _, small, large = json.loads(printed.split("FOUND")[1])
    more = large["size"] - small["size"]
    assert more > 80  # MB
    # Twice while the constructor is called again, for the doctor; in the proof the session packs
    # most of them, once for each session that is kept: 2.5, and 3 left, where two were.
    assert large["peak"] - small["peak"] < 2.2 * more, (small, large)
    assert large["left"] - small["left"] < 0.3 * more, (small, large)
