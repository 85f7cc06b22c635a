"""Tokenizers of the kinds that MiniLM's is not, trained on texts that go wrong somewhere."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

NASTY = [
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing and  double spaces \t tabs \r\n newlines\n\n",
    "naïve café ÅÄÖ ﬁ ½ e\u0301",
    "日本語 中文 한국어 ไทย",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "مرحبا بالعالم \u202eabc\u202c שלום",
    "nul \x00 bell \x07 zero\u200bwidth \ufeffbom \u00adsoft",
    "[CLS] looks like [SEP] special [MASK] tokens </s> <s> <pad>",
    "def f(x):\n    return {x: [1.5, 'a'], **{}}  # comment",
    "word " * 150,
    "x" * 300,
    "".join(chr(c) for c in range(32, 600)),
    "https://example.org/a?b=c&d=%20#e",
]
CORPUS = [text for text in NASTY if text.strip()] * 3 + [
    "the cat sat on the mat and the dog ran"
] * 20
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True
    )
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=2500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


def wrapped(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)
