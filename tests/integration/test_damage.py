"""Damage: every file removed, every file flipped, and changes under a renewed manifest.

Each case ends in an error that names the file or tensor, none in a prediction.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from artifacts import (
    SAME_BATCHES,
    TEXTS,
    edit_json,
    edit_mlmodel,
    flip,
    read_header,
    reseal,
    rewrite,
    write_header,
)
from mlflow.exceptions import MlflowException

import mlflow_safeflavor
from mlflow_safeflavor.errors import (
    FormatVersionError,
    IntegrityError,
    ParityError,
    SafeFlavorError,
    StructureError,
    TrustError,
    WeightsError,
)
from mlflow_safeflavor.module import tensors

pytest_plugins = "saved_models"

PACKAGE = Path(mlflow_safeflavor.__file__).parent
DATA = [
    f"{name}.json"
    for name in ("config", "structure", "tensors", "environment", "parity", "manifest")
]
DATA += [
    "model.safetensors",
    "parity.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]
TOP = ["MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml", "input_example.json"]
TOP += ["serving_input_example.json"]
VENDORED = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.relative_to(PACKAGE).parts[0]
    not in ("checkpoints", "cli.py", "save", "spark.py", "spark_daemon.py", "verify")
]
CODE = [f"code/mlflow_safeflavor/{file.relative_to(PACKAGE).as_posix()}" for file in VENDORED]
FILES = [
    *TOP,
    *(f"safeflavor/{name}" for name in DATA),
    *CODE,
    *(
        f"code/mlflow_safeflavor/{name}"
        for name in ("LOADER.txt", "artifact/proven_classes.txt", "py.typed")
    ),
]
# One vendored file of each room stands for all: they are compared in one loop.
ROOMS = {name.rpartition("/")[0]: name for name in CODE}
HARMED = [name for name in FILES if name not in CODE or name in ROOMS.values()]
# Of a model that has a graph, beside those.
GRAPH = ["requirements-onnx.txt", "safeflavor/graph.json", "safeflavor/graph.onnx"]
GRAPH += ["safeflavor/parity-onnx.json", "safeflavor/parity-onnx.safetensors"]
# MLflow's own reading of the files takes most of a second, so through pyfunc one vendored file
# stands for all.
FILES_FOR_PYFUNC = [
    name for name in FILES if not name.startswith("code/") or name.endswith("/load.py")
]

MANIFEST = "safeflavor/manifest.json"
WEIGHTS = "model.safetensors"
FIRST, SECOND = (
    "bert.encoder.layer.0.output.dense.weight",
    "bert.encoder.layer.1.output.dense.weight",
)
SQUARE = "bert.encoder.layer.0.attention.self.query.weight"


def refuse(path, kind, *named, **options):
    """Load natively, which must fail with exactly this kind of error, naming all of ``named``."""
    with pytest.raises(SafeFlavorError) as refused:
        mlflow_safeflavor.load_model(str(path), **options)
    assert type(refused.value) is kind, refused.value
    for name in named:
        assert name in refused.value.message
    return refused.value


def refuse_behind_pyfunc(path, kind, *named):
    with pytest.raises(kind) as refused:
        mlflow.pyfunc.load_model(str(path))
    for name in named:
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("model", "files"), [("saved", FILES), ("saved_with_graph", FILES + GRAPH)]
)
def test_every_file_of_an_artifact_is_a_case(model, files, request):
    root = request.getfixturevalue(model)
    there = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    assert there == set(files)


# Accidents: the manifest is as it was


@pytest.mark.parametrize("name", HARMED)
def test_a_missing_file(copied, name):
    (copied / name).unlink()
    refuse(copied, IntegrityError, name)


@pytest.mark.parametrize("name", [name for name in HARMED if name not in ("MLmodel", MANIFEST)])
def test_a_flipped_bit(copied, name):
    flip(copied / name)
    refuse(copied, IntegrityError, name, "fetch the artifact again")


@pytest.mark.parametrize("harm", [Path.unlink, flip])
@pytest.mark.parametrize("name", GRAPH)
def test_a_graph_that_is_missing_or_flipped(saved_with_graph, tmp_path, name, harm):
    root = Path(shutil.copytree(saved_with_graph, tmp_path / "copy", copy_function=os.link))
    harm(root / name)
    refuse(root, IntegrityError, name)
    refuse_behind_pyfunc(root, IntegrityError, name)


@pytest.mark.parametrize("name", FILES_FOR_PYFUNC)
def test_a_missing_file_behind_pyfunc(copied, name):
    (copied / name).unlink()
    # Without MLmodel MLflow does not even know whom to call, and says so itself.
    refuse_behind_pyfunc(copied, MlflowException if name == "MLmodel" else IntegrityError, name)


@pytest.mark.parametrize(
    "name", [name for name in FILES_FOR_PYFUNC if name not in ("MLmodel", MANIFEST)]
)
def test_a_flipped_bit_behind_pyfunc(copied, name):
    flip(copied / name)
    refuse_behind_pyfunc(copied, IntegrityError, name)


@pytest.mark.parametrize(
    "old", ["text-classification", "LABEL_0", "max_batch_tokens: 512", '"name": "lab']
)
@pytest.mark.parametrize("behind", ["native", "pyfunc"])
def test_a_changed_flavor_entry_or_signature(copied, old, behind):
    text = (copied / "MLmodel").read_text()
    assert old in text
    flip(copied / "MLmodel", text.index(old) + len(old) - 1)
    if behind == "native":
        refuse(copied, IntegrityError, "MLmodel")
    else:
        refuse_behind_pyfunc(copied, IntegrityError, "MLmodel")


@pytest.mark.parametrize(
    "name", ["MLmodel", MANIFEST, "safeflavor/tensors.json", f"safeflavor/{WEIGHTS}"]
)
def test_a_bit_anywhere_changes_no_answer(copied, saved, name):
    """Where a bit has no meaning (MLflow's ids and dates) the model answers as it did.

    Else it is refused.
    """
    wanted = mlflow_safeflavor.load_model(str(saved)).predict(TEXTS)
    size = (saved / name).stat().st_size
    loaded = 0
    for position in random.Random(0).sample(range(size), 25):
        rewrite(copied / name, (saved / name).read_bytes())
        flip(copied / name, position)
        try:
            model = mlflow_safeflavor.load_model(str(copied))
        except (IntegrityError, FormatVersionError):
            pass
        else:
            loaded += 1
            assert model.predict(TEXTS).equals(wanted), f"byte {position} changed the answers"
    assert name == "MLmodel" or loaded == 0


@pytest.mark.parametrize(
    "name", [f"safeflavor/{WEIGHTS}", "safeflavor/parity.safetensors", "safeflavor/tensors.json"]
)
@pytest.mark.parametrize("kept", [0, 4, 0.5, -1], ids=["empty", "4 bytes", "half", "one byte less"])
def test_a_file_cut_short(copied, name, kept):
    content = (copied / name).read_bytes()
    rewrite(copied / name, content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    refuse(copied, IntegrityError, name, f"wanted {len(content)}")
    refuse(copied, IntegrityError, name, verify="structure")


def test_a_file_that_grew(copied):
    path = copied / "safeflavor" / WEIGHTS
    rewrite(path, path.read_bytes() + b"\0")
    refuse(copied, IntegrityError, WEIGHTS, verify="structure")


@pytest.mark.parametrize(
    "name", ["safeflavor/structure.pkl", "safeflavor/a/b.json", "code/sitecustomize.py", "code/x"]
)
def test_a_file_that_was_not_there(copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("")
    refuse(copied, IntegrityError, name, "was not there")
    refuse_behind_pyfunc(copied, IntegrityError, name)


@pytest.mark.parametrize(
    "name", ["safeflavor/config.json", "code/mlflow_safeflavor/load/load.py", "requirements.txt"]
)
def test_a_link_in_place_of_a_file(copied, saved, name):
    (copied / name).unlink()
    (copied / name).symlink_to(saved / name)
    refuse(copied, IntegrityError, name, "symbolic link")


def test_a_link_that_leads_nowhere(copied):
    (copied / "code" / "dangling.py").symlink_to(copied / "nothing")
    refuse(copied, IntegrityError, "code/dangling.py")


def test_byte_code_that_running_left_behind_is_no_damage(copied):
    cache = copied / "code" / "mlflow_safeflavor" / "__pycache__"
    cache.mkdir()
    (cache / "load.cpython-311.pyc").write_bytes(b"")
    mlflow_safeflavor.load_model(str(copied))


# The manifest itself


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "safeflavor/../../outside", "a//b", "./a", "code\\x.py", ".."],
)
def test_a_manifest_that_names_something_outside(copied, name):
    edit_json(
        copied / MANIFEST,
        lambda content: content["files"].update({name: {"sha256": "0" * 64, "size": 1}}),
    )
    refuse(copied, IntegrityError, MANIFEST, repr(name), "path")


@pytest.mark.parametrize(
    "content",
    [
        *([], {}, None, "x", {"version": 1}, {"version": 2, "files": {}, "mlmodel": "x"}),
        *({"version": 1, "files": [], "mlmodel": "x"}, {"version": 1, "files": {}, "mlmodel": 3}),
        {"version": 1, "files": {"a": {"sha256": "0"}}, "mlmodel": "x"},
        {"version": 1, "files": {"a": {"sha256": "0", "size": True}}, "mlmodel": "x"},
        {"version": 1, "files": {"a": {"sha256": "0", "size": "1"}}, "mlmodel": "x"},
        {"version": 1, "files": {}, "mlmodel": "x", "more": 1},
    ],
    ids=repr,
)
def test_a_malformed_manifest(copied, content):
    rewrite(copied / MANIFEST, json.dumps(content))
    refuse(copied, IntegrityError, MANIFEST, "malformed")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"]
)
@pytest.mark.parametrize("name", [MANIFEST, "safeflavor/tensors.json", "safeflavor/structure.json"])
def test_a_file_that_is_no_json(copied, name, content):
    rewrite(copied / name, content)
    if name != MANIFEST:
        reseal(copied)
    refuse(copied, IntegrityError, name.rpartition("/")[2])


DEEP = [
    f"safeflavor/{name}.json"
    for name in ("structure", "config", "tensors", "environment", "parity")
]


@pytest.mark.parametrize("name", [MANIFEST, *DEEP])
def test_a_file_that_is_nested_deeper_than_any_was_saved(copied, name):
    """By a bound, and not by how far Python happens to recurse from where it stands."""
    content = json.loads((copied / name).read_bytes())
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    content = {**content, "deep": deep} if isinstance(content, dict) else [*content, deep]
    rewrite(copied / name, json.dumps(content))
    if name != MANIFEST:
        reseal(copied)
    refuse(copied, IntegrityError, name.rpartition("/")[2], "nested more than 100 deep")


# Changed on purpose: the manifest was made anew


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", IntegrityError),
        ("structure.json", IntegrityError),
        ("tensors.json", IntegrityError),
        ("environment.json", IntegrityError),
        ("parity.json", IntegrityError),
        ("parity.safetensors", IntegrityError),
        (WEIGHTS, IntegrityError),
        ("tokenizer/tokenizer.json", IntegrityError),
    ],
)
@pytest.mark.parametrize("verify", ["full", "structure"])
def test_a_file_that_nobody_lists_any_more(copied, name, kind, verify):
    (copied / "safeflavor" / name).unlink()
    reseal(copied)
    refuse(copied, kind, name.rpartition("/")[2], verify=verify)


def test_a_flipped_weight_is_named(copied):
    path = copied / "safeflavor" / WEIGHTS
    header, data = read_header(path)
    first, last = header[FIRST]["data_offsets"]
    flip(path, len(path.read_bytes()) - len(data) + (first + last) // 2)
    reseal(copied)
    refuse(copied, IntegrityError, f"tensor {FIRST}", WEIGHTS)


def change_header(root, change, *, swap_digests=()):
    """Change the header of the weights, and make anew every digest that an attacker can."""
    path = root / "safeflavor" / WEIGHTS
    header, data = read_header(path)
    header = change(header) or header
    write_header(path, header, data)
    length = len(path.read_bytes()) - len(data)
    digest = hashlib.sha256(path.read_bytes()[:length]).hexdigest()

    def renew(inventory):
        inventory["files"][WEIGHTS] = digest
        if swap_digests:
            one, other = (inventory["data"][name] for name in swap_digests)
            one["sha256"], other["sha256"] = other["sha256"], one["sha256"]

    edit_json(root / "safeflavor" / "tensors.json", renew)
    reseal(root)


def renamed(header):
    return {("renamed" if name == FIRST else name): entry for name, entry in header.items()}


def test_a_renamed_tensor_by_header(copied):
    path = copied / "safeflavor" / WEIGHTS
    header, data = read_header(path)
    write_header(path, renamed(header), data)
    reseal(copied)
    refuse(copied, IntegrityError, WEIGHTS, "header")


@pytest.mark.parametrize("verify", ["full", "structure", "off"])
def test_a_renamed_tensor_with_all_digests_made_anew(copied, verify):
    change_header(copied, renamed)
    with pytest.raises((WeightsError, IntegrityError)) as refused:
        mlflow_safeflavor.load_model(str(copied), verify=verify)
    assert FIRST in refused.value.message


@pytest.mark.parametrize("dtype", ["I32", "U32", "F16", "F64"])
@pytest.mark.parametrize("verify", ["full", "off"])
def test_another_dtype_in_the_header(copied, dtype, verify):
    change_header(copied, lambda header: header.update({FIRST: {**header[FIRST], "dtype": dtype}}))
    # A dtype of another width does not fill the range that the header gives it, and safetensors
    # says so.
    kind = WeightsError if dtype in ("I32", "U32") else IntegrityError
    named = (FIRST, "float32") if kind is WeightsError else (WEIGHTS,)
    refuse(copied, kind, *named, verify=verify)


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_another_dtype_everywhere(copied, verify):
    def to_integers(inventory):
        inventory["data"][FIRST]["dtype"] = "int32"
        for row in inventory["tensors"]:
            if row["data"] == FIRST:
                row["dtype"] = "int32"

    edit_json(copied / "safeflavor" / "tensors.json", to_integers)
    change_header(copied, lambda header: header.update({FIRST: {**header[FIRST], "dtype": "I32"}}))
    # Header and inventory agree, so it shows at the latest when the recorded rows are answered.
    with pytest.raises((WeightsError, ParityError)) as refused:
        mlflow_safeflavor.load_model(str(copied), verify=verify)
    assert "Int" in refused.value.message or FIRST in refused.value.message


def swapped(header):
    header[FIRST], header[SECOND] = header[SECOND], header[FIRST]


def test_two_tensors_under_each_others_name(copied):
    change_header(copied, swapped)
    refuse(copied, IntegrityError, FIRST, SECOND)


def test_two_tensors_under_each_others_name_with_all_digests_made_anew(copied):
    change_header(copied, swapped, swap_digests=(FIRST, SECOND))
    # Every digest, shape and dtype is right now; only the recorded answers know better.
    refuse(copied, ParityError, "parity.json", "row 0")
    refuse(copied, ParityError, "parity.json", verify="structure")
    refuse_behind_pyfunc(copied, ParityError)


def same_range(header):
    header[FIRST] = {**header[FIRST], "data_offsets": header[SECOND]["data_offsets"]}


def overlapping(header):
    first, last = header[FIRST]["data_offsets"]
    header[FIRST] = {**header[FIRST], "data_offsets": [first + 4, last + 4]}


def past_the_end(header):
    header[FIRST] = {**header[FIRST], "data_offsets": [10**9, 10**9 + 8192]}


def backwards(header):
    header[FIRST] = {**header[FIRST], "data_offsets": header[FIRST]["data_offsets"][::-1]}


def negative(header):
    header[FIRST] = {**header[FIRST], "data_offsets": [-8192, 0]}


def without_range(header):
    del header[FIRST]["data_offsets"]


def three_numbers(header):
    header[FIRST] = {**header[FIRST], "data_offsets": [0, 1, 2]}


def other_shape(header):
    header[FIRST] = {**header[FIRST], "shape": [1, 1]}


def no_entry(header):
    header[FIRST] = None


def one_more(header):
    header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def one_less(header):
    del header[FIRST]


HEADERS = [
    same_range,
    overlapping,
    past_the_end,
    backwards,
    negative,
    without_range,
    three_numbers,
    other_shape,
]
HEADERS += [no_entry, one_more, one_less]


@pytest.mark.parametrize("change", HEADERS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_header_that_lies(copied, change, verify):
    change_header(copied, change, swap_digests=())
    with pytest.raises((IntegrityError, WeightsError)) as refused:
        mlflow_safeflavor.load_model(str(copied), verify=verify)
    assert any(name in refused.value.message for name in (FIRST, WEIGHTS, "more"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        b"\0" * 8,
    ],
    ids=["empty", "7 bytes", "huge length", "longer than the file", "no dict", "no header"],
)
@pytest.mark.parametrize("verify", ["full", "off"])
@pytest.mark.parametrize("name", [WEIGHTS, "parity.safetensors"])
def test_a_safetensors_file_that_is_none(copied, name, content, verify):
    rewrite(copied / "safeflavor" / name, content)
    reseal(copied)
    if name == WEIGHTS:
        refuse(copied, IntegrityError, name, verify=verify)
    elif verify == "full":  # golden rows are not read with verify="off"
        refuse(copied, IntegrityError, name)


def test_a_safetensors_file_cut_short_with_the_manifest_made_anew(copied):
    path = copied / "safeflavor" / WEIGHTS
    rewrite(path, path.read_bytes()[:-4])
    reseal(copied)
    refuse(copied, IntegrityError, WEIGHTS)
    refuse(copied, IntegrityError, WEIGHTS, verify="off")


# The inventory


def row_of(inventory, path):
    return next(row for row in inventory["tensors"] if row["path"] == path)


INVENTORY = {
    "no row": lambda inventory: inventory["tensors"].remove(row_of(inventory, FIRST)),
    "twice": lambda inventory: inventory["tensors"].append(row_of(inventory, FIRST)),
    "other path": lambda inventory: row_of(inventory, FIRST).update(path="other"),
    "other kind": lambda inventory: row_of(inventory, FIRST).update(kind="buffer"),
    "other shape": lambda inventory: row_of(inventory, FIRST).update(shape=[64, 32]),
    "past the end": lambda inventory: row_of(inventory, FIRST).update(offset=1),
    "negative offset": lambda inventory: row_of(inventory, FIRST).update(offset=-1),
    "wide stride": lambda inventory: row_of(inventory, FIRST).update(stride=[640, 1]),
    "unknown data": lambda inventory: row_of(inventory, FIRST).update(data="other"),
    "not persistent": lambda inventory: row_of(inventory, FIRST).update(persistent=False),
    "unknown dtype": lambda inventory: inventory["data"][FIRST].update(dtype="float7"),
    "no dtype": lambda inventory: inventory["data"][FIRST].update(dtype="nn"),
    "data of another shape": lambda inventory: inventory["data"][FIRST].update(shape=[64, 64]),
    "a file elsewhere": lambda inventory: inventory["data"][FIRST].update(
        file="../model.safetensors"
    ),
    "files elsewhere": lambda inventory: inventory["files"].update({"../../x.safetensors": "0"}),
    "unlisted file": lambda inventory: inventory["files"].update({"other.safetensors": "0"}),
    "newer version": lambda inventory: inventory.update(version=99),
    "no rows": lambda inventory: inventory.update(tensors=None),
    "a list": lambda inventory: [inventory],
}


@pytest.mark.parametrize("change", INVENTORY)
@pytest.mark.parametrize("verify", ["full", "off"])
def test_an_inventory_that_lies(copied, change, verify):
    edit_json(copied / "safeflavor" / "tensors.json", INVENTORY[change])
    reseal(copied)
    with pytest.raises((IntegrityError, WeightsError)) as refused:
        mlflow_safeflavor.load_model(str(copied), verify=verify)
    assert any(name in refused.value.message for name in (FIRST, "other", "tensors.json"))


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_an_inventory_that_lies_about_the_order_of_values(copied, verify):
    """Nothing is missing and all facts agree with the inventory.

    Only the recorded answers know better.
    """
    edit_json(
        copied / "safeflavor" / "tensors.json",
        lambda all_: row_of(all_, SQUARE).update(stride=[1, 32]),
    )
    reseal(copied)
    refuse(copied, ParityError, "row 0", verify=verify)


@pytest.mark.parametrize("verify", ["full", "off"])
def test_an_inventory_that_ties_what_was_not_tied(copied, verify):
    edit_json(
        copied / "safeflavor" / "tensors.json", lambda all_: row_of(all_, FIRST).update(data=SECOND)
    )
    reseal(copied)
    refuse(copied, WeightsError, FIRST, "share memory", verify=verify)


# Structure


def edit_text(path, old, new):
    text = path.read_text()
    assert old in text, f"{old} is not in {path.name}"
    rewrite(path, text.replace(old, new))


@pytest.mark.parametrize(
    ("new", "kind"),
    [
        ("BertForTokenClassification", (WeightsError,)),
        ("BertModel", (WeightsError, StructureError)),
        ("BertForNothing", (StructureError,)),
        ("torch", (StructureError, IntegrityError)),
        ("__builtins__", (StructureError, IntegrityError)),
        ("BertForSequenceClassification.__init__", (StructureError, IntegrityError)),
    ],
)
def test_another_class(copied, new, kind):
    edit_text(copied / "safeflavor" / "structure.json", "BertForSequenceClassification", new)
    reseal(copied)
    with pytest.raises(kind) as refused:
        mlflow_safeflavor.load_model(str(copied))
    assert "where: " in refused.value.message


def test_a_class_outside_transformers_is_not_imported(copied, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass BertForSequenceClassification: 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    edit_text(
        copied / "safeflavor" / "structure.json", "transformers.models.bert.modeling_bert", "evil"
    )
    reseal(copied)
    refuse(copied, StructureError, "evil:BertForSequenceClassification")
    assert not (tmp_path / "ran").exists()


CONFIG = {
    "more layers": ({"num_hidden_layers": 3}, WeightsError, "encoder.layer.2"),
    "fewer layers": ({"num_hidden_layers": 1}, WeightsError, "encoder.layer.1"),
    "more heads": ({"num_attention_heads": 4}, ParityError, "row 0"),
    "another activation": ({"hidden_act": "relu"}, ParityError, "row 0"),
    "no such activation": ({"hidden_act": "nothing"}, StructureError, "constructor"),
    "indivisible heads": ({"num_attention_heads": 5}, StructureError, "constructor"),
}


@pytest.mark.parametrize("change", CONFIG)
def test_another_config(copied, change):
    values, kind, named = CONFIG[change]
    edit_json(copied / "safeflavor" / "config.json", lambda config: config.update(values))
    reseal(copied)
    refuse(copied, kind, named)


# Golden rows


def test_other_recorded_answers(copied):
    def change(content):
        content["answers"][1]["score"] += 0.01

    edit_json(copied / "safeflavor" / "parity.json", change)
    reseal(copied)
    refuse(copied, ParityError, "parity.json", "row 1, score", "wanted: within atol")
    assert mlflow_safeflavor.load_model(str(copied), verify="off").report.golden_rows == 0


def test_other_recorded_labels(copied):
    edit_json(
        copied / "safeflavor" / "parity.json",
        lambda content: content["answers"][0].update(label="LABEL_7"),
    )
    reseal(copied)
    refuse(copied, ParityError, "row 0, label", "LABEL_7")


@pytest.mark.parametrize("rows", [[], None, {}, [{"text": "a"}]], ids=repr)
def test_malformed_recordings(copied, rows):
    edit_json(copied / "safeflavor" / "parity.json", lambda content: content.update(rows=rows))
    reseal(copied)
    refuse(copied, IntegrityError, "parity.json")


def test_another_recorded_output(copied):
    path = copied / "safeflavor" / "parity.safetensors"
    header, data = read_header(path)
    name = next(name for name in header if name.startswith("0.output."))
    at = header[name]["data_offsets"][0] + 3  # the byte of a float32 that holds sign and exponent
    write_header(path, header, data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
    reseal(copied)
    refuse(copied, ParityError, "row 0, output logits")


def test_another_tokenizer(copied):
    edit_json(
        copied / "safeflavor" / "tokenizer" / "tokenizer.json",
        lambda content: content["model"]["vocab"].update(the=6, a=5),
    )
    reseal(copied)
    refuse(copied, ParityError, "input input_ids")


# MLmodel


def flavor(**values):
    return lambda content: content["flavors"]["safeflavor"].update(values)


MLMODEL = {
    "other task": (flavor(task="nothing"), StructureError, "nothing"),
    "other dtype": (flavor(dtype="int8"), IntegrityError, "dtype"),
    "other structure": (flavor(structure="eval"), IntegrityError, "structure"),
    "pickle": (flavor(structure="pickle", runs=["pickle"]), TrustError, "pickle"),
    "own code": (flavor(structure="import", runs=["code"]), TrustError, "code"),
    "pickle that runs nothing": (flavor(structure="pickle"), IntegrityError, "structure.json"),
    "own code that runs nothing": (flavor(structure="import"), IntegrityError, "structure.json"),
    "no task": (
        lambda content: content["flavors"]["safeflavor"].pop("task"),
        IntegrityError,
        "task",
    ),
    "task of another type": (flavor(task=3), IntegrityError, "task"),
    "columns of another type": (flavor(input_columns=["text"]), IntegrityError, "input_columns"),
    "two columns without names": (
        flavor(input_columns={"text": None, "text_pair": None}),
        IntegrityError,
        "a sole null",
    ),
    "a number for a column": (flavor(input_columns={"text": 3}), IntegrityError, "a sole null"),
}


@pytest.mark.parametrize("change", MLMODEL)
def test_another_flavor_entry(copied, change):
    edit, kind, named = MLMODEL[change]
    edit_mlmodel(copied, edit)
    reseal(copied)
    refuse(copied, kind, named)


@pytest.mark.parametrize(
    "text", ["", "flavors: [", "\t", "- a", "flavors: {}", "flavors: {safeflavor: null}", "3"]
)
def test_an_mlmodel_that_is_none(copied, text):
    rewrite(copied / "MLmodel", text)
    refuse(copied, IntegrityError, "MLmodel")


def test_an_mlmodel_that_would_run_code_is_only_read(copied, tmp_path):
    rewrite(copied / "MLmodel", f"flavors: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    refuse(copied, IntegrityError, "MLmodel")
    assert not (tmp_path / "ran").exists()


# Any value of any JSON file, and of the flavor entry, replaced


def places(value, path=()):
    """Path of every value.

    Of lists the first two items stand for all, of tables of tensors the first two rows.
    """
    if isinstance(value, dict):
        items = list(value.items())[: 2 if len(value) > 25 else None]
    else:
        items = list(enumerate(value))[:2] if isinstance(value, list) else []
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    if new is DELETED:
        del value[path[-1]]
    else:
        value[path[-1]] = new


DELETED = object()
VALUES = [DELETED, None, "zz", -1, 10**9, [], {}, 1.5, True]


@pytest.mark.slow
def test_no_value_replaced_gives_other_answers_or_an_unnamed_error(copied, saved):
    wanted = mlflow_safeflavor.load_model(str(saved)).predict(TEXTS)
    escaped = []
    for name, start in [
        ("structure", ()),
        ("parity", ()),
        ("environment", ()),
        ("tensors", ()),
        ("MLmodel", None),
    ]:
        path = copied / ("MLmodel" if start is None else f"safeflavor/{name}.json")
        text = path.read_text()
        read, write = (
            (yaml.safe_load, yaml.safe_dump) if start is None else (json.loads, json.dumps)
        )
        below = read(text)["flavors"]["safeflavor"] if start is None else read(text)
        prefix = ("flavors", "safeflavor") if start is None else ()
        for place in [(), *places(below)] if start is None else list(places(below)):
            for new in random.Random(str(place)).sample(VALUES, 1):
                content = read(text)
                put(content, (*prefix, *place), new)
                rewrite(path, write(content))
                reseal(copied)
                label = (
                    f"{name} {'.'.join(map(str, place))} = "
                    f"{'deleted' if new is DELETED else repr(new)}"
                )
                try:
                    found = mlflow_safeflavor.load_model(str(copied)).predict(TEXTS)
                except SafeFlavorError:
                    pass
                except Exception as error:
                    escaped.append(f"{label}: {type(error).__name__}: {error}")
                else:
                    assert found.equals(wanted), f"{label}: other answers"
        rewrite(path, text)
    assert escaped == []


# Several files of weights


@pytest.fixture
def sharded(tmp_path, tiny_bert, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 50_000)
    path = tmp_path / "sharded"
    model = tiny_bert(initializer_range=0.5)
    mlflow_safeflavor.save_model(
        model, path, tokenizer=tiny_tokenizer, model_config=SAME_BATCHES, rehearse=False, graph="no"
    )
    return path


def shards_of(path):
    return sorted((path / "safeflavor").glob("model-*.safetensors"))


def test_weights_in_several_files_load_as_in_one(sharded, saved):
    assert len(shards_of(sharded)) > 1
    index = json.loads((sharded / "safeflavor" / "model.safetensors.index.json").read_text())
    assert {file.name for file in shards_of(sharded)} == set(index["weight_map"].values())
    wanted = mlflow_safeflavor.load_model(str(saved)).predict(TEXTS)
    assert mlflow_safeflavor.load_model(str(sharded)).predict(TEXTS).equals(wanted)


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_shard_that_is_missing_or_flipped(sharded, which):
    shard = shards_of(sharded)[which]
    flip(shard, len(shard.read_bytes()) - 5)
    refuse(sharded, IntegrityError, shard.name)
    shard.unlink()
    refuse(sharded, IntegrityError, shard.name)
    reseal(sharded)
    refuse(sharded, IntegrityError, shard.name)
    refuse(sharded, IntegrityError, shard.name, verify="off")


def test_two_shards_under_each_others_name(sharded):
    first, second = shards_of(sharded)[:2]
    os.rename(first, sharded / "x")
    os.rename(second, first)
    os.rename(sharded / "x", second)
    reseal(sharded)
    refuse(sharded, IntegrityError, first.name)
    # Without digests it shows only that all tensors are there, and they are: the names in the files
    # did not change.
    assert mlflow_safeflavor.load_model(str(sharded), verify="structure").report.bit_identical


def test_a_tensor_in_two_shards(sharded):
    first, second = shards_of(sharded)[:2]
    shutil.copyfile(first, second)
    reseal(sharded)
    with pytest.raises((IntegrityError, WeightsError)):
        mlflow_safeflavor.load_model(str(sharded), verify="off")


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_the_index_of_shards(sharded, damage):
    index = sharded / "safeflavor" / "model.safetensors.index.json"
    if damage == "missing":
        index.unlink()
    else:
        flip(index)
    refuse(sharded, IntegrityError, index.name)
