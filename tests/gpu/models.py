"""Models that checks ask, made here from seeds: nothing is downloaded, and no hub is known."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import mlflow_safeflavor

from . import odd_modules

__all__ = ["Saved", "classifier", "texts_of", "tokenizer"]

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SIZES = {"tiny": (1000, 32, 2, 2), "minilm": (30522, 384, 6, 12), "large": (50265, 768, 12, 12)}
"""Words, hidden size, layers, heads.

"minilm" has the shape of all-MiniLM-L6-v2, "large" that of RoBERTa-base.
"""


def _words(count: int) -> list[str]:
    return [
        "".join(letters)
        for letters in islice(product(string.ascii_lowercase, repeat=4), count - len(_SPECIAL))
    ]


def tokenizer(size: str = "tiny") -> Any:
    """A BERT tokenizer in which every word is one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *_words(_SIZES[size][0])])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in _SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


def texts_of(lengths: list[int], size: str = "tiny", seed: int = 0) -> list[str]:
    """Texts of so many tokens each, special ones included."""
    draw, words = random.Random(seed), _words(_SIZES[size][0])
    return [" ".join(draw.choices(words, k=max(1, length - 2))) for length in lengths]


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def classifier(size: str = "tiny") -> Any:
    """A BERT for three labels."""
    words, hidden, layers, heads = _SIZES[size]
    with _seeded():
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=words,
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * hidden,
                initializer_range=0.05,
                num_labels=3,
            )
        ).eval()


def _writer() -> Any:
    words, hidden, layers, heads = _SIZES["tiny"]
    with _seeded():
        config = GPT2Config(
            vocab_size=words, n_positions=128, n_embd=hidden, n_layer=layers, n_head=heads,
            initializer_range=0.3,
            bos_token_id=2, eos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


_EXAMPLES = {
    "Odd": lambda: {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)},
    "Convolution": lambda: {
        "x": np.linspace(-1, 1, 4 * 2048, dtype=np.float32).reshape(4, 8, 16, 16)
    },
}


class Saved:
    """Artifacts by name, each made when it is first asked for: in this run, by this package.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, dtype: str = "float32", *, graph: bool = False) -> Path:
        """ "tiny", "minilm", "large" (classifiers), "writer", "Odd", "Convolution" or "Greedy"."""
        path = self.folder / f"{name}-{dtype}{'-graph' if graph else ''}"
        if path.exists():
            return path
        options: dict[str, Any] = {"dtype": dtype, "rehearse": False}
        if name in (*_EXAMPLES, "Greedy"):
            with _seeded():
                module = getattr(odd_modules, name)().eval()
            options |= {"init_args": {}, "code_paths": [odd_modules.__file__]}
            if name == "Greedy":
                options |= {"task": "feature-extraction", "tokenizer": tokenizer()}
            else:
                options |= {"task": "raw", "input_example": _EXAMPLES[name]()}
        elif name == "writer":
            module, options["tokenizer"] = _writer(), tokenizer()
        else:
            module, options["tokenizer"] = classifier(name), tokenizer(name)
        # Recording graphs takes seconds, and one check is about graphs.
        mlflow_safeflavor.save_model(module, path, graph="require" if graph else "no", **options)
        return path
