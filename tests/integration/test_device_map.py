"""Devices and device maps.

Answers equal to the plain load, and a clear word where there is no such device.
"""

from __future__ import annotations

import builtins
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from architectures import seeded
from artifacts import TEXTS, edit_json, reseal
from transformers import GPT2Config, GPT2LMHeadModel, ModernBertConfig, ModernBertModel

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import OverloadedError, ParityError, PlacementError
from mlflow_safeflavor.module import devices, failures, placement, precision
from mlflow_safeflavor.module.devices import resolve_device
from mlflow_safeflavor.module.dtypes import resolve_dtype
from mlflow_safeflavor.module.slots import find_slots

pytest_plugins = "saved_models"

ONES = {"x": np.ones((3, 4), np.float32)}
IDS = {"input_ids": np.array([[1, 5, 9, 4], [7, 2, 2, 3]])}


def load(path, **options):
    return mlflow_safeflavor.load_model(str(path), **options)


_made = {}


@pytest.fixture
def gpt2(tmp_path_factory):
    """A saved language model whose head is tied to its embedding."""
    if "gpt2" not in _made:
        config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        path = tmp_path_factory.mktemp("gpt2") / "model"
        model = seeded(lambda: GPT2LMHeadModel(config))
        mlflow_safeflavor.save_model(
            model, path, task="raw", input_example=IDS, rehearse=False, graph="no"
        )
        _made["gpt2"] = path
    return _made["gpt2"]


@pytest.fixture
def modernbert(tmp_path_factory):
    """A saved model whose rotary frequencies are non-persistent buffers."""
    if "modernbert" not in _made:
        config = ModernBertConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            attn_implementation="eager",
        )
        path = tmp_path_factory.mktemp("modernbert") / "model"
        model = seeded(lambda: ModernBertModel(config))
        mlflow_safeflavor.save_model(
            model, path, task="raw", input_example=IDS, rehearse=False, graph="no"
        )
        _made["modernbert"] = path
    return _made["modernbert"]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), f"{name} differs from the plain load"


# Device maps


BERT_MAPS = {
    "auto": "auto",
    "balanced": "balanced",
    "sequential": "sequential",
    "one device": {"": "cpu"},
    "one device, by parts": {"bert": "cpu", "classifier": "cpu", "dropout": "cpu"},
    "cpu and disk": {
        "bert.embeddings": "cpu",
        "bert.encoder": "disk",
        "bert.pooler": "cpu",
        "classifier": "cpu",
    },
    "all on disk": {"": "disk"},
    "all on disk, by parts": {"bert": "disk", "classifier": "disk"},
    "nested": {"": "cpu", "bert.encoder": "disk", "bert.encoder.layer.1": "cpu"},
    "nested, disk at the root": {
        "": "disk",
        "bert.encoder.layer.0.attention": "cpu",
        "classifier": "disk",
    },
    "devices as objects": {"bert": torch.device("cpu"), "classifier": torch.device("cpu", 0)},
}


@pytest.mark.parametrize("case", BERT_MAPS)
def test_answers_are_those_of_the_plain_load(saved, case):
    expected = load(saved).predict(TEXTS)
    model = load(saved, device_map=BERT_MAPS[case])
    assert model.predict(TEXTS).equals(expected), "answers differ from the plain load"
    assert model.predict(TEXTS).equals(expected), "answers differ the second time"
    assert model.report.bit_identical
    assert model.report.device == "cpu, by device_map"


def test_what_is_offloaded_takes_no_memory(saved):
    module = load(saved, device_map={"bert.encoder": "disk", "": "cpu"}).module
    offloaded = {slot.path for slot in find_slots(module) if slot.tensor.is_meta}
    assert offloaded == {
        name for name, _ in module.named_parameters() if name.startswith("bert.encoder.")
    }


def test_offloaded_tensors_are_read_from_the_artifact_and_written_nowhere(
    saved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(saved.rglob("*"))
    load(saved, device_map={"": "disk"}).predict(TEXTS)
    assert sorted(saved.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"transformer": "disk", "lm_head": "cpu"},
        {"transformer": "cpu", "lm_head": "disk"},
        {"transformer": "disk", "lm_head": "disk"},
        {"": "cpu", "transformer.h": "disk"},
        {"": "cpu", "transformer.wte": "disk"},
    ],
    ids=str,
)
def test_a_tied_model_offloaded_on_either_side_of_its_tie(gpt2, device_map):
    expected = load(gpt2).predict(IDS)
    model = load(gpt2, device_map=device_map)
    for _ in range(2):
        same(model.predict(IDS), expected)


@pytest.mark.parametrize(
    "device_map", [{"": "disk"}, {"": "cpu", "layers": "disk"}, {"": "cpu", "rotary_emb": "disk"}]
)
def test_non_persistent_buffers_of_an_offloaded_model(modernbert, device_map):
    plain = load(modernbert)
    transient = {
        slot.path: slot.tensor for slot in find_slots(plain.module) if slot.kind == "buffer"
    }
    assert transient, "the test is void: no buffers"
    expected = plain.predict(IDS)
    model = load(modernbert, device_map=device_map)
    for _ in range(2):
        same(model.predict(IDS), expected)


@pytest.mark.parametrize(
    ("device_map", "where", "what"),
    [
        ({"": 0}, "device", "cuda:0"),
        ({"bert": "cpu", "classifier": 1}, "device", "cuda:1"),
        ({"": "cuda:3"}, "device", "cuda:3"),
        ({"": "xpu"}, "device", "xpu"),
        ({"": "cpu:1"}, "device", "cpu:1"),
        ({"": "meta"}, "device", "meta"),
    ],
    ids=str,
)
def test_a_device_that_is_not_there(saved, device_map, where, what):
    with pytest.raises(PlacementError, match="no such device here") as caught:
        load(saved, device_map=device_map)
    assert caught.value.where == where
    assert caught.value.wanted == what
    assert str(caught.value.found).startswith("cpu only")
    assert caught.value.hint


@pytest.mark.parametrize("device", ["gpu", "", None, 1.5, True, -1])
def test_something_that_is_no_device(saved, device):
    with pytest.raises(PlacementError, match="Not a device"):
        load(saved, device_map={"": device})


@pytest.mark.parametrize("name", ["bert.encodr", "bert.embeddings.word_embeddings.weight"])
def test_a_submodule_that_is_not_there(saved, name):
    """A tensor is none: accelerate ignores such a key with a warning."""
    with pytest.raises(PlacementError, match="something the model does not have") as caught:
        load(saved, device_map={"": "cpu", name: "disk"})
    assert repr(name) in str(caught.value.where)
    assert "'bert'" in str(caught.value.wanted)


@pytest.mark.parametrize("name", ["", "ber", "bert.encoder.layer.1"])
def test_a_map_that_leaves_tensors_out(saved, name):
    with pytest.raises(PlacementError) as caught:
        load(saved, device_map={"classifier": "cpu", **({name: "cpu"} if name else {})})
    expected = "does not have" if name == "ber" else "without a place"
    assert expected in caught.value.what
    if name != "ber":
        assert "bert.embeddings.word_embeddings.weight" in str(caught.value.where)


def test_an_empty_map_leaves_everything_out(saved):
    with pytest.raises(PlacementError, match="without a place"):
        load(saved, device_map={})


def test_a_strategy_that_does_not_exist(saved):
    with pytest.raises(PlacementError, match="Unknown device map") as caught:
        load(saved, device_map="bogus")
    assert caught.value.found == "bogus"
    assert "auto" in str(caught.value.wanted)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"dtype": "bfloat16"}], ids=str)
def test_a_map_together_with_a_device_or_dtype(saved, options):
    with pytest.raises(PlacementError, match="device_map says where everything goes") as caught:
        load(saved, device_map="auto", **options)
    assert repr(next(iter(options.values()))) in str(caught.value.found)


def test_without_accelerate_the_extra_is_named(saved, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "accelerate":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "accelerate")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PlacementError, match="device_map needs accelerate") as caught:
        load(saved, device_map="auto")
    assert "mlflow-safeflavor[accelerate]" in str(caught.value.hint)
    monkeypatch.undo()
    assert load(saved, device_map="auto").report.bit_identical


class Sliced(torch.nn.Module):
    """A parameter that no file holds by itself: it is part of another."""

    def __init__(self):
        super().__init__()
        self.whole = torch.nn.Linear(4, 4, bias=False)
        self.part = torch.nn.Linear(4, 2, bias=False)
        self.part.weight = torch.nn.Parameter(self.whole.weight[:2])
        self.turned = torch.nn.Linear(4, 4, bias=False)
        self.turned.weight = torch.nn.Parameter(torch.randn(4, 4).t())
        self.last = torch.nn.Linear(2, 2)
        self.scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x):
        return self.scale * self.last(self.turned(self.whole(x))[:, :2] + self.part(x))


@pytest.fixture
def sliced(tmp_path):
    path = tmp_path / "model"
    model = seeded(Sliced)
    mlflow_safeflavor.save_model(
        model, path, task="raw", init_args={}, input_example=ONES, rehearse=False, graph="no"
    )
    return path


@pytest.mark.parametrize("name", ["part", "whole", "turned"])
def test_views_cannot_be_offloaded(sliced, name):
    """They are no tensors of the file, so accelerate could only read something else."""
    with pytest.raises(PlacementError, match="cannot be offloaded to disk") as caught:
        load(sliced, trust={"code"}, device_map={"": "cpu", name: "disk"})
    assert caught.value.where == f"{name}.weight"


def test_the_rest_of_a_model_with_views_can_be_offloaded(sliced):
    expected = load(sliced, trust={"code"}).predict(ONES)
    same(
        load(sliced, trust={"code"}, device_map={"": "cpu", "last": "disk"}).predict(ONES), expected
    )


def test_a_tied_model_with_an_exception_from_disk(gpt2):
    expected = load(gpt2).predict(IDS)
    same(load(gpt2, device_map={"": "disk", "transformer.h.0.attn": "cpu"}).predict(IDS), expected)


def test_tensors_beside_an_exception_from_disk_have_no_place(sliced):
    """The part on disk is split around the exception.

    What belongs to none of its submodules is then left over.
    """
    with pytest.raises(PlacementError, match="without a place") as caught:
        load(sliced, trust={"code"}, device_map={"": "disk", "last": "cpu"})
    assert caught.value.where == "scale"


# Devices, told apart without having any


@pytest.fixture
def having(monkeypatch):
    """``having(cuda=2)``: torch sees that many."""

    def have(**counts):
        monkeypatch.setattr(devices, "_device_count", lambda kind: counts.get(kind, 0))

    have()
    return have


def test_auto_takes_what_there_is(having):
    assert resolve_device("auto") == torch.device("cpu")
    having(mps=1)
    assert resolve_device("auto") == torch.device("mps")
    having(cuda=2, xpu=1)
    assert resolve_device() == torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (1, "cuda:1"),
        (0, "cuda:0"),
        (torch.device("cuda", 1), "cuda:1"),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
    ],
    ids=str,
)
def test_devices_as_int_str_or_object(having, device, expected):
    having(cuda=2)
    assert resolve_device(device) == torch.device(expected)


def test_an_int_is_an_index_of_the_accelerator_there_is(having):
    having(xpu=2)
    assert resolve_device(1) == torch.device("xpu", 1)


@pytest.mark.parametrize("device", [2, "cuda:2", "cuda:7", "xpu", "mps", "meta", "cpu:1"])
def test_an_index_beyond_the_last_names_what_is_there(having, device):
    having(cuda=2)
    with pytest.raises(PlacementError, match="no such device here") as caught:
        resolve_device(device)
    assert caught.value.found == "cpu, cuda × 2"


def test_without_any_accelerator_an_int_is_refused(having):
    with pytest.raises(PlacementError) as caught:
        resolve_device(0)
    assert caught.value.wanted == "cuda:0"
    assert str(caught.value.found).startswith("cpu only")


@pytest.mark.parametrize(
    "device", ["gpu", "", None, True, False, 1.5, "cuda:-1", -1, "cuda:x", [], "CPU"], ids=repr
)
def test_no_device_at_all(having, device):
    having(cuda=2)
    with pytest.raises(PlacementError, match="Not a device") as caught:
        resolve_device(device)
    assert repr(device) in str(caught.value.found)


def test_the_count_is_torchs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device(2) == torch.device("cuda", 2)
    with pytest.raises(PlacementError):
        resolve_device(3)
    with pytest.raises(PlacementError):
        resolve_device("mps")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("torch.float16", torch.float16),
    ],
)
def test_serving_dtypes(dtype, expected):
    assert resolve_dtype(dtype) is expected


@pytest.mark.parametrize(
    "dtype",
    ["auto", "float80", "int8", "half", "", None, torch.int64, 16, "FLOAT32", "as-is"],
    ids=repr,
)
def test_no_serving_dtype(dtype):
    with pytest.raises(PlacementError, match="Not a serving dtype") as caught:
        resolve_dtype(dtype)
    assert caught.value.found == repr(dtype)
    assert "float32" in str(caught.value.wanted)


def test_a_model_that_does_not_fit_is_a_placement_error(saved, monkeypatch):
    original = torch.Tensor.to

    def full(self, target, *args, **kwargs):
        if isinstance(target, torch.device):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, target, *args, **kwargs)

    module = load(saved).module
    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(PlacementError, match="does not fit") as caught:
        placement.place(module, torch.device("cuda", 0), {})
    assert caught.value.where == "cuda:0"
    assert "GB" in str(caught.value.wanted)


@pytest.mark.parametrize(
    ("cuda", "environ", "reason"),
    [
        (None, {}, f"cpu only; torch {torch.__version__} was built without CUDA"),
        (
            "13.0",
            {},
            "cpu only; torch was built for CUDA 13.0, and finds no GPU with a driver that is new "
            "enough",
        ),
        ("13.0", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides GPUs"),
    ],
)
def test_why_there_is_no_gpu(having, monkeypatch, cuda, environ, reason):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlacementError, match="no such device here") as caught:
        resolve_device("cuda")
    assert reason in str(caught.value.found)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["auto", "cuda", 0])
def test_a_device_that_was_used_before_the_fork(having, monkeypatch, device):
    having(cuda=1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(PlacementError, match="forked after it had been used") as caught:
        resolve_device(device)
    assert "spawn" in str(caught.value.hint)
    assert resolve_device("cpu") == torch.device("cpu")


# Memory that runs out in the middle of a batch


class Hungry(torch.nn.Module):
    """Has room for two rows at a time, and for none with the word "else"."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(40, 4)
        self.rows = []

    def forward(self, input_ids, attention_mask):
        self.rows.append(len(input_ids))
        if len(input_ids) > 2 or (input_ids == 27).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return {"last_hidden_state": self.table(input_ids)}


@pytest.fixture
def hungry(tiny_tokenizer, tmp_path):
    options = {
        "task": "feature-extraction",
        "init_args": {},
        "tokenizer": tiny_tokenizer,
        "rehearse": False,
    }
    mlflow_safeflavor.save_model(seeded(Hungry), tmp_path / "model", graph="no", **options)
    model = load(tmp_path / "model", trust={"code"})
    model.module.rows.clear()
    return model


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on"]


def test_a_batch_without_room_is_halved_and_answers_stay_in_order(hungry):
    found = hungry.predict(WORDS)["embedding"].tolist()
    assert hungry.module.rows == [7, 3, 1, 2, 4, 2, 2]
    assert found == [hungry.predict([word])["embedding"].item() for word in WORDS]


def test_a_row_without_room_is_to_blame_alone(hungry):
    with ThreadPoolExecutor(2) as pool:
        failed, answered = (
            pool.submit(hungry.predict, texts) for texts in (["the", "a", "else"], WORDS)
        )
        with pytest.raises(OverloadedError, match="Memory ran out") as caught:
            failed.result()
        assert len(answered.result()) == len(WORDS)
    assert "20.00 GiB" in str(caught.value.found)
    assert caught.value.__cause__ is None, "it would hold what the forward had made"
    assert len(hungry.predict(WORDS)) == len(WORDS), "the next request"


def test_arrays_without_room_are_no_fault_of_the_arrays(tmp_path, monkeypatch):
    """They are one forward, whatever their rows are, so there is nothing smaller to try."""
    path = tmp_path / "model"
    options: dict[str, Any] = {
        "init_args": {"in_features": 4, "out_features": 2},
        "input_example": ONES["x"],
        "task": "raw",
    }
    mlflow_safeflavor.save_model(torch.nn.Linear(4, 2), path, graph="no", **options, rehearse=False)
    model = load(path, trust={"code"})

    def full(self, input):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Linear, "forward", full)
    with pytest.raises(OverloadedError, match="Memory ran out"):
        model.predict(ONES["x"])
    monkeypatch.undo()
    assert len(model.predict(ONES["x"])["output_0"]) == 3


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            ),
            True,
        ),
        (
            Exception(
                "[ONNXRuntimeError] : 1 : FAIL : void* onnxruntime::BFCArena::AllocateRawInternal"
            ),
            True,
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error, is_memory):
    assert failures.is_out_of_memory(error) is is_memory


# TF32


@pytest.fixture
def tf32():
    """Settings of the process as tests leave them are put back."""
    before = [(place, name, getattr(place, name)) for place, name, _ in precision._EXACT]
    yield torch.backends
    for place, name, value in before:
        setattr(place, name, value)


def _settings():
    return [precision._read(place, name) for place, name, _ in precision._EXACT]


@pytest.mark.parametrize("allowed", [False, True])
def test_no_tf32_while_a_model_runs_on_a_gpu_and_afterwards_as_before(tf32, allowed):
    tf32.cuda.matmul.allow_tf32 = tf32.cudnn.allow_tf32 = allowed
    before = _settings()
    with precision.exact_products(torch.device("cuda")):
        assert not tf32.cuda.matmul.allow_tf32
        assert not tf32.cudnn.allow_tf32
        inside = _settings()
        with precision.exact_products(torch.device("cuda", 1)):
            assert _settings() == inside
        assert _settings() == inside, "somebody is still inside"
    assert _settings() == before
    with precision.exact_products(torch.device("cpu")):
        assert _settings() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="named precisions came with torch 2.9"
)
def test_precisions_by_name_are_put_off_and_back(tf32):
    tf32.cuda.matmul.fp32_precision, tf32.cudnn.conv.fp32_precision = "tf32", "ieee"
    before = _settings()
    with precision.exact_products(torch.device("cuda")):
        names = [tf32.cuda.matmul, tf32.cudnn.conv, tf32.cudnn.rnn]
        assert [place.fp32_precision for place in names] == ["ieee"] * 3
    assert _settings() == before


def test_what_the_user_tells_torch_meanwhile_stays(tf32):
    tf32.cuda.matmul.allow_tf32 = False
    with precision.exact_products(torch.device("cuda")):
        tf32.cuda.matmul.allow_tf32 = True
    assert tf32.cuda.matmul.allow_tf32


# Near ties


@pytest.fixture
def undecided(tiny_bert, tiny_tokenizer, tmp_path):
    """A saved classifier whose labels are equally likely, so that any rounding orders them."""
    model = tiny_bert(num_labels=2)
    with torch.no_grad():
        model.classifier.weight[1], model.classifier.bias[:] = model.classifier.weight[0], 0
    mlflow_safeflavor.save_model(
        model, tmp_path / "model", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    return tmp_path / "model"


def test_a_near_tie_that_rounding_decides_otherwise_is_no_difference(undecided, monkeypatch):
    before = load(undecided).predict(TEXTS)["label"].tolist()
    forward = torch.nn.Linear.forward

    def rounded(self, x):
        """As another device might."""
        found = forward(self, x)
        return found + torch.tensor([0.0, 1e-6]) if self.out_features == 2 else found

    monkeypatch.setattr(torch.nn.Linear, "forward", rounded)
    model = load(undecided)
    assert model.predict(TEXTS)["label"].tolist() != before, "the test is void"
    assert 0 < model.report.max_difference < 1e-5
    assert not model.report.bit_identical


def test_an_answer_that_its_outputs_do_not_give_is_one(undecided):
    edit_json(
        Layout(undecided).parity, lambda content: content["answers"][1].update(label="LABEL_1")
    )
    reseal(undecided)
    with pytest.raises(ParityError, match="row 1, label"):
        load(undecided)
