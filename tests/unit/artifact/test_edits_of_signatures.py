"""Which edits of a signature change no answer."""

from __future__ import annotations

import json

import pytest

from mlflow_safeflavor.artifact.edits import find_signature_edits
from mlflow_safeflavor.artifact.plain_files import is_junk

TEXT, LABEL, SCORE = (
    {"type": kind, "name": name, "required": True}
    for kind, name in (("string", "text"), ("string", "label"), ("double", "score"))
)
UNNAMED = {"type": "string", "required": True}
TOP_K, LENGTH = (
    {"name": name, "default": default, "shape": None, "type": "long"}
    for name, default in (("top_k", 1), ("max_length", 0))
)


def signature(inputs=(UNNAMED,), outputs=(LABEL, SCORE), params=(TOP_K, LENGTH)):
    parts = {"inputs": inputs, "outputs": outputs, "params": params}
    return {
        name: None if part is None else json.dumps([*part], indent=1 if name == "params" else None)
        for name, part in parts.items()
    }


SAVED = signature()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (signature(inputs=[TEXT]), "names its columns 'text'"),
        (signature(inputs=[{**UNNAMED, "required": False}]), "which of them are required"),
        (signature(outputs=None), "no longer says what is answered"),
        (signature(outputs=[LABEL, {**SCORE, "required": False}]), "written anew"),
        (signature(params=[TOP_K]), "no longer declares max_length"),
        (signature(params=None), "no longer declares top_k, max_length"),
        (signature(params=[LENGTH, TOP_K]), "written anew"),
    ],
)
def test_what_changes_no_answer_is_told(found, words):
    [edit], refused = find_signature_edits(SAVED, found)
    assert words in edit
    assert refused == []


@pytest.mark.parametrize(
    "found",
    [
        None,
        "signature",
        {},
        {**SAVED, "more": None},
        {**SAVED, "inputs": "[{"},
        {**SAVED, "inputs": 3},
        {**SAVED, "inputs": "{}"},
        {**SAVED, "params": json.dumps([[]])},
        signature(inputs=None),
        signature(inputs=[]),
        signature(inputs=[{**TEXT, "type": "long"}]),
        signature(inputs=[TEXT, LABEL]),
        signature(inputs=[{"type": "string", "requirex": True}]),
        signature(inputs=[{**UNNAMED, "name": ["text"]}]),
        signature(outputs=[LABEL]),
        signature(outputs=[LABEL, {**SCORE, "name": "scorf"}]),
        signature(params=[{**TOP_K, "default": 2}]),
        signature(params=[{**TOP_K, "type": "string"}]),
        signature(params=[{**TOP_K, "name": "top_j"}]),
        signature(params=[TOP_K, LENGTH, {**TOP_K, "name": "more"}]),
    ],
    ids=str,
)
def test_what_may_change_an_answer_is_refused(found):
    edits, [refused] = find_signature_edits(SAVED, found)
    assert edits == []
    assert refused.startswith("MLmodel: its signature ")
    assert len(refused) < 500


def test_named_columns_keep_their_names_and_order():
    saved = signature(inputs=[TEXT, LABEL])
    for inputs in ([LABEL, TEXT], [TEXT, {**LABEL, "name": "b"}], [TEXT, UNNAMED]):
        assert find_signature_edits(saved, signature(inputs=inputs))[0] == []
    assert find_signature_edits(saved, saved) == ([], [])
    assert find_signature_edits(None, SAVED)[0] == []
    assert find_signature_edits(None, None) == ([], [])


def test_junk_is_told_by_names_that_nothing_imports():
    for name in (
        *(".DS_Store", "code/._torch.py", "a/.nfs0000012ab", "a/.gitkeep"),
        *(".gitattributes", "Thumbs.db"),
    ):
        assert is_junk(name), name
    for name in ("a.py", "code/.hidden.py", "DS_Store", ".nfs.py", "x/.pth", "._", "code/x._y"):
        assert not is_junk(name), name
