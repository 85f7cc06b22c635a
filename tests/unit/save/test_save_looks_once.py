"""A save looks for a module's tensors once, and constructs no more than it compares."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest
import torch

import mlflow_safeflavor
from mlflow_safeflavor.module import slots
from mlflow_safeflavor.save import save

# Walks: of the module, of each construction, and once more after its forwards, for the graph.
# Constructions: the first that gives the module back, each that did not, and one for the doctor.
WANTED = {
    "bert": (4, 2),
    "without a pooler": (5, 3),
    "of the user's": (4, 2),
    "of the user's, with arguments": (5, 3),
}

OWN = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self, size=4, hidden=8):
            super().__init__()
            self.size, self.hidden = size, hidden
            self.first, self.last = torch.nn.Linear(size, hidden), torch.nn.Linear(hidden, 2)
            self.register_buffer("scale", torch.linspace(0, 1, hidden), persistent=False)

        def forward(self, x):
            return {"y": self.last(self.first(x) * self.scale)}
"""


@pytest.fixture
def walked(monkeypatch):
    """Who called ``find_slots``, by function, from now on."""
    original, callers = slots.find_slots, []

    def find_slots(module):
        frame = sys._getframe(1)
        callers.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")
        return original(module)

    for module in list(sys.modules.values()):
        if getattr(module, "find_slots", None) is original:
            monkeypatch.setattr(module, "find_slots", find_slots)
    return callers


@pytest.fixture
def constructed(monkeypatch):
    """``constructed(cls)``: a list that gets an entry whenever the class is constructed."""

    def count(cls):
        original, made = cls.__init__, []

        @functools.wraps(original)
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            made.append(cls.__name__)

        monkeypatch.setattr(cls, "__init__", __init__)
        return made

    return count


def subjects(tiny_bert, tiny_tokenizer, user_code):
    """Name → a module, and what it is saved with."""
    own, file = user_code("own_code", OWN)
    rows = {"x": torch.ones(3, 4).numpy()}
    raw = {"task": "raw", "input_example": rows, "code_paths": [file]}
    return {
        "bert": (tiny_bert(), {"tokenizer": tiny_tokenizer}),
        "without a pooler": (
            type(tiny_bert(None))(tiny_bert(None).config, add_pooling_layer=False).eval(),
            {"tokenizer": tiny_tokenizer},
        ),
        "of the user's": (own.Net().eval(), raw),
        "of the user's, with arguments": (own.Net(4, 6).eval(), raw),
    }


@pytest.mark.parametrize("name", WANTED)
def test_walks_and_constructions_of_a_save(
    tiny_bert, tiny_tokenizer, user_code, walked, constructed, tmp_path, name
):
    module, options = subjects(tiny_bert, tiny_tokenizer, user_code)[name]
    made = constructed(type(module))
    walked.clear()
    mlflow_safeflavor.save_model(module, tmp_path / "model", rehearse=False, **options)
    assert (tmp_path / "model" / "safeflavor" / "graph.onnx").exists()
    assert (len(walked), len(made)) == WANTED[name], walked


# Values that were once handed from function to function whole.
PARCELS = ("Source", "LoadOptions", "LoadReport")


def test_nothing_is_handed_on_whole_through_a_save():
    taken = []
    for file in sorted(Path(save.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                kinds = {ast.unparse(one.annotation) for one in arguments if one.annotation}
                taken += [(node.name, kind) for kind in PARCELS if kind in kinds]
    assert taken == [("needs_of", "Source"), ("write_task", "Source")]
