"""A call that was watched leaves nothing behind in its thread."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module import bounds
from mlflow_safeflavor.module.allowance import Allowance
from mlflow_safeflavor.module.bounds import within
from mlflow_safeflavor.module.memory import real_memory

# 3.11 never gets past a traced call while it thinks that an exception waits for the thread.
TRACED = """
import sys
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.bounds import within

def busy():
    while True:
        pass

def swallows():
    try:
        busy()
    except BaseException:
        return 2

def trace(after):
    print(after, flush=True)
    sys.settrace(lambda *_: None)
    (lambda: 3)()
    sys.settrace(None)

assert within(0, lambda: 1) == 1
trace("one that ended in time")
try:
    within(0, busy, most_seconds=0.1, first_look=0.05)
except StructureError as error:
    trace("one that was interrupted")
assert within(0, swallows, most_seconds=0.1, first_look=0.05) == 2
trace("one that swallowed the interruption")
"""


def test_calls_after_it_can_be_traced():
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "time",
        "interrupted",
        "interruption",
    ]


@pytest.mark.parametrize("when", ["__enter__", "__exit__"])
@pytest.mark.parametrize("infers", [False, True])  # where composed operators are taken apart
def test_it_does_not_come_while_a_mode_of_torch_is_entered_or_left(monkeypatch, when, infers):
    """Torch would ask that mode about everything that the thread does, for good."""
    asked: list[bool] = []
    change = getattr(Allowance, when)

    def late(self, *exception):
        asked.append(bounds._raise_in(threading.get_ident(), bounds._TooMuch, but=bounds.sheltered))
        return change(self, *exception)

    monkeypatch.setattr(Allowance, when, late)
    with torch.inference_mode(infers), real_memory(inventory=Inventory({}, {}, {})):
        assert torch.ones(2, 2).reshape(4).sum() == 4
    assert asked
    assert not any(asked)
    assert not bounds.sheltered
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_interrupted_constructor_leaves_gradients_as_they_were():
    def forgets():
        torch.set_grad_enabled(False)
        raise KeyError

    with pytest.raises(KeyError), real_memory(inventory=Inventory({}, {}, {})):
        forgets()
    assert torch.is_grad_enabled()


def test_it_leaves_no_mode_behind():
    def endless():
        total = torch.zeros(2)
        while True:
            total = torch.add(total, 1.0)

    for seconds in (0.02, 0.03, 0.04):
        with pytest.raises(StructureError, match="takes far more"):  # noqa: SIM117
            with real_memory(inventory=Inventory({}, {}, {})):
                within(0, endless, most_seconds=seconds, first_look=0.01)
        assert torch._C._len_torch_dispatch_stack() == 0
        assert not bounds.sheltered
