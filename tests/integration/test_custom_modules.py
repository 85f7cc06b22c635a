"""Modules of the user's own.

Imported or pickled, with hooks or raw arrays, and only where somebody agreed.
"""

from __future__ import annotations

import functools
import json
import pickletools
import shutil
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import seeded
from artifacts import edit_json, reseal
from memory import all_bits, memory
from safetensors import safe_open
from torch import nn
from transformers import BertConfig

import mlflow_safeflavor
from mlflow_safeflavor.errors import (
    InputError,
    IntegrityError,
    ParityError,
    RehearsalError,
    StructureError,
    TrustError,
)
from mlflow_safeflavor.module.slots import find_slots

pytest_plugins = "saved_models"

BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
IDS = {
    "input_ids": np.array([[2, 5, 9, 3], [2, 7, 3, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
}
X = {"x": np.array([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0]], dtype=np.float32)}
ROWS = [{"a": 1.0, "b": 2.0}, {"a": -3.0, "b": 0.5}]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Imports and paths of one test are none of another's; and nobody has allowed pickles."""
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith(("torch", "transformers", "mlflow", "numpy", "pandas")):
            del sys.modules[name]


def forget(*files: str) -> None:
    """As in another process on another machine: neither imported nor there."""
    for file in map(Path, files):
        sys.modules.pop(file.stem, None)
        sys.path[:] = [path for path in sys.path if path != str(file.parent)]
        file.unlink()


def answer(module: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a module says without any of this package."""
    with torch.inference_mode():
        found = module(**{name: torch.tensor(array) for name, array in arrays.items()})
    return (
        {"output_0": found.numpy()}
        if isinstance(found, torch.Tensor)
        else {k: v.numpy() for k, v in found.items()}
    )


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), f"{name} is another"


@pytest.fixture
def save(tmp_path):
    def run(model, name="model", **options):
        path = tmp_path / "store" / name
        mlflow_safeflavor.save_model(
            model, path, **{"graph": "no", "rehearse": False, "task": "raw", **options}
        )
        return path

    return run


def load(path, *trust: str, **options):
    return mlflow_safeflavor.load_model(str(path), trust=set(trust), **options)


def structure_of(path: Path):
    return json.loads((path / "safeflavor" / "structure.json").read_text())


NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, hidden, act="relu", *, scales=(1, 2)):
            super().__init__()
            self.first, self.second = nn.Linear(4, hidden), nn.Linear(hidden, 3)
            self.act = getattr(torch, act)
            self.table = [torch.randn(3), (torch.arange(3.0),)]
            self.scales = tuple(scales)
            self.register_buffer("steps", torch.linspace(0, 1, 3), persistent=False)

        def forward(self, x):
            y = self.second(self.act(self.first(x)))
            return {"y": y * self.scales[0] + self.table[0], "z": y + self.steps * self.table[1][0]}
"""


# Kind import: nn.Module with arguments


def test_a_module_with_arguments_comes_from_the_artifacts_own_code(save, user_code):
    code, file = user_code("own_net", NET)
    model = seeded(lambda: code.Net(8, act="tanh", scales=[3, 4]))
    expected, before = answer(model, X), all_bits(model)
    path = save(
        model,
        init_args={"hidden": 8, "act": "tanh", "scales": [3, 4]},
        code_paths=[file],
        input_example=X,
    )
    forget(file)
    loaded = load(path, "code")
    assert Path(str(sys.modules["own_net"].__file__)).parent == path / "code"
    assert structure_of(path)["kind"] == "import"
    assert loaded.spec.runs == ("code",)
    assert all_bits(loaded.module) == before
    same(loaded.predict(X), expected)
    assert loaded.report.bit_identical
    assert not loaded.module.training
    assert not (path / "safeflavor" / "structure.pkl").exists()


def test_pyfunc_answers_the_same(save, user_code):
    """Under pyfunc MLflow has put the code on the path.

    Loading through it is the agreement to run it.
    """
    code, file = user_code("own_net", NET)
    model = seeded(lambda: code.Net(8))
    expected = answer(model, X)
    path = save(model, init_args={"hidden": 8}, code_paths=[file], input_example=X)
    forget(file)
    same(mlflow.pyfunc.load_model(str(path)).predict(X), expected)


def test_code_needs_trust_and_nothing_of_it_runs_before(save, user_code, tmp_path):
    code, file = user_code("canary_net", NET + "\n    RAN = True\n")
    path = save(
        seeded(lambda: code.Net(8)), init_args={"hidden": 8}, code_paths=[file], input_example=X
    )
    forget(file)
    for trust in ((), ("pickle",)):
        with pytest.raises(TrustError, match="runs its own code") as caught:
            load(path, *trust)
        assert caught.value.where == "canary_net:Net"
        assert caught.value.wanted == "trust={'code'}"
        assert "canary_net" not in sys.modules, "the code ran before anybody agreed"
        assert not any(str(path) in entry for entry in sys.path), (
            "the code can be imported before anybody agreed"
        )


@pytest.mark.parametrize("trust", [{"kode"}, {"code", "all"}], ids=["unknown", "one unknown"])
def test_trust_in_something_that_does_not_exist(save, user_code, trust):
    code, file = user_code("own_net", NET)
    path = save(
        seeded(lambda: code.Net(8)), init_args={"hidden": 8}, code_paths=[file], input_example=X
    )
    with pytest.raises(TrustError, match="Unknown kind of trust"):
        mlflow_safeflavor.load_model(str(path), trust=trust)


def test_a_config_among_the_arguments(save, user_code):
    code, file = user_code(
        "with_config",
        """
        from torch import nn
        from transformers import BertModel

        class Scorer(nn.Module):
            def __init__(self, labels, encoder_config=None):
                super().__init__()
                self.encoder = BertModel(encoder_config, add_pooling_layer=False)
                self.head = nn.Linear(encoder_config.hidden_size, labels)

            def forward(self, input_ids, attention_mask):
                states = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
                return self.head(states[:, 0])
        """,
    )
    config = BertConfig(**BERT)
    model = seeded(lambda: code.Scorer(5, encoder_config=config))
    expected = answer(model, IDS)
    path = save(
        model,
        init_args={"labels": 5, "encoder_config": config},
        code_paths=[file],
        input_example=IDS,
    )
    forget(file)
    loaded = load(path, "code")
    same(loaded.predict(IDS), expected)
    assert type(loaded.module.encoder.config) is BertConfig
    stored = structure_of(path)["arguments"]["encoder_config"]
    assert stored["config_class"].endswith(":BertConfig")
    assert stored["config"]["vocab_size"] == 40


def test_a_pretrained_model_of_the_users_own(save, user_code):
    code, file = user_code(
        "own_pretrained",
        """
        import torch
        from torch import nn
        from transformers import BertConfig, BertModel, PreTrainedModel

        class OwnConfig(BertConfig):
            model_type = "own-bert"

            def __init__(self, heads=2, **kwargs):
                self.heads = heads
                super().__init__(**kwargs)

        class OwnModel(PreTrainedModel):
            config_class = OwnConfig

            def __init__(self, config, extra=False):
                super().__init__(config)
                self.bert = BertModel(config)
                self.out = nn.Linear(config.hidden_size, config.heads)
                self.extra = nn.Linear(config.heads, config.heads) if extra else nn.Identity()
                self.register_buffer("scale", torch.linspace(1, 2, config.heads), persistent=False)
                self.post_init()

            def forward(self, input_ids, attention_mask=None):
                hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
                return self.extra(self.out(hidden)) * self.scale
        """,
    )
    model = seeded(lambda: code.OwnModel(code.OwnConfig(heads=3, **BERT), extra=True))
    expected = answer(model, IDS)
    path = save(model, code_paths=[file], input_example=IDS)
    forget(file)
    loaded = load(path, "code")
    same(loaded.predict(IDS), expected)
    assert loaded.module.config.heads == 3
    assert structure_of(path)["arguments"] == {"extra": {"value": True}}, (
        "a flag that decides the structure"
    )


def test_a_class_of_an_installed_package_is_pinned(save, tmp_path):
    site = tmp_path / "site"
    (site / "acme_heads").mkdir(parents=True)
    (site / "acme_heads" / "__init__.py").write_text(textwrap.dedent(NET))
    info = site / "acme_heads-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-heads\nVersion: 1.5\n")
    (info / "INSTALLER").write_text("pip")
    (info / "RECORD").write_text("acme_heads/__init__.py,,\nacme_heads-1.5.dist-info/METADATA,,\n")
    sys.path.insert(0, str(site))
    import acme_heads

    model = seeded(lambda: acme_heads.Net(8))
    path = save(model, init_args={"hidden": 8}, input_example=X)
    assert "acme-heads==1.5" in (path / "requirements.txt").read_text().split()
    assert not list((path / "code").glob("acme*"))
    with pytest.raises(TrustError):
        load(path)
    same(load(path, "code").predict(X), answer(model, X))
    sys.path.remove(str(site))
    sys.modules.pop("acme_heads")
    with pytest.raises(StructureError, match="own code cannot be imported") as caught:
        load(path, "code", environment="ignore")
    assert caught.value.where == "acme_heads:Net"


@pytest.mark.parametrize(
    ("init_args", "what"),
    [
        ({"hidden": 9}, "does not give back the module"),
        ({"hidden": "many"}, "constructor of the model failed"),
        ({}, "constructor of the model failed"),
        ({"hidden": 8, "act": torch.relu}, "cannot be stored as JSON"),
        ({"hidden": 8, "scales": {1, 2}}, "cannot be stored as JSON"),
        ({"hidden": float("nan")}, "cannot be stored as JSON"),
    ],
    ids=["wrong size", "wrong kind", "missing", "function", "set", "nan"],
)
def test_arguments_that_do_not_give_back_the_module(save, user_code, tmp_path, init_args, what):
    code, file = user_code("own_net", NET)
    with pytest.raises(StructureError, match=what):
        save(seeded(lambda: code.Net(8)), init_args=init_args, code_paths=[file], input_example=X)
    assert not (tmp_path / "store" / "model").exists()


def test_a_module_that_was_changed_after_it_was_made(save, user_code):
    code, file = user_code("own_net", NET)
    model: Any = seeded(lambda: code.Net(8))
    model.second = nn.Sequential(model.second, nn.Linear(3, 3))
    with pytest.raises(StructureError, match="changed after it was made") as caught:
        save(model, init_args={"hidden": 8}, code_paths=[file], input_example=X)
    assert "second" in str(caught.value.where)


def test_the_hint_of_missing_arguments_names_both_ways(save, user_code):
    code, file = user_code("own_net", NET)
    with pytest.raises(StructureError) as caught:
        save(seeded(lambda: code.Net(8)), code_paths=[file], input_example=X)
    assert "init_args" in str(caught.value.hint)
    assert "allow_pickle=True" in str(caught.value.hint)


def test_modules_of_one_name_and_other_content_do_not_mix(save, user_code, tmp_path):
    code, file = user_code("same_name", NET)
    first = save(
        seeded(lambda: code.Net(8)),
        "first",
        init_args={"hidden": 8},
        code_paths=[file],
        input_example=X,
    )
    code, file = user_code("same_name", NET.replace("self.scales[0]", "self.scales[1]"))
    second = save(
        seeded(lambda: code.Net(8)),
        "second",
        init_args={"hidden": 8},
        code_paths=[file],
        input_example=X,
    )
    forget(file)
    assert load(second, "code").report.bit_identical
    with pytest.raises(StructureError, match="Another module of the same name") as caught:
        load(first, "code")
    assert caught.value.where == "same_name"
    assert str(caught.value.wanted) == str(first / "code" / "same_name.py")
    assert caught.value.found == str(second / "code" / "same_name.py")
    assert load(second, "code").report.bit_identical


def test_a_module_whose_name_begins_like_the_loaders_is_the_users(save, user_code):
    source = NET.replace("torch.randn(3)", "torch.randn(3) * 0")
    code, file = user_code("mlflow_safeflavor_extras", source)
    path = save(
        seeded(lambda: code.Net(8)), init_args={"hidden": 8}, code_paths=[file], input_example=X
    )
    user_code("mlflow_safeflavor_extras", source.replace("self.scales[0]", "self.scales[1]"))
    with pytest.raises(StructureError, match="Another module of the same name"):
        load(path, "code")


def test_a_package_in_code_paths(save, tmp_path):
    package = tmp_path / "src" / "own_package"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("from own_package.deep.net import Net\n")
    (package / "deep" / "net.py").write_text(textwrap.dedent(NET))
    sys.path.insert(0, str(package.parent))
    from own_package.deep import Net

    model = seeded(lambda: Net(8))
    expected = answer(model, X)
    path = save(model, init_args={"hidden": 8}, code_paths=[str(package)], input_example=X)
    shutil.rmtree(package)
    sys.path.remove(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]
    same(load(path, "code").predict(X), expected)


def test_the_loader_does_not_go_into_code_paths(save, user_code):
    code, file = user_code("own_net", NET)
    package = str(Path(mlflow_safeflavor.__file__).parent)
    with pytest.raises(InputError, match="code_paths must not hold the loader"):
        save(
            seeded(lambda: code.Net(8)),
            init_args={"hidden": 8},
            code_paths=[file, package],
            input_example=X,
        )


# Kind pickle


PREDICTOR = """
    import torch
    from torch import nn
    from transformers import AutoModel

    CALLS = []

    class Predictor(nn.Module):
        def __init__(self, checkpoint, labels=3):
            CALLS.append(checkpoint)
            super().__init__()
            self.encoder = AutoModel.from_pretrained(checkpoint)
            self.head = nn.Linear(self.encoder.config.hidden_size, labels)

        def forward(self, input_ids, attention_mask):
            hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.head(hidden[:, 0])
"""


@pytest.fixture
def predictor(user_code, tmp_path, tiny_bert):
    """The classic: encoder from a checkpoint in ``__init__``, and a head.

    With its code's file and its checkpoint.
    """
    checkpoint = tmp_path / "encoder"
    tiny_bert(None, **BERT).save_pretrained(checkpoint)
    code, file = user_code("predictor_code", PREDICTOR)
    return seeded(lambda: code.Predictor(str(checkpoint))), file, checkpoint


def test_encoder_and_head_come_back_without_the_checkpoint_and_without_init(save, predictor):
    model, file, checkpoint = predictor
    expected, bits_before = answer(model, IDS), all_bits(model)
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    shutil.rmtree(checkpoint)
    forget(file)
    loaded = load(path, "code", "pickle")
    import predictor_code

    assert Path(predictor_code.__file__).parent == path / "code"
    assert predictor_code.CALLS == [], "__init__ was called"
    assert all_bits(loaded.module) == bits_before
    same(loaded.predict(IDS), expected)
    assert loaded.spec.structure == "pickle"
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_this_is_where_other_ways_break(predictor, tmp_path):
    """What the pickle is for.

    Without its checkpoint the class cannot be called, here as anywhere.
    """
    model, _, checkpoint = predictor
    shutil.rmtree(checkpoint)
    with pytest.raises(OSError, match="encoder"):
        type(model)(str(checkpoint))


def test_a_pickle_is_made_only_where_it_was_allowed(save, predictor, tmp_path):
    model, file, _ = predictor
    with pytest.raises(StructureError) as caught:
        save(model, code_paths=[file], input_example=IDS)
    assert "allow_pickle=True" in str(caught.value.hint)
    assert not (tmp_path / "store" / "model").exists()


def test_a_constructor_that_gives_the_module_back_is_preferred_to_a_pickle(save, user_code):
    code, file = user_code("plain_net", NET.replace("hidden, act", "hidden=8, act"))
    path = save(seeded(code.Net), allow_pickle=True, code_paths=[file], input_example=X)
    assert structure_of(path)["kind"] == "import"
    assert not (path / "safeflavor" / "structure.pkl").exists()


def test_a_constructor_that_loads_a_checkpoint_is_no_way_to_give_the_module_back(
    save, user_code, predictor
):
    _, _, checkpoint = predictor
    code, file = user_code(
        "loads", PREDICTOR.replace("checkpoint, labels", f"checkpoint={str(checkpoint)!r}, labels")
    )
    model = seeded(code.Predictor)
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    shutil.rmtree(checkpoint)
    assert structure_of(path)["kind"] == "pickle"
    assert f"read {checkpoint}" in structure_of(path)["reason"]
    same(load(path, "code", "pickle").predict(IDS), answer(model, IDS))


def test_a_pickle_needs_trust_natively(save, predictor):
    model, file, _ = predictor
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    forget(file)
    for trust in ((), ("code",)):
        with pytest.raises(TrustError, match="runs its own pickle") as caught:
            load(path, *trust)
        assert caught.value.wanted == "trust={'pickle'}"
        assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION" in str(caught.value.hint)
        assert "predictor_code" not in sys.modules, "something of it ran before anybody agreed"


@pytest.mark.parametrize("value", [None, "false", "0", ""])
def test_a_pickle_needs_an_explicit_yes_under_pyfunc(save, predictor, monkeypatch, value):
    """MLflow's own default is yes."""
    model, file, _ = predictor
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    if value is not None:
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", value)
    with pytest.raises(mlflow.MlflowException, match=r"(?i)pickle"):
        mlflow.pyfunc.load_model(str(path))


@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_with_an_explicit_yes_pyfunc_loads_it(save, predictor, monkeypatch, value):
    model, file, checkpoint = predictor
    expected = answer(model, IDS)
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    shutil.rmtree(checkpoint)
    forget(file)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", value)
    same(mlflow.pyfunc.load_model(str(path)).predict(IDS), expected)


def in_main(monkeypatch, source: str, name: str):
    """A class as a notebook or script defines it."""
    main = type(sys)("__main__")
    exec(textwrap.dedent(source), main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    return getattr(main, name)


def test_a_class_of_a_notebook(save, monkeypatch):
    notebook = in_main(monkeypatch, NET, "Net")
    model = seeded(lambda: notebook(8))
    expected = answer(model, X)
    with pytest.raises(StructureError, match="cannot be imported anywhere else") as caught:
        save(model, init_args={"hidden": 8}, input_example=X)
    assert caught.value.where == "__main__:Net"
    assert "code_paths" in str(caught.value.hint)
    path = save(model, allow_pickle=True, input_example=X)
    monkeypatch.undo()  # another __main__, without that class
    same(load(path, "pickle").predict(X), expected)


def test_a_class_in_a_function_with_tensors_in_its_closure(save):
    offset = torch.full((3,), 0.25)

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.holder = {"plain": Plain()}

        def forward(self, x):
            return self.layer(x) * self.holder["plain"].factor + offset

    class Plain:
        factor = None

        def __init__(self):
            self.factor = torch.full((3,), 1.5)

    model = seeded(Local)
    expected = answer(model, X)
    path = save(model, allow_pickle=True, input_example=X)
    same(load(path, "pickle").predict(X), expected)
    with safe_open(path / "safeflavor" / "model.safetensors", framework="pt") as file:
        hidden = {name: file.get_tensor(name) for name in file.keys() if name.startswith("<hidden")}  # noqa: SIM118
    assert sorted(tensor[0].item() for tensor in hidden.values()) == [0.25, 1.5]


def opcodes(path: Path) -> tuple[list[str], int, int]:
    """Names that the pickle imports, how many tensors it asks for, and its size."""
    content = (path / "safeflavor" / "structure.pkl").read_bytes()
    strings: list[Any] = []
    names: list[Any] = []
    tensors = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE"):
            strings.append(argument)
        elif opcode.name == "STACK_GLOBAL":
            names.append(" ".join(strings[-2:]))
        elif opcode.name == "GLOBAL":
            names.append(argument)
        tensors += opcode.name == "BINPERSID"
    return names, tensors, len(content)


def test_no_tensor_is_in_the_pickle(save, predictor):
    model, file, _ = predictor
    marker = np.float32(-1234.5678)
    model.encoder.embeddings.word_embeddings.weight.data.fill_(float(marker))
    closed_over = torch.full((500,), 8765.4321)
    model.register_forward_hook(lambda module, args, output: output + closed_over[:3])
    expected = answer(model, IDS)
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    same(load(path, "code", "pickle").predict(IDS), expected)
    names, tensors, size = opcodes(path)
    assert tensors == len({id(slot.tensor) for slot in find_slots(model)}) + 1
    bad = [
        name
        for name in names
        if "storage" in name.lower() or "_rebuild_" in name or name == "torch Tensor"
    ]
    assert bad == [], "the pickle builds tensors itself"
    pickled = (path / "safeflavor" / "structure.pkl").read_bytes()
    weights = (path / "safeflavor" / "model.safetensors").read_bytes()
    for number in (marker, np.float32(8765.4321)):
        assert number.tobytes() * 3 not in pickled
        assert number.tobytes() * 3 in weights
    assert size < 40_000


def test_the_pickle_does_not_grow_with_the_weights(save):
    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(4, width)
            self.kept = [torch.randn(width)]

        def forward(self, x):
            return self.layer(x) + self.kept[0]

    sizes = [
        opcodes(save(seeded(partial(Wide, w)), f"wide{w}", allow_pickle=True, input_example=X))[2]
        for w in (10, 50_000)
    ]
    assert abs(sizes[1] - sizes[0]) < 100


def test_sharing_of_memory_survives_the_pickle(save, monkeypatch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight
            self.base: torch.Tensor
            self.register_buffer("base", torch.arange(8.0))
            self.view = self.base[2:6]
            self.recurrent = nn.LSTM(4, 4)

        def forward(self, x):
            return self.head(self.recurrent(x)[0]) + self.view.sum()

    model = seeded(Tied)
    expected, before = answer(model, X), memory(model)
    loaded = load(save(model, allow_pickle=True, input_example=X), "pickle")
    assert memory(loaded.module) == before
    assert loaded.module.head.weight is loaded.module.embedding.weight
    same(loaded.predict(X), expected)


def test_a_buffer_that_is_part_of_a_hidden_tensor(save):
    class Held:
        all: torch.Tensor

    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = Held()
            self.held.all = torch.arange(12.0)
            self.register_buffer("part", self.held.all[4:8])
            self.every = self.held.all[1::3]

        def forward(self, x):
            return x * self.part + self.held.all[:4] + self.every

    model = seeded(Partial)
    expected = answer(model, X)
    loaded = load(save(model, allow_pickle=True, input_example=X), "pickle")
    same(loaded.predict(X), expected)
    assert loaded.module.part.data_ptr() == loaded.module.held.all[4:].data_ptr()


def test_what_cannot_be_pickled_is_named(save, tmp_path):
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.lock = nn.Linear(4, 3), threading.Lock()

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(StructureError, match="cannot be pickled") as caught:
        save(Locked(), allow_pickle=True, input_example=X)
    assert "lock" in str(caught.value.found)
    assert "lock" in str(caught.value.hint)
    assert not (tmp_path / "store" / "model").exists()


def test_a_pickle_of_another_python_is_refused(save, predictor):
    model, file, _ = predictor
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    edit_json(
        path / "safeflavor" / "structure.json",
        lambda content: content["pickle"].update(python="3.9"),
    )
    reseal(path)
    with pytest.raises(StructureError, match="byte code of another Python") as caught:
        load(path, "code", "pickle")
    assert caught.value.wanted == "Python 3.9"
    assert caught.value.found == "Python {}.{}".format(*sys.version_info)
    assert "code_paths" in str(caught.value.hint)


@pytest.mark.parametrize(
    "tensors", [[], ["head.weight"], ["nowhere"], None, "head.weight", [1], [["a"]]], ids=str
)
def test_a_damaged_list_of_tensors(save, predictor, tensors):
    model, file, _ = predictor
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS)
    edit_json(
        path / "safeflavor" / "structure.json",
        lambda content: content["pickle"].update(tensors=tensors),
    )
    reseal(path)
    with pytest.raises((IntegrityError, StructureError)):
        load(path, "code", "pickle")


def test_a_pickle_whose_code_is_gone_is_named(save, predictor):
    model, file, _ = predictor
    path = save(model, allow_pickle=True, input_example=IDS)  # without code_paths
    forget(file)
    with pytest.raises(StructureError, match="cannot be unpickled here") as caught:
        load(path, "code", "pickle")
    assert "predictor_code" in str(caught.value.found)
    assert "code_paths" in str(caught.value.hint)


def test_parametrized_modules_refuse_to_be_pickled(save):
    """Torch's own rule; with a constructor that parametrizes they can be saved by import."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(StructureError, match="The module is parametrized") as caught:
        save(seeded(Normed), allow_pickle=True, input_example=X)
    assert 'remove_parametrizations(model.layer, "weight")' in str(caught.value.hint)


# The custom task


HOOKS = """
    import threading
    import torch

    SIZES = []

    def pre(rows, tokenizer):
        SIZES.append(len(rows))
        return {"x": torch.tensor([[row["a"], row["b"], 0.0, 1.0] for row in rows])}

    def post(outputs, rows):
        return [{"score": float(y.sum()), "a": row["a"]} for y, row in zip(outputs["y"], rows)]

    class Methods:
        def __init__(self, factor):
            self.factor = factor

        def pre(self, rows, tokenizer):
            return {name: value * self.factor for name, value in pre(rows, tokenizer).items()}

        @classmethod
        def post(cls, outputs, rows):
            return post(outputs, rows)
"""


@pytest.fixture
def hooked(user_code, save):
    """``hooked(**options)``: a saved model with the custom task.

    Gives its path, its code and a reference answer.

    ``choose`` gives further options, from the module that the hooks are in.
    """

    def make(choose=None, **options):
        net, net_file = user_code("hooked_net", NET)
        hooks, hooks_file = user_code("hooked_hooks", HOOKS)
        model = seeded(lambda: net.Net(8))

        def expected(rows, pre=hooks.pre):
            with torch.inference_mode():
                outputs = [model(**pre([row], None)) for row in rows]
            return [
                post[0]
                for post in (hooks.post(o, [row]) for o, row in zip(outputs, rows, strict=True))
            ]

        options = {
            "preprocess": hooks.pre,
            "postprocess": hooks.post,
            "input_example": ROWS,
            **options,
        }
        options |= choose(hooks) if choose else {}
        path = save(
            model,
            task="custom",
            init_args={"hidden": 8},
            code_paths=[net_file, hooks_file],
            **options,
        )
        return path, hooks, expected

    return make


def close(frame: pd.DataFrame, expected) -> None:
    assert frame["a"].tolist() == [row["a"] for row in expected], "rows are not in the order asked"
    assert frame["score"].tolist() == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_importable_hooks(hooked):
    path, _, expected = hooked()
    assert structure_of(path)["hooks"] == {
        "preprocess": "hooked_hooks:pre",
        "postprocess": "hooked_hooks:post",
    }
    loaded = load(path, "code")
    close(loaded.predict(ROWS), expected(ROWS))
    close(mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame(ROWS)), expected(ROWS))
    with pytest.raises(TrustError):
        load(path)


def test_pickled_hooks_beside_an_imported_module(hooked):
    shift = torch.full((4,), 0.5)

    def pre(rows, tokenizer):
        return {"x": torch.tensor([[row["a"], row["b"], 0.0, 1.0] for row in rows]) + shift}

    with pytest.raises(StructureError, match="hook cannot be imported") as caught:
        hooked(preprocess=pre)
    assert caught.value.where == "preprocess"
    assert "allow_pickle=True" in str(caught.value.hint)
    path, _, expected = hooked(preprocess=pre, allow_pickle=True)
    assert structure_of(path)["kind"] == "import"
    assert structure_of(path)["hooks"] == {"preprocess": None, "postprocess": "hooked_hooks:post"}
    with safe_open(path / "safeflavor" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("<hidden 0>"), shift), (
            "the closure's tensor belongs into the file"
        )
    loaded = load(path, "code", "pickle")
    assert loaded.spec.runs == ("code", "pickle")
    close(loaded.predict(ROWS), expected(ROWS, pre))
    for trust in ({"code"}, {"pickle"}):
        with pytest.raises(TrustError):
            mlflow_safeflavor.load_model(str(path), trust=trust)


def test_a_method_of_an_object_is_not_its_function(hooked):
    """Its name gives back a function without the object, so it has to be pickled."""

    def choose(hooks):
        return {"preprocess": hooks.Methods(2.0).pre}

    with pytest.raises(StructureError, match="hook cannot be imported"):
        hooked(choose)
    path, hooks, expected = hooked(choose, allow_pickle=True)
    close(load(path, "code", "pickle").predict(ROWS), expected(ROWS, hooks.Methods(2.0).pre))


def test_a_class_method_is_importable(hooked):
    path, _, expected = hooked(lambda hooks: {"postprocess": hooks.Methods.post})
    assert structure_of(path)["hooks"]["postprocess"] == "hooked_hooks:Methods.post"
    close(load(path, "code").predict(ROWS), expected(ROWS))


def test_a_wrapped_function_is_not_the_function_of_its_name(hooked):
    """functools.wraps gives it the name of the other.

    Importing that would quietly drop the wrapper.
    """

    def choose(hooks):
        @functools.wraps(hooks.pre)
        def doubled(rows, tokenizer):
            return {name: 2 * value for name, value in hooks.pre(rows, tokenizer).items()}

        assert (doubled.__module__, doubled.__qualname__) == ("hooked_hooks", "pre")
        return {"preprocess": doubled}

    with pytest.raises(StructureError, match="hook cannot be imported"):
        hooked(choose)


def test_lambdas_and_a_whole_pickled_model(save):
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x)

    path = save(
        seeded(Local),
        task="custom",
        allow_pickle=True,
        input_example=ROWS,
        preprocess=lambda rows, tokenizer: {
            "x": torch.tensor([[row["a"], row["b"]] for row in rows])
        },
        postprocess=lambda outputs, rows: [
            {"sum": float(row.sum())} for row in outputs["output_0"]
        ],
    )
    loaded = load(path, "pickle")
    assert loaded.spec.runs == ("pickle",)
    with torch.inference_mode():
        expected = seeded(Local)(torch.tensor([[1.0, 2.0], [-3.0, 0.5]])).sum(dim=1)
    assert loaded.predict(ROWS)["sum"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_hooks_and_module_share_the_tensors_of_two_pickles(save):
    """Both reach a tensor that is none of the module's, and each has one of its own."""
    shared, own = torch.full((3,), 2.0), torch.full((3,), 3.0)

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.extra = lambda y: y * shared + own

        def forward(self, x):
            return self.extra(self.layer(x))

    model, factor = seeded(Local), torch.full((3,), 5.0)
    path = save(
        model,
        task="custom",
        allow_pickle=True,
        preprocess=lambda rows, tokenizer: {
            "x": torch.tensor([[row["a"], row["b"], 0.0, 1.0] for row in rows])
        },
        postprocess=lambda outputs, rows: [
            {"score": float((torch.tensor(y) * factor * shared).sum())} for y in outputs["output_0"]
        ],
        input_example=ROWS,
    )
    y = model(torch.tensor([[row["a"], row["b"], 0.0, 1.0] for row in ROWS]))
    assert load(path, "pickle").predict(ROWS)["score"].tolist() == pytest.approx(
        (y * 10).sum(-1).tolist(), rel=1e-5
    )


def test_order_is_kept_and_batches_are_as_said(hooked):
    path, hooks, expected = hooked(model_config={"batch_rows": 8})
    rows = [{"a": float(i), "b": float(i % 7)} for i in range(70)]
    loaded = load(path, "code")
    batches: list[int] = []

    def count(module, args, kwargs):
        batches.append(len(kwargs["x"]))

    loaded.module.register_forward_pre_hook(count, with_kwargs=True)
    hooks.SIZES.clear()
    frame = loaded.predict(pd.DataFrame(rows, index=range(100, 170)))
    assert hooks.SIZES == [70]  # hooks see all rows of a request, forward batches of them
    assert batches == [8] * 8 + [6]
    assert frame.index.tolist() == list(range(100, 170))
    close(frame, expected(rows))


@pytest.mark.parametrize("rows", [0, -1, True, 2.5, "8", None])
def test_a_batch_size_that_is_none(hooked, rows):
    with pytest.raises(InputError, match="Not a number of rows"):
        hooked(model_config={"batch_rows": rows})


def test_many_threads_at_once(hooked):
    path, _, expected = hooked(model_config={"batch_rows": 4})
    loaded = load(path, "code")
    sets = [[{"a": float(i * 10 + j), "b": float(j)} for j in range(1 + i % 9)] for i in range(48)]
    with ThreadPoolExecutor(8) as pool:
        for rows, frame in zip(sets, pool.map(loaded.predict, sets), strict=True):
            close(frame, expected(rows))


def test_hooks_get_the_tokenizer_that_was_saved(hooked, tiny_tokenizer):
    seen = []

    def pre(rows, tokenizer):
        ids = tokenizer(
            [row["text"] for row in rows], padding="max_length", max_length=4, truncation=True
        )
        seen.append(type(tokenizer).__name__)
        return {"x": torch.tensor(ids["input_ids"], dtype=torch.float32)}

    path, *_ = hooked(
        preprocess=pre,
        postprocess=lambda outputs, rows: [{"n": float(y.sum())} for y in outputs["y"]],
        input_example=[{"text": "the cat"}],
        tokenizer=tiny_tokenizer,
        allow_pickle=True,
    )
    loaded = load(path, "code", "pickle")
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert len(loaded.predict([{"text": "a dog"}, {"text": "the cat sat"}])) == 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda rows, tokenizer: torch.ones(len(rows), 4), "Tensor"),
        (lambda rows, tokenizer: {"x": [[1.0] * 4 for _ in rows]}, "x"),
        (lambda rows, tokenizer: None, "None"),
    ],
    ids=["a tensor", "lists", "nothing"],
)
def test_preprocess_that_gives_something_else(hooked, wrong, named):
    with pytest.raises(StructureError, match="preprocess must give") as caught:
        hooked(preprocess=wrong, allow_pickle=True)
    assert named in str(caught.value.found)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda outputs, rows: None, "NoneType"),
        (lambda outputs, rows: {"score": 1.0}, "dict"),
        (lambda outputs, rows: [{"score": 1.0}], "a list of 1: dict"),
        (lambda outputs, rows: [0.5 for _ in rows], "float"),
        (lambda outputs, rows: outputs["y"], "ndarray"),
        (lambda outputs, rows: "ab", "str"),
    ],
    ids=["nothing", "a dict", "too few", "numbers", "an array", "a text"],
)
def test_postprocess_that_gives_something_else(hooked, wrong, named):
    with pytest.raises(StructureError, match="postprocess must give") as caught:
        hooked(postprocess=wrong, allow_pickle=True)
    assert named in str(caught.value.found)


@pytest.mark.parametrize(
    "absent", [["postprocess"], ["preprocess"], ["preprocess", "postprocess"]], ids=" ".join
)
def test_the_custom_task_needs_both_hooks(hooked, absent):
    with pytest.raises(InputError, match="needs both"):
        hooked(**dict.fromkeys(absent))


def test_hooks_belong_to_the_custom_task_alone(save, user_code):
    code, file = user_code("own_net", NET)
    with pytest.raises(InputError, match="belong to the custom task"):
        save(
            code.Net(8),
            init_args={"hidden": 8},
            code_paths=[file],
            input_example=X,
            preprocess=print,
        )


def test_the_custom_task_needs_an_example(hooked):
    with pytest.raises(InputError, match="needs an example"):
        hooked(input_example=None)


@pytest.mark.parametrize(
    "rows", [[{"a": 1.0}], [{"a": 1.0, "b": 2.0, "c": 3.0}], [{"a": 1.0, "b": None}], []], ids=str
)
def test_rows_that_do_not_have_the_examples_columns(hooked, rows):
    path, *_ = hooked()
    with pytest.raises(InputError):
        load(path, "code").predict(rows)


def test_an_answer_that_changed_is_seen_at_load(hooked):
    """The recorded rows are replayed through the hooks, so that changed code is noticed."""
    path, *_ = hooked()
    code = path / "code" / "hooked_hooks.py"
    code.write_text(code.read_text().replace("0.0, 1.0]", "0.0, 1.5]"))
    reseal(path)
    sys.modules.pop("hooked_hooks")
    with pytest.raises(ParityError):
        load(path, "code")


# The raw task


def raw(save, user_code, **options):
    code, file = user_code("raw_net", NET)
    model = seeded(lambda: code.Net(8))
    return save(
        model, init_args={"hidden": 8}, code_paths=[file], input_example=X, **options
    ), model


def test_arrays_of_any_size_lists_and_tensors(save, user_code):
    path, model = raw(save, user_code)
    loaded = load(path, "code")
    for x in (
        np.ones((1, 4), np.float32),
        np.ones((5, 4), np.float32),
        np.ones((2, 3, 4), np.float32),
    ):
        same(loaded.predict({"x": x}), answer(model, {"x": x}))
    same(
        loaded.predict({"x": [[1.0, 2.0, 3.0, 4.0]]}),
        answer(model, {"x": np.float32([[1, 2, 3, 4]])}),
    )
    same(loaded.predict({"x": torch.ones(1, 4)}), answer(model, {"x": np.ones((1, 4), np.float32)}))
    same(
        loaded.predict({"x": np.ones((1, 4), np.float64)}),
        answer(model, {"x": np.ones((1, 4), np.float32)}),
    )


def test_the_callers_arrays_stay_theirs(save, user_code):
    source = (
        "from torch import nn\nclass Greedy(nn.Module):\n    def forward(self, x):\n        "
        "return x.mul_(2)\n"
    )
    code, file = user_code("greedy", source)
    path = save(code.Greedy(), init_args={}, code_paths=[file], input_example=X)
    mine = np.ones((2, 2), np.float32)
    assert load(path, "code").predict({"x": mine})["output_0"].tolist() == [[2, 2], [2, 2]]
    assert mine.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("arrays", "where", "what"),
    [
        ({"y": np.ones((2, 4))}, "y", "no such argument"),
        ({**X, "extra": np.ones(2)}, "extra", "no such argument"),
        ({"x": [[1.0], [1.0, 2.0]]}, "x", "Not an array"),
        ({"x": [["a", "b"]]}, "x", "Not an array of numbers"),
        ({"x": None}, "x", "Not an array of numbers"),
        ({"x": np.array([object()])}, "x", "Not an array of numbers"),
    ],
    ids=["unknown", "one too many", "ragged", "texts", "None", "objects"],
)
def test_arrays_that_forward_cannot_take(save, user_code, arrays, where, what):
    path, _ = raw(save, user_code)
    with pytest.raises(InputError, match=what) as caught:
        load(path, "code").predict(arrays)
    assert caught.value.where == where


@pytest.mark.parametrize("data", [{}, None, "text"], ids=lambda data: type(data).__name__)
def test_something_else_than_named_arrays(save, user_code, data):
    path, _ = raw(save, user_code)
    with pytest.raises(InputError, match="takes named arrays"):
        load(path, "code").predict(data)


def test_shapes_that_forward_refuses_are_the_callers_fault(save, user_code):
    path, _ = raw(save, user_code)
    with pytest.raises(InputError, match="forward refused the arrays") as caught:
        load(path, "code").predict({"x": np.ones((2, 5), np.float32)})
    assert caught.value.where == {"x": "float32[2, 5]"}
    assert "2x5" in str(caught.value.found)


def test_a_forward_that_asserts_refuses_too(save, user_code):
    code, file = user_code(
        "assertive",
        """
        from torch import nn

        class Assertive(nn.Module):
            def forward(self, x):
                assert x.shape[-1] == 4, "four, please"
                return x + 1
        """,
    )
    path = save(code.Assertive(), init_args={}, code_paths=[file], input_example=X)
    with pytest.raises(InputError, match="forward refused the arrays") as caught:
        load(path, "code").predict({"x": np.ones((2, 5), np.float32)})
    assert "four, please" in str(caught.value.found)


def test_bfloat16_in_and_out(save, user_code):
    path, model = raw(save, user_code, dtype="bfloat16")
    loaded = load(path, "code")
    assert {
        slot.tensor.dtype for slot in find_slots(loaded.module) if slot.kind == "parameter"
    } == {torch.bfloat16}
    found = loaded.predict(X)
    assert found["y"].dtype == np.float32, "numpy knows no bfloat16"
    assert np.allclose(found["y"], answer(model, X)["y"], atol=0.1)
    assert not np.array_equal(found["y"], answer(model, X)["y"]), "nothing was cast"


def test_integers_and_booleans_are_not_cast(save, user_code):
    code, file = user_code(
        "picky",
        """
        import torch
        from torch import nn

        class Picky(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(10, 2)

            def forward(self, ids, keep):
                if ids.dtype is not torch.int64 or keep.dtype is not torch.bool:
                    raise TypeError(f"{ids.dtype} {keep.dtype}")
                return {"vectors": self.embedding(ids), "kept": ids[keep], "mask": ~keep}
        """,
    )
    example = {"ids": np.array([[1, 2, 3]]), "keep": np.array([[True, False, True]])}
    path = save(
        seeded(code.Picky), init_args={}, code_paths=[file], input_example=example, dtype="float16"
    )
    found = load(path, "code").predict(example)
    assert found["kept"].tolist() == [1, 3]
    assert found["mask"].tolist() == [[False, True, False]]
    assert found["vectors"].dtype == np.float32


@pytest.mark.parametrize("result", ["'text'", "None", "{'n': 'three'}", "(1, {'a': [object()]})"])
def test_a_forward_without_named_tensors_is_refused(save, user_code, result):
    source = (
        "from torch import nn\nclass Odd(nn.Module):\n    def forward(self, x):\n        return "
        f"{result}\n"
    )
    code, file = user_code("odd_net", source)
    with pytest.raises(StructureError, match="forward"):
        save(code.Odd(), init_args={}, code_paths=[file], input_example=X)


def test_the_raw_task_has_no_columns(save, user_code):
    with pytest.raises(InputError, match="no columns"):
        raw(save, user_code, input_columns={"x": "y"})


# For real


def test_log_and_register(tracking, user_code, monkeypatch):
    code, file = user_code("logged_net", NET)
    model = seeded(lambda: code.Net(8))
    info = mlflow_safeflavor.log_model(
        model,
        "net",
        task="raw",
        init_args={"hidden": 8},
        code_paths=[file],
        input_example=X,
        rehearse=False,
        graph="no",
    )
    forget(file)
    same(mlflow_safeflavor.load_model(info.model_uri, trust={"code"}).predict(X), answer(model, X))


@pytest.mark.slow
def test_rehearsal_of_an_imported_model_with_hooks(hooked):
    path, _, expected = hooked(rehearse=True)
    close(load(path, "code").predict(ROWS), expected(ROWS))


@pytest.mark.slow
def test_rehearsal_refuses_code_that_was_left_out(save, user_code, tmp_path):
    code, _ = user_code("left_out", NET)
    with pytest.raises(RehearsalError, match="left_out"):
        save(seeded(lambda: code.Net(8)), init_args={"hidden": 8}, input_example=X, rehearse=True)
    assert not (tmp_path / "store" / "model").exists()


@pytest.mark.slow
def test_rehearsal_refuses_a_checkpoint_that_only_this_machine_has(save, predictor, tmp_path):
    model, file, checkpoint = predictor
    arguments = {
        "init_args": {"checkpoint": str(checkpoint)},
        "code_paths": [file],
        "input_example": IDS,
    }
    with pytest.raises(
        RehearsalError, match=r"read .*encoder/config\.json, which is no part of the model"
    ):
        save(model, rehearse=True, **arguments)
    assert not (tmp_path / "store" / "model").exists()
    path = save(model, **arguments)
    with pytest.raises(
        TrustError, match=r"read .*encoder/config\.json, which is no part of the model"
    ):
        load(path, "code")  # nor is it read where it happens to be there


@pytest.mark.slow
def test_rehearsal_of_a_pickled_model_of_which_nothing_else_is_left(save, predictor):
    model, file, checkpoint = predictor
    shutil.rmtree(checkpoint)
    path = save(model, allow_pickle=True, code_paths=[file], input_example=IDS, rehearse=True)
    same(load(path, "code", "pickle").predict(IDS), answer(model, IDS))


@pytest.mark.serve
@pytest.mark.slow
def test_a_pickled_model_behind_a_real_server(save, predictor, serve):
    model, file, checkpoint = predictor
    words = ["the", "cat", "sat", "on"]

    def pre(rows, tokenizer):
        ids = [[2, *(4 + words.index(word) for word in row["text"].split()), 3] for row in rows]
        longest = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
            ),
        }

    def post(outputs, rows):
        return [
            {"best": int(row.argmax()), "score": float(row.max())} for row in outputs["output_0"]
        ]

    rows = [{"text": "the cat"}, {"text": "sat on the cat"}, {"text": "on"}]
    path = save(
        model,
        task="custom",
        allow_pickle=True,
        code_paths=[file],
        input_example=rows,
        preprocess=pre,
        postprocess=post,
    )
    expected = load(path, "code", "pickle").predict(rows)
    shutil.rmtree(checkpoint)
    with serve(path, env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}) as server:
        found = server.invoke({"dataframe_records": rows})
        assert found.status == 200, found.text
        assert (
            pd.DataFrame(found.json()["predictions"])["best"].tolist() == expected["best"].tolist()
        )
        assert pd.DataFrame(found.json()["predictions"])["score"].tolist() == pytest.approx(
            expected["score"].tolist()
        )
        wrong = server.invoke({"dataframe_records": [{"txet": "the"}]})
        assert wrong.status == 400, wrong.text
