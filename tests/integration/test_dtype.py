"""Serving dtypes: what is cast, what stays, and when."""

from __future__ import annotations

import json

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import modernbert, seeded, tiny_model
from artifacts import TEXTS
from click.testing import CliRunner
from memory import all_bits, memory
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

import mlflow_safeflavor
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import PlacementError, WeightsError
from mlflow_safeflavor.module import dtype_plan, placement
from mlflow_safeflavor.module import rebuild as rebuilding
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.module.watch import Watch

pytest_plugins = "saved_models"

IDS = {"input_ids": np.array([[1, 5, 9, 4], [7, 2, 2, 3]])}
X = {"x": np.array([[1.0, 2.0, 3.0, 4.0]], dtype=np.float32)}
HALVES = [torch.bfloat16, torch.float16]


def dtypes(module):
    return {slot.path: slot.tensor.dtype for slot in find_slots(module)}


def load(path, **options):
    return mlflow_safeflavor.load_model(str(path), **options)


@pytest.fixture
def save(tmp_path):
    def run(model, name="model", **options):
        options = {"task": "raw", "input_example": IDS, "rehearse": False, "graph": "no", **options}
        mlflow_safeflavor.save_model(model, tmp_path / name, **options)
        return tmp_path / name

    return run


def t5(**config):
    return seeded(
        lambda: T5EncoderModel(
            T5Config(
                vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **config
            )
        )
    )


class Mixed(nn.Module):
    """Something of every dtype."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.linspace(0, 1, 3))
        self.register_buffer("fixed", torch.linspace(0, 1, 3, dtype=torch.float32))
        self.register_buffer("transient", torch.linspace(0, 1, 3), persistent=False)
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("bytes", torch.arange(3, dtype=torch.uint8), persistent=False)
        self.exact = torch.linspace(0, 1, 3, dtype=torch.float64)
        self.plain = torch.linspace(0, 1, 3)
        self.phase = torch.ones(3, dtype=torch.complex64)

    def forward(self, x):
        return (
            self.layer(x) * self.mask
            + self.count
            + self.exact.to(x.dtype)
            + self.plain
            + self.transient
        )


KEPT = {
    "count": torch.int64,
    "mask": torch.bool,
    "bytes": torch.uint8,
    "exact": torch.float64,
    "phase": torch.complex64,
    "fixed": torch.float32,
}
CAST = {"layer.weight", "layer.bias", "mean", "transient", "plain"}


# At save


@pytest.mark.parametrize("dtype", ["float32", *HALVES], ids=str)
def test_the_serving_dtype_is_stored_and_comes_back(save, dtype):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ).eval()
    path = save(model, dtype=dtype)
    loaded = load(path)
    wanted = torch.float32 if dtype == "float32" else dtype
    assert loaded.spec.dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in loaded.module.parameters()} == {wanted}
    with safe_open(path / "safeflavor" / "model.safetensors", framework="pt") as file:
        stored = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert stored == {wanted}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "saving changed the module"
    assert loaded.report.bit_identical


def test_a_module_in_half_precision_is_not_stored_as_float32_by_accident(save):
    """The default dtype is explicit, whatever the module happens to be in."""
    model = seeded(Mixed).to(torch.bfloat16)
    loaded = load(save(model, init_args={}, input_example=X), trust={"code"})
    assert loaded.module.layer.weight.dtype == torch.float32
    assert torch.equal(loaded.module.layer.weight, model.layer.weight.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_kind_of_tensor_in_half_precision(save, dtype):
    model = seeded(Mixed)
    found = load(save(model, init_args={}, input_example=X, dtype=dtype), trust={"code"}).module
    assert dtypes(found) == KEPT | dict.fromkeys(CAST, dtype)
    for path, tensor in ((slot.path, slot.tensor) for slot in find_slots(found)):
        original = next(slot.tensor for slot in find_slots(model) if slot.path == path)
        assert torch.equal(tensor, original.to(tensor.dtype)), f"{path} is not the original, cast"


def test_of_a_pickled_module_parameters_and_persistent_buffers_are_cast(save):
    """No constructor says what its other tensors would be, so they stay.

    As nn.Module.to does it.
    """

    class Local(Mixed):
        pass

    found = load(
        save(seeded(Local), allow_pickle=True, input_example=X, dtype="bfloat16"), trust={"pickle"}
    ).module
    wanted = dict.fromkeys(("layer.weight", "layer.bias", "mean", "fixed"), torch.bfloat16)
    assert dtypes(found) == {**KEPT, "transient": torch.float32, "plain": torch.float32, **wanted}


def test_rotary_frequencies_stay_float32(save):
    model = modernbert()
    frequencies = {path: dtype for path, dtype in dtypes(model).items() if "inv_freq" in path}
    assert frequencies, "the test is void"
    found = load(save(model, dtype="bfloat16")).module
    assert {
        path: dtype for path, dtype in dtypes(found).items() if "inv_freq" in path
    } == frequencies
    assert set(frequencies.values()) == {torch.float32}
    for path in frequencies:
        assert all_bits(found)[path] == all_bits(model)[path], f"{path} went through half precision"
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


# Islands in float32


def test_t5_keeps_wo_in_float32_under_float16_only(save):
    model = t5()
    for dtype, island in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        found = load(save(model, str(dtype), dtype=dtype)).module
        for path, there in dtypes(found).items():
            assert there == (island if ".wo." in path else dtype), f"{path} under {dtype}"
        wo = found.encoder.block[1].layer[1].DenseReluDense.wo.weight
        assert torch.equal(wo, model.encoder.block[1].layer[1].DenseReluDense.wo.weight.to(island))


class Strict(PreTrainedModel):
    config_class = BertConfig
    _keep_in_fp32_modules = ("loose",)
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.loose = nn.Linear(4, 4)
        self.router = nn.Linear(4, 4)
        self.router.register_buffer("correction", torch.zeros(4))
        self.post_init()

    def forward(self, x):
        routed = self.router(x.float()) + self.router.correction
        return self.layer(self.loose(x.to(self.loose.weight.dtype)).to(x.dtype)) * routed.to(
            x.dtype
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strict_islands_hold_in_both_halves(save, dtype):
    path = save(seeded(lambda: Strict(BertConfig())), dtype=dtype, input_example=X)
    found = dtypes(load(path, trust={"code"}).module)
    assert (
        found["router.weight"]
        == found["router.bias"]
        == found["router.correction"]
        == torch.float32
    )
    assert found["layer.weight"] == dtype
    assert found["loose.weight"] == (torch.float32 if dtype == torch.float16 else dtype)


def test_islands_of_a_module_that_is_in_half_precision_already(save):
    """It is stored in another dtype, so the islands are as the class wants them."""
    model = t5().to(torch.bfloat16)
    found = load(save(model, dtype="float16")).module
    assert {dtype for path, dtype in dtypes(found).items() if ".wo." in path} == {torch.float32}


# As it is, and float64


class Gaussian(nn.Module):
    """In float64, as gpytorch's and botorch's users have it: float32 cannot solve this."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.linspace(0, 1, 40, dtype=torch.float64))
        self.values = nn.Parameter(torch.sin(6 * self.places.detach()))

    def forward(self, x):
        def kernel(a, b):
            return torch.exp(-((a[:, None] - b[None]) ** 2) / 0.08)

        noise = 1e-8 * torch.eye(40, dtype=self.places.dtype)
        weights = torch.linalg.solve(kernel(self.places, self.places) + noise, self.values)
        return {"mean": kernel(x, self.places) @ weights, "half": x.bfloat16()}


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "as-is"], ids=str)
def test_float64_is_served_in_float64(save, dtype):
    x = np.linspace(0.05, 0.95, 7)
    path = save(seeded(Gaussian), init_args={}, input_example={"x": x}, dtype=dtype)
    loaded = load(path, trust={"code"})
    mean = loaded.predict({"x": x})["mean"]
    assert (loaded.spec.dtype, mean.dtype) == ("float64", np.float64)
    assert np.abs(mean - np.sin(6 * x)).max() < 1e-5
    assert loaded.report.bit_identical
    assert loaded.predict({"x": x})["half"].dtype == np.float32, "numpy knows no bfloat16"
    pyfunc = mlflow.pyfunc.load_model(str(path))
    assert np.array_equal(pyfunc.predict({"x": x})["mean"], mean)


def test_a_cast_that_nobody_asked_for_is_said_once_and_recorded(save, caplog):
    x = np.linspace(0.05, 0.95, 7)
    path = save(seeded(Gaussian), init_args={}, input_example={"x": x})
    said = [record.message for record in caplog.records if "no dtype was given" in record.message]
    assert len(said) == 1
    assert "the weights are float64, and become float32" in said[0]
    assert load(path, trust={"code"}).spec.cast_from == "float64"
    shown = CliRunner().invoke(main, ["inspect", str(path)], env={"COLUMNS": "300"}).output
    assert "float32, cast from float64: no dtype was given" in shown


@pytest.mark.parametrize("dtype", ["float32", "as-is"])
def test_what_was_asked_for_is_not_announced(save, caplog, dtype):
    path = save(
        seeded(Gaussian), init_args={}, input_example={"x": np.linspace(0, 1, 3)}, dtype=dtype
    )
    assert "no dtype was given" not in caplog.text
    assert load(path, trust={"code"}).spec.cast_from == ""


class Islands(nn.Module):
    """A body in bfloat16, norm and head in float32, as finetuning leaves them."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = (
            nn.Linear(4, 8).bfloat16(),
            nn.LayerNorm(8),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.head(self.norm(self.body(x.bfloat16()).float()))


def test_a_module_of_several_dtypes_keeps_them(save):
    model = seeded(Islands)
    path = save(model, init_args={}, input_example=X, dtype="as-is")
    expected = model(torch.tensor(X["x"])).detach().numpy()
    loaded = load(path, trust={"code"})
    assert loaded.spec.dtype == "as-is"
    assert np.array_equal(loaded.predict(X)["output_0"], expected)
    assert np.array_equal(loaded.predict({"x": X["x"].astype(np.float64)})["output_0"], expected)
    assert dtypes(load(path, trust={"code"}).module) == dtypes(model)
    cast = load(path, trust={"code"}, dtype="bfloat16", verify="off").module
    assert set(dtypes(cast).values()) == {torch.bfloat16}


def test_as_it_is_keeps_what_a_class_would_not(save):
    model = t5()
    model.encoder.block[0].layer[1].DenseReluDense.wo.bfloat16()
    found = load(save(model, dtype="as-is")).module
    assert dtypes(found) == dtypes(model)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_a_checkpoint_is_read_as_it_is_or_says_what_it_becomes(
    save, tiny_bert, tiny_tokenizer, tmp_path, caplog, stored, file
):
    tiny_bert().to(stored).save_pretrained(tmp_path / "checkpoint")
    if file.endswith(".bin"):  # transformers 5 writes none; and configs of old ones say no dtype
        torch.save(
            load_file(tmp_path / "checkpoint" / "model.safetensors"), tmp_path / "checkpoint" / file
        )
        (tmp_path / "checkpoint" / "model.safetensors").unlink()
        config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
        config = {key: value for key, value in config.items() if not key.endswith("dtype")}
        (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    options = {"task": None, "input_example": None}
    assert (
        load(save(tmp_path / "checkpoint", "kept", dtype="as-is", **options)).spec.dtype
        == str(stored)[6:]
    )
    assert "no dtype was given" not in caplog.text
    spec = load(save(tmp_path / "checkpoint", "default", **options)).spec
    assert spec.dtype == "float32"
    assert spec.cast_from == ("" if stored == torch.float32 else "bfloat16")
    assert ("no dtype was given" in caplog.text) == (stored != torch.float32)


def test_from_pretrained_says_what_it_casts(tiny_bert, tmp_path, caplog):
    tiny_bert().bfloat16().save_pretrained(tmp_path)
    assert mlflow_safeflavor.from_pretrained(tmp_path, dtype="as-is").dtype == torch.bfloat16
    assert mlflow_safeflavor.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    assert caplog.text == ""
    assert mlflow_safeflavor.from_pretrained(tmp_path).dtype == torch.float32
    assert "the weights are bfloat16" in caplog.text


@pytest.mark.parametrize(
    "task", ["text-classification", "token-classification", "question-answering", "fill-mask"]
)
def test_scores_of_a_float64_model_are_in_float64(save, tiny_tokenizer, tmp_path, task):
    """To 1e-12 those of transformers' pipeline, which casts only whole texts' to float32."""
    head = {
        "text": "SequenceClassification",
        "token": "TokenClassification",
        "question": "QuestionAnswering",
    }
    model = tiny_model("Bert", "For" + head.get(task.partition("-")[0], "MaskedLM")).double()
    text, tolerance = "the cat [MASK] on the mat", 1e-6 if task == "text-classification" else 1e-12
    rows = {"question": "a cat", "context": text} if task.startswith("question") else {"text": text}
    options = {"task": task, "tokenizer": tiny_tokenizer, "dtype": "float64", "graph": "no"}
    path = save(model, input_example=pd.DataFrame([rows]), **options)
    recorded = load_numpy(path / "safeflavor" / "parity.safetensors")
    assert {array.dtype for name, array in recorded.items() if ".output." in name} == {
        np.dtype("float64")
    }
    answers = load(path).predict(pd.DataFrame([rows])).to_dict("records")[0]
    if task == "question-answering" and not hasattr(transformers, "QuestionAnsweringPipeline"):
        assert float(np.float32(answers["score"])) != answers["score"]
        return
    pipe = transformers.pipeline(task, model=model, tokenizer=tiny_tokenizer)
    wanted = pipe(**rows) if task == "question-answering" else pipe(text)
    found = answers.get(
        "score", [e["score"] for e in answers.get("entities", [])] or answers.get("scores")
    )
    wanted = [e["score"] for e in wanted] if isinstance(wanted, list) else [wanted["score"]]
    assert np.allclose(np.ravel(found), wanted[: len(np.ravel(found))], atol=tolerance, rtol=0)
    assert len(np.ravel(found)) > 0


def test_embeddings_of_a_float64_model_are_in_float64(save, tiny_bert, tiny_tokenizer):
    model = tiny_bert(None).double()
    options = {
        "task": "feature-extraction",
        "tokenizer": tiny_tokenizer,
        "dtype": "as-is",
        "graph": "no",
    }
    path = save(model, input_example=None, **options)
    answer = np.array(load(path).predict(["the cat sat"])["embedding"][0])
    with torch.inference_mode():
        hidden = (
            model(**tiny_tokenizer("the cat sat", return_tensors="pt")).last_hidden_state[0].mean(0)
        )
    assert hidden.dtype == torch.float64
    assert np.abs(answer - hidden.numpy()).max() < 1e-12


def test_as_it_is_is_no_dtype_to_load_in(saved):
    with pytest.raises(PlacementError, match="Not a serving dtype"):
        load(saved, dtype="as-is")


# At load


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_cast_at_load_is_a_cast_at_save(save, dtype):
    for name, model in (("t5", t5()), ("modernbert", modernbert())):
        at_load = load(save(model, f"{name}-32"), dtype=dtype)
        at_save = load(save(model, f"{name}-16", dtype=dtype))
        assert all_bits(at_load.module) == all_bits(at_save.module), name
        assert memory(at_load.module) == memory(at_save.module), name
        ours, theirs = at_load.predict(IDS), at_save.predict(IDS)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs), name


def test_a_cast_at_load_casts_inputs_too(save):
    path = save(seeded(Mixed), init_args={}, input_example=X)
    loaded = load(path, trust={"code"}, dtype="bfloat16")
    assert dtypes(loaded.module) == KEPT | dict.fromkeys(CAST, torch.bfloat16)
    assert loaded.predict(X)["output_0"].dtype == np.float32
    assert loaded.engine.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_cast_answers_as_torchs_own_cast(saved, tiny_tokenizer, dtype):
    cast, model = load(saved, dtype=dtype), load(saved).module.to(dtype)
    for text in TEXTS:
        with torch.inference_mode():
            logits = model(**tiny_tokenizer(text, return_tensors="pt")).logits[0].float()
        assert cast.predict([text])["score"].item() == pytest.approx(
            logits.softmax(0).max().item(), abs=1e-6
        )
    assert cast.predict(TEXTS)["score"].tolist() != load(saved).predict(TEXTS)["score"].tolist(), (
        "nothing was cast"
    )


def test_the_dtype_it_was_saved_in_casts_nothing_and_copies_nothing(saved):
    loaded = load(saved, dtype="float32")
    assert loaded.report.bit_identical
    assert all_bits(loaded.module) == all_bits(load(saved).module)


def test_the_cast_comes_after_the_comparison(saved, monkeypatch):
    """A module that is not the saved one is refused before anything is cast."""
    order = []
    for module, name in ((rebuilding, "_require_same_tensors"), (placement, "place")):
        original = getattr(module, name)

        def noting(*args, _name=name, _original=original, **kwargs):
            order.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, noting)
    load(saved, dtype="bfloat16")
    assert order == ["_require_same_tensors", "place"]

    def refuse(*args):
        raise WeightsError("not the same")

    monkeypatch.setattr(rebuilding, "_require_same_tensors", refuse)
    order.clear()
    with pytest.raises(WeightsError, match="not the same"):
        load(saved, dtype="bfloat16")
    assert order == []


def test_alias_groups_survive_a_cast(save):
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    path = save(seeded(lambda: GPT2LMHeadModel(config)))
    plain, cast = load(path).module, load(path, dtype="bfloat16").module
    assert cast.lm_head.weight is cast.transformer.wte.weight
    assert cast.lm_head.weight.dtype == torch.bfloat16
    groups = [
        {name: where[0] for name, where in memory(module).items()} for module in (plain, cast)
    ]
    assert groups[0] == groups[1]


class Disturbed(nn.Module):
    """While it is constructed, "another thread" changes torch's default dtype ``left`` times."""

    left = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        if Disturbed.left:
            Disturbed.left -= 1
            torch.set_default_dtype(torch.float32)
        self.register_buffer("transient", torch.linspace(0, 1, 3), persistent=False)

    def forward(self, x):
        return self.layer(x) + self.transient


@pytest.mark.parametrize("times", [0, 1, 3])
def test_another_thread_in_the_middle_decides_nothing(save, times):
    path = save(seeded(Disturbed), init_args={}, input_example=X)
    left = times

    def disturbed(*args, **kwargs):
        nonlocal left
        if "inventory" not in kwargs:  # the skeleton that tells dtypes, not the model itself
            Disturbed.left = left > 0
            left -= 1
        return build(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtype_plan, "build", disturbed)
        found = load(path, trust={"code"}, dtype="bfloat16").module
    Disturbed.left = 0
    assert dtypes(found) == dict.fromkeys(
        ("layer.weight", "layer.bias", "transient"), torch.bfloat16
    )
    assert left == -1, "it was not constructed once more for each disturbance"


def test_a_default_dtype_that_never_settles_is_named(save, monkeypatch):
    path = save(seeded(Disturbed), init_args={}, input_example=X)
    calls = []

    def disturbed(*args, **kwargs):
        calls.append(1)
        torch.set_default_dtype(torch.float32)
        built = build(*args, **kwargs)
        if "inventory" not in kwargs and len(calls) % 2:
            built.transient = built.transient.float()
        return built

    monkeypatch.setattr(dtype_plan, "build", disturbed)
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(Watch, "disturbed", always, raising=False)
    with pytest.raises(PlacementError, match="kept changing"):
        load(path, trust={"code"}, dtype="bfloat16")


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.base: torch.Tensor
        self.register_buffer("base", torch.linspace(0, 2, 8))
        self.view = self.base[2:6]
        self.turned = nn.Parameter(torch.arange(16.0).view(4, 4).t())
        self.again = self.turned

    def forward(self, x):
        return x @ self.turned + self.view + self.again[0] + self.base[:4]


def test_views_and_strides_survive_a_cast(save):
    model = seeded(Views)
    path = save(model, init_args={}, input_example=X)
    found = load(path, trust={"code"}, dtype="bfloat16").module
    assert set(dtypes(found).values()) == {torch.bfloat16}
    wanted = {
        name: (leader, offset // 2, stride)
        for name, (leader, offset, stride) in memory(model).items()
    }
    assert memory(found) == wanted, "half the bytes a number, so half the distance"
    assert torch.equal(found.view, model.view.bfloat16())
    assert found.again is found.turned
    assert found.turned.stride() == (1, 4)


def test_float64_attributes_and_parameters(save):
    class Doubles(Mixed):
        pass

    globals()["Doubles"] = Doubles
    Doubles.__qualname__ = "Doubles"
    try:
        model = seeded(Doubles).double()
        found = load(save(model, init_args={}, input_example=X), trust={"code"}).module
    finally:
        del globals()["Doubles"]
    assert found.layer.weight.dtype == torch.float32, "no dtype was given, so it is float32"
    assert found.exact.dtype == torch.float64
    assert torch.equal(found.exact, model.exact)
    assert found.mean.dtype == torch.float32, "the constructor makes it in the serving dtype"
