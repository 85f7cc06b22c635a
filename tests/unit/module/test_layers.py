"""Modules of torch.nn the usual way.

A tree of classes and plain arguments, which anybody may build.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from functools import partial
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import mlflow_safeflavor
from mlflow_safeflavor.errors import SafeFlavorError, StructureError
from mlflow_safeflavor.module import build as building
from mlflow_safeflavor.module.attributes import find_differences
from mlflow_safeflavor.module.bounds import within
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.inventory import take_inventory
from mlflow_safeflavor.module.layers import describe_layers, is_tree, make_layers
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.module.subject import Subject

BLOCK: dict[str, Any] = {"d_model": 4, "nhead": 2, "dim_feedforward": 8}
shared, relu = nn.Linear(4, 4), nn.ReLU()


def modules():
    """Those whose arguments are not all noted under their own names, and one of each family."""
    return [
        nn.Linear(4, 3, bias=False),
        nn.Bilinear(4, 5, 2),
        nn.Conv2d(
            4, 8, (3, 1), 2, "valid", dilation=2, groups=2, bias=False, padding_mode="circular"
        ),
        nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1),
        nn.BatchNorm1d(4, eps=1e-3, affine=False),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.LayerNorm((4, 3), eps=1e-3, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.Embedding(7, 4, padding_idx=2, max_norm=1.5),
        nn.EmbeddingBag(7, 4, mode="max"),
        nn.LSTM(
            4, 3, 2, bias=False, batch_first=True, dropout=0.2, bidirectional=True, proj_size=2
        ),
        nn.GRU(4, 3, 1, False),
        nn.RNN(4, 3, nonlinearity="relu"),
        nn.LSTMCell(4, 3, bias=False),
        nn.MultiheadAttention(
            4, 2, dropout=0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=5, vdim=6
        ),
        nn.TransformerEncoderLayer(
            **BLOCK, dropout=0.3, activation="gelu", layer_norm_eps=1e-3, batch_first=True
        ),
        nn.TransformerDecoderLayer(**BLOCK, norm_first=True, bias=False),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**BLOCK), 2, nn.LayerNorm(4), mask_check=False
        ),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**BLOCK, batch_first=True), 1, enable_nested_tensor=False
        ),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(**BLOCK), 2),
        nn.TransformerDecoderLayer(**BLOCK, activation=nn.SiLU()),
        nn.Transformer(4, 2, 1, 2, 8, activation="gelu", batch_first=True),
        nn.AdaptiveLogSoftmaxWithLoss(4, 20, [5, 10], div_value=2.0, head_bias=True),
        nn.PairwiseDistance(1.0, keepdim=True),
        nn.Unflatten(1, (2, 2)),
        nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear", align_corners=True),
        nn.AdaptiveAvgPool2d((None, 3)),
        nn.Hardtanh(-2.0, 3.0),
        nn.Sequential(),
        nn.Sequential(
            shared,
            relu,
            nn.Sequential(shared, relu),
            nn.ModuleDict({"b": relu, "a": nn.ModuleList([shared])}),
        ),
        nn.Sequential(
            OrderedDict(short_path=nn.Linear(4, 4), backbone=nn.Sequential(shared, nn.GELU("tanh")))
        ),
    ]


with warnings.catch_warnings():  # torch's own words about its fast path
    warnings.simplefilter("ignore")
    MODULES = modules()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_tree_makes_the_same_module(module):
    tree = json.loads(json.dumps(describe_layers(module), sort_keys=True))
    assert is_tree(tree)
    made = make_layers(tree).train(module.training)
    assert repr(made) == repr(module)
    assert [
        str(difference)
        for difference in find_differences(Subject.of(module), Subject.of(made))
        if not difference.tensor
    ] == []
    slots = [
        [(slot.path, slot.kind, slot.tensor.shape) for slot in find_slots(each)]
        for each in (module, made)
    ]
    assert slots[0] == slots[1]


class Own(nn.Sequential):
    pass


@pytest.mark.parametrize("module", [
    nn.Module(), Own(nn.Linear(2, 2)), nn.Sequential(Own()), nn.LazyLinear(3),
    nn.CrossEntropyLoss(torch.ones(3)),
    nn.TransformerEncoderLayer(**BLOCK, activation=functional.silu),
    nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_what_is_no_tree(module):
    assert describe_layers(module) is None


LEAF = {"class": "Linear", "arguments": {"in_features": 2, "out_features": 2}, "modules": []}


@pytest.mark.parametrize("tree", [
    {**LEAF, "class": "DataParallel"}, {**LEAF, "class": "Module"}, {**LEAF, "class": "init"},
    {**LEAF, "class": None},
    {**LEAF, "class": "modules.linear.Linear"}, {**LEAF, "more": 1}, {"same": 1},
    {"class": "Linear"}, [],
    {**LEAF, "arguments": {"device": "meta"}}, {**LEAF, "arguments": {"self": 1}},
    {**LEAF, "arguments": []},
    {**LEAF, "arguments": {"in_features": {"a": 1}}}, {**LEAF, "modules": {"in_features": LEAF}},
    {**LEAF, "class": "Embedding", "arguments": {"_weight": [[1.0]]}},
    {**LEAF, "modules": [["bias", "text"]]},
    {"class": "Sequential", "arguments": {"0": 1}, "modules": []},
    {"class": "Sequential", "arguments": {}, "modules": [["0", {**LEAF, "class": "os"}]]},
    {"class": "Sequential", "arguments": {}, "modules": [["0", LEAF, 1]]},
], ids=str)  # fmt: skip
def test_a_tree_of_anything_else_is_malformed(tree):
    assert not is_tree(tree)


@pytest.mark.parametrize("tree", [
    {"class": "Linear", "arguments": {"in_features": 60_000, "out_features": 60_000},
        "modules": []},
    {"class": "LSTM", "arguments": {"input_size": 2, "hidden_size": 9, "num_layers": 1_000_000},
        "modules": []},
    {"class": "Sequential", "arguments": {}, "modules": [[str(i), LEAF] for i in range(2000)]},
    {"class": "Sequential", "arguments": {}, "modules": [["0", {"same": "1"}]]},
    {"class": "TransformerEncoder", "arguments": {"num_layers": 1_000_000},
        "modules": [["encoder_layer", LEAF]]},
    {"class": "MultiheadAttention", "arguments": {"embed_dim": 2, "num_heads": 0}, "modules": []},
    {"class": "Sequential", "arguments": {}, "modules": [["a.b", LEAF]]},
], ids=lambda tree: f"{tree['class']}-{len(tree['modules'])}")  # fmt: skip
def test_a_tree_that_asks_for_more_than_is_stored_is_refused(tree, monkeypatch):
    # A twentieth of the time that a build may take: a million copies of a layer take all of it.
    monkeypatch.setattr(building, "within", partial(within, most_seconds=1.5))
    assert is_tree(tree)
    inventory, _ = take_inventory(find_slots(nn.Linear(2, 2)))
    described = {"kind": "torch", "class": "torch.nn:Module", "tree": tree}
    with pytest.raises(StructureError, match=r"far more|not there|constructor"):
        build(described, inventory=inventory)


# Saved and loaded.

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
TABLE = pd.DataFrame(X, columns=list("abcd"))
NETS = {
    "a table": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), TABLE),
    "shared": (lambda: MODULES[-1], torch.tensor(X)),
    "recurrent": (lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), X[None]),
    "two inputs": (lambda: nn.Bilinear(4, 4, 2), {"input1": X, "input2": X}),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        dict.fromkeys(("query", "key", "value"), X),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**BLOCK, batch_first=True), 2),
        X[None],
    ),
}


def flat(answer):
    if isinstance(answer, (torch.Tensor, np.ndarray)):
        return [np.asarray(answer.detach() if isinstance(answer, torch.Tensor) else answer)]
    return [part for each in answer for part in flat(each)]


@pytest.mark.parametrize("name", NETS)
def test_it_answers_as_it_did_and_asks_for_nothing(name, tmp_path):
    make, example = NETS[name]
    torch.manual_seed(0)
    module = make().train()
    mlflow_safeflavor.save_model(
        module, tmp_path / "m", task="raw", input_example=example, rehearse=False, graph="no"
    )
    loaded = mlflow_safeflavor.load_model(tmp_path / "m")
    assert (loaded.spec.structure, loaded.spec.runs) == ("torch", ())
    assert module.training
    given = (
        list(example.values())
        if type(example) is dict
        else [X if example is TABLE else np.asarray(example)]
    )
    arrays = [torch.tensor(array) for array in given]
    with torch.inference_mode():
        wanted = flat(module.eval()(*arrays))
    answers = loaded.predict(example)
    found = [np.stack(answers[key]) if example is TABLE else answers[key] for key in answers]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.allclose(one, other.reshape(one.shape), atol=1e-6)


def test_a_rehearsal_and_the_command_line_know_it(tmp_path):
    mlflow_safeflavor.save_model(
        NETS["a table"][0](), tmp_path / "m", task="raw", input_example=TABLE, graph="no"
    )
    from click.testing import CliRunner

    from mlflow_safeflavor.cli import main

    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "m")]).output
    assert "torch (runs no code of its own)" in shown


@pytest.mark.parametrize("change", ["attribute", "hook"])
def test_what_was_changed_afterwards_is_named_with_a_hint_that_works(change, tmp_path):
    module = nn.TransformerEncoderLayer(**BLOCK, batch_first=True).eval()
    if change == "attribute":
        module.norm2.eps = 0.5
    else:
        module.linear2.register_forward_hook(lambda module, inputs, output: output * 2)
    save = {"task": "raw", "input_example": X[None], "rehearse": False}
    with pytest.raises(StructureError, match=r"norm2|linear2") as refused:
        mlflow_safeflavor.save_model(module, tmp_path / "m", **save)
    assert "init_args" not in str(refused.value.hint)
    assert "graph='only'" in str(refused.value.hint)
    mlflow_safeflavor.save_model(module, tmp_path / "m", **save, graph="only")
    with torch.inference_mode():
        wanted = module(torch.tensor(X[None])).numpy()
    assert np.allclose(
        mlflow_safeflavor.load_model(tmp_path / "m").predict(X[None])["output_0"], wanted, atol=1e-5
    )
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_encoder_layer_has_a_graph(tmp_path):
    """Torch itself runs such a layer as one kernel."""
    module = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = np.random.default_rng(0).normal(size=(4, 17, 32)).astype(np.float32)
    given = {"task": "raw", "input_example": x, "graph": "require", "rehearse": False}
    mlflow_safeflavor.save_model(module, tmp_path / "m", **given)
    native = mlflow_safeflavor.load_model(tmp_path / "m").predict(x)["output_0"]
    served = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict(x)["output_0"]
    module_ = mlflow_safeflavor.load_model(
        tmp_path / "m", model_config={"engine": "module"}
    ).predict(x)["output_0"]
    assert np.array_equal(native, served)
    assert np.allclose(native, module_, atol=1e-5)


def test_a_description_that_was_edited_is_refused(tmp_path):
    mlflow_safeflavor.save_model(
        nn.Linear(4, 3), tmp_path / "m", task="raw", input_example=X, rehearse=False, graph="no"
    )
    file = tmp_path / "m" / "safeflavor" / "structure.json"
    said = json.loads(file.read_text())
    assert said["tree"] == {
        "class": "Linear",
        "arguments": {"in_features": 4, "out_features": 3},
        "modules": [],
    }
    file.write_text(json.dumps(said | {"tree": {**said["tree"], "class": "DataParallel"}}))
    with pytest.raises(SafeFlavorError, match=r"structure\.json"):
        mlflow_safeflavor.load_model(tmp_path / "m", verify="off")
