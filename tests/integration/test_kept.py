"""The process and the module that was handed over belong to the caller.

Afterwards they are as they were.
"""

from __future__ import annotations

import os
import random
import threading
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from yaml import YAMLError

import mlflow_safeflavor
from mlflow_safeflavor.environment.threads import use_threads
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.module.kept import kept_module, kept_parameters
from mlflow_safeflavor.module.random_state import kept_random_state

pytest_plugins = "saved_models"


def in_thread(function, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found[0]


def of_the_process():
    """What a library has no business to change."""
    return {
        "environ": dict(os.environ),
        "threads": torch.get_num_threads(),
        "threads of others": in_thread(torch.get_num_threads),
        "interop": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "folder": os.getcwd(),
    }


@pytest.fixture(autouse=True)
def _their_own(monkeypatch):
    """A variable unlike what torch has."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")


@contextmanager
def process_unchanged():
    before = of_the_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.cuda, "manual_seed_all", lambda seed: pytest.fail("accelerators were seeded")
        )
        yield
    after = of_the_process()
    assert [name for name in before if before[name] != after[name]] == []


class Draws(torch.nn.Module):
    """Draws from every generator, when it is made and when it is asked."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.draw()

    def draw(self):
        return torch.rand(1).item() + np.random.rand() + random.random()

    def forward(self, x):
        return self.layer(x) + 0 * self.draw()


EXAMPLE = {"x": np.ones((2, 2), "float32")}
RAW: dict[str, Any] = {"task": "raw", "input_example": EXAMPLE, "rehearse": False, "graph": "no"}


@pytest.mark.parametrize("pickle", [False, True], ids=["constructor", "pickle"])
def test_save_and_every_load_leave_the_process_as_it_was(tmp_path, pickle):
    path, module, given = tmp_path / "model", Draws().eval(), {"allow_pickle": pickle}
    if pickle:
        module.register_buffer("more", torch.ones(1))  # which its constructor does not give back
    with process_unchanged():
        mlflow_safeflavor.save_model(module, path, **given, **RAW)
    with process_unchanged():
        mlflow_safeflavor.load_model(
            str(path), trust={"pickle", "code"}, model_config={"num_threads": 2}
        )
    with process_unchanged():
        mlflow_safeflavor.verify_model(str(path), trust={"pickle", "code"})
    with process_unchanged():
        mlflow.pyfunc.load_model(str(path), model_config={"num_threads": 2})


def test_so_do_from_pretrained_and_materialize(tmp_path, tiny_bert):
    tiny_bert().save_pretrained(tmp_path)
    with process_unchanged():
        found = mlflow_safeflavor.from_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = type(found)(found.config)
    with process_unchanged():
        mlflow_safeflavor.materialize(skeleton, tmp_path)
    with process_unchanged(), pytest.raises(SafeFlavorError):
        mlflow_safeflavor.from_pretrained(tmp_path, model_class=type(found), drop=("classifier.*",))


def test_threads_of_a_model_are_its_own():
    def count(wanted):
        use_threads(wanted)
        return torch.get_num_threads()

    with process_unchanged():
        assert [in_thread(count, wanted) for wanted in (5, 2, 0)] == [5, 2, torch.get_num_threads()]


def test_the_option_of_one_model_does_not_reach_another(saved):
    counts = {}

    def counting(model, name):
        forward = model.engine._forward

        def count(**inputs):
            counts[name] = torch.get_num_threads()
            return forward(**inputs)

        model.engine._forward = count

    models = {
        wanted: mlflow_safeflavor.load_model(
            str(saved), model_config={"num_threads": wanted, "engine": "module"}
        )
        for wanted in (3, 0, 2)
    }
    for wanted, model in models.items():
        counting(model, wanted)
        model.predict([{"text": "the cat"}])
    assert counts == {3: 3, 0: torch.get_num_threads(), 2: 2}


# The module that was handed over.


@dataclass
class Counts:
    calls: int = 0


class Remembers(torch.nn.Module):
    """A forward that leaves traces wherever it can."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("late", None)
        self.plain, self.calls, self.counts = torch.zeros(2), 0, Counts()
        self.log, self.named = [], OrderedDict(last=None)
        self.deep = {"log": [torch.zeros(1)]}

    def forward(self, x):
        self.seen += x.mean()
        self.plain = self.plain + 1
        self.late = x.mean()
        self.calls += 1
        self.counts.calls += 1
        self.log.append(x)
        self.named["last"] = x
        self.deep["log"][0] += 1
        self.made = x
        self.layer.bias.add_(1)
        self.layer.weight.requires_grad_(False)
        self.register_forward_hook(print)
        self.layer.train()
        return self.layer(x)


def facts_of(module):
    return {
        "state": {name: tensor.tolist() for name, tensor in module.state_dict().items()},
        "gradients": {name: one.requires_grad for name, one in module.named_parameters()},
        "objects": {name: id(one) for name, one in module.named_parameters()},
        "modes": [child.training for child in module.modules()],
        "plain": (module.plain.tolist(), module.calls, module.counts.calls, module.late),
        "contents": (list(module.log), dict(module.named), module.deep["log"][0].tolist()),
        "attributes": list(vars(module)),
        "hooks": len(module._forward_hooks),
    }


@pytest.mark.parametrize("options", [
    {"graph": "no"},
    {"graph": "no", "init_args": {}},
    {"graph": "only"},
    {"graph": "no", "dtype": "bfloat16"},
    {"graph": "no", "metadata": {"a": object()}},
], ids=lambda options: "-".join(options) + f"-{options['graph']}")  # fmt: skip
def test_a_save_leaves_the_module_as_it_was_also_when_it_is_refused(tmp_path, options):
    module = Remembers().train()
    module.layer.eval()
    before = facts_of(module)
    with suppress(SafeFlavorError, YAMLError), process_unchanged():
        mlflow_safeflavor.save_model(
            module, tmp_path / "model", allow_pickle=True, **{**RAW, **options}
        )
    assert facts_of(module) == before


def test_without_that_the_forward_changes_all_of_it():
    module = Remembers().eval()
    before = facts_of(module)
    with torch.inference_mode():
        module(torch.ones(2, 2))
    after = facts_of(module)
    assert [name for name in before if before[name] == after[name]] == ["objects"]


def test_nan_in_place_views_and_what_was_made_in_inference_mode_are_kept():
    module: Any = torch.nn.Module()
    with torch.inference_mode():
        module.register_buffer("made", torch.ones(3))
    module.register_buffer("base", torch.tensor([1.0, float("nan")]))
    module.register_buffer("view", module.base[1:].expand(4))
    with kept_module(module):
        module.base.fill_(7)
        with torch.inference_mode():
            module.made.zero_()
    assert module.base[0] == 1
    assert module.view.isnan().all()
    assert module.made.tolist() == [1, 1, 1]


def test_parameters_that_nobody_wrote_are_not_read_again():
    module = torch.nn.Linear(2, 2)
    with kept_parameters(module, lambda: pytest.fail("read")):
        module(torch.ones(1, 2))
    stored = {name: one.detach().clone() for name, one in module.named_parameters()}
    with kept_parameters(module, lambda: stored), torch.no_grad():
        module.weight.zero_()
    assert torch.equal(module.weight, stored["weight"])


def test_random_states_are_kept_when_something_fails():
    before = of_the_process()
    with suppress(ValueError), kept_random_state():
        torch.rand(1), np.random.rand(), random.random()
        raise ValueError
    assert of_the_process() == before
