"""What the rows of the table of hints share: each hint was told to somebody while its test ran."""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from types import SimpleNamespace

import pytest
import torch  # its first import warns, which within a test would be an error
from hints.hint_rows import X
from hints.sites import Site

import mlflow_safeflavor
from mlflow_safeflavor.errors import SafeFlavorError

CODE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, factor=2.0, width=4):
        super().__init__()
        self.f = factor
        self.layer = torch.nn.Linear(width, 3)

    def forward(self, x):
        return {"y": self.layer(x) * self.f}

class Own(torch.nn.Module):
    def __init__(self, made):
        super().__init__()
        self.layer = torch.nn.Linear(4, made.width)

    def forward(self, x):
        return {"y": self.layer(x)}

class Asks(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)  # no graph branches on values

def pre(rows, tokenizer=None):
    return {"x": torch.tensor([[row["a"]] * 4 for row in rows])}

def post(outputs, *rest):
    return [{"y": float(y[0])} for y in outputs["y"]]
"""


@pytest.fixture(autouse=True)
def told(request, monkeypatch):
    """Every hint of the test's rows is told to somebody while it runs."""
    said: list[tuple[str, str]] = []
    make, warn = SafeFlavorError.__init__, warnings.warn

    def note(self, what, **details):
        said.append((what, details.get("hint") or ""))
        make(self, what, **details)

    def note_warning(message, *args, **options):
        said.append((str(message),) * 2)
        warn(message, *args, **options)

    monkeypatch.setattr(SafeFlavorError, "__init__", note)
    monkeypatch.setattr(warnings, "warn", note_warning)

    class Handler(logging.Handler):
        def emit(self, record):
            said.append((str(record.msg),) * 2)

    handler = Handler()
    logger = logging.getLogger("mlflow.safeflavor")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    for site in (marker.args[0] for marker in request.node.iter_markers("hint")):
        assert any(_is(site, *each) for each in said), f"nobody was told: {site}; but {said}"


def _is(site: Site, what: str, hint: str) -> bool:
    # What has no blank is the name of a constant, or of the function that makes a hint of it.
    named = " " not in site.what or any(
        _pattern(one).fullmatch(what) for one in site.what.split(" | ")
    )
    return named and _pattern(site.hint).search(hint) is not None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, re.split(r"…|\{model\}", template))), re.DOTALL)


_numbers = itertools.count()


@pytest.fixture
def code(user_code):
    """A module of the user's.

    Under a new name each time, as a loaded model's code stays importable.
    """
    module, file = user_code(f"hints_code_{next(_numbers)}", CODE)
    return SimpleNamespace(**vars(module), file=file)


@pytest.fixture
def save(tmp_path):
    """``save(model, …)``.

    The path of a saved model, of the raw task unless something else is said.
    """
    count = iter(range(100))

    def run(model, **given):
        if isinstance(model, torch.nn.Module) and not hasattr(model, "config"):
            given = {"task": "raw", "input_example": X, **given}
        path = tmp_path / f"model-{next(count)}"
        mlflow_safeflavor.save_model(model, path, **{"graph": "no", "rehearse": False, **given})
        return path

    return run
