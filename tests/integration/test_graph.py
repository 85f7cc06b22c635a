"""The graph in ONNX Runtime.

The module's answers, and the same bits for any company, padding and threads.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
import transformers
from artifacts import edit_mlmodel, reseal
from click.testing import CliRunner
from integration.test_audio import make_model as make_listener
from integration.test_audio import masked
from integration.test_images import make_model as make_viewer
from integration.test_images import make_processor
from packaging.utils import canonicalize_name
from torch import nn

import mlflow_safeflavor
from mlflow_safeflavor import cli, generate_dockerfile
from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import read_spec
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import InputError, PlacementError, StructureError
from mlflow_safeflavor.graph import export as exporting
from mlflow_safeflavor.graph.engine import GraphEngine
from mlflow_safeflavor.graph.file import reason_against
from mlflow_safeflavor.graph.onnx_engine import Session
from mlflow_safeflavor.load import engine_choice
from mlflow_safeflavor.module.engine import ModuleEngine
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.save import graph as recording

TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "",
    "red tree under green tree " * 9,
    "x = y + ( x - y )",
]
SHAPE = {
    "vocab_size": 35,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def bert(head, **config):
    torch.manual_seed(0)
    return getattr(transformers, f"Bert{head}")(
        transformers.BertConfig(**SHAPE, initializer_range=0.5, **config)
    )


def engine_of(served):
    return served._model_impl.model.engine


def both(path, **options):
    """The same artifact, served as a graph and as a module."""
    served = [
        mlflow.pyfunc.load_model(str(path), model_config={"engine": name})
        for name in ("auto", "module")
    ]
    assert [engine_of(model).name for model in served] == ["onnx", "module"]
    return served


def near(one, other):
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


def same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


# Every task that is a forward.

TASKS: dict[str, tuple[Any, ...]] = {
    "text-classification": ("ForSequenceClassification", pd.DataFrame({"text": TEXTS}), {}),
    "text pairs": (
        "ForSequenceClassification",
        pd.DataFrame({"a": TEXTS, "b": TEXTS[::-1]}),
        {"input_columns": {"text": "a", "text_pair": "b"}},
    ),
    "feature-extraction": ("Model", pd.DataFrame({"text": TEXTS}), {}),
    "token-classification": ("ForTokenClassification", pd.DataFrame({"text": TEXTS}), {}),
    "question-answering": (
        "ForQuestionAnswering",
        pd.DataFrame({"question": ["the cat", "a dog ran"], "context": [TEXTS[0], TEXTS[3]]}),
        {},
    ),
    "fill-mask": ("ForMaskedLM", pd.DataFrame({"text": ["the [MASK] sat", "a [MASK]"]}), {}),
    "zero-shot-classification": (
        "ForSequenceClassification",
        pd.DataFrame({"text": TEXTS[:2]}),
        {
            "task": "zero-shot-classification",
            "params": {"candidate_labels": ["cat", "red tree"]},
            "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
        },
    ),
    "text-ranking": (
        "ForSequenceClassification",
        pd.DataFrame({"a": TEXTS, "b": TEXTS[::-1]}),
        {
            "task": "text-ranking",
            "input_columns": {"query": "a", "passage": "b"},
            "model_config": {"label": "LABEL_1"},
        },
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_of_text(name, tiny_tokenizer, tmp_path):
    head, rows, options = TASKS[name]
    options = dict(options)
    labels = {"id2label": options.pop("id2label")} if "id2label" in options else {}
    model = bert(head, **labels)
    if labels:
        model.config.label2id = {label: i for i, label in labels["id2label"].items()}
    mlflow_safeflavor.save_model(
        model, tmp_path / "m", tokenizer=tiny_tokenizer, graph="require", rehearse=False, **options
    )
    graph, module = both(tmp_path / "m")
    together = graph.predict(rows)
    near(together, module.predict(rows))
    # One at a time the bits are the same; so they are natively.
    for i in range(len(rows)):
        same(
            graph.predict(rows[i : i + 1]).reset_index(drop=True),
            together[i : i + 1].reset_index(drop=True),
        )
    same(mlflow_safeflavor.load_model(tmp_path / "m").predict(rows), together)
    assert engine_of(graph)._rebuilt is None  # all of it was answered by the graph


def test_images(tmp_path):
    mlflow_safeflavor.save_model(
        make_viewer(), tmp_path / "m", processor=make_processor(size={"height": 32, "width": 32}),
        graph="require",
        rehearse=False,
    )  # fmt: skip
    graph, module = both(tmp_path / "m")
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (40 + i, 50, 3), np.uint8) for i in range(3)]
    model, other = graph._model_impl.model, module._model_impl.model
    near(model.predict(images, {"top_k": -1}), other.predict(images, {"top_k": -1}))
    assert engine_of(graph)._rebuilt is None


def test_sounds(tmp_path):
    mlflow_safeflavor.save_model(
        make_listener(), tmp_path / "m", processor=masked, graph="require", rehearse=False
    )
    graph, module = both(tmp_path / "m")
    draw = np.random.default_rng(0)
    sounds = [draw.normal(size=size).astype(np.float32) for size in (1600, 2400, 4000)]
    model, other = graph._model_impl.model, module._model_impl.model
    near(model.predict(sounds), other.predict(sounds))
    assert engine_of(graph)._rebuilt is None


def test_what_writes_stays_with_the_module(tiny_tokenizer, tmp_path):
    config = transformers.GPT2Config(
        vocab_size=35, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    mlflow_safeflavor.save_model(model, tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False)
    assert "token by token" in str(reason_against(Layout(tmp_path / "m")))
    assert engine_of(mlflow.pyfunc.load_model(str(tmp_path / "m"))).name == "module"
    with pytest.raises(StructureError, match="cannot be stored as a graph"):
        mlflow_safeflavor.save_model(
            model, tmp_path / "n", tokenizer=tiny_tokenizer, graph="require", rehearse=False
        )
    assert not (tmp_path / "n").exists()


# Modules of the user's own.


def make_private(width=4):
    """A class that nothing could import."""

    class Private(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(
                nn.Linear(width, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
            )
            self.shift = torch.arange(3.0)  # neither parameter nor buffer

        def forward(self, x, scale=None):
            y = self.inner(x) + self.shift
            return {"y": y if scale is None else y * scale}

    torch.manual_seed(0)
    return Private()


X = {"x": np.array([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0]], dtype=np.float32)}


def test_a_graph_alone_needs_no_trust_and_no_class(tmp_path, clean_process):
    model = make_private()
    with torch.inference_mode():
        wanted = model.eval()(torch.tensor(X["x"]))["y"].numpy()
    mlflow_safeflavor.save_model(model, tmp_path / "m", task="raw", input_example=X, graph="only")
    layout = Layout(tmp_path / "m")
    spec, _ = read_spec(layout)
    assert (spec.structure, spec.runs) == ("graph", ())
    assert not layout.structure_pickle.exists()
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "m"))
    with pytest.raises(StructureError, match="graph of one forward"):
        loaded.module  # noqa: B018
    np.testing.assert_allclose(loaded.predict(X)["y"], wanted, rtol=1e-6)
    wanted = loaded.predict(X)["y"]
    printed = clean_process(
        "import sys, json, mlflow.pyfunc, numpy as np\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "y = model.predict({'x': np.array(json.loads(sys.argv[2]), dtype=np.float32)})['y']\n"
        "there = [name for name in ('transformers', 'torch._dynamo') if name in sys.modules]\n"
        "print('FOUND', json.dumps([y.tolist(), there]))",
        str(tmp_path / "m"),
        json.dumps(X["x"].tolist()),
        env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
    ).stdout
    found, there = json.loads(printed.split("FOUND")[1])
    assert (np.array(found, dtype=np.float32) == wanted).all()
    assert there == []


def test_classifier_without_torch(tiny_tokenizer, tmp_path, clean_process):
    """Serving imports neither torch nor transformers, and nothing that a graph is made with."""
    mlflow_safeflavor.save_model(
        bert("ForSequenceClassification"), tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False
    )
    wanted = mlflow_safeflavor.load_model(str(tmp_path / "m")).predict(TEXTS)
    printed = clean_process(
        "import sys, json\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnxscript'):\n"
        "    sys.modules[name] = None  # as where it is not installed\n"
        "import mlflow.pyfunc, pandas as pd\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "rows = model.predict(pd.DataFrame({'text': json.loads(sys.argv[2])}))\n"
        "print('FOUND', json.dumps(rows.to_dict('list')))",
        str(tmp_path / "m"),
        json.dumps(TEXTS),
        env={"OMP_NUM_THREADS": "1"},
    ).stdout
    assert json.loads(printed.split("FOUND")[1]) == wanted.to_dict("list")


def test_verify_asks_the_engine_that_is_wanted(tiny_tokenizer, tmp_path, monkeypatch):
    mlflow_safeflavor.save_model(
        bert("Model"), tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False
    )
    asked = []
    for engine in (GraphEngine, ModuleEngine):
        call = engine.__call__
        monkeypatch.setattr(
            engine,
            "__call__",
            lambda self, *a, call=call, **k: asked.append(self.name) or call(self, *a, **k),
        )
    for options, name in (
        ([], "onnx"),
        (["--engine", "onnx"], "onnx"),
        (["--engine", "module"], "module"),
    ):
        asked.clear()
        done = CliRunner().invoke(cli.main, ["verify", str(tmp_path / "m"), *options])
        assert done.exit_code == 0, done.output
        assert set(asked) == {name}


def test_serving_needs_nothing_but_the_pins(tiny_tokenizer, tmp_path, clean_process):
    """As in the lean image: what no pin brings along cannot be imported."""
    mlflow_safeflavor.save_model(
        bert("Model"), tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False
    )
    pins = (
        Environment.from_json(read_json(Layout(tmp_path / "m").environment))
        .for_graph()
        .distributions
    )
    owners = importlib.metadata.packages_distributions()
    others = [
        name
        for name, there in owners.items()
        if not pins.keys() & set(map(canonicalize_name, there))
    ]
    assert {"torch", "transformers"} <= {*others}
    clean_process(
        "import sys, json\n"
        "sys.modules.update(dict.fromkeys(json.loads(sys.argv[2])))\n"
        "import mlflow.pyfunc, pandas as pd\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1], model_config={'engine': 'onnx'})\n"
        "assert len(model.predict(pd.DataFrame({'text': ['a cat', 'a dog']}))) == 2\n",
        str(tmp_path / "m"),
        json.dumps(
            [
                name
                for name in others
                if name not in ("mlflow_safeflavor", "pkg_resources", "setuptools")
            ]
        ),
    )


def test_an_image_has_the_pins_of_what_it_serves_with(tiny_tokenizer, tmp_path):
    path = tmp_path / "m"
    mlflow_safeflavor.save_model(
        bert("Model"), path, tokenizer=tiny_tokenizer, torch_index=None, rehearse=False
    )

    def image(engine="auto", **options):
        folder = tmp_path / f"image-{len(list(tmp_path.iterdir()))}"
        file = generate_dockerfile(str(path), folder, engine=engine, hashes=False, **options)
        pins = (folder / "environment" / "requirements.txt").read_text().splitlines()
        return {line.split("==")[0] for line in pins}, "SAFEFLAVOR_ENGINE=onnx" in file.read_text()

    lean, full = image("onnx"), image("module")
    assert image() == lean
    assert "mlflow-skinny" in lean[0]
    assert {"torch", "transformers", "mlflow", "scipy", "pyarrow"} <= full[0] - lean[0]
    assert (lean[1], full[1]) == (True, False)
    assert image(target="cuda") == full
    with pytest.raises(InputError, match="served on a CPU"):
        image("onnx", target="cuda")
    assert image("onnx", target="cpu") == lean
    assert image("module", target="cuda") == full

    def chooses(content):
        content["flavors"]["safeflavor"]["model_config"]["engine"] = "module"

    edit_mlmodel(path, chooses)
    reseal(path)
    assert image() == full


def test_hooks(tmp_path):
    mlflow_safeflavor.save_model(
        make_private(),
        tmp_path / "m",
        task="custom",
        preprocess=lambda rows, tokenizer: {
            "x": torch.tensor([[row["a"], row["b"], 0.0, 1.0] for row in rows])
        },
        postprocess=lambda outputs, rows: [{"best": int(y.argmax())} for y in outputs["y"]],
        input_example=[{"a": 1.0, "b": 2.0}, {"a": -3.0, "b": 0.5}],
        graph="only",
        allow_pickle=True,  # for the hooks
        rehearse=False,
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "m"), trust={"pickle"})
    assert loaded.report.engine == "onnx"
    assert len(loaded.predict([{"a": float(i), "b": 0.0} for i in range(5)])) == 5


def test_what_the_graph_does_not_take_goes_to_the_module(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    mlflow_safeflavor.save_model(
        make_private(),
        tmp_path / "m",
        task="raw",
        input_example=X,
        allow_pickle=True,
        rehearse=False,
    )
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"))._model_impl.model
    assert served.engine.name == "onnx"
    plain = served.predict(X)["y"]
    assert served.engine._rebuilt is None
    doubled = served.predict({**X, "scale": np.float32(2)})["y"]
    np.testing.assert_allclose(doubled, plain * 2, rtol=1e-5)
    assert served.engine._rebuilt is not None
    with torch.device("meta"):  # the caller's own, which no engine looks at
        np.testing.assert_array_equal(served.predict({**X, "scale": np.float32(2)})["y"], doubled)


def test_a_graph_alone_says_what_it_takes(tmp_path):
    mlflow_safeflavor.save_model(
        make_private(), tmp_path / "m", task="raw", input_example=X, graph="only", rehearse=False
    )
    loaded = mlflow_safeflavor.load_model(str(tmp_path / "m"))
    with pytest.raises(StructureError, match=r"wanted.*float32\[rows, 4\]"):
        loaded.predict({**X, "scale": np.float32(2)})
    with pytest.raises(StructureError, match="does not take this input"):
        loaded.predict({"x": np.zeros((2, 5), np.float32)})
    assert loaded.predict({"x": np.zeros((7, 4), np.float32)})["y"].shape == (7, 3)
    with pytest.raises(InputError, match="served on a CPU"):
        generate_dockerfile(str(tmp_path / "m"), tmp_path / "image", target="cuda", hashes=False)
    assert generate_dockerfile(
        str(tmp_path / "m"), tmp_path / "image", target="cpu", hashes=False
    ).exists()
    for refused in (
        {"dtype": "bfloat16"},
        {"model_config": {"compile": True}},
        {"model_config": {"engine": "module"}},
    ):
        with pytest.raises(PlacementError):
            mlflow_safeflavor.load_model(str(tmp_path / "m"), **refused)


def test_beside_a_device_that_nobody_chose_a_graph_stays_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    given: dict[str, Any] = {"task": "raw", "input_example": X, "rehearse": False}
    mlflow_safeflavor.save_model(make_private(), tmp_path / "m", allow_pickle=True, **given)
    mlflow_safeflavor.save_model(make_private(), tmp_path / "alone", graph="only", **given)
    monkeypatch.setattr(engine_choice, "is_plainly_cpu", lambda asked: asked == "cpu")
    monkeypatch.setattr(engine_choice, "_device", lambda asked: "cuda:0")
    asked = mlflow.pyfunc.load_model(str(tmp_path / "m"), model_config={"engine": "onnx"})
    alone = mlflow.pyfunc.load_model(str(tmp_path / "alone"))
    for served in (asked, alone):
        assert engine_of(served).name == "onnx"
    assert engine_of(asked).fallback().device.type == "cpu"
    with pytest.raises(PlacementError, match="cuda:0"):
        mlflow.pyfunc.load_model(
            str(tmp_path / "m"), model_config={"engine": "onnx", "device": "cuda:0"}
        )


def test_half_precision_stays_with_the_module(tiny_tokenizer, tmp_path):
    given = {"tokenizer": tiny_tokenizer, "dtype": "bfloat16", "rehearse": False}
    mlflow_safeflavor.save_model(bert("ForSequenceClassification"), tmp_path / "m", **given)
    assert "served in float32" in str(reason_against(Layout(tmp_path / "m")))
    with pytest.raises(StructureError, match="served in float32"):
        mlflow_safeflavor.save_model(
            bert("ForSequenceClassification"), tmp_path / "n", graph="only", **given
        )


# Recording and its proof.


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.linear(x) if x.sum() > 0 else x}


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return {"y": x + self.calls}


class Shouts(nn.Module):
    """Another answer for one shape, which the tracer does not see."""

    def forward(self, x):
        return {"y": x * (2 if int(x.shape[0]) == 7 else 1)}


class Random(nn.Module):
    def forward(self, x):
        return {"y": x + torch.rand_like(x)}


class Parts(nn.Module):
    """Cuts something three times as long as its input."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        a, b, c = self.cut(torch.cat((x, x * 5, x * 7)), x.shape[0])
        return {"y": a * b[: x.shape[0]] + c.sum(0)}


class Turns(nn.Module):
    """Turns pairs of numbers by their place, which is the same in all rows."""

    def forward(self, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        places = torch.arange(x.shape[1])[None, :, None] * torch.tensor([1.0, 0.1])
        angles = torch.cat((places, places), -1)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        half = torch.cat((-heads[..., 2:], heads[..., :2]), -1)
        return {"y": heads * cos + half * sin}


class Attends(nn.Module):
    """With one mask for all places, of the lowest number, as older models make it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids).unflatten(-1, (2, 4)).transpose(1, 2)
        mask = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        return {"y": nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)}


class Patches(nn.Module):
    """Works on patches of an image, and puts it together again."""

    def forward(self, x):
        parts = nn.functional.unfold(x, (2, 3), stride=(2, 3))
        return {
            "y": nn.functional.fold(parts * parts[..., :1], x.shape[-2:], (2, 3), stride=(2, 3))
        }


class Windows(nn.Module):
    """Pads to whole windows, of another size each time."""

    def __init__(self, *sizes):
        super().__init__()
        self.size = sizes[0]
        self.next = Windows(*sizes[1:]) if sizes[1:] else nn.Identity()

    def forward(self, x):
        return self.next(
            nn.functional.pad(x, (0, (self.size - x.shape[1] % self.size) % self.size))
        )


class Measures(nn.Module):
    """Asks how many rows there are as Python does."""

    def forward(self, x):
        return {"y": x.flatten().reshape(len(x), 1, -1), "parts": x.sum() / len([x, x])}


class Twice(nn.Module):
    """Gives its input, a weight, and one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        y = x * 2
        return {"x": x, "weight": self.weight, "y": y, "again": y}


class Calls(nn.Module):
    """Calls its parameters what the exporter calls results."""

    def __init__(self):
        super().__init__()
        self.add = nn.Parameter(torch.arange(4.0))
        self.linear = nn.Parameter(torch.arange(16.0).reshape(4, 4))
        self.val_0 = nn.Parameter(torch.ones(4) * 3)

    def forward(self, x):
        y = nn.functional.linear(x + self.add, self.linear) * self.val_0
        return {"y": y, "z": y[:, 1:3]}


def record(module, *examples, limit=None):
    module = module.eval().requires_grad_(False)
    rows = [x if isinstance(x, dict) else {"x": x} for x in examples]
    return recording.record(module, find_slots(module), {}, rows, limit=limit)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Decides, "torch.export"), (Counts, "changes"), (Random, "no operator that a graph may hold")],
)
def test_forwards_without_a_graph(cls, reason):
    with pytest.raises(recording.Refusal, match=reason):
        record(cls(), torch.ones(3, 4))


@pytest.mark.parametrize("cut", [
    lambda x, rows: x.chunk(3),
    lambda x, rows: x.split(rows),
    lambda x, rows: x.split((rows, rows + 1, rows - 1)),
    lambda x, rows: x.unflatten(0, (3, rows)).unbind(),
    lambda x, rows: x.tensor_split(3),
])  # fmt: skip
def test_parts_of_a_free_size(cut):
    graph, _ = record(Parts(cut), torch.randn(3, 4), torch.randn(5, 4))
    assert [known.shape[0] for known in graph.inputs] == ["rows"]


def test_the_length_of_a_tensor_stays_free():
    graph, facts = record(Measures(), torch.randn(3, 4), torch.randn(2, 4))
    assert [known.shape for known in graph.inputs] == [("rows", "x_1")]
    assert facts["onnx"].sizes["rows"] >= {1, 2, 7, 32}
    assert "len" not in globals()


def test_a_len_of_somebodys_own_is_left_alone(monkeypatch):
    own = Measures.forward.__globals__
    monkeypatch.setitem(own, "len", lambda of: 3)
    with pytest.raises(recording.Refusal, match="the graph fails"):
        record(Measures(), torch.randn(3, 4), torch.randn(3, 2))
    assert own["len"]([]) == 3


def test_angles_that_are_the_same_in_all_rows():
    graph, facts = record(Turns(), torch.randn(3, 5, 8), torch.randn(2, 4, 8))
    operators = {operator for operator, *_ in graph.nodes}
    assert operators & {"RotaryEmbedding", "Neg"} == {"RotaryEmbedding"}
    assert facts["onnx"].sizes["rows"] >= {1, 2, 7, 32}


def test_masks_that_are_the_same_for_all_queries():
    """And rows of nothing but padding, over which torch takes the mean."""
    ids = torch.arange(18).reshape(3, 6) % 9
    given = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in (ids, ids[:, :4])]
    graph, facts = record(Attends(), *given)
    assert "Attention" in {operator for operator, *_ in graph.nodes}
    assert facts["onnx"].sizes["rows"] >= {1, 2, 7, 32}


def test_patches_side_by_side():
    graph, facts = record(Patches(), torch.randn(3, 2, 8, 10), torch.randn(2, 2, 6, 6))
    assert [known.shape[0] for known in graph.inputs] == ["rows"]
    assert facts["onnx"].inputs > 20


@pytest.mark.parametrize(("count", "width"), [(2, "x_1"), (7, 12)])
def test_free_sizes_that_become_too_involved_are_fixed(count, width):
    module = Windows(*(7, 5, 9, 4, 11, 6, 8)[:count])
    graph, _ = record(module, torch.randn(3, 12), torch.randn(2, 12))
    assert [known.shape for known in graph.inputs] == [("rows", width)]


def test_outputs_that_are_something_else_already():
    graph, _ = record(Twice(), torch.rand(3, 4), torch.rand(2, 4))
    found = Session(graph, {}, threads=1)({"x": np.ones((2, 4), np.float32)})
    assert {name: array.tolist() for name, array in found.items()} == {
        "x": [[1.0] * 4] * 2, "weight": [0.0, 1.0, 2.0, 3.0], "y": [[2.0] * 4] * 2,
        "again": [[2.0] * 4] * 2
    }  # fmt: skip


def test_parameters_that_are_called_as_results_are(tmp_path):
    example, module = {"x": np.ones((2, 4), np.float32)}, Calls()
    mlflow_safeflavor.save_model(
        module, tmp_path / "m", task="raw", input_example=example, graph="only", rehearse=False
    )
    loaded = mlflow_safeflavor.load_model(tmp_path / "m")
    assert isinstance(loaded.engine, GraphEngine)
    assert loaded.engine.session.graph.weights.keys() == {"add", "linear", "val_0"}
    with torch.inference_mode():
        wanted = module(torch.from_numpy(example["x"]))
    assert np.array_equal(loaded.predict(example)["y"], wanted["y"])


def read_by(head, tokenizer):
    """Nodes of a tiny BERT, and those behind its last attention."""
    encoded = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    shorter = {name: ids[:, :5] for name, ids in encoded.items()}
    graph, facts = record(bert(head), dict(encoded), shorter)
    assert facts["onnx"].batch
    assert facts["onnx"].padding
    operators = [operator for operator, *_ in graph.nodes]
    last = len(operators) - operators[::-1].index("Attention")
    return graph.nodes, operators[last:]


def test_heads_are_neither_turned_nor_copied(tiny_tokenizer):
    nodes, _ = read_by("ForTokenClassification", tiny_tokenizer)
    turned = [taken for operator, taken, _ in nodes if operator in ("Transpose", "Reshape")]
    assert all(name.endswith(".weight") for (name, *_) in turned)


def test_behind_attention_a_classifier_of_texts_computes_one_token(tiny_tokenizer):
    _, behind = read_by("ForSequenceClassification", tiny_tokenizer)
    # Of what attention gives and of what is added to it, before any product; and where it was.
    assert behind.count("Gather") == 2
    assert behind.index("Gather") < behind.index("MatMul")
    for head in ("Model", "ForTokenClassification"):
        _, behind = read_by(head, tiny_tokenizer)
        assert behind.count("Gather") == (head == "Model")
        assert "Gather" not in behind[: behind.index("MatMul")]


def test_other_answers_are_found(monkeypatch):
    """The proof, not the exporter, is what decides."""
    export = exporting.export
    wrapped = Scaled(make_private())
    monkeypatch.setattr(recording, "export", lambda module, *rest: export(wrapped.inner, *rest))
    with pytest.raises(recording.Refusal, match="differs by"):
        record(wrapped, torch.rand(3, 4))


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner.eval().requires_grad_(False)

    def forward(self, x):
        return {"y": self.inner(x)["y"] * (1 + 2**-8)}


def test_a_shape_that_the_module_treats_apart():
    with pytest.raises(recording.Refusal):
        record(Shouts(), torch.ones(3, 4), torch.ones(2, 4))


def test_the_same_model_is_the_same_file(tiny_tokenizer, tmp_path):
    for name in "ab":
        mlflow_safeflavor.save_model(
            bert("Model"),
            tmp_path / name,
            tokenizer=tiny_tokenizer,
            graph="require",
            rehearse=False,
        )
    one, other = (Layout(tmp_path / name).graph.read_bytes() for name in "ab")
    assert one == other
    assert str(tmp_path).encode() not in one
    assert len(one) < 20_000


def test_any_reader_of_the_standard_opens_it(tiny_tokenizer, tmp_path):
    """Without any of our code.

    ONNX Runtime finds the weights beside the file, and onnx calls it valid.
    """
    mlflow_safeflavor.save_model(
        bert("ForSequenceClassification"),
        tmp_path / "m",
        tokenizer=tiny_tokenizer,
        graph="require",
        rehearse=False,
    )
    file = Layout(tmp_path / "m").graph
    encoded = {name: np.array([ids]) for name, ids in tiny_tokenizer(TEXTS[0]).items()}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(
        ["output.logits"], {f"input.{name}": array for name, array in encoded.items()}
    )
    score = np.exp(logits[0]).max() / np.exp(logits[0]).sum()
    assert mlflow_safeflavor.load_model(tmp_path / "m").predict(TEXTS[0])["score"][
        0
    ] == pytest.approx(score, rel=1e-5)
    onnx.checker.check_model(file)
    stored = onnx.load(file, load_external_data=False).graph.initializer
    outside = {tensor.name for tensor in stored if tensor.external_data}
    model = bert("ForSequenceClassification")
    assert outside <= {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} <= outside
    assert sum(len(tensor.raw_data) for tensor in stored) < 2_000


def test_negative_rows_of_a_table_are_refused(tmp_path):
    """The standard counts them from the end, torch refuses them."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids):
            return {"y": self.table(ids).sum(1)}

    example = {"ids": np.array([[1, 2, 3], [4, 5, 6]])}
    mlflow_safeflavor.save_model(
        Looks(), tmp_path / "m", task="raw", input_example=example, graph="only", rehearse=False
    )
    loaded = mlflow_safeflavor.load_model(tmp_path / "m")
    assert loaded.predict({"ids": np.array([[9, 0]])})["y"].shape == (1, 4)
    for wrong in (-1, 10):
        with pytest.raises(mlflow_safeflavor.errors.InputError, match=str(wrong)):
            loaded.predict({"ids": np.array([[1, wrong]])})


def test_many_threads(tiny_tokenizer, tmp_path):
    mlflow_safeflavor.save_model(
        bert("ForSequenceClassification"),
        tmp_path / "m",
        tokenizer=tiny_tokenizer,
        rehearse=False,
        graph="only",
    )
    engine = mlflow_safeflavor.load_model(str(tmp_path / "m")).engine
    batches = [
        dict(tiny_tokenizer([text, "a"], padding=True, truncation=True, return_tensors="np"))
        for text in TEXTS
    ]
    wanted = [engine(batch)["logits"] for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(lambda i: engine(batches[i % 5])["logits"], range(400))):
            assert np.array_equal(found, wanted[i % 5])


# Seen from outside.


def test_inspect_shows_it(tiny_tokenizer, tmp_path):
    mlflow_safeflavor.save_model(
        bert("Model"), tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False
    )
    shown = (
        CliRunner()
        .invoke(cli.main, ["inspect", str(tmp_path / "m"), "--graph"], catch_exceptions=False)
        .output
    )
    words = " ".join(shown.replace("│", " ").split())
    assert "same bits for any number of threads, any batch, any padding; within" in words
    assert "input input_ids: int64[rows, length]" in shown
    assert "weight embeddings.word_embeddings.weight: float32[35, 32]" in shown
    assert "output.last_hidden_state = LayerNormalization(" in shown


def test_a_damaged_graph_is_refused(tiny_tokenizer, tmp_path):
    mlflow_safeflavor.save_model(
        bert("Model"), tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False
    )
    file = Layout(tmp_path / "m").graph
    file.write_bytes(file.read_bytes().replace(b"Gelu", b"Relu"))
    with pytest.raises(mlflow_safeflavor.errors.IntegrityError, match=r"graph\.onnx"):
        mlflow.pyfunc.load_model(str(tmp_path / "m"))


def test_unknown_word(tmp_path):
    with pytest.raises(mlflow_safeflavor.errors.InputError, match=r"auto \| require \| only \| no"):
        mlflow_safeflavor.save_model(
            make_private(), tmp_path / "m", task="raw", input_example=X, graph="jit"
        )
    assert not Path(tmp_path / "m").exists()


def test_pickled_hooks_need_no_class_of_the_module(tmp_path, monkeypatch):
    """As where transformers changes between two releases.

    The graph answers, and the hooks come without the module.
    """
    (tmp_path / "gone.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self, size):\n        "
        "super().__init__()\n"
        "        self.layer = torch.nn.Linear(size, 3)\n\n    def forward(self, x):\n        "
        "return self.layer(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("gone").Net(4).eval()
    mlflow_safeflavor.save_model(
        model,
        tmp_path / "m",
        task="custom",
        allow_pickle=True,
        preprocess=lambda rows, tokenizer: {
            "x": torch.tensor([[row["a"], 1.0, 0.0, 1.0] for row in rows])
        },
        postprocess=lambda outputs, rows: [{"score": float(y.sum())} for y in outputs["output_0"]],
        input_example=[{"a": 1.0}, {"a": -3.0}],
        rehearse=False,
        graph="require",
    )
    rows = [{"a": 2.0}, {"a": 0.5}]
    expected = mlflow_safeflavor.load_model(str(tmp_path / "m"), trust={"pickle"}).predict(rows)
    monkeypatch.delitem(sys.modules, "gone")
    (tmp_path / "gone.py").unlink()
    with pytest.raises(StructureError, match="cannot be unpickled"):
        mlflow_safeflavor.load_model(
            str(tmp_path / "m"), trust={"pickle"}, model_config={"engine": "module"}
        )
    graph = mlflow_safeflavor.load_model(str(tmp_path / "m"), trust={"pickle"})
    assert graph.predict(rows)["score"].tolist() == pytest.approx(
        expected["score"].tolist(), rel=1e-5
    )


@pytest.mark.slow
def test_another_dtype_among_the_options_is_the_modules(tmp_path):
    """The graph is rehearsed all the same, in its own."""
    torch.manual_seed(0)
    example, options = X["x"], {"dtype": "bfloat16"}
    mlflow_safeflavor.save_model(
        nn.Sequential(nn.Linear(4, 3)),
        tmp_path / "m",
        task="raw",
        input_example=example,
        model_config=options,
    )
    assert engine_of(mlflow.pyfunc.load_model(str(tmp_path / "m"))).name == "module"
    own = {"dtype": "", "engine": "onnx"}
    assert engine_of(mlflow.pyfunc.load_model(str(tmp_path / "m"), model_config=own)).name == "onnx"
