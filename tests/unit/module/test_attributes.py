"""What is no tensor comes back too, or is named.

Attributes, wrappers, what a forward left, lazy modules.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import random
import sys
import textwrap
import types
import warnings
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from architectures import seeded
from torch import nn
from torch.nn.utils import parametrizations, prune

import mlflow_safeflavor
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module import attributes, structure
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.module.wrappers import require_plain


def find_differences(given, built):
    return attributes.find_differences(Subject.of(given), Subject.of(built))


X = {"x": np.array([[-0.4], [3.0]], dtype=np.float32)}

CODE = '''
    import functools
    import torch
    from torch import nn

    class Alarm(nn.Module):
        def __init__(self, threshold=0.5, *, strict=False):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.threshold, self.strict = threshold, strict

        def forward(self, x):
            p = torch.sigmoid(self.layer(x))
            return {"alarm": p >= self.threshold if self.strict else p > self.threshold}

    class Scale:
        def __init__(self, by):
            self.by = by

    class Many(nn.Module):
        """Something of every kind that is no tensor."""

        def __init__(self, factor=1.0, labels=("no", "yes"), flag=False):
            super().__init__()
            self.layer = nn.Linear(1, 2)
            self.f = factor * 2
            self.names = list(labels)
            self.table = {"a": 1, "b": [1, 2]}
            self.act = torch.relu
            self.scale = Scale(2.0)
            self.post = functools.partial(torch.clamp, min=0.0)
            self.made = lambda x: x * factor
            self.norm = nn.LayerNorm(2)
            self.body = nn.Sequential(nn.ReLU(), nn.Identity())
            self.kind = torch.float32
            self.grid = torch.zeros(2).numpy()
            self.both = not flag

        def forward(self, x):
            body = self.body(self.norm(self.layer(x)))
            return self.post(self.made(self.act(body * self.f * self.scale.by)))

    class Keeps(nn.Module):
        """Leaves what it computed behind."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)
            self.attn, self.calls, self.seen = 0, 0, []
            self.cache = torch.zeros(1)
            self.unit = 1

        def forward(self, x):
            y = self.layer(x)
            self.attn, self.calls, self.seen = y.softmax(-1), self.calls + 1, [len(x)]
            self.cache = torch.arange(float(len(x)))
            return y * self.unit

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())

        def forward(self, x):
            return self.body(x)

    class Pre(nn.Module):
        def forward(self, x):
            return x + 1
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "held.py").write_text(textwrap.dedent(CODE))
    sys.path.insert(0, str(folder))
    import held

    yield held
    sys.path.remove(str(folder))
    del sys.modules["held"]


@pytest.fixture
def save(tmp_path, code):
    def run(model, name="model", **options):
        options = {
            "task": "raw",
            "input_example": X,
            "rehearse": False,
            "graph": "no",
            "code_paths": [code.__file__],
            **options,
        }
        mlflow_safeflavor.save_model(model, tmp_path / name, **options)
        return mlflow_safeflavor.load_model(str(tmp_path / name), trust={"code", "pickle"})

    return run


def kind_of(loaded):
    return json.loads((loaded.folder / "safeflavor" / "structure.json").read_text())["kind"]


# Kept, because the constructor takes it


@pytest.mark.parametrize(
    "changes",
    [{"threshold": 0.3}, {"strict": True}, {"threshold": 0.3, "strict": True}, {"threshold": 1}],
    ids=str,
)
def test_arguments_are_found_among_the_attributes(save, code, changes):
    model = seeded(lambda: code.Alarm(**changes))
    loaded = save(model)
    assert (loaded.module.threshold, loaded.module.strict) == (model.threshold, model.strict)
    assert kind_of(loaded) == "import"
    with torch.inference_mode():
        assert loaded.predict(X)["alarm"].tolist() == model(torch.tensor(X["x"]))["alarm"].tolist()


def test_an_attribute_that_was_set_later_is_as_good_as_an_argument(save, code):
    model = seeded(code.Alarm)
    model.threshold = 0.25
    assert save(model).module.threshold == 0.25


# Named, because it does not


def _set(path, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value(model) if callable(value) else value)

    return change


CHANGES = {
    "a number": (_set("f", 3.0), "f: 3.0, rebuilt 2.0"),
    "a number of another type": (_set("f", None), "f: None, rebuilt 2.0"),
    "a list": (lambda m: m.names.append("maybe"), "names: ['no', 'yes', 'maybe'], rebuilt ['no', "
                                                  "'yes']"),
    "an item of a list": (lambda m: m.names.__setitem__(1, "oui"), "names[1]: 'oui', rebuilt "
                                                                   "'yes'"),
    "a value deep in a dict": (lambda m: m.table["b"].__setitem__(1, 3), "table['b'][1]: 3, "
                                                                         "rebuilt 2"),
    "a key of a dict": (lambda m: m.table.update(c=1), "table['c']: 1, rebuilt nothing"),
    "a function": (_set("act", lambda m: torch.tanh), "act: "),
    "a part of an object": (lambda m: setattr(m.scale, "by", 4.0), "scale.by: 4.0, rebuilt 2.0"),
    "an argument of a partial": (
        lambda m: setattr(m, "post", functools.partial(torch.clamp, min=-1.0)),
        "post.keywords['min']: -1.0",
    ),
    "a class of a part": (lambda m: m.body.__setitem__(0, nn.GELU()), "body.0: a "
                                                                      "torch.nn.modules.activation:GELU"),
    "a part more": (lambda m: m.body.append(nn.Tanh()), "body.2: a Tanh, rebuilt None"),
    "a setting of torch's": (lambda m: setattr(m.norm, "eps", 0.5), "norm.eps: 0.5, rebuilt 1e-05"),
    "a method of the instance": (lambda m: setattr(m, "forward", m.layer.forward), "forward: "),
    "a hook": (lambda m: m.layer.register_forward_hook(lambda *a: a[2] + 1),
        "layer._forward_hooks: "),
    "a hook before": (lambda m: m.register_forward_pre_hook(lambda *a: a[1]),
        "_forward_pre_hooks: "),
    "an array": (lambda m: m.grid.__setitem__(0, 1.0), "grid: "),
    "a dtype": (_set("kind", torch.float64), "kind: torch.float64, rebuilt torch.float32"),
    "something new": (lambda m: setattr(m, "note", "calibrated"), "note: 'calibrated', rebuilt "
                                                                  "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_constructor_gives_back_is_named(code, name):
    model = seeded(code.Many)
    assert list(find_differences(model, seeded(code.Many))) == []
    change, words = CHANGES[name]
    change(model)
    with pytest.raises(StructureError) as caught:
        structure.describe(Subject.of(model), forward=lambda module: module(torch.tensor(X["x"])))
    assert str(caught.value.found).startswith(words), caught.value.found
    for way in ("init_args", "allow_pickle=True", "graph='only'"):
        assert way in str(caught.value.hint)


def test_a_value_in_a_closure_is_named(code):
    assert [d.path for d in find_differences(code.Many(3.0), code.Many())] == ["f", "made.factor"]


def test_a_refusal_leaves_nothing_and_every_hint_works(save, code, tmp_path):
    model = seeded(code.Many)
    model.f = 3.0
    with pytest.raises(StructureError, match=r"f: 3\.0, rebuilt 2\.0"):
        save(model)
    assert list(tmp_path.iterdir()) == []
    expected = model(torch.tensor(X["x"])).detach().numpy()
    pickled = save(model, "pickled", allow_pickle=True)
    assert kind_of(pickled) == "pickle"
    again = seeded(lambda: code.Many(1.5))
    assert save(again, "arguments", init_args={"factor": 1.5}).module.f == 3.0
    assert pickled.module.f == 3.0
    assert np.array_equal(pickled.predict(X)["output_0"], expected)


def test_a_graph_keeps_it(save, code):
    model = seeded(code.Many)
    model.f, model.made = 3.0, abs
    found = save(model, graph="only").predict(X)["output_0"]
    assert np.array_equal(found, model(torch.tensor(X["x"])).detach().numpy())


def test_training_and_bookkeeping_are_no_difference(tiny_bert):
    model = tiny_bert()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # has another name in the latest transformers
        model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model._weight_conversions = []  # which from_pretrained leaves
    model(input_ids=torch.tensor([[2, 3]]), labels=torch.tensor([1]))
    model.config.use_cache, model.hf_device_map, model.model_tags = False, {"": 0}, ["mine"]
    model.generation_config, model.bert.embeddings.dropout.p = None, 0.5
    model.bert.embeddings.word_embeddings.padding_idx = 3
    # which a loss sets in the config that is saved
    new = tiny_bert(problem_type=model.config.problem_type)
    assert list(find_differences(model, new)) == []


def test_a_resized_vocabulary_is_no_difference(tmp_path, tiny_bert, tiny_tokenizer):
    """``resize_token_embeddings`` leaves ``vocab_size`` on the model; the constructor does not."""
    model = tiny_bert()
    tiny_tokenizer.add_tokens(["more"])
    model.resize_token_embeddings(len(tiny_tokenizer))
    mlflow_safeflavor.save_model(
        model, tmp_path / "model", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    module: Any = mlflow_safeflavor.load_model(str(tmp_path / "model")).module
    assert module.config.vocab_size == len(tiny_tokenizer)


def test_a_head_that_was_replaced_with_its_config_is_no_difference(
    tmp_path, tiny_bert, tiny_tokenizer
):
    """``num_labels`` of the model stays what it was then; a loss would read it."""
    model = tiny_bert()
    model.classifier = nn.Linear(model.config.hidden_size, 3)
    model.config.num_labels = 3
    assert model.num_labels == 2
    mlflow_safeflavor.save_model(
        model, tmp_path / "model", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    found = mlflow_safeflavor.load_model(str(tmp_path / "model")).predict(
        ["a"], params={"top_k": None}
    )
    assert len(found["labels"][0]) == 3


def test_a_tokenizer_that_was_used_is_as_it_was(code, tiny_tokenizer):
    def make():
        module = code.Pre()
        module.tokenizer, module.draw = copy.deepcopy(tiny_tokenizer), random.Random(1)
        return module

    used, new = make(), make()
    used.tokenizer(
        ["the cat", "a"], padding=True, truncation=True, max_length=4, return_tensors="pt"
    )
    used.draw.random()
    assert list(find_differences(used, new)) == []
    used.tokenizer.add_tokens(["dachshund"])
    assert any(d.path.startswith("tokenizer.") for d in find_differences(used, new))


def test_a_changed_attribute_of_a_library_class_is_named_where_it_is_read(tiny_bert):
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.scaling = 0.5
    model.bert.pooler.activation = nn.ReLU()
    names = [d.path for d in find_differences(model, tiny_bert())]
    assert names == ["bert.encoder.layer.0.attention.self.scaling", "bert.pooler.activation"]


# What a forward leaves behind


def test_what_a_forward_makes_anew_is_not_saved(save, code, caplog):
    model = seeded(code.Keeps)
    model(torch.ones(5, 1))
    with caplog.at_level(logging.INFO, logger="mlflow.safeflavor"):
        loaded = save(model)
    assert "not saved, because a forward makes it anew: attn, cache, calls" in caplog.text
    assert model.calls == 1, "the module that was handed over was run for this"
    assert np.array_equal(
        loaded.predict(X)["output_0"], model(torch.tensor(X["x"])).detach().numpy()
    )


def test_beside_what_a_forward_makes_anew_the_rest_is_named(save, code):
    model = seeded(code.Keeps)
    model(torch.ones(5, 1))
    model.unit = 2
    with pytest.raises(StructureError) as caught:
        save(model)
    assert str(caught.value.found) == "unit: 2, rebuilt 1"


def test_a_note_of_what_a_forward_did_to_the_weights_goes_with_them(code):
    """RWKV divides weights by powers of two in its first forward, and must not do so again."""
    config = transformers.RwkvConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=8, attention_hidden_size=8
    )
    model = seeded(lambda: transformers.RwkvModel(config))
    ids = torch.ones(1, 3, dtype=torch.long)
    model(ids)
    before = model.blocks[7].attention.output.weight.detach().clone()
    with pytest.raises(StructureError, match="layers_are_rescaled: True, rebuilt False"):
        structure.describe(Subject.of(model), forward=lambda module: module(ids))
    assert torch.equal(model.blocks[7].attention.output.weight, before)


def test_a_forward_that_fails_excuses_nothing(code):
    model = seeded(code.Keeps)
    model(torch.ones(5, 1))
    with pytest.raises(StructureError, match="calls: 1, rebuilt 0"):
        structure.describe(Subject.of(model), forward=lambda module: module(torch.ones(2, 3)))


ROPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "bos_token_id": 2,
}


def _phi3():
    from transformers import Phi3Config, Phi3ForSequenceClassification

    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "rope_theta": 1e4,
    }
    rope |= {"factor": 8.0, "original_max_position_embeddings": 8}
    return Phi3ForSequenceClassification(
        Phi3Config(**ROPE, max_position_embeddings=64, rope_parameters=rope)
    )


def _llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return LlamaForSequenceClassification(
        LlamaConfig(**ROPE, max_position_embeddings=8, rope_parameters=rope)
    )


@pytest.mark.skipif(
    int(__import__("importlib.metadata").metadata.version("transformers").partition(".")[0]) < 5,
    reason="rope_parameters",
)
@pytest.mark.parametrize("length", [4, 24])
@pytest.mark.parametrize("make", [_phi3, _llama], ids=["longrope", "dynamic"])
def test_rope_caches_are_no_damage_and_no_change(save, tiny_tokenizer, make, length):
    model, new = seeded(make), seeded(make)
    model(input_ids=torch.ones(1, length, dtype=torch.long))
    options = {"task": None, "tokenizer": tiny_tokenizer, "input_example": None, "code_paths": None}
    rows = [{"text": "the cat"}, {"text": "the cat sat on the mat under a tree " * 3}]
    used, unused = (
        save(model, "used", **options).predict(rows),
        save(new, "unused", **options).predict(rows),
    )
    assert used.to_dict() == unused.to_dict(), (
        "the model remembers what it was asked before it was saved"
    )


# Lazy modules


def test_a_lazy_module_that_ran_is_an_ordinary_one(save, code):
    model = seeded(code.Lazy)
    model.train()(torch.randn(6, 1))
    loaded = save(model.eval())
    assert np.array_equal(
        loaded.predict(X)["output_0"], model(torch.tensor(X["x"])).detach().numpy()
    )
    assert loaded.report.bit_identical
    assert type(loaded.module.body[0]) is nn.Linear
    assert loaded.module.body[0].in_features == 1


@pytest.mark.parametrize("options", [{}, {"allow_pickle": True}, {"graph": "only"}], ids=str)
def test_a_lazy_module_that_never_ran_is_named(save, code, options):
    with pytest.raises(StructureError, match="no forward has made") as caught:
        save(code.Lazy(), **options)
    assert "body.0.weight" in str(caught.value.where)


# Wrappers of training

_COMPILES = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


@_COMPILES
def test_wrappers_that_answer_the_same_are_taken_off(save, code, caplog):
    model = seeded(code.Alarm)
    # as Lightning leaves them, the first wherever it was imported
    model._compile_kwargs, model._hparams = {}, {}
    for name, wrapped in {
        "compiled": torch.compile(model),
        "parallel": nn.DataParallel(model),
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "both": nn.DataParallel(cast("nn.Module", torch.compile(model))),
    }.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mlflow.safeflavor"):
            loaded = save(wrapped, name)
        assert type(loaded.module).__name__ == "Alarm"
        assert "is taken off" in caplog.text


def _autocast(model):
    from accelerate.utils.operations import convert_outputs_to_fp32

    model._original_forward = model.forward  # as Accelerator.prepare does it
    forward = convert_outputs_to_fp32(torch.autocast("cpu")(model.forward.__func__))
    model.forward = types.MethodType(forward, model)
    model._is_accelerate_prepared = True


def _autocast_off(model):
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


WRAPPED = {
    "autocast": (_autocast, "extract_model_from_parallel(model, "
                            "keep_fp32_wrapper=False)", _autocast_off),
    "compiled part": (
        lambda m: setattr(m, "layer", torch.compile(m.layer)), "model.layer = "
                                                               "model.layer._orig_mod", None,
    ),
    "compiled in place": (lambda m: m.compile(), "model._compiled_call_impl = None", None),
    "weight norm": (
        lambda m: parametrizations.weight_norm(m.layer),
        'torch.nn.utils.parametrize.remove_parametrizations(model.layer, "weight")', None,
    ),
    "spectral norm": (
        lambda m: parametrizations.spectral_norm(m.layer),
        'torch.nn.utils.parametrize.remove_parametrizations(model.layer, "weight")', None,
    ),
    "pruned": (
        lambda m: prune.l1_unstructured(m.layer, "weight", 0.5),
        'torch.nn.utils.prune.remove(model.layer, "weight")', None,
    ),
}  # fmt: skip


@_COMPILES
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_named_with_the_line_that_takes_them_off(save, code, name):
    pytest.importorskip("accelerate")
    wrap, line, unwrap = WRAPPED[name]
    model = seeded(code.Alarm)
    wrap(model)
    with pytest.raises(StructureError) as caught:
        save(model)
    assert line in str(caught.value.hint)
    if unwrap is None:
        exec(line, {"torch": torch, "model": model})
    else:
        model = unwrap(model)
    loaded = save(model)
    assert loaded.predict(X)["alarm"].tolist() == model(torch.tensor(X["x"]))["alarm"].tolist()


def test_a_model_of_transformers_that_was_unwrapped_is_as_it_was(tiny_bert):
    """accelerate leaves the innermost forward on the instance, without transformers' decorators."""
    pytest.importorskip("accelerate")
    model = tiny_bert()
    _autocast(model)
    with pytest.raises(StructureError, match="mixed precision"):
        require_plain(model)
    model = _autocast_off(model)
    assert "forward" in vars(model)
    require_plain(model)
    assert list(find_differences(model, tiny_bert())) == []
    model.forward = functools.wraps(model.forward)(lambda *args, **kwargs: None)
    assert [d.path for d in find_differences(model, tiny_bert())] == ["forward"]


class _Quantised(nn.Module):
    is_quantized = True


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still handed over
        return torch.jit.script(nn.Linear(1, 1))


def _of(name: str) -> type[nn.Module]:
    """A module as if of a library that is not installed here."""
    module, _, qualname = name.partition(":")
    return type(qualname, (nn.Linear,), {"__module__": module})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_scripted, "save the module that was scripted"),
        (_Quantised, "before quantising it"),
        (
            lambda: nn.Sequential(_of("bitsandbytes.nn.modules:Linear8bitLt")(1, 1)),
            "before quantising it",
        ),
        (lambda: _of("peft.peft_model:PeftModel")(1, 1), "merge_and_unload()"),
        (lambda: nn.Sequential(_of("peft.tuners.lora.layer:Linear")(1, 1)), "merge_and_unload()"),
        (
            lambda: _of("torch.distributed.fsdp.fully_sharded_data_parallel:FSDP")(1, 1),
            "full_state_dict=True",
        ),
    ],
    ids=["script", "quantised", "bitsandbytes", "peft", "native adapters", "fsdp"],
)
def test_what_cannot_be_taken_off_is_named(save, make, words):
    with pytest.raises(StructureError) as caught:
        save(make(), allow_pickle=True)
    assert words in str(caught.value.hint)


def test_a_lightning_module_with_its_trainer_is_named(save):
    model: Any = _of("lightning.pytorch.core.module:LightningModule")(1, 1)
    model._trainer = object()
    with pytest.raises(StructureError) as caught:
        save(model, allow_pickle=True)
    assert "model._trainer = None" in str(caught.value.hint)
