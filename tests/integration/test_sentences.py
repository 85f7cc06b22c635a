"""Models of sentence-transformers.

As objects and as folders of every age they answer as ``encode`` and ``predict``.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from functools import partial
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import tiny_model
from click.testing import CliRunner
from transformers import T5Config, T5EncoderModel

import mlflow_safeflavor
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.cells import from_json
from mlflow_safeflavor.tasks.feature_extraction import FeatureExtraction
from mlflow_safeflavor.tasks.quantization import PRECISIONS

pytest.importorskip("sentence_transformers", minversion="6")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.models import (
        Dense,
        Dropout,
        LayerNorm,
        Normalize,
        Pooling,
        Transformer,
    )
    from sentence_transformers.models import WordWeights as Unknown
    from sentence_transformers.util import quantize_embeddings

TEXTS = [
    "the cat sat on the mat",
    "a",
    "Cats sating UNDER reds",
    "",
    "dog " * 60,
    "return x + y if dog else cat",
]
PAIRS = list(zip(TEXTS, [*TEXTS[2:], "red", "mat"], strict=True))
SIZE = 32


@pytest.fixture
def transformer(tmp_path, tiny_tokenizer):
    """``make(model, **options)``: a ``Transformer`` around a tiny model."""

    def make(model=None, tokenizer=tiny_tokenizer, **options):
        folder = tmp_path / f"bare-{len(list(tmp_path.iterdir()))}"
        (model or tiny_model("Bert", "Model")).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return Transformer(str(folder), **options)

    return make


def seeded(module):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    return module


def t5(size):
    torch.manual_seed(0)
    sizes = {
        "d_model": SIZE,
        "d_ff": 32,
        "d_kv": 16,
        "num_layers": 1,
        "num_heads": 2,
        "pad_token_id": 0,
    }
    return T5EncoderModel(T5Config(vocab_size=size, **sizes)).eval()


KINDS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
PROMPTS: dict[str, Any] = {
    "prompts": {"query": "find the cat : ", "document": "x ="},
    "default_prompt_name": "query",
}


def _pooled(kind):
    return [Pooling(SIZE, pooling_mode=kind)]


# Name → what is behind the transformer, arguments of the transformer, and of the whole.
LAYOUTS: dict[str, tuple[Any, ...]] = {
    **{kind: (partial(_pooled, kind), {}, {}) for kind in KINDS},
    "three side by side, to length 1": (
        lambda: [Pooling(SIZE, pooling_mode=("cls", "max", "mean")), Normalize()],
        {},
        {},
    ),
    "dense": (
        lambda: [Pooling(SIZE, pooling_mode="cls"), seeded(Dense(SIZE, 12)), Normalize()],
        {},
        {},
    ),
    "two dense": (
        lambda: [
            Pooling(SIZE, pooling_mode="lasttoken"),
            seeded(Dense(SIZE, 20, bias=False, activation_function=torch.nn.GELU())),
            seeded(Dense(20, SIZE, activation_function=None, use_residual=True)),
        ],
        {},
        {},
    ),
    "layer norm": (lambda: [Pooling(SIZE), seeded(LayerNorm(SIZE)), Dropout(0.5)], {}, {}),
    "before the pooling": (
        lambda: [
            seeded(Dense(SIZE, 16, module_input_name="token_embeddings")),
            Normalize(module_input_name="token_embeddings"),
            Pooling(16, pooling_mode=("weightedmean", "max")),
        ],
        {},
        {},
    ),
    "prompts": (lambda: [Pooling(SIZE)], {}, PROMPTS),
    "prompts that do not count": (
        lambda: [
            Pooling(SIZE, pooling_mode=("mean", "cls", "weightedmean"), include_prompt=False),
            Normalize(),
        ],
        {},
        PROMPTS,
    ),
    "prompts that do not count, and dense": (
        lambda: [Pooling(SIZE, include_prompt=False), seeded(Dense(SIZE, 8))],
        {},
        PROMPTS,
    ),
    "short": (
        lambda: [Pooling(SIZE), Normalize()],
        {"max_seq_length": 7, "do_lower_case": True},
        {},
    ),
    "cut off": (
        lambda: [Pooling(SIZE), Normalize()],
        {},
        {"truncate_dim": 5, "similarity_fn_name": "dot"},
    ),
    "T5": (lambda: [Pooling(SIZE)], {"model": t5(35)}, {}),
    "Roberta": (
        lambda: [Pooling(SIZE, pooling_mode="cls")],
        {"model": tiny_model("Roberta", "Model")},
        {},
    ),
    "MPNet": (lambda: [Pooling(SIZE)], {"model": tiny_model("MPNet", "Model")}, {}),
}


def build(transformer, name):
    behind, options, whole = LAYOUTS[name]
    return SentenceTransformer(modules=[transformer(**options), *behind()], device="cpu", **whole)


def save(model, path, **options):
    mlflow_safeflavor.save_model(model, path, **{"graph": "no", "rehearse": False, **options})
    return mlflow_safeflavor.load_model(path)


def error(found, wanted):
    """Largest difference, in units of the number where that is more than 1."""
    return (np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max()


def embeddings(loaded, texts=TEXTS, **params):
    return np.array(loaded.predict(texts, params=params)["embedding"].tolist())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_embeddings_are_those_of_encode(transformer, tmp_path, name):
    if name == "T5" and transformers.__version__.startswith("4."):
        pytest.skip("sentence-transformers' own encode gives T5 token types there")
    model = build(transformer, name)
    wanted = model.encode(TEXTS)
    found = embeddings(save(model, tmp_path / "object"))
    assert found.shape == wanted.shape
    assert error(found, wanted) < 1e-6
    model.save(str(tmp_path / "folder"))
    again = SentenceTransformer(str(tmp_path / "folder"), device="cpu").encode(TEXTS)
    assert error(again, wanted) < 1e-6
    folder = save(tmp_path / "folder", tmp_path / "from folder")
    assert error(embeddings(folder), wanted) < 1e-6
    assert (folder.spec.structure, folder.spec.runs) == ("transformers", ())
    assert folder.report.bit_identical


@pytest.mark.filterwarnings("ignore")
def test_the_layout_of_old_releases(transformer, tmp_path):
    """Flags for poolings, the transformer in its own folder, pickled weights of a dense layer."""
    model = build(transformer, "dense")
    folder, new = tmp_path / "old", tmp_path / "new"
    model.save(str(new))
    folder.mkdir()
    shutil.copytree(
        new,
        folder / "0_Transformer",
        ignore=lambda path, names: [n for n in names if n[1:2] == "_"],
    )
    (folder / "0_Transformer" / "modules.json").unlink()
    (folder / "0_Transformer" / "config_sentence_transformers.json").unlink()
    said = {"max_seq_length": 6, "do_lower_case": False}
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(said))
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    flags = {f"pooling_mode_{mode}": mode in ("cls_token", "mean_tokens") for mode in modes}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": SIZE, **flags})
    )
    (folder / "2_Dense").mkdir()
    dense = {
        "in_features": 64,
        "out_features": 9,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    layer = seeded(torch.nn.Linear(64, 9))
    torch.save(
        {f"linear.{k}": v for k, v in layer.state_dict().items()},
        folder / "2_Dense" / "pytorch_model.bin",
    )
    types = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(types)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    wanted = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    found = save(folder, tmp_path / "model")
    assert error(embeddings(found), wanted) < 1e-6
    assert found.task.limit == 6


@pytest.mark.filterwarnings("ignore")
def test_real_weights_and_a_folder_that_says_cls(minilm_folder, tmp_path):
    texts = ["a cat on the mat", "Zürich: 3 € for 😀, naïve café!", "the quick brown fox " * 120]
    folder = tmp_path / "bge"
    shutil.copytree(minilm_folder, folder)
    config = json.loads((folder / "1_Pooling" / "config.json").read_text())
    config |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    for path in (minilm_folder, folder):
        wanted = SentenceTransformer(str(path), device="cpu").encode(texts)
        found = embeddings(save(path, tmp_path / f"model-{path.name}"), texts)
        assert error(found, wanted) < 1e-6
        assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_arguments_of_encode_are_params(transformer, tmp_path):
    model = build(transformer, "prompts that do not count")
    found = save(model, tmp_path / "model")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    declared = {param.name: param.default for param in served.metadata.get_params_schema().params}
    assert declared == {
        **{"prompt_name": "query", "prompt": "", "truncate_dim": 0, "normalize_embeddings": False},
        **{"precision": "float32", "max_length": 0, "truncation": True},
    }
    for ours, theirs in (
        ({"prompt_name": "document"}, {"prompt_name": "document"}),
        ({"prompt_name": ""}, {"prompt": ""}),
        ({"prompt": "a cat "}, {"prompt": "a cat "}),
        ({"truncate_dim": 3}, {"truncate_dim": 3}),
        (
            {"truncate_dim": 3, "normalize_embeddings": True},
            {"truncate_dim": 3, "normalize_embeddings": True},
        ),
    ):
        wanted = model.encode(TEXTS, **theirs)
        assert error(embeddings(found, **ours), wanted) < 1e-6, ours
        answer = served.predict(pd.DataFrame({"text": TEXTS}), params=ours)["embedding"].tolist()
        assert error(np.array(answer), wanted) < 1e-6, ours
    with pytest.raises(InputError, match=r"'prompt_name'[\s\S]*document \| query"):
        found.predict(["a"], params={"prompt_name": "passage"})
    assert found.spec.task_config["similarity"] == "cosine"


# Others than are asked: those would be the very ends of a range.
CALIBRATION = ["cats and dogs", "red mats", "x y", "if not else return", "the", "dog dog cat on"]


def require_quantised(found, wanted):
    """Equal, but for a number next to the border of two steps, and of the same type."""
    assert found.shape == wanted.shape
    assert np.issubdtype(found.dtype, np.integer)
    different = np.abs(found.astype(int) - wanted.astype(int))
    assert different.max() <= 1
    assert (different > 0).mean() < 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "given", [{}, {"truncate_dim": 13, "normalize_embeddings": True}], ids=["whole", "cut off"]
)
def test_precisions_are_those_of_quantize_embeddings(transformer, tmp_path, given):
    model = build(transformer, "prompts")
    options = {"model_config": {"calibration": CALIBRATION}, "params": given}
    found = save(model, tmp_path / "model", **options)
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    whole = model.encode(TEXTS, **given)
    known = model.encode(CALIBRATION, **given)
    precision: Any
    for precision in PRECISIONS[1:]:
        wanted = quantize_embeddings(whole, precision, calibration_embeddings=known)
        require_quantised(embeddings(found, precision=precision), wanted)
        for i, text in enumerate(TEXTS):
            alone = embeddings(found, [text], precision=precision)
            require_quantised(alone, wanted[i : i + 1])
        frame = pd.DataFrame({"text": TEXTS})
        answer = served.predict(frame, params={"precision": precision})["embedding"]
        assert np.array(answer.tolist()).tolist() == embeddings(found, precision=precision).tolist()
    assert (embeddings(found, precision="float32") == embeddings(found)).all()
    # the texts are gone, and nothing but the ends of their embeddings is stored
    config = found.spec.task_config
    assert config["calibration"] == []
    ends = np.stack([known.min(axis=0), known.max(axis=0)])
    assert from_json(config["ranges"]) == pytest.approx(ends, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_precision_given_at_save_is_that_of_golden_rows_and_signature(transformer, tmp_path):
    model = build(transformer, "cls")
    options = {"model_config": {"calibration": CALIBRATION}, "params": {"precision": "int8"}}
    found = save(model, tmp_path / "model", **options)
    assert found.report.bit_identical
    parity = json.loads((tmp_path / "model" / "safeflavor" / "parity.json").read_text())
    assert all(
        isinstance(number, int) for answer in parity["answers"] for number in answer["embedding"]
    )
    signature = mlflow.models.Model.load(str(tmp_path / "model")).signature
    assert "Array(long)" in str(signature.outputs)
    for name, value in (("truncate_dim", 3), ("normalize_embeddings", True)):
        with pytest.raises(InputError, match=rf"'{name}' beside precision 'int8'"):
            found.predict(["a"], params={name: value})
        both = {name: value, "precision": "binary"}
        assert len(found.predict(["a"], params=both)["embedding"][0]) == (1 if value == 3 else 4)


@pytest.mark.filterwarnings("ignore")
def test_precisions_without_ranges_are_refused_by_name(transformer, tmp_path):
    found = save(build(transformer, "cls"), tmp_path / "model")
    for precision in ("int8", "uint8", "int4"):
        with pytest.raises(InputError, match=r"'precision'[\s\S]*saved with calibration texts"):
            found.predict(["a"], params={"precision": precision})
    assert embeddings(found, precision="ubinary").shape == (len(TEXTS), SIZE // 8)


@pytest.mark.filterwarnings("ignore")
def test_golden_rows_hold_the_tokens_of_prompts(transformer, tmp_path):
    found = save(build(transformer, "prompts"), tmp_path / "model")
    parity = json.loads((tmp_path / "model" / "safeflavor" / "parity.json").read_text())
    first, *_, query, document = [row["text"] for row in parity["rows"]]
    assert [query, document] == [text + first for text in PROMPTS["prompts"].values()]
    assert found.report.bit_identical


@pytest.mark.filterwarnings("ignore")
def test_the_similarity_is_told(transformer, tmp_path):
    save(build(transformer, "cut off"), tmp_path / "model", metadata={"a": 1})
    assert mlflow.models.Model.load(str(tmp_path / "model")).metadata == {
        "similarity": "dot",
        "a": 1,
    }
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "model")])
    assert re.search(r"similarity\W+dot", shown.output), shown.output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["before the pooling", "prompts that do not count, and dense"])
def test_the_whole_chain_is_one_graph(transformer, tmp_path, name):
    model = build(transformer, name)
    calibrated = {"calibration": CALIBRATION}
    module = save(model, tmp_path / "model", graph="require", model_config=calibrated)
    graph = mlflow_safeflavor.load_model(tmp_path / "model", model_config={"engine": "onnx"})
    assert graph.report.engine == "onnx"
    assert np.abs(embeddings(graph) - model.encode(TEXTS)).max() < 1e-6
    for precision in PRECISIONS[1:]:
        wanted = embeddings(module.answered_by(module.engine), precision=precision)
        require_quantised(embeddings(graph, precision=precision), wanted)


@pytest.mark.filterwarnings("ignore")
def test_nothing_of_sentence_transformers_is_needed_to_load(transformer, tmp_path, clean_process):
    save(build(transformer, "dense"), tmp_path / "model")
    code = """
import sys
sys.modules["sentence_transformers"] = None  # whoever imports it fails
import mlflow
print(len(mlflow.pyfunc.load_model(sys.argv[1]).predict({"text": ["a cat"]})["embedding"][0]))
"""
    assert clean_process(code, str(tmp_path / "model")).stdout.split()[-1] == "12"
    assert "sentence-transformers" not in (tmp_path / "model" / "requirements.txt").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_object_is_left_as_it_was(transformer, tmp_path):
    model = build(transformer, "two dense")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "model", dtype="bfloat16")
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )


# Cross-encoders.


def cross_encoder(tmp_path, tokenizer, labels, **options):
    tiny_model("Bert", "ForSequenceClassification", num_labels=labels).save_pretrained(
        tmp_path / "bare"
    )
    tokenizer.save_pretrained(tmp_path / "bare")
    return CrossEncoder(str(tmp_path / "bare"), device="cpu", **options)


def scores(loaded):
    rows = pd.DataFrame(PAIRS, columns=["text", "text_pair"])
    answers = loaded.predict(rows)
    if "labels" not in answers:
        return answers["score"].to_numpy()
    names = loaded.task.config["labels"]
    return np.array(
        [
            [dict(zip(a, b, strict=True))[n] for n in names]
            for a, b in answers[["labels", "scores"]].values
        ]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (1, {}),
        (1, {"activation_fn": torch.nn.Identity(), "max_length": 9}),
        (3, {}),
        (3, {"activation_fn": torch.nn.Sigmoid()}),
    ],
    ids=["one label", "logits of short texts", "three labels", "three labels by themselves"],
)
def test_scores_are_those_of_predict(tmp_path, tiny_tokenizer, labels, options):
    model = cross_encoder(tmp_path, tiny_tokenizer, labels, **options)
    wanted = model.predict(PAIRS)
    assert error(scores(save(model, tmp_path / "object")), wanted) < 1e-6
    model.save(str(tmp_path / "folder"))
    assert error(scores(save(tmp_path / "folder", tmp_path / "from folder")), wanted) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "said",
    [
        {
            "sentence_transformers": {
                "activation_fn": "torch.nn.modules.linear.Identity",
                "version": "4.0.0",
            }
        },
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
    ids=["version 4", "version 3"],
)
def test_scores_of_older_folders(tmp_path, tiny_tokenizer, said):
    cross_encoder(tmp_path, tiny_tokenizer, 1)
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, **said}))
    wanted = CrossEncoder(str(tmp_path / "bare"), device="cpu").predict(PAIRS)
    assert error(scores(save(tmp_path / "bare", tmp_path / "model")), wanted) < 1e-6
    assert np.ptp(wanted) > 1e-3


# Of both.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sentences", "inside", "pairs"])
def test_a_folder_of_another_dtype_is_kept_or_says_what_it_becomes(
    transformer, tmp_path, tiny_tokenizer, kind, caplog
):
    folder = tmp_path / "folder"
    if kind == "pairs":
        cross_encoder(tmp_path, tiny_tokenizer, 1).bfloat16().save(str(folder))
    else:
        build(transformer, "cls").bfloat16().save(str(folder))
    if kind == "inside":  # as old releases laid it out
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "0_Transformer").mkdir()
        for file in [
            file for file in folder.iterdir() if file.is_file() and file.name != "modules.json"
        ]:
            file.rename(folder / "0_Transformer" / file.name)
    spec = save(folder, tmp_path / "model").spec
    assert (spec.dtype, spec.cast_from) == ("float32", "bfloat16")
    assert caplog.text.count("the weights are bfloat16") == 1
    spec = save(folder, tmp_path / "kept", dtype="as-is").spec
    assert (spec.dtype, spec.cast_from) == ("bfloat16", "")


# What is not done.


class Own(SentenceTransformer):
    """Answers otherwise."""

    def encode(self, texts: Any, **options: Any) -> Any:  # type: ignore[override]  # shorter
        return super().encode(texts, **options) + 1


REFUSED = {
    "WordWeights": lambda make: [make(), Unknown(["a"], {"a": 1.0}), Pooling(SIZE)],
    "PReLU": lambda make: [
        make(),
        Pooling(SIZE),
        Dense(SIZE, 4, activation_function=torch.nn.PReLU()),
    ],
    "negative_slope=0.3": lambda make: [
        make(),
        Pooling(SIZE),
        Dense(SIZE, 4, activation_function=torch.nn.LeakyReLU(0.3)),
    ],
    "one Pooling": lambda make: [make(), Normalize()],
    "module_input_name": lambda make: [
        make(),
        Pooling(SIZE),
        Dense(SIZE, 4, module_output_name="other"),
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", REFUSED)
def test_unknown_modules_are_refused_by_name(transformer, tmp_path, named):
    model = SentenceTransformer(modules=REFUSED[named](transformer), device="cpu")
    with pytest.raises(StructureError, match=rf"{named}[\s\S]*hint[\s\S]*custom"):
        save(model, tmp_path / "model")
    if named in ("WordWeights", "one Pooling", "module_input_name"):
        model.save(str(tmp_path / "folder"))
        with pytest.raises(StructureError, match=named):
            save(tmp_path / "folder", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore")
def test_other_objects_of_the_package_are_refused_by_name(transformer, tmp_path, tiny_tokenizer):
    with pytest.raises(StructureError, match=r"Own[\s\S]*encode"):
        save(Own(modules=[transformer(), Pooling(SIZE)], device="cpu"), tmp_path / "model")
    tiny_model("Bert", "ForMaskedLM").save_pretrained(tmp_path / "mlm")
    tiny_tokenizer.save_pretrained(tmp_path / "mlm")
    with pytest.raises(StructureError, match="SparseEncoder"):
        save(SparseEncoder(str(tmp_path / "mlm"), device="cpu"), tmp_path / "model")
    with pytest.raises(StructureError, match="Tanh"):
        save(
            cross_encoder(tmp_path, tiny_tokenizer, 1, activation_fn=torch.nn.Tanh()),
            tmp_path / "model",
        )
    first = transformer()
    first.processing_kwargs = {"text": {"max_length": 4}}
    with pytest.raises(StructureError, match="processing_kwargs"):
        save(SentenceTransformer(modules=[first, Pooling(SIZE)], device="cpu"), tmp_path / "model")


def test_a_folder_that_merely_has_a_config_goes_on_as_before(tmp_path, tiny_tokenizer):
    tiny_model("Bert", "Model").save_pretrained(tmp_path / "bare")
    tiny_tokenizer.save_pretrained(tmp_path / "bare")
    found = save(
        tmp_path / "bare",
        tmp_path / "model",
        model_config={"pooling": ["cls", "max"], "normalize": True},
    )
    vectors = embeddings(found)
    assert vectors.shape == (len(TEXTS), 2 * SIZE)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pooling", "median"),
        ("pooling", []),
        ("prompts", {"a": 1}),
        ("similarity", "angle"),
        ("include_prompt", 1),
        ("calibration", ["a"]),
        ("calibration", "ab"),
    ],
)
def test_options_that_are_not_allowed(name, value):
    with pytest.raises(InputError, match=f"model_config, '{name}'"):
        FeatureExtraction.describe(tiny_model("Bert", "Model"), {name: value})
