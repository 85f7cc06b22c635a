"""Tokenizers: JSON files only, transformers' ids, safe from many threads, never changed."""

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from other_tokenizers import NASTY, byte_level, unigram, wrapped
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder
from mlflow_safeflavor.tasks.inputs.tokenizer import load_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def tokenizers(minilm_folder):
    """Name → tokenizer: three algorithms, both sides of truncation, special tokens split or not."""
    return {
        "wordpiece": AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True),
        "byte-level": wrapped(
            byte_level(), model_max_length=64, model_input_names=["input_ids", "attention_mask"]
        ),
        "unigram": wrapped(unigram()),
        "left": wrapped(
            unigram(), truncation_side="left", padding_side="left", model_max_length=20
        ),
        "split": wrapped(byte_level(), split_special_tokens=True),
        "bare": wrapped(Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))),
    }


NAMES = ["wordpiece", "byte-level", "unigram", "left", "split", "bare"]


@pytest.fixture(params=NAMES)
def tokenizer(request, tokenizers):
    """A copy, so that no test sees what another left behind in it."""
    return copy.deepcopy(tokenizers[request.param])


def _rows(batch, count):
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def _files(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("pairs", [None, NASTY[::-1]], ids=["single", "pairs"])
def test_ids_are_those_of_transformers(tokenizer, pairs, tmp_path):
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizer, tmp_path))
    for length in (4, 5, 17, 64, 200):
        wanted = _rows(tokenizer(NASTY, pairs, truncation=True, max_length=length), len(NASTY))
        assert encoder.encode(NASTY, pairs, max_length=length) == wanted
        assert max(len(row["input_ids"]) for row in wanted) <= length
    uncut = _rows(tokenizer(NASTY, pairs, truncation=False, verbose=False), len(NASTY))
    assert encoder.encode(NASTY, pairs, truncation=False) == uncut
    assert encoder.encode(NASTY, pairs, max_length=5, truncation=False) == uncut
    # Without a length, the one the tokenizer declares; without such a one, nothing is cut.
    own = tokenizer(
        NASTY, pairs, truncation=True, max_length=min(tokenizer.model_max_length, 10**9)
    )
    assert encoder.encode(NASTY, pairs) == _rows(own, len(NASTY))


@pytest.mark.parametrize("only", [0, 1])
def test_one_text_of_a_pair_is_cut_as_transformers_does(tokenizer, only, tmp_path):
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizer, tmp_path))
    other = "the cat"
    for text in (NASTY[3], NASTY[12], NASTY[11]):
        texts = [text, other] if only == 0 else [other, text]
        uncut = len(tokenizer(*texts, verbose=False)["input_ids"])
        length = (
            uncut - len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        )
        for limit in (length, length + 3, uncut + 1):
            wanted = tokenizer(
                *texts, truncation=("only_first", "only_second")[only], max_length=limit
            )
            (found,) = encoder.encode(texts[:1], texts[1:], max_length=limit, only=only)
            assert found == dict(wanted)
        # transformers gives up where one token more must go.
        (longer,) = encoder.encode(texts[:1], texts[1:], max_length=length - 1, only=only)
        assert len(longer["input_ids"]) == length


def test_texts_from_ids_and_from_tokens_are_those_of_transformers(tokenizer, tmp_path):
    tokenizer.clean_up_tokenization_spaces = True
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizer, tmp_path))
    for text in (*NASTY, "it 's , they 've n't ' . ? ! ' m 'm 're ."):
        ids = tokenizer(text, verbose=False)["input_ids"]
        for skip in (True, False):
            assert encoder.decode(ids, skip_special=skip) == tokenizer.decode(
                ids, skip_special_tokens=skip
            )
        tokens = [encoder.token(i) for i in ids]
        assert tokens == tokenizer.convert_ids_to_tokens(ids)
        assert encoder.join(tokens) == tokenizer.convert_tokens_to_string(tokens)
        assert [encoder.token_id(token) for token in tokens] == ids
    assert encoder.token_id("no such token") is None
    assert encoder.token(10**6) == ""


def test_whether_subwords_are_marked(tokenizers, tmp_path):
    marked = {
        name: TextEncoder(
            tmp_path / name, write_tokenizer(tokenizers[name], tmp_path / name)
        ).marks_subwords
        for name in NAMES
    }
    assert [name for name, marks in marked.items() if marks] == ["wordpiece"]


def test_one_row_is_the_same_as_many(tokenizer, tmp_path):
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizer, tmp_path))
    assert [encoder.encode([text], max_length=9)[0] for text in NASTY] == encoder.encode(
        NASTY, max_length=9
    )


def test_the_config_says_what_padding_needs(tokenizers, tmp_path):
    config = write_tokenizer(tokenizers["wordpiece"], tmp_path / "a")
    assert config == {
        "clean_up": False,
        "cls_token_id": 101,
        "mask_token": "[MASK]",
        "mask_token_id": 103,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": 512,
        "pad_token_id": 0,
        "pad_token_type_id": 0,
        "padding_side": "right",
        "split_special_tokens": False,
        "truncation_side": "right",
        "unk_token_id": 100,
    }
    config = write_tokenizer(tokenizers["left"], tmp_path / "b")
    assert (config["padding_side"], config["truncation_side"], config["pad_token_id"]) == (
        "left",
        "left",
        1,
    )
    assert write_tokenizer(tokenizers["unigram"], tmp_path / "c")["model_max_length"] is None
    assert write_tokenizer(tokenizers["split"], tmp_path / "d")["split_special_tokens"] is True


def test_special_tokens_are_counted(tokenizers, tmp_path):
    counts = {}
    for name in ("wordpiece", "byte-level", "bare"):
        encoder = TextEncoder(tmp_path / name, write_tokenizer(tokenizers[name], tmp_path / name))
        counts[name] = (encoder.special_tokens(pair=False), encoder.special_tokens(pair=True))
    assert counts == {"wordpiece": (2, 3), "byte-level": (2, 4), "bare": (0, 0)}


def test_only_json_files_and_the_tokenizer_is_not_changed(tokenizer, tmp_path):
    tokenizer(["a", "b b"], truncation=True, max_length=7, padding=True)
    before = tokenizer.backend_tokenizer.to_str()
    assert '"max_length":7' in before.replace(" ", "")
    write_tokenizer(tokenizer, tmp_path)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert set(_files(tmp_path)) <= {
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None
    assert "/" not in str(
        json.loads((tmp_path / "tokenizer_config.json").read_text()).get("name_or_path", "")
    )


def test_a_vocabulary_file_of_the_class_is_not_written(minilm_folder, tmp_path):
    class Copying(BertTokenizerFast):
        def save_pretrained(self, save_directory, **options):
            shutil.copy(minilm_folder / "vocab.txt", save_directory)
            return super().save_pretrained(save_directory, **options)

    # A class of the user's own is saved as the generic one, which gives the same ids.
    tokenizer = Copying.from_pretrained(minilm_folder, local_files_only=True)
    write_tokenizer(tokenizer, tmp_path)
    assert "vocab.txt" not in _files(tmp_path)
    assert type(load_tokenizer(tmp_path)).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0] }}", {"default": "{{ messages[0] }}", "tool_use": "{{ tools }}"}],
    ids=["one", "many"],
)
def test_a_chat_template_is_kept_in_json(tokenizers, template, tmp_path):
    tokenizer = copy.deepcopy(tokenizers["byte-level"])
    tokenizer.chat_template = template
    write_tokenizer(tokenizer, tmp_path)
    assert all(name.endswith(".json") for name in _files(tmp_path))
    assert load_tokenizer(tmp_path).chat_template == template


def test_the_transformers_tokenizer_comes_back(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.is_fast
    assert loaded(NASTY, truncation=True, max_length=12) == tokenizer(
        NASTY, truncation=True, max_length=12
    )
    for name in (
        "model_max_length",
        "padding_side",
        "truncation_side",
        "pad_token_id",
        "model_input_names",
    ):
        assert getattr(loaded, name) == getattr(tokenizer, name)


def test_a_backend_changed_after_loading_comes_back_as_it_was_saved(minilm_folder, tmp_path):
    """Of the generic class: those of transformers 5 rebuild their backend from the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)
    own = normalizers.Sequence(
        [normalizers.Replace("o", "0"), tokenizer.backend_tokenizer.normalizer]
    )
    tokenizer.backend_tokenizer.normalizer = own
    config = write_tokenizer(tokenizer, tmp_path)
    wanted = tokenizer(["hello world"])["input_ids"]
    assert load_tokenizer(tmp_path)(["hello world"])["input_ids"] == wanted
    assert TextEncoder(tmp_path, config).encode(["hello world"])[0]["input_ids"] == wanted[0]


def test_the_same_tokenizer_gives_the_same_bytes(tokenizer, tmp_path):
    for name in ("a", "b"):
        write_tokenizer(tokenizer, tmp_path / name)
    for file in _files(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# Refusals.


def test_a_tokenizer_without_a_fast_backend(tmp_path):
    class Slow:
        is_fast = False

    with pytest.raises(StructureError, match=r"no fast backend[\s\S]*Slow[\s\S]*hint"):
        write_tokenizer(Slow(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_tokenizer_whose_python_code_changes_the_ids(minilm_folder, tmp_path):
    class Reversing(BertTokenizerFast):
        def __call__(self, text=None, text_pair=None, **options):
            return super().__call__([one[::-1] for one in text], text_pair, **options)

    with pytest.raises(StructureError, match=r"other ids[\s\S]*Reversing[\s\S]*wanted[\s\S]*found"):
        write_tokenizer(Reversing.from_pretrained(minilm_folder, local_files_only=True), tmp_path)


def test_a_tokenizer_that_wants_more_than_text(minilm_folder, tmp_path):
    class Boxes(BertTokenizerFast):
        def __call__(self, text, text_pair=None, *, boxes, **options):
            return super().__call__(text, text_pair, **options)

    with pytest.raises(StructureError, match=r"does not take plain texts[\s\S]*Boxes[\s\S]*boxes"):
        write_tokenizer(Boxes.from_pretrained(minilm_folder, local_files_only=True), tmp_path)


def test_a_backend_with_parts_in_python(tokenizers, tmp_path):
    class Upper:
        def normalize(self, text):
            text.uppercase()

    tokenizer = copy.deepcopy(tokenizers["byte-level"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(Upper())
    with pytest.raises(
        StructureError,
        match=r"cannot be (copied|written)[\s\S]*PreTrainedTokenizerFast|TokenizersBackend",
    ):
        write_tokenizer(tokenizer, tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:900])]
)
def test_a_damaged_file(tokenizers, damage, tmp_path):
    config = write_tokenizer(tokenizers["byte-level"], tmp_path)
    damage(tmp_path / "tokenizer.json")
    for read in (lambda: TextEncoder(tmp_path, config), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
            read()


def test_a_config_without_a_key(tokenizers, tmp_path):
    config = write_tokenizer(tokenizers["byte-level"], tmp_path)
    del config["truncation_side"]
    with pytest.raises(IntegrityError, match="truncation_side"):
        TextEncoder(tmp_path, config)


# Threads.


def test_threads_with_mixed_lengths_get_single_threaded_encodings(tokenizers, tmp_path):
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizers["byte-level"], tmp_path))
    reference = TextEncoder(tmp_path, encoder.config)
    draw = random.Random(0)
    jobs = [
        (draw.sample(NASTY, 3), draw.choice([None, *range(5, 18)]), draw.random() < 0.8)
        for _ in range(600)
    ]
    wanted = [
        reference.encode(texts, max_length=length, truncation=cut) for texts, length, cut in jobs
    ]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda job: encoder.encode(job[0], max_length=job[1], truncation=job[2]), jobs)
        )
    assert found == wanted


def test_cutting_two_long_texts_is_cheap(tokenizers, tmp_path):
    """tokenizers' own truncation builds every combination of what it cuts off a pair.

    Here more than memory holds.
    """
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizers["wordpiece"], tmp_path))
    start = time.perf_counter()
    row = encoder.encode(["left " * 20_000], ["right " * 20_000], max_length=8)[0]
    assert time.perf_counter() - start < 5
    assert row["input_ids"] == encoder.encode(["left left"], ["right right right"])[0]["input_ids"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_way_to_cut_a_pair(side, tmp_path):
    backend = Tokenizer(
        models.WordLevel(
            {"[U]": 0, "[S]": 1, **{c: i for i, c in enumerate("abcdefghij", 2)}}, "[U]"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[S] $A", "[S] $A [S] $B:1 [S]:1", [("[S]", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[U]", truncation_side=side
    )
    encoder = TextEncoder(tmp_path, write_tokenizer(tokenizer, tmp_path))
    texts = [" ".join("abcde"[:n]) for n in range(6) for m in range(6)]
    pairs = [" ".join("fghij"[:m]) for n in range(6) for m in range(6)]
    for length in range(3, 15):
        wanted = _rows(tokenizer(texts, pairs, truncation=True, max_length=length), len(texts))
        assert encoder.encode(texts, pairs, max_length=length) == wanted


def test_encoding_imports_neither_transformers_nor_torch(tokenizers, tmp_path):
    config = write_tokenizer(tokenizers["byte-level"], tmp_path)
    code = (
        "import json, sys; from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder;"
        "encoder = TextEncoder(sys.argv[1], json.loads(sys.argv[2]));"
        "encoder.encode(['a'], max_length=4);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
