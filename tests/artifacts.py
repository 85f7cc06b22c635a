"""Rows for tiny models.

Damage to files of a saved model, and a manifest made anew by somebody who may write.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import write_manifest
from mlflow_safeflavor.artifact.spec import guarded_parts

TEXTS = ["the cat sat", "a dog ran on the mat", "return x + y"]
SAME_BATCHES = {"forward_cost": 512}
"""Measured, it could cut rows into other batches, whose answers have other last bits."""


def changes(count: int) -> list[dict[str, str]]:
    """Pairs of texts of up to 12 words that the tiny tokenizer knows; always the same ones."""
    chosen = random.Random(0)
    words = (
        "the a cat dog sat ran on under mat tree red green return x y = + - ( ) def if else".split()
    )
    columns = ("buggy_code", "fixed_code")
    return [
        {name: " ".join(chosen.choices(words, k=chosen.randint(1, 12))) for name in columns}
        for _ in range(count)
    ]


def forms_of(cells: list[Any]) -> dict[str, tuple[Any, Any, int]]:
    """Form → a Python caller's input, HTTP's (None for nothing), and how many of three rows.

    Every one-column form that MLflow lets pass to a model whose column has no name.
    """
    one, lists = cells[0], [[cell] for cell in cells]
    series, dicts = pd.Series(cells), [{"review": cell} for cell in cells]
    return {
        "a value": (one, {"inputs": one}, 1),
        "a value as instances": (None, {"instances": one}, 1),
        "a list": (cells, {"inputs": cells}, 3),
        "a list of one": ([one], {"inputs": [one]}, 1),
        "a list as instances": (None, {"instances": cells}, 3),
        "a Series": (series, None, 3),
        "a Series with a name and an index": (series.set_axis([7, 7, 1]).rename("review"), None, 3),
        "an array": (np.array(cells), None, 3),
        "an array of objects": (np.array(cells, dtype=object), None, 3),
        "an array of rows": (np.array(cells).reshape(3, 1), {"inputs": lists}, 3),
        "a table": (
            series.to_frame("text"),
            {"dataframe_split": {"columns": ["text"], "data": lists}},
            3,
        ),
        "a table with an index": (
            series.set_axis([7, 7, 1]).to_frame("review"),
            {"dataframe_split": {"columns": ["review"], "index": [7, 8, 1], "data": lists}},
            3,
        ),
        "a table without names": (series.to_frame(), {"dataframe_split": {"data": lists}}, 3),
        "a table of one row": (
            pd.DataFrame({"review": [one]}),
            {"dataframe_records": [{"review": one}]},
            1,
        ),
        "a dict": ({"review": one}, None, 1),
        "a dict of a list": ({"review": cells}, None, 3),
        "a dict of a list of one": ({"review": [one]}, None, 1),
        "a dict of an array": ({"review": np.array(cells)}, None, 3),
        "dicts": (dicts, {"dataframe_records": dicts}, 3),
        "dicts as inputs": (None, {"inputs": dicts}, 3),
        "dicts as instances": (None, {"instances": dicts}, 3),
    }


def rewrite(path: Path, content: bytes | str) -> None:
    """Put other bytes at ``path`` and leave alone what other hard links show."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def flip(path: Path, position: int | None = None) -> None:
    """Change one bit of one byte, by default in the middle; an empty file becomes one byte."""
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2 if position is None else position] ^= 1
    rewrite(path, bytes(content))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Let ``change`` work on the content of a JSON file.

    What it returns, unless None, takes its place.
    """
    content = json.loads(path.read_text())
    changed = change(content)
    rewrite(path, json.dumps(content if changed is None else changed))


def edit_mlmodel(root: Path, change: Callable[[Any], Any]) -> None:
    """The same for ``MLmodel``."""
    path = Layout(root).mlmodel
    content = yaml.safe_load(path.read_text())
    change(content)
    rewrite(path, yaml.safe_dump(content))


def reseal(root: Path) -> None:
    """Make the manifest anew, as somebody would who changed files on purpose."""
    layout = Layout(root)
    layout.manifest.unlink()
    write_manifest(layout, mlmodel=guarded_parts(yaml.safe_load(layout.mlmodel.read_text())))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    """Write a safetensors file without any check."""
    text = json.dumps(header).encode()
    rewrite(path, struct.pack("<Q", len(text)) + text + data)
