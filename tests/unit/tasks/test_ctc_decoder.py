"""Decoding of frames: repeats, blanks, words and their places."""

import pytest

from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.tasks.inputs.ctc_decoder import ARGUMENTS, CtcDecoder, Said

VOCABULARY = {"_": 0, "|": 1, "A": 2, "B": 3, "?": 4, ".": 5}
CONFIG = {
    **dict.fromkeys(ARGUMENTS),
    "pad_token": "_",
    "unk_token": "?",
    "word_delimiter_token": "|",
    "replace_word_delimiter_char": " ",
}


def decoder(**settings):
    return CtcDecoder(VOCABULARY, {**CONFIG, **settings}, "here")


def test_repeats_collapse_unless_a_blank_lies_between():
    characters = decoder().characters([2, 2, 0, 2, 3, 3])
    assert characters == [Said("A", 0, 2), Said("A", 3, 4), Said("B", 4, 6)]
    assert decoder().text(characters) == "AAB"


def test_words_lie_between_delimiters():
    characters = decoder().characters([1, 2, 2, 0, 3, 1, 0, 1, 2, 0])
    assert decoder().text(characters) == "AB  A"
    assert decoder().words(characters) == [Said("AB", 1, 5), Said("A", 8, 9)]


def test_what_the_vocabulary_does_not_know_is_one_unknown_token():
    assert decoder().characters([7, 8, 4, 2]) == [Said("?", 0, 3), Said("A", 3, 4)]


def test_nothing_was_said():
    for ids in ([], [0, 0, 0], [1, 0, 1]):
        characters = decoder().characters(ids)
        assert (decoder().text(characters), decoder().words(characters)) == ("", [])


def test_texts_are_lowered_and_cleaned_up_where_the_tokenizer_does():
    characters = decoder().characters([2, 1, 5])
    assert decoder().text(characters) == "A ."
    assert decoder(do_lower_case=True).text(characters) == "a ."
    assert decoder(clean_up_tokenization_spaces=True).text(characters) == "A."


@pytest.mark.parametrize(
    ("vocabulary", "config"),
    [([], CONFIG), ({"A": "0"}, CONFIG), (VOCABULARY, {}), (VOCABULARY, {**CONFIG, "more": 1})],
)
def test_malformed_files_are_refused(vocabulary, config):
    with pytest.raises(IntegrityError, match="described by something else"):
        CtcDecoder(vocabulary, config, "here")
