"""A lower bound of tokens.

Never more than there are, whatever the tokenizer, and told by the beginning of a text.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlflow_safeflavor.tasks.inputs import token_bound
from mlflow_safeflavor.tasks.inputs.token_bound import TokenBound

WORDS = "the cat sat on a mat ing ▁the ▁cat ▁sat ▁a Ġthe Ġcat ##s ##t ##ing ##at".split()
LETTERS = [*"abcdehinostgmĠ▁'.,!éÅ3", *(f"##{letter}" for letter in "abcdehinost")]
VOCABULARY = {token: i for i, token in enumerate(["[UNK]", "<mask>", *WORDS, *LETTERS])}
UNIGRAMS = [(token, -1.0 - len(token) / 9) for token in VOCABULARY]
SPACES = normalizers.Replace(" ", "▁")


def word_piece():
    return models.WordPiece(VOCABULARY, unk_token="[UNK]", max_input_chars_per_word=99)


def bpe():
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("c", "a"),
        ("ca", "t"),
        ("Ġ", "the"),
        ("▁", "the"),
        ("Ġ", "cat"),
    ]
    vocabulary = {
        **VOCABULARY,
        **{token: len(VOCABULARY) + i for i, token in enumerate(["th", "ca"])},
    }
    return models.BPE(vocabulary, merges, unk_token="[UNK]", fuse_unk=True)


def unigram():
    return models.Unigram(UNIGRAMS, unk_id=0)


def precompiled_like():
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])


# name: model, normalizer, pre-tokenizer, whether the beginning of a text tells
KINDS = {
    "BERT": (word_piece, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), True),
    "RoBERTa": (bpe, None, pre_tokenizers.ByteLevel(add_prefix_space=True), True),
    "XLM-R": (
        unigram,
        precompiled_like(),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        True,
    ),
    "ALBERT": (unigram, normalizers.Replace("``", '"'), pre_tokenizers.Metaspace(), True),
    "words": (word_piece, normalizers.Strip(), pre_tokenizers.WhitespaceSplit(), True),
    "Llama 2": (bpe, normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None, False),
    "spaces are taken away": (
        word_piece,
        normalizers.Replace(" ", ""),
        pre_tokenizers.WhitespaceSplit(),
        False,
    ),
    "any pattern": (bpe, None, pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), False),
    "whole texts": (unigram, None, pre_tokenizers.Metaspace(split=False), False),
}


def made(kind, *, added=()):
    model, normalizer, pre_tokenizer, _ = KINDS[kind]
    backend = Tokenizer(model())
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), *added])
    return backend


ODD = ["  ", " " * 50, "\n", "\t \n", "e\u0301", "\u0301", "at" * 99, "x" * 40, "ﬁ", "``", "\x00"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_never_more_than_there_are(kind, monkeypatch):
    monkeypatch.setattr(token_bound, "_SAMPLE", 20)
    backend, told = made(kind), 0
    bound = TokenBound(backend)
    for seed in range(400):
        draw = random.Random(seed)
        weights = [5] * len(WORDS) + [1, 40] + [1] * len(ODD)
        text = "".join(draw.choices([*WORDS, "<mask>", " ", *ODD], weights, k=120))
        there = len(backend.encode(text, add_special_tokens=False))
        for tokens in (there // 4, there - 1, there, there + 1):
            exceeds = bound.exceeds(text, tokens)
            assert there > tokens or not exceeds, (seed, tokens, there)
            told += exceeds
    assert (told > 0) is KINDS[kind][3]


def test_an_added_token_that_holds_a_space_may_lie_across_any_cut():
    assert (
        TokenBound(made("BERT", added=[AddedToken("the cat")])).exceeds("the cat " * 9999, 99)
        is False
    )


class Counting:
    """A backend, and how many characters it was given."""

    def __init__(self, backend):
        self.backend, self.characters = backend, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **options):
        self.characters += sum(map(len, texts))
        return self.backend.encode_batch_fast(texts, **options)


@pytest.mark.parametrize("tokens", [500, 5_000])
def test_no_more_is_read_than_it_takes(tokens):
    bound = TokenBound(made("BERT"))
    backend: Any = Counting(bound._backend)
    bound._backend = backend
    assert bound.exceeds("the cat sat " * 20_000, tokens)
    assert backend.characters < 2 * 4 * tokens + 3 * token_bound._SAMPLE
