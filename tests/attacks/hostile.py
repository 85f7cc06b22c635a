"""Artifacts by somebody who may write every file, and renews the manifest where that helps.

Each function below is one attack: it takes a copy of a good artifact and damages it. Its docstring
is what is attempted, its decorator says how loading must end: the names of our errors, ``loads``
where the damage is rightly disregarded, ``any`` where MLflow reads the file before we do.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import marshal
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from artifacts import edit_json, edit_mlmodel, flip, read_header, reseal, rewrite, write_header
from onnx import helper, numpy_helper

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import digest_json
from mlflow_safeflavor.artifact.plain_files import digest_of_file

SOURCE = """
import torch

class Scale(torch.nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = torch.nn.Linear(size, size)
    def forward(self, x):
        return self.linear(x)

def pre(rows, tokenizer):
    return {"x": torch.tensor([[row["a"], row["b"], 0.0, 1.0] for row in rows])}

def post(outputs, rows):
    return [{"sum": float(values.sum())} for values in outputs["output_0"]]
"""
MODULE = "scale_of_the_user"


@dataclass(frozen=True)
class Attack:
    """One hostile artifact.

    Attributes:
        name: Name of the function.
        damage: Takes ``Target``.
        native: How ``mlflow_safeflavor.load_model`` must end; the name of an error.
        pyfunc: How ``mlflow.pyfunc.load_model`` must end; None where it does not apply.
        base: Which good artifact is damaged: "classifier", "graph", "coded", "pickled", "image",
            "sound" or "chat".
        options: Arguments of ``load_model``.
        config: ``model_config`` for pyfunc.
        heavy: Whether it is after memory or time, and so runs in a bounded process.
        bomb: As ``heavy``, and refused so early that one bounded process does for all.
        then: What to do with a model that loads.
    """

    name: str
    damage: Callable[[Target], None]
    native: str
    pyfunc: str | None
    base: str = "classifier"
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    heavy: bool = False
    bomb: bool = False
    then: Callable[[Any], Any] = lambda model: None

    @property
    def attempt(self) -> str:
        """What is attempted, in one line."""
        return (self.damage.__doc__ or "").strip()


class Target(Layout):
    """An artifact to damage, and the file that no attack may touch."""

    def __init__(self, root: Path, canary: Path) -> None:
        super().__init__(root)
        self.canary = canary
        self.weights = self.data / "model.safetensors"
        self.tokenizer_json = self.tokenizer / "tokenizer.json"
        self.tokenizer_config = self.tokenizer / "tokenizer_config.json"

    @property
    def payload(self) -> str:
        """Python source that touches the canary."""
        return f"open({str(self.canary)!r}, 'w').close()\n"

    def reseal(self) -> None:
        """Make the manifest anew."""
        reseal(self.root)

    def json(self, path: Path, change: Callable[[Any], Any]) -> None:
        """Change a JSON file and make the manifest anew."""
        edit_json(path, change)
        self.reseal()

    def structure_of(self, **changes: Any) -> None:
        """Change keys of structure.json, and what MLmodel says of it."""

        def follow(entry: Any) -> None:
            entry["structure"], entry["model_class"] = content["kind"], content["class"]

        edit_json(self.structure, lambda old: old | changes)
        content = json.loads(self.structure.read_text())
        self.flavor(follow)

    def flavor(self, change: Callable[[Any], Any]) -> None:
        """Change our entry of MLmodel and make the manifest anew."""
        edit_mlmodel(self.root, lambda content: change(content["flavors"]["safeflavor"]))
        self.reseal()

    def header(
        self, change: Callable[[Any], Any], data: Callable[[bytes], bytes] = lambda data: data
    ) -> None:
        """Change header and data of the weights, and make every digest anew."""
        header, content = read_header(self.weights)
        changed = change(header)
        write_header(self.weights, header if changed is None else changed, data(content))
        self.redigest()

    def redigest(self) -> None:
        """Write the digests that the weights have now into tensors.json, and renew the manifest."""
        content = self.weights.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        try:
            entries = json.loads(content[8:start])
            ranges = {n: e["data_offsets"] for n, e in entries.items() if n != "__metadata__"}
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            ranges = {}

        def change(inventory: Any) -> None:
            inventory["files"]["model.safetensors"] = hashlib.sha256(content[:start]).hexdigest()
            for name, span in ranges.items():
                if name in inventory["data"] and all(type(n) is int for n in span):
                    part = content[start + span[0] : start + span[1]] if span[0] >= 0 else b""
                    inventory["data"][name]["sha256"] = hashlib.sha256(part).hexdigest()

        self.json(self.tensors, change)

    def values(self, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Change the values of weights, and make every digest anew."""
        header, data = read_header(self.weights)
        spans = {
            name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
        }
        arrays = {
            name: np.frombuffer(data[a:b], np.float32).copy() for name, (a, b) in spans.items()
        }
        change(arrays)
        ordered = sorted(spans, key=lambda name: spans[name])
        write_header(self.weights, header, b"".join(arrays[name].tobytes() for name in ordered))
        self.redigest()


MAY_IMPORT = re.compile(
    r"mlflow_safeflavor(\.\w+)+"
    r"|transformers\.(models\.\w+(\.(modeling|configuration)_\w+|\.\w+_auto)?|(image|video)_processing_\w+)"
)
"""What a hostile load may import that no load before it did.

This package's own modules, what defines models, and

transformers' own tables. No pipeline, no timm."""

ATTACKS: list[Attack] = []
SAME = "same"


def attack(
    native: str, pyfunc: str | None = SAME, **more: Any
) -> Callable[[Callable[[Target], None]], Any]:
    """Register an attack; see ``Attack``."""

    def register(damage: Callable[[Target], None]) -> Callable[[Target], None]:
        made = Attack(damage.__name__, damage, native, native if pyfunc == SAME else pyfunc, **more)
        ATTACKS.append(made)
        return damage

    return register


class Touch:
    """Unpickled, it touches the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key"))
BERT = "transformers.models.bert.modeling_bert"


# --- running something ----------------------------------------------------------------------------


@attack("TrustError", base="pickled")
def pickle_payload(target):
    """structure.pkl of a pickled model calls `open` when it is unpickled"""
    rewrite(target.structure_pickle, pickle.dumps(Touch(target.canary)))
    target.reseal()


@attack("IntegrityError", base="pickled")
def pickle_not_declared(target):
    """the pickle stays, but MLmodel says that nothing runs"""
    rewrite(target.structure_pickle, pickle.dumps(Touch(target.canary)))
    target.flavor(lambda entry: entry.update(runs=[]))


@attack("IntegrityError")
def pickle_smuggled_in(target):
    """a pickle and its description are added to a transformers model"""
    rewrite(target.structure_pickle, pickle.dumps(Touch(target.canary)))
    target.structure_of(pickle={"tensors": [], "python": "3.11", "cloudpickle": "3"})


@attack("TrustError", base="pickled", options={"trust": {"code"}})
def pickle_with_trust_in_code_only(target):
    """a pickle hopes that trust in code is trust in pickles"""
    rewrite(target.structure_pickle, pickle.dumps(Touch(target.canary)))
    target.reseal()


@attack("IntegrityError")
def pickle_as_weights(target):
    """model.safetensors is a pickle, as torch.save makes it"""
    target.weights.unlink()
    torch.save(Touch(target.canary), target.weights)
    target.reseal()


@attack("IntegrityError")
def pickle_beside_weights(target):
    """a pytorch_model.bin that transformers might prefer"""
    torch.save(Touch(target.canary), target.data / "pytorch_model.bin")


def class_attack(
    class_name: str,
    doc: str,
    arguments: Mapping[str, Any] | None = None,
    outcome: str = "StructureError",
    **more: Any,
) -> None:
    """A transformers artifact whose class is something else.

    Arguments that are no flags are refused before it is.
    """
    outcome = "IntegrityError" if arguments else outcome

    def damage(target: Target) -> None:
        given = {
            k: {"value": v.replace("CANARY", str(target.canary))}
            for k, v in (arguments or {}).items()
        }
        target.structure_of(**{"class": class_name, "arguments": given, **more})

    damage.__name__ = "class_" + re.sub(r"\W+", "_", class_name)
    damage.__doc__ = doc
    attack(outcome)(damage)


NO_CONFIG: dict[str, Any] = {"config_class": None, "config": None}
class_attack(
    "os:system",
    "the class is os.system, its argument a command",
    {"command": "touch CANARY"},
    **NO_CONFIG,
)
class_attack("builtins:eval", "the class is eval", {"source": "open('CANARY','w')"}, **NO_CONFIG)
class_attack(
    "subprocess:Popen", "the class is subprocess.Popen", {"args": "touch CANARY"}, **NO_CONFIG
)
class_attack(
    "transformers.utils.hub:cached_file", "the class is a function of transformers that downloads"
)
class_attack(
    "transformers.utils.import_utils:subprocess.Popen",
    "a class is reached through what transformers imports",
)
class_attack(
    "transformers.models.auto.auto_factory:importlib",
    "the class is a module that transformers imports",
)
class_attack(f"{BERT}:__builtins__", "the class is a dunder name of a transformers module")
class_attack(
    f"{BERT}:BertModel.__init__.__globals__", "the class is reached through attributes of a class"
)
class_attack(
    "transformers.testing_utils:TestCasePlus",
    "the class is in a transformers module with side effects",
)
class_attack("transformers.models.bert.tokenization_bert:BertTokenizer", "the class reads a file "
                                                                         "of its choice",
             {"vocab": "/etc/hostname"}, **NO_CONFIG)  # fmt: skip
class_attack(
    "transformers.models.bert.configuration_bert:BertConfig", "the class is no module", **NO_CONFIG
)
class_attack("transformers.models.bert.modeling_bert\n:BertModel", "the class name has a line "
                                                                   "break",
             outcome="IntegrityError")  # fmt: skip


@attack("StructureError")
def config_class_outside(target):
    """config_class is not of transformers"""
    rewrite(target.code / "their_config.py", target.payload)
    target.structure_of(config_class="their_config:Config")


@attack("StructureError")
def config_class_is_no_config(target):
    """config_class is a model, whose from_dict does not exist"""
    target.structure_of(config_class=f"{BERT}:BertModel")


@attack("TrustError", "StructureError", base="coded")
def import_os_system(target):
    """an artifact with code of its own: the class is os.system, called with a command"""
    target.structure_of(
        **{"class": "os:system", "arguments": {"command": {"value": f"touch {target.canary}"}}}
    )


@attack("TrustError", "StructureError", base="coded")
def import_popen(target):
    """the same with a class that is no module"""
    target.structure_of(
        **{
            "class": "subprocess:Popen",
            "arguments": {"args": {"value": ["touch", str(target.canary)]}},
        }
    )


@attack("TrustError", "ParityError", base="coded")
def hook_is_eval(target):
    """the user's hook is eval"""
    target.structure_of(hooks={"preprocess": "builtins:eval", "postprocess": f"{MODULE}:post"})


@attack("IntegrityError")
def kind_switched(target):
    """structure.json says import, MLmodel says transformers"""
    rewrite(target.code / "their_module.py", target.payload)
    target.json(
        target.structure, lambda old: old | {"kind": "import", "class": "their_module:Model"}
    )


@attack("IntegrityError")
def kind_switched_everywhere(target):
    """both say import, but that nothing runs"""
    rewrite(target.code / "their_module.py", target.payload)
    target.structure_of(**{"kind": "import", "class": "their_module:Model"})


@attack("IntegrityError")
def hooks_injected(target):
    """hooks in a model whose task has none"""
    rewrite(target.code / "their_hooks.py", target.payload)
    target.structure_of(hooks={"preprocess": "their_hooks:pre"})


@attack("TrustError", "IntegrityError")
def hooks_injected_and_declared(target):
    """the same, and MLmodel says that code runs"""
    rewrite(target.code / "their_hooks.py", target.payload)
    target.flavor(lambda entry: entry.update(runs=["code"]))
    target.structure_of(hooks={"preprocess": "their_hooks:pre"})


@attack("TrustError", None, then=lambda model: model.tokenizer)
def tokenizer_auto_map(target):
    """tokenizer_config.json names a class in a file beside it"""
    rewrite(target.tokenizer / "their_tokenizer.py", target.payload)
    edit = {
        "auto_map": {"AutoTokenizer": ["their_tokenizer.T", "their_tokenizer.T"]},
        "tokenizer_class": "T",
    }
    target.json(target.tokenizer_config, lambda old: old | edit)


@attack("TrustError")
def config_auto_map(target):
    """config.json names a class in a file beside it"""
    rewrite(target.data / "their_model.py", target.payload)
    edit = {"auto_map": {"AutoModel": "their_model.M"}, "trust_remote_code": True}
    target.json(target.config, lambda old: old | edit)


@attack("IntegrityError")
def kernel_of_a_hub(target):
    """attn_implementation names a kernel that transformers would fetch and run"""
    target.structure_of(attn_implementation="kernels-community/flash-attn")


@attack("TrustError")
def kernel_in_config(target):
    """the same, deep in config.json"""
    target.json(
        target.config,
        lambda old: old | {"text_config": {"_attn_implementation": "somebody/kernel@main:f"}},
    )


@attack("IntegrityError")
def code_added(target):
    """a module is added to code/"""
    rewrite(target.code / "helper.py", target.payload)


@attack("IntegrityError", base="coded", options={"trust": {"code"}})
def code_changed(target):
    """the user's own module is changed"""
    file = target.code / f"{MODULE}.py"
    rewrite(file, file.read_text() + target.payload)


@attack("StructureError")
def code_shadows_torch(target):
    """code/torch.py, which MLflow puts before the real one"""
    rewrite(target.code / "torch.py", target.payload)
    target.reseal()


@attack("StructureError")
def code_shadows_json(target):
    """code/json/__init__.py"""
    (target.code / "json").mkdir()
    rewrite(target.code / "json" / "__init__.py", target.payload)
    target.reseal()


@attack("TrustError", "StructureError", base="coded")
def code_shadows_late_import(target):
    """code/sqlite3.py, which something may import later"""
    rewrite(target.code / "sqlite3.py", target.payload)
    target.reseal()


@attack("loads", base="coded", options={"trust": {"code"}})
def code_as_byte_code(target):
    """a .pyc in __pycache__ that Python runs in place of the source that was checked"""
    code = marshal.dumps(compile(target.payload + SOURCE, f"{MODULE}.py", "exec"))
    file = Path(importlib.util.cache_from_source(str(target.code / f"{MODULE}.py")))
    file.parent.mkdir(exist_ok=True)
    # Flag 1: a hash that nobody compares, so the byte code always counts.
    file.write_bytes(importlib.util.MAGIC_NUMBER + struct.pack("<L", 1) + bytes(8) + code)


@attack("IntegrityError", "any")
def yaml_python_object(target):
    """MLmodel holds a YAML tag that makes Python objects"""
    text = f"evil: !!python/object/apply:os.system ['touch {target.canary}']\n"
    rewrite(target.mlmodel, target.mlmodel.read_text() + text)


# --- files ----------------------------------------------------------------------------------------


def manifest_attack(name: str, doc: str, change: Callable[[Any], Any]) -> None:
    """The manifest alone is changed."""

    def damage(target: Target) -> None:
        edit_json(target.manifest, change)

    damage.__name__, damage.__doc__ = name, doc
    attack("IntegrityError")(damage)


ENTRY = {"sha256": "0" * 64, "size": 1}
manifest_attack(
    "manifest_parent", "a name with ..", lambda m: m["files"].update({"safeflavor/../../x": ENTRY})
)
manifest_attack(
    "manifest_absolute", "an absolute name", lambda m: m["files"].update({"/etc/hostname": ENTRY})
)
manifest_attack(
    "manifest_backslash", "a name of another system", lambda m: m["files"].update({"..\\x": ENTRY})
)
manifest_attack(
    "manifest_long_name",
    "a name no file system takes",
    lambda m: m["files"].update({"x" * 9000: ENTRY}),
)
manifest_attack("manifest_nul", "a name with a NUL", lambda m: m["files"].update({"a\0b": ENTRY}))
manifest_attack("manifest_empty", "no file is listed", lambda m: m.update(files={}))
manifest_attack("manifest_without_weights", "the weights are not listed",
                lambda m: m["files"].pop("safeflavor/model.safetensors"))  # fmt: skip
manifest_attack("manifest_is_a_list", "a list instead of a mapping", lambda m: [m])
manifest_attack(
    "manifest_sizes",
    "sizes that are no numbers",
    lambda m: m["files"].update(x={**ENTRY, "size": True}),
)
manifest_attack(
    "manifest_mlmodel",
    "another digest of MLmodel",
    lambda m: m["mlmodel"].update(flavors="0" * 64),
)


@attack("IntegrityError")
def requirements_index(target):
    """requirements.txt gets another index, from which pip would install anything"""
    rewrite(
        target.requirements,
        "--index-url http://127.0.0.1:9/simple\n" + target.requirements.read_text(),
    )


def link_attack(name: str, doc: str, damage: Callable[[Target, Path], None]) -> None:
    """Something is put behind a symbolic link, with the same content."""

    def link(target: Target) -> None:
        damage(target, target.canary.parent / "elsewhere")

    link.__name__, link.__doc__ = name, doc
    attack("IntegrityError")(link)


def _behind_link(path: Path, elsewhere: Path) -> None:
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def _linked_folder(target: Target, elsewhere: Path) -> None:
    elsewhere.mkdir()
    (elsewhere / "__init__.py").write_text(target.payload)
    (target.code / "package").symlink_to(elsewhere)


link_attack(
    "link_weights", "the weights are a symbolic link", lambda t, e: _behind_link(t.weights, e)
)
link_attack(
    "link_manifest", "the manifest is a symbolic link", lambda t, e: _behind_link(t.manifest, e)
)
link_attack(
    "link_tokenizer",
    "the tokenizer folder is a symbolic link",
    lambda t, e: _behind_link(t.tokenizer, e),
)
link_attack("link_data", "safeflavor/ is a symbolic link", lambda t, e: _behind_link(t.data, e))
link_attack("link_code", "code/ holds a symbolic link to a package", _linked_folder)


@attack("IntegrityError", heavy=True)
def fifo_weights(target):
    """the weights are a pipe that nobody writes to"""
    target.weights.unlink()
    os.mkfifo(target.weights)


@attack("IntegrityError", heavy=True)
def fifo_manifest(target):
    """the manifest is a pipe"""
    target.manifest.unlink()
    os.mkfifo(target.manifest)


@attack("IntegrityError", None, heavy=True)
def fifo_mlmodel(target):
    """MLmodel is a pipe (through pyfunc MLflow itself waits for ever)"""
    target.mlmodel.unlink()
    os.mkfifo(target.mlmodel)


@attack("IntegrityError", heavy=True)
def device_manifest(target):
    """the manifest is /dev/zero, which never ends"""
    target.manifest.unlink()
    target.manifest.symlink_to("/dev/zero")


@attack("IntegrityError", "any")
def mlmodel_is_a_link(target):
    """MLmodel is a symbolic link"""
    _behind_link(target.mlmodel, target.canary.parent / "elsewhere")


@attack("IntegrityError")
def pipe_beside(target):
    """a pipe that no manifest lists, in a folder that is walked"""
    os.mkfifo(target.tokenizer / "pipe.json")


@attack("IntegrityError")
def folders_nested(target):
    """100 folders in each other"""
    (target.data / "/".join("d" * 100)).mkdir(parents=True)


def sparse(target: Target, path: Path, size: int) -> None:
    """Make a file huge without writing it, and tell the manifest so.

    Nobody is to read it to find that it lies.
    """
    rewrite(path, b"")
    os.truncate(path, size)

    def change(manifest: Any) -> None:
        manifest["files"][target.name_of(path)] = {"sha256": "0" * 64, "size": size}
        manifest["sha256"] = digest_json(
            {name: manifest[name] for name in manifest.keys() - {"sha256"}}
        )

    edit_json(target.manifest, change)


@attack("IntegrityError")
def json_of_40_gb(target):
    """config.json is a hole of 40 GB"""
    sparse(target, target.config, 40 * 10**9)


@attack("IntegrityError", None)
def tokenizer_of_40_gb(target):
    """a vocabulary is a hole of 40 GB"""
    sparse(target, target.tokenizer_json, 40 * 10**9)


@attack("IntegrityError")
def requirements_of_40_gb(target):
    """requirements.txt is a hole of 40 GB"""
    sparse(target, target.requirements, 40 * 10**9)


@attack("IntegrityError")
def manifest_of_40_gb(target):
    """the manifest is a hole of 40 GB"""
    rewrite(target.manifest, b"")
    os.truncate(target.manifest, 40 * 10**9)


@attack("IntegrityError", None)
def mlmodel_of_3_mb(target):
    """MLmodel has 3 MB, half a minute for a YAML parser (through pyfunc MLflow reads it first)"""
    rewrite(target.mlmodel, target.mlmodel.read_text() + "more:\n" + "- [a, b]\n" * 333_000)


def text_attack(
    name: str, doc: str, file: str, change: Callable[[str], str | bytes], outcome: str
) -> None:
    """The text of one file below safeflavor/ is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        rewrite(target.data / file, change((target.data / file).read_text()))
        target.reseal()

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome)(damage)


text_attack("json_huge_number", "a number of 5,000 digits", "tensors.json",
            lambda text: text.replace('"version": 1', '"version": '
                                                      f'{"1" * 5000}'),
                                                      "IntegrityError")  # fmt: skip
text_attack(
    "json_deep",
    "100,000 nested lists",
    "structure.json",
    lambda text: "[" * 10**5,
    "IntegrityError",
)
text_attack("json_deep_config", "900 nested dicts in a config", "config.json",
            lambda text: '{"a":' * 900 + "1" + "}" * 900, "IntegrityError")  # fmt: skip
text_attack("json_twice", "a key stands there twice, so that readers differ", "structure.json",
            lambda text: text.replace("{", '{"class": '
                                           '"os:system",', 1), "IntegrityError")  # fmt: skip
text_attack("json_nan", "a NaN in a config", "config.json",
            lambda text: text.replace("1e-12", "NaN"), "IntegrityError")  # fmt: skip
text_attack(
    "json_not_utf8",
    "bytes that are no text",
    "parity.json",
    lambda text: b"\xff\xfe{}",
    "IntegrityError",
)
text_attack("json_empty", "an empty file", "environment.json", lambda text: "", "IntegrityError")


@attack("IntegrityError", "any", heavy=True)
def yaml_bomb(target):
    """nine lines of YAML that are a billion values once written out"""
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)]
    bomb = "\n".join(f"    {line}" for line in lines)
    text = target.mlmodel.read_text()
    rewrite(target.mlmodel, text.replace("  safeflavor:\n", f"  safeflavor:\n{bomb}\n"))


@attack("IntegrityError", "any")
def yaml_recursive(target):
    """a YAML list that contains itself"""
    text = target.mlmodel.read_text()
    rewrite(target.mlmodel, text.replace("  safeflavor:\n", "  safeflavor:\n    loop: &a [*a]\n"))


@attack("IntegrityError", "any")
def yaml_deep(target):
    """10,000 nested YAML lists"""
    rewrite(
        target.mlmodel, target.mlmodel.read_text() + "deep: " + "[" * 10**4 + "]" * 10**4 + "\n"
    )


@attack("IntegrityError", "any")
def yaml_keys(target):
    """keys of different types, which cannot be sorted"""
    text = target.mlmodel.read_text()
    rewrite(
        target.mlmodel,
        text.replace("  safeflavor:\n", "  safeflavor:\n    1: a\n    2001-01-01: b\n"),
    )


# --- the safetensors header


def header_attack(
    name: str, doc: str, change: Callable[[Any], Any], data: Callable[[bytes], bytes] = lambda d: d,
    outcome: str = "IntegrityError",
) -> None:  # fmt: skip
    """The header of the weights is changed, and every digest made anew."""

    def damage(target: Target) -> None:
        target.header(change, data)

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome)(damage)


def _offsets(name: str, change: Callable[[int, int], list[Any]]) -> Callable[[Any], None]:
    return lambda header: header[name].update(data_offsets=change(*header[name]["data_offsets"]))


def _all_gone(header: Any) -> dict[str, Any]:
    return {"__metadata__": header["__metadata__"]}


header_attack(
    "header_overlap", "two tensors over the same bytes", lambda h: h[QUERY].update(h[KEY])
)
header_attack(
    "header_out_of_range",
    "a tensor past the end",
    _offsets(QUERY, lambda a, b: [a + 10**9, b + 10**9]),
)
header_attack(
    "header_negative",
    "a tensor before the start",
    _offsets(QUERY, lambda a, b: [a - 10**6, b - 10**6]),
)
header_attack(
    "header_backwards", "a tensor that ends before it starts", _offsets(QUERY, lambda a, b: [b, a])
)
header_attack(
    "header_huge_offsets",
    "offsets beyond 64 bits",
    _offsets(QUERY, lambda a, b: [a + 2**64, b + 2**64]),
)
header_attack(
    "header_float_offsets",
    "offsets that are no whole numbers",
    _offsets(QUERY, lambda a, b: [a, b + 0.5]),
)
header_attack(
    "header_infinite_offsets",
    "offsets that are infinite",
    _offsets(QUERY, lambda a, b: [a, float("inf")]),
)
header_attack(
    "header_gap", "bytes that belong to no tensor", lambda h: None, lambda data: data + bytes(64)
)
header_attack("header_dtype", "another dtype of the same "
                              "size", lambda h: h[QUERY].update(dtype="I32"), lambda d: d,
              "WeightsError")  # fmt: skip
header_attack(
    "header_unknown_dtype", "a dtype that nobody has", lambda h: h[QUERY].update(dtype="X99")
)
header_attack("header_shape", "another shape of as many "
                              "values", lambda h: h[QUERY].update(shape=[1024]), lambda d: d,
              "WeightsError")  # fmt: skip
header_attack(
    "header_shape_overflow",
    "a shape whose size wraps to 0",
    lambda h: h[QUERY].update(shape=[2**62, 4]),
)
header_attack(
    "header_terabytes", "a shape of 10^12 values", lambda h: h[QUERY].update(shape=[10**12])
)
header_attack("header_zero_size", "an empty tensor in the place of a full one",
              lambda h: h[QUERY].update(shape=[0], data_offsets=[0, 0]))  # fmt: skip
header_attack("header_extra_tensor", "a tensor that nobody listed",
              lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
              lambda d: d,
              "WeightsError")  # fmt: skip
header_attack(
    "header_renamed",
    "a tensor under another name",
    lambda h: h.update({"module." + QUERY: h.pop(QUERY)}),
)
header_attack("header_empty", "no tensor at all", _all_gone, lambda data: b"")
header_attack("header_list", "the header is a list", lambda h: [h])


def bytes_attack(name: str, doc: str, change: Callable[[bytes], bytes]) -> None:
    """The bytes of the weights are changed, and every digest made anew."""

    def damage(target: Target) -> None:
        rewrite(target.weights, change(target.weights.read_bytes()))
        target.redigest()

    damage.__name__, damage.__doc__ = name, doc
    attack("IntegrityError")(damage)


def _with_header(text: str | bytes) -> Callable[[bytes], bytes]:
    raw = text.encode() if isinstance(text, str) else text
    return lambda content: struct.pack("<Q", len(raw)) + raw


bytes_attack(
    "header_length_beyond",
    "a header longer than the file",
    lambda c: struct.pack("<Q", len(c)) + c[8:],
)
bytes_attack(
    "header_length_huge", "a header of 2^63 bytes", lambda c: struct.pack("<Q", 2**63) + c[8:]
)
bytes_attack("header_deep", "a header of nested lists", _with_header("[" * 10**5))
bytes_attack("header_not_utf8", "a header that is no text", _with_header(b"\xff" * 64))
bytes_attack("weights_empty", "an empty file", lambda content: b"")
bytes_attack("weights_cut", "half of the file", lambda content: content[: len(content) // 2])


@attack("IntegrityError")
def header_twice(target):
    """one name twice in the header, so that readers differ"""
    content = target.weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length].decode().rstrip(), content[8 + length :]
    entry = json.loads(text)[KEY]
    text = text.replace("{", "{" + f"{json.dumps(QUERY)}: {json.dumps(entry)}, ", 1)
    rewrite(target.weights, struct.pack("<Q", len(text)) + text.encode() + data)
    target.redigest()


# --- the inventory


def inventory_attack(
    name: str,
    doc: str,
    change: Callable[[dict[str, Any], Any], Any],
    outcome: str = "IntegrityError",
    **more: Any,
) -> None:
    """tensors.json is changed: ``change`` gets rows by path, and all of it."""

    def damage(target: Target) -> None:
        target.json(
            target.tensors,
            lambda content: (
                change({row["path"]: row for row in content["tensors"]}, content) and None
            ),
        )

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome, **more)(damage)


inventory_attack("view_past_the_end", "a view that reaches past its data",
                 lambda rows, c: rows[QUERY].update(shape=[32, 32], stride=[32, 1],
                     offset=1))  # fmt: skip
inventory_attack(
    "view_far_outside", "a view far outside", lambda rows, c: rows[QUERY].update(stride=[2**40, 1])
)
inventory_attack(
    "view_negative_stride", "a negative stride", lambda rows, c: rows[QUERY].update(stride=[-32, 1])
)
inventory_attack(
    "view_negative_offset", "a negative offset", lambda rows, c: rows[QUERY].update(offset=-1)
)
inventory_attack(
    "view_beyond_64_bits",
    "a shape beyond 64 bits",
    lambda rows, c: rows[QUERY].update(shape=[2**70, 0]),
)
inventory_attack("view_of_terabytes", "10^12 values with a stride of 0, which cost nothing until "
                                      "they are copied",
                 lambda rows, c: rows[QUERY].update(shape=[10**12, 32], stride=[0, 1]),
                 "WeightsError",
                 heavy=True)  # fmt: skip
inventory_attack("view_transposed", "a square matrix "
                                    "transposed",
                                    lambda rows, c: rows[QUERY].update(stride=[1, 32]),
                 "ParityError")  # fmt: skip
inventory_attack("alias_made", "two tensors share one's "
                               "data", lambda rows, c: rows[QUERY].update(data=KEY),
                 "WeightsError")  # fmt: skip
inventory_attack("alias_swapped", "two tensors have each other's data",
                 lambda rows, c: (rows[QUERY].update(data=KEY), rows[KEY].update(data=QUERY)),
                 "WeightsError")  # fmt: skip
inventory_attack(
    "alias_to_nothing",
    "data that does not exist",
    lambda rows, c: rows[QUERY].update(data="nothing"),
)
inventory_attack("row_missing", "a tensor is left "
                                "out", lambda rows, c: c["tensors"].remove(rows[QUERY]),
                 "WeightsError")  # fmt: skip
inventory_attack(
    "row_twice", "a tensor stands there twice", lambda rows, c: c["tensors"].append(rows[QUERY])
)
inventory_attack("row_kind", "a parameter becomes a "
                             "buffer", lambda rows, c: rows[QUERY].update(kind="buffer"),
                 "WeightsError")  # fmt: skip
inventory_attack("row_hidden", "a parameter is hidden from the comparison",
                 lambda rows, c: rows[QUERY].update(kind="hidden"), "WeightsError")  # fmt: skip
inventory_attack("row_dtype", "a row of another dtype than its data",
                 lambda rows, c: rows[QUERY].update(dtype="float64"))  # fmt: skip
inventory_attack("dtype_is_anything", "a dtype that is another attribute of torch",
                 lambda rows, c: (rows[QUERY].update(dtype="os"),
                     c["data"][QUERY].update(dtype="os")))  # fmt: skip
inventory_attack("file_above", "weights outside the artifact",
                 lambda rows, c: (c["files"].update({"../../x.safetensors": ""}),
                                  c["data"][QUERY].update(file="../../x.safetensors")))  # fmt: skip
inventory_attack("file_absolute", "weights at an absolute path",
                 lambda rows, c: c["files"].update({"/tmp/x.safetensors": ""}))  # fmt: skip
inventory_attack("file_missing", "a shard that is not there",
                 lambda rows, c: c["files"].update({"model-00002-of-00002.safetensors": ""})
)  # fmt: skip


@attack("loads")
def shard_index(target):
    """an index that says where transformers would find the weights; nobody here reads it"""
    index = {"metadata": {}, "weight_map": {QUERY: "../../elsewhere.safetensors"}}
    rewrite(target.data / "model.safetensors.index.json", json.dumps(index))
    target.reseal()


@attack("IntegrityError")
def shard_with_the_same_name(target):
    """a second file brings another tensor of the same name"""
    entry = {QUERY: {"dtype": "F32", "shape": [32, 32], "data_offsets": [0, 4096]}}
    shard = target.data / "model-2.safetensors"
    write_header(shard, entry, bytes(4096))
    header = shard.read_bytes()[:-4096]
    target.json(
        target.tensors,
        lambda c: c["files"].update({shard.name: hashlib.sha256(header).hexdigest()}),
    )


# --- values and recorded answers


@attack("IntegrityError")
def bit_flipped(target):
    """one bit of the weights"""
    flip(target.weights)


@attack("IntegrityError")
def bit_flipped_and_resealed(target):
    """one bit of the weights, and the manifest made anew"""
    flip(target.weights)
    target.reseal()


@attack("IntegrityError")
def weights_of_another_model(target):
    """the weights and their inventory are exchanged, the manifest is not"""
    target.values(lambda arrays: arrays.update({QUERY: arrays[KEY]}))
    manifest = json.loads(target.manifest.read_text())
    manifest["files"]["safeflavor/tensors.json"]["sha256"] = digest_of_file(target.config)
    rewrite(target.manifest, json.dumps(manifest))


@attack("ParityError")
def weights_swapped(target):
    """two tensors of one shape change places, all digests made anew"""
    target.values(
        lambda arrays: arrays.update(
            {QUERY: arrays["classifier.weight"].repeat(16), KEY: arrays[QUERY]}
        )
    )


@attack("ParityError")
def weights_scaled(target):
    """the classifier's weights change sign, all digests made anew"""
    target.values(lambda arrays: arrays.update({"classifier.weight": -arrays["classifier.weight"]}))


@attack("ParityError")
def weights_not_numbers(target):
    """the classifier's bias becomes NaN, all digests made anew"""
    target.values(lambda arrays: arrays["classifier.bias"].fill(np.nan))


def json_attack(
    name: str, doc: str, file: str, change: Callable[[Any], Any], outcome: str, **more: Any
) -> None:
    """A JSON file below safeflavor/ is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        target.json(target.data / file, change)

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome, **more)(damage)


json_attack("golden_rows_gone", "no golden row is "
                                "left", "parity.json", lambda c: c.update(rows=[], answers=[]),
            "IntegrityError")  # fmt: skip
json_attack("golden_answers_changed", "another answer is recorded", "parity.json",
            lambda c: c["answers"][0].update(score=0.9), "ParityError")  # fmt: skip
json_attack("golden_rows_changed", "another row is recorded", "parity.json",
            lambda c: c["rows"][0].update(text="green tree"), "ParityError")  # fmt: skip
json_attack("golden_row_is_a_number", "a row that is "
                                      "none", "parity.json", lambda c: c["rows"].__setitem__(0, 5),
            "ParityError")  # fmt: skip


def _tolerate(number: float, content: Any) -> None:
    content["tolerance"].update(atol=number)


for _number in (1e308, 1.0, -1.0):
    json_attack(f"tolerance_{_number:g}", f"a tolerance of {_number:g}", "parity.json",
                partial(_tolerate, _number), "IntegrityError")  # fmt: skip
json_attack("environment_lies", "another Python and torch were there", "environment.json",
            lambda c: c.update(python="2.7.18",
                distributions=c["distributions"] | {"torch": "0.1"}),
            "EnvironmentMismatchError", options={"environment": "error"},
            config={"environment": "error"})  # fmt: skip
json_attack("environment_types", "versions that are no strings", "environment.json",
            lambda c: c["distributions"].update(torch=["2.0"]), "IntegrityError")  # fmt: skip
json_attack("config_heads", "another number of heads, which no shape shows", "config.json",
            lambda c: c.update(num_attention_heads=8), "ParityError")  # fmt: skip
json_attack("config_epsilon", "another epsilon, which no shape shows", "config.json",
            lambda c: c.update(layer_norm_eps=1.0), "ParityError")  # fmt: skip
json_attack("config_terabytes", "a hidden size of 10^9", "config.json",
            lambda c: c.update(hidden_size=10**9, num_attention_heads=1), "StructureError",
            heavy=True)  # fmt: skip
json_attack("config_endless", "10^9 layers", "config.json",
    lambda c: c.update(num_hidden_layers=10**9),
            "StructureError", heavy=True)  # fmt: skip


@attack("ParityError")
def golden_outputs_gone(target):
    """the recorded outputs are gone"""
    write_header(target.parity_tensors, {"__metadata__": {}}, b"")
    target.reseal()


# --- environment.json -----------------------------------------------------------------------------


def environment_attack(name: str, doc: str, change: Callable[[Any], Any]) -> None:
    """environment.json is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        target.json(target.environment, change)

    damage.__name__, damage.__doc__ = name, doc
    attack("IntegrityError")(damage)


environment_attack("python_of_two_lines", "a Python version that goes on in another line",
                   lambda e: e.update(python="3.11.7\nRUN id"))  # fmt: skip
environment_attack(
    "python_is_an_image",
    "a Python version that is a tag",
    lambda e: e.update(python="3.11@sha256:0"),
)
environment_attack(
    "machine_with_escape", "a machine that a terminal obeys", lambda e: e.update(machine="\x1b[2J")
)
environment_attack("pin_is_an_option", "a distribution that is an option of pip",
                   lambda e: e["distributions"].update({"--index-url=http://x": "1"}))  # fmt: skip
environment_attack("pin_of_two_lines", "a version of two lines",
                   lambda e: e["distributions"].update(numpy="1\n--index-url "
                                                             "http://x"))  # fmt: skip
environment_attack(
    "torch_build_nested",
    "a fact of torch that is a list",
    lambda e: e["torch_build"].update(cuda=[[]]),
)
environment_attack("wheel_outside", "a wheel named like a path outside",
                   lambda e: e.update(wheels={"torch": {"file": "../x.whl", "sha256": "0" * 64,
                       "content": "0" * 64}}),
                   )  # fmt: skip


# --- MLmodel --------------------------------------------------------------------------------------


def flavor_attack(
    name: str, doc: str, change: Callable[[Any], Any], outcome: str = "IntegrityError"
) -> None:
    """Our entry of MLmodel is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        target.flavor(change)

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome)(damage)


flavor_attack(
    "version_newer",
    "a format of the future",
    lambda e: e.update(format_version=99),
    "FormatVersionError",
)
flavor_attack(
    "version_2_70",
    "a version of 71 bits",
    lambda e: e.update(format_version=2**70),
    "FormatVersionError",
)
flavor_attack("version_zero", "a format before the first", lambda e: e.update(format_version=0))
flavor_attack("version_true", "a version that is true", lambda e: e.update(format_version=True))
flavor_attack("version_text", "a version that is text", lambda e: e.update(format_version="1"))
flavor_attack("dtype_auto", "dtype auto", lambda e: e.update(dtype="auto"))
flavor_attack("dtype_other", "another dtype than the weights "
                             "have", lambda e: e.update(dtype="bfloat16"),
              "WeightsError")  # fmt: skip
flavor_attack("task_unknown", "a task that nobody has", lambda e: e.update(task="os:system"))
flavor_attack(
    "task_switched", "another task", lambda e: e.update(task="feature-extraction"), "ParityError"
)
flavor_attack(
    "task_config_gone",
    "what the task recorded is gone",
    lambda e: e.update(task_config={}),
    "ParityError",
)
flavor_attack(
    "labels_swapped",
    "labels change places",
    lambda e: e["task_config"]["labels"].reverse(),
    "ParityError",
)
flavor_attack("runs_nested", "runs is no list of words", lambda e: e.update(runs=[["code"]]))
flavor_attack("runs_unknown", "runs something unheard of", lambda e: e.update(runs=["shell"]))
flavor_attack("column_of_two_lines", "a column whose name goes on in another line",
              lambda e: e["input_columns"].update(text="text\nRUN id"))  # fmt: skip
flavor_attack("column_with_escape", "a column that a terminal obeys",
              lambda e: e["input_columns"].update(text="\x1b]0;owned\x07"))  # fmt: skip
flavor_attack(
    "option_is_a_list",
    "a run-time option that is a list",
    lambda e: e["model_config"].update(device=["cpu"]),
)
flavor_attack("option_of_two_lines", "a run-time option of two lines",
              lambda e: e["model_config"].update(device="cpu\nENV A=b"))  # fmt: skip
flavor_attack("loader_version_of_two_lines", "a version of two lines",
              lambda e: e.update(loader_version="1.0\nRUN id"))  # fmt: skip
flavor_attack(
    "loader_digest_text",
    "a digest that is a path",
    lambda e: e.update(loader_digest="../../etc/passwd"),
)
flavor_attack("task_of_two_lines", "a task of two lines", lambda e: e.update(task="raw\nRUN id"))
flavor_attack("task_config_nested", "what the task recorded is 50 lists deep",
              lambda e: e["task_config"].update(more=json.loads("[" * 50 + "]" * 50)))  # fmt: skip
flavor_attack("task_config_date", "what the task recorded holds what JSON does not have",
              lambda e: e["task_config"].update(more=datetime.date(2020, 1, 1)))  # fmt: skip
flavor_attack("key_missing", "a key is missing", lambda e: e.pop("runs"))


@attack("IntegrityError", "any")
def flavor_is_text(target):
    """our entry of MLmodel is a string"""
    edit_mlmodel(target.root, lambda content: content["flavors"].update(safeflavor="x"))
    target.reseal()


def option_attack(name: str, doc: str, outcome: str, **options: Any) -> None:
    """A stored run-time option is changed: only pyfunc reads these."""

    def damage(target: Target) -> None:
        edit_mlmodel(
            target.root,
            lambda content: content["flavors"]["python_function"]["config"].update(options),
        )
        target.reseal()

    damage.__name__, damage.__doc__ = name, doc
    attack("loads", outcome)(damage)


option_attack("option_engine", "an engine that nobody has", "InputError", engine="os:system")
option_attack("option_batch", "a negative batch", "InputError", max_batch_tokens=-1)
option_attack("option_device", "the meta device", "PlacementError", device="meta")
option_attack("option_dtype", "dtype auto at run time", "PlacementError", dtype="auto")
option_attack(
    "option_verify", "a level of verification that nobody has", "InputError", verify="none"
)


# --- the tokenizer --------------------------------------------------------------------------------

PATTERN = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "A" * 24}


@attack("ParityError", heavy=True)
def tokenizer_regex_bomb(target):
    """a regular expression that takes exponential time, and a golden row for it"""
    edit_json(target.tokenizer_json, lambda c: c.update(pre_tokenizer=PATTERN))
    target.json(target.parity, lambda c: c["rows"][0].update(text="a" * 60 + "!"))


json_attack("tokenizer_panic", "a normaliser that makes the Rust side "
                               "panic", "tokenizer/tokenizer.json",
            lambda c: c.update(normalizer=CHARSMAP), "ParityError")  # fmt: skip
json_attack("tokenizer_vocabulary", "two words change places", "tokenizer/tokenizer.json",
            lambda c: c["model"]["vocab"].update(cat=c["model"]["vocab"]["dog"],
                dog=c["model"]["vocab"]["cat"]),
            "ParityError")  # fmt: skip
text_attack("tokenizer_not_json", "a tokenizer.json that is "
                                  "none", "tokenizer/tokenizer.json", lambda text: "{",
            "IntegrityError")  # fmt: skip


# --- what building, encoding and rendering may take


def config_attack(name: str, doc: str, **change: Any) -> None:
    """Numbers of config.json, and no label has a name."""

    def edit(config: Any) -> None:
        config.pop("id2label", None)
        config.pop("label2id", None)
        config.update(change)

    json_attack(name, doc, "config.json", edit, "StructureError", bomb=True)


config_attack(
    "bomb_labels",
    "3 million labels without names, for which a config makes two dicts",
    num_labels=3_000_000,
)
config_attack(
    "bomb_labels_in_a_part",
    "the same in a part of the config",
    text_config={"num_labels": 3_000_000},
)
config_attack("bomb_positions", "30 million positions", max_position_embeddings=3 * 10**7)
config_attack(
    "bomb_layers",
    "a million layers, a number that no bound of numbers sees",
    num_hidden_layers=10**6,
)
config_attack("bomb_width", "a width of 2^20, squared", hidden_size=2**20, num_attention_heads=1)
config_attack("bomb_digits", "a number of thousand digits", num_attention_heads=10**1000)


@attack("StructureError", bomb=True)
def bomb_table(target):
    """another class, which computes positions one by one in Python"""
    model = "transformers.models.distilbert.{}_distilbert:DistilBert{}"
    target.structure_of(**{
        "class": model.format("modeling", "Model"),
        "config_class": model.format("configuration", "Config"),
    })  # fmt: skip
    small = {"dim": 32, "n_heads": 2, "n_layers": 2, "hidden_dim": 64, "vocab_size": 30}
    config = {"sinusoidal_pos_embds": True, "max_position_embeddings": 2**24 - 1, **small}
    target.json(target.config, lambda old: config)


flavor_attack("token_pad", "a token that fills up rows, beyond the "
                           "table", lambda e: e["task_config"].update(
    pad_token_id=10**6))  # fmt: skip
json_attack("token_added", "a word that the model has no embedding for", "tokenizer/tokenizer.json",
            lambda c: c["model"]["vocab"].update(zebra=len(c["model"]["vocab"])),
            "IntegrityError")  # fmt: skip
json_attack("tokenizer_padding", "every text is filled up to 10^9 "
                                 "tokens", "tokenizer/tokenizer.json",
            lambda c: c.update(padding={"strategy": {"Fixed": 10**9}, "direction": "Right",
                "pad_to_multiple_of": None,
                                        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}),
            "IntegrityError", bomb=True)  # fmt: skip
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
json_attack("tokenizer_doubling", "sixty rules that each double a text", "tokenizer/tokenizer.json",
            lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 60}),
            "IntegrityError", bomb=True)  # fmt: skip
json_attack("tokenizer_insertion", "a megabyte in the place of each "
                                   "letter", "tokenizer/tokenizer.json",
            lambda c: c.update(normalizer={**DOUBLING, "content": "a" * 10**6}), "IntegrityError",
            bomb=True)  # fmt: skip


def processor_attack(name: str, doc: str, base: str, **change: Any) -> None:
    """Numbers of a processor."""
    json_attack(name, doc, "processor/preprocessor_config.json", lambda c: c.update(change),
        "IntegrityError",
                base=base, bomb=True)  # fmt: skip


processor_attack(
    "pixels",
    "every image becomes 12,000 x 12,000",
    "image",
    size={"height": 12_000, "width": 12_000},
)
processor_attack(
    "pixels_of_an_edge", "the same by its short edge", "image", size={"shortest_edge": 12_000}
)
processor_attack(
    "pixels_as_a_product",
    "edges that are fine one by one",
    "image",
    size={"height": 8000, "width": 8000},
)
processor_attack("bands", "2 million mel bands", "sound", feature_size=2_000_000)
processor_attack("windows", "windows of 10^9 samples", "sound", n_fft=10**9)
processor_attack("windows_densely", "a window at every sample", "sound", hop_length=1, n_fft=8192)
processor_attack("filling", "every sound is filled up to two days", "sound", chunk_length=172_800)


def template_attack(name: str, doc: str, template: str) -> None:
    """A chat template, which the golden rows go through."""
    json_attack(name, doc, "tokenizer/tokenizer_config.json",
        lambda c: c.update(chat_template=template),
                "ParityError", base="chat", bomb=True)  # fmt: skip


template_attack(
    "template_range", "a loop of 10^9 rounds", "{% for i in range(1000000000) %}{% endfor %}"
)
template_attack(
    "template_loops", "loops in loops", "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
)
template_attack("template_product", "a text times 10^10", "{{ 'x' * 10000000000 }}")
template_attack("template_doubling", "a text beside itself, 60 times", "{% set ns = "
                                                                       "namespace(s='xxxx') %}"
                "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}")  # fmt: skip
template_attack(
    "template_recursion",
    "a macro that calls itself",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
)
template_attack("template_tree", "a macro that calls itself twice, 60 deep",
                "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
                "{{ m(60) }}")  # fmt: skip
template_attack("template_format", "a number as wide as the memory", "{{ '%99999999999d' % 1 }}")


# --- a graph --------------------------------------------------------------------------------------

GRAPH: Mapping[str, Any] = {"base": "graph"}


def graph_attack(
    native: str = "StructureError", **more: Any
) -> Callable[[Callable[[Any], Any]], Any]:
    """Register a change of graph.onnx, made by a function whose docstring is what is attempted.

    It takes the model; it may return other bytes.
    """

    def register(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def damage(target: Target) -> None:
            model = onnx.ModelProto.FromString(target.graph.read_bytes())
            changed = change(model)
            if not isinstance(changed, bytes):
                name_canary(model, str(target.canary))
            rewrite(
                target.graph, changed if isinstance(changed, bytes) else model.SerializeToString()
            )
            target.reseal()

        damage.__name__, damage.__doc__ = f"graph_{change.__name__}", change.__doc__
        attack(native, **{**GRAPH, **more})(damage)
        return change

    return register


def name_canary(message: Any, path: str) -> None:
    """Write the canary's path wherever a text of a message, or of those within, has its place."""
    for entry, value in message.ListFields():
        if entry.message_type:
            for part in value if entry.is_repeated else [value]:
                name_canary(part, path)
        elif entry.type == entry.TYPE_STRING and entry.is_repeated:
            value[:] = [text.replace("CANARY", path) for text in value]
        elif entry.type == entry.TYPE_STRING:
            setattr(message, entry.name, value.replace("CANARY", path))


def change_attack(
    name: str, doc: str, change: Callable[[Any], Any], native: str = "StructureError", **more: Any
) -> None:
    """The same for a change of one line."""
    change.__name__, change.__doc__ = name, doc
    graph_attack(native, **more)(change)


def node(operator: str, *inputs: str, outputs: Any = None, **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), outputs or ["?"], **attributes)


def tensor(name: str, *numbers: float, dtype: str = "int64") -> Any:
    return numpy_helper.from_array(np.array(numbers, dtype), name)


def use(model: Any, *nodes: Any, constants: Any = ()) -> None:
    """Let the answer go through these nodes.

    ``<`` is what the one before gave, and ``?`` what it gives itself.
    """
    last = model.graph.output[0].name
    for made in model.graph.node:
        made.output[:] = ["answer" if name == last else name for name in made.output]
    before = "answer"
    for i, made in enumerate(nodes):
        made.input[:] = [before if name == "<" else name for name in made.input]
        before = last if i == len(nodes) - 1 else f"made.{i}"
        made.output[:] = [before if name == "?" else name for name in made.output]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)


def call_attack(
    name: str,
    doc: str,
    *nodes: Any,
    native: str = "StructureError",
    constants: Any = (),
    **more: Any,
) -> None:
    """The answer of the graph goes through these nodes."""
    change_attack(name, doc, lambda model: use(model, *nodes, constants=constants), native, **more)


def subgraph(name: str) -> Any:
    """A graph that nodes hold within."""
    value = helper.make_tensor_value_info("y", 1, None)
    return helper.make_graph([helper.make_node("Identity", ["answer"], ["y"])], name, [], [value])


def weight(model: Any, at: int = 0) -> Any:
    """An initializer whose bytes are in the file of weights."""
    return [entry for entry in model.graph.initializer if entry.external_data][at]


def own(model: Any) -> Any:
    """An initializer whose bytes are inside."""
    return next(entry for entry in model.graph.initializer if entry.raw_data and len(entry.dims))


def place(model: Any, **facts: str | None) -> None:
    """Let a weight lie elsewhere."""
    entry = weight(model)
    pairs = {pair.key: pair.value for pair in entry.external_data} | facts
    del entry.external_data[:]
    for key, value in pairs.items():
        if value is not None:
            entry.external_data.add(key=key, value=value)


def place_attack(name: str, doc: str, native: str = "IntegrityError", **facts: str | None) -> None:
    change_attack(f"weight_{name}", doc, lambda model: place(model, **facts), native)


def varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found, number = found + bytes([number & 0x7F | 0x80]), number >> 7
    return found + bytes([number])


def coded(number: int, content: bytes, wire: int = 2) -> bytes:
    """A field as protobuf writes it."""
    return varint(number << 3 | wire) + (varint(len(content)) if wire == 2 else b"") + content


def behind(model: Any, *path: tuple[str, int], add: bytes) -> bytes:
    """The model with bytes behind the last field of one of its parts; ``path`` names it.

    Field, and which of them.
    """
    if not path:
        return model.SerializeToString() + add
    (name, at), *rest = path
    entry = model.DESCRIPTOR.fields_by_name[name]
    value = getattr(model, name)
    parts = list(value) if entry.is_repeated else [value]
    inner = [
        behind(part, *rest, add=add) if i == at else part.SerializeToString()
        for i, part in enumerate(parts)
    ]
    model.ClearField(name)
    return model.SerializeToString() + b"".join(coded(entry.number, part) for part in inner)


def twice_attack(name: str, doc: str, *path: tuple[str, int], add: bytes) -> None:
    """A field that stands there already, once more behind it.

    Protobuf would take the last, or merge both.
    """
    change_attack(f"twice_{name}", doc, lambda model: behind(model, *path, add=add))


call_attack(
    "calls_foreign",
    "an operator of ONNX Runtime's own",
    node("FusedMatMul", "<", "<", domain="com.microsoft"),
)
call_attack("calls_machine_learning", "an operator of ai.onnx.ml, which reads before an array",
            node("ArrayFeatureExtractor", "<", "rows", domain="ai.onnx.ml"),
            constants=[tensor("rows",
            -10)])  # fmt: skip
call_attack(
    "calls_alias", "the standard's domain by its other name", node("Relu", "<", domain="ai.onnx")
)
call_attack(
    "calls_library",
    "an operator of a library that nobody loaded",
    node("Touch", "<", domain="CANARY"),
)
call_attack("calls_compiled", "what a compiler made of a graph, in a file",
            node("EPContext", "<", domain="com.microsoft", ep_cache_context="CANARY",
                embed_mode=0))  # fmt: skip
call_attack("calls_unknown", "an operator that nobody knows", node("Touch", "<"))
call_attack("calls_if", "a node with graphs within",
            node("If", "yes", then_branch=subgraph("a"), else_branch=subgraph("b")),
            constants=[tensor("yes", True, dtype="bool")])  # fmt: skip
call_attack("calls_loop", "a loop of 10^18 "
                          "rounds", node("Loop", "rounds", "", "<", body=subgraph("a")),
            constants=[tensor("rounds", 10**18)])  # fmt: skip
call_attack("calls_scan", "a scan", node("Scan", "<", body=subgraph("a"), num_scan_inputs=1))
call_attack(
    "calls_hidden_graph",
    "an operator that has none holds a graph",
    node("Relu", "<", body=subgraph("a")),
)
call_attack("calls_random", "an operator that draws at random", node("RandomNormalLike", "<"))
call_attack("calls_dropout", "an operator that leaves out at random", node("Dropout", "<"))
call_attack("calls_sequence", "an operator that makes a sequence", node("SequenceConstruct", "<"))
call_attack("calls_optional", "an operator that gives nothing", node("Optional", "<"))
call_attack("calls_text", "an operator on texts", node("StringSplit", "<", outputs=["?", "n"]))
call_attack("calls_image", "an operator that decodes a file", node("ImageDecoder", "<"))
call_attack(
    "calls_unpool",
    "a kernel that wrote where an index says",
    node("MaxUnpool", "<", "<", kernel_shape=[2]),
)
call_attack("text_constant", "a constant that is a text", node("Constant", value_string="CANARY"))
call_attack("text_constants", "a constant of texts", node("Constant", value_strings=["CANARY"]))
call_attack("text_cast", "numbers become texts", node("Cast", "<", to=8))
call_attack("cast_complex", "numbers become complex", node("Cast", "<", to=14))
call_attack("cast_unknown", "numbers become what nobody knows", node("Cast", "<", to=99))
call_attack("split_lies", "a node that says another number of results than it has, which ends "
                          "ONNX Runtime's process",
            node("Split", "<", outputs=["?", "a", "b"], num_outputs=1))  # fmt: skip
call_attack(
    "uses_itself",
    "a node uses itself",
    helper.make_node("Relu", ["loop"], ["loop"]),
    node("Identity", "loop"),
)
call_attack("uses_what_follows", "a node uses what comes after "
                                 "it", helper.make_node("Relu", ["later"], ["a"]),
            helper.make_node("Relu", ["<"], ["later"]), node("Identity", "a"))  # fmt: skip
call_attack("uses_nothing", "a node uses what nobody gives", node("Add", "<", "no.such"))
call_attack("gives_a_weight", "a node gives what is a "
                              "weight", helper.make_node("Relu", ["<"], ["classifier.weight"]),
            node("Identity", "answer"))  # fmt: skip
call_attack("gives_an_input", "a node gives what is an "
                              "input", helper.make_node("Relu", ["<"], ["input.input_ids"]),
            node("Identity", "answer"))  # fmt: skip
call_attack("gives_twice", "two nodes give one name", helper.make_node("Relu", ["<"], ["a"]),
            helper.make_node("Neg", ["answer"], ["a"]), node("Identity", "a"))  # fmt: skip
call_attack(
    "gives_itself_twice",
    "a node gives one name twice",
    node("Split", "<", outputs=["?", "a", "a"], axis=1),
)
call_attack("row_outside", "a row that a table does not "
                           "have", node("Gather", "<", "rows"), native="ParityError",
            constants=[tensor("rows", 2**40)])  # fmt: skip
call_attack(
    "shapes_differ", "a product of shapes that do not fit", node("MatMul", "<", "classifier.weight")
)
call_attack("arity_missing", "too few arguments", node("MatMul", "<"))
call_attack("arity", "too many arguments", node("Relu", "<", "<", "<"))
call_attack(
    "argument_unknown",
    "an attribute that the operator does not have",
    node("Relu", "<", touch="CANARY"),
)
call_attack(
    "other_answer",
    "a graph that is right in form, and answers something else",
    node("Neg", "<"),
    native="ParityError",
)
call_attack("nan", "a NaN in the graph",
            node("Add", "<", "nan"), constants=[tensor("nan", float("nan"), dtype="float32")],
            native="ParityError")  # fmt: skip
call_attack("truth_of_seven", "truth values of 7, which kernels count and write "
                              "differently", node("NonZero", "seven"),
            node("Cast", "<", to=1),
            constants=[helper.make_tensor("seven", 9, [64], bytes([7] * 64),
            raw=True)])  # fmt: skip
call_attack("nodes_30001", "30,001 nodes", *(node("Relu", "<") for _ in range(30_001)))

ZEROS = node("ConstantOfShape", "shape")


def memory_attack(
    name: str, doc: str, *nodes: Any, native: str = "OverloadedError", constants: Any = ()
) -> None:
    call_attack(f"memory_{name}", doc, *nodes, native=native, constants=constants, bomb=True)


memory_attack(
    "zeros", "4 TB in one node", ZEROS, node("ReduceSum", "<"), constants=[tensor("shape", 2**40)]
)
memory_attack("zeros_in_parts", "16 GB of constants, 800 MB each, which would be computed before "
                                "the first run",
              *(part for i in range(20) for part in (
                  helper.make_node("ConstantOfShape", ["shape"], [f"z{i}"],
                      value=tensor("", i, dtype="float32")),
                  helper.make_node("Mul", [f"z{i}", "answer" if not i else f"s{i - 1}"], [f"m{i}"]),
                  helper.make_node("ReduceSum", [f"m{i}"], [f"s{i}"], keepdims=0))),
              node("Expand", "s19", "most"),
              constants=[tensor("shape", 200 * 2**20, 1, 1), tensor("most",
              2**44)])  # fmt: skip
memory_attack("expand", "a number made "
                        "wide", node("ReduceSum", "<", keepdims=0), node("Expand", "<", "shape"),
              constants=[tensor("shape", 2**41)])  # fmt: skip
memory_attack(
    "tile",
    "a tensor repeated 10^12 times",
    node("Tile", "<", "times"),
    native="ParityError",
    constants=[tensor("times", 10**12, 1)],
)
memory_attack(
    "pad",
    "10^12 zeros beside a tensor",
    node("Pad", "<", "by"),
    constants=[tensor("by", 0, 0, 0, 10**12)],
)
memory_attack("range", "a range of 10^13 "
                       "numbers", node("Range", "a", "b", "c"), node("Cast", "<", to=1),
              constants=[numpy_helper.from_array(np.int64(n), name)
                         for name, n in (("a", 0), ("b", 10**13), ("c",
              1))])  # fmt: skip
memory_attack("resize", "a tensor stretched", node("Resize", "<", "", "scales"),
              constants=[tensor("scales", 1.0, 1e13, dtype="float32")])  # fmt: skip
memory_attack("broadcast", "a column plus a row, each "
                           "small", ZEROS, node("Transpose", "<", perm=[1, 0]),
              node("Add", "<", "made.0"), constants=[tensor("shape", 10**7, 1)])  # fmt: skip
memory_attack(
    "doubling",
    "a tensor beside itself, 50 times",
    *(node("Concat", "<", "<", axis=0) for _ in range(50)),
)
memory_attack("overflow", "sizes whose product is 0 in 64 bits", ZEROS, node("ReduceSum", "<"),
              native="ParityError", constants=[tensor("shape", 2**32, 2**32, 2)])  # fmt: skip
memory_attack("product", "a column times a row", ZEROS, node("MatMul", "<", "other"),
              constants=[tensor("shape", 10**7, 1),
                  numpy_helper.from_array(np.zeros((1, 10**5), np.float32),
              "other")])  # fmt: skip
memory_attack("norms", "a weight that 200 norms would each fuse into a copy of it", *(
                  part for i in range(200) for part in (
                      helper.make_node("Conv", ["image", "kernel"], [f"c{i}"]),
                      helper.make_node("BatchNormalization", [f"c{i}", "one", "one", "one", "one"],
                          [f"b{i}"]))),
              node("Sum", *(f"b{i}" for i in range(200))),
              constants=[numpy_helper.from_array(np.zeros((1, 2048, 1, 1), np.float32), "image"),
                         numpy_helper.from_array(np.zeros((2048, 2048, 1, 1), np.float32),
                             "kernel"),
                         numpy_helper.from_array(np.ones(2048, np.float32), "one")],
                         native="StructureError")  # fmt: skip


@graph_attack(bomb=True)
def memory_of_messages(model):
    """48 million nodes of two bytes, which take 20 GB in Python"""
    model.ClearField("graph")
    return model.SerializeToString() + coded(7, coded(1, b"") * 48_000_000)


@graph_attack(bomb=True)
def memory_of_numbers(model):
    """a list of 100 million numbers, packed"""
    model.ClearField("graph")
    return model.SerializeToString() + coded(7, coded(5, coded(1, b"\1" * 100_000_000)))


# What the model says beside its nodes.

change_attack("functions", "an operator is a function of the file",
              lambda model: model.functions.add(name="Relu", domain="own"))  # fmt: skip
change_attack("training", "what to do for training", lambda model: model.training_info.add())
change_attack("metadata", "settings of ONNX Runtime in the file",
              lambda model: model.metadata_props.add(key="ort_config", value='{"session_options": '
                                                                             '{}}'))  # fmt: skip
change_attack("notes", "a text for people", lambda model: setattr(model, "doc_string", "\x1b[2J"))
change_attack(
    "sparse", "a sparse initializer", lambda model: model.graph.sparse_initializer.add(dims=[2**40])
)
change_attack(
    "quantized", "a note on quantization", lambda model: model.graph.quantization_annotation.add()
)
change_attack("shapes_inside", "shapes of what nodes give, which nobody compares",
              lambda model: model.graph.value_info.add(name="answer"))  # fmt: skip
change_attack(
    "opset_future",
    "operators of a version that nobody knows",
    lambda model: setattr(model.opset_import[0], "version", 99),
)
change_attack(
    "opset_past",
    "operators of a version of long ago",
    lambda model: setattr(model.opset_import[0], "version", 7),
)
change_attack(
    "opset_none", "operators of no version", lambda model: model.ClearField("opset_import")
)
change_attack(
    "opset_two",
    "two versions of the operators",
    lambda model: model.opset_import.add(domain="", version=22),
)
change_attack("opset_of_others", "a domain of others beside the standard's",
              lambda model: model.opset_import.add(domain="com.microsoft", version=1))  # fmt: skip
change_attack(
    "format_past",
    "a format in which initializers are inputs",
    lambda model: setattr(model, "ir_version", 3),
)
change_attack(
    "format_future", "a format of the future", lambda model: setattr(model, "ir_version", 2**40)
)
change_attack("no_graph", "a model without a graph", lambda model: model.ClearField("graph"))
change_attack(
    "no_output", "a graph that gives nothing", lambda model: model.graph.ClearField("output")
)
change_attack("output_is_an_input", "a graph gives what it takes",
              lambda model: setattr(model.graph.output[0], "name", "input.input_ids"))  # fmt: skip
change_attack(
    "output_twice",
    "an output twice",
    lambda model: model.graph.output.append(model.graph.output[0]),
)
change_attack(
    "output_missing",
    "an output that no node gives",
    lambda model: setattr(model.graph.output[0], "name", "output.x"),
)
change_attack("output_negative", "an output of a negative size",
              lambda model: setattr(model.graph.output[0].type.tensor_type.shape.dim[0],
                  "dim_value", -5))  # fmt: skip
change_attack("output_of_texts", "an output of texts",
              lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type",
                  8))  # fmt: skip
change_attack("output_sequence", "an output that is a sequence",
              lambda model: model.graph.output[0].type.sequence_type.SetInParent())  # fmt: skip
change_attack("input_negative", "an input of a negative size",
              lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value",
                  -5))  # fmt: skip
change_attack("input_of_texts", "an input of texts",
              lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type",
                  8))  # fmt: skip
change_attack("input_without_shape", "an input of any shape",
            lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
              native="loads")  # fmt: skip
change_attack(
    "input_twice", "an input twice", lambda model: model.graph.input.append(model.graph.input[0])
)
change_attack("attribute_twice", "an attribute of a node twice",
            lambda model: first(model, "Transpose").attribute.add().CopyFrom(
    first(model, "Transpose").attribute[0]))  # fmt: skip
change_attack("attribute_lies", "an attribute that is not what it says",
              lambda model: setattr(first(model, "Transpose").attribute[0], "type", 4))  # fmt: skip
change_attack("attribute_of_both", "an attribute that is a number and numbers",
              lambda model: setattr(first(model, "Transpose").attribute[0], "i", 4))  # fmt: skip


def first(model: Any, operator: str) -> Any:
    return next(made for made in model.graph.node if made.op_type == operator)


@graph_attack("loads")
def input_renamed(model):
    """an input has another name, which is code; the module answers what the graph does not take"""
    for value in model.graph.input:
        value.name = value.name.replace("input_ids", "__import__('os').system('touch CANARY')")
    for made in model.graph.node:
        made.input[:] = [
            name.replace("input.input_ids", model.graph.input[0].name) for name in made.input
        ]


@graph_attack()
def output_renamed(model):
    """an output has another name"""
    model.graph.node[-1].output[0] = model.graph.output[0].name = "output.else"


# Where weights lie.

place_attack("absolute", "a weight in a file anywhere", location="/etc/passwd")
place_attack("parent", "a weight in a file beside the folder", location="../MLmodel")
place_attack(
    "of_the_process", "a weight in the process's own variables", location="/proc/self/environ"
)
place_attack(
    "in_memory",
    "a weight at an address in memory",
    location="*/_ORT_MEM_ADDR_/*",
    offset="94000000000000",
)
place_attack(
    "in_another_file",
    "a weight in a file that is no file of weights",
    location="tokenizer/tokenizer.json",
)
place_attack("in_the_graph", "a weight in the graph itself", location="graph.onnx")
place_attack("nowhere", "a weight in a file without a name", location="")
place_attack("behind_the_end", "a weight behind the end of the file", offset="99999999992")
place_attack("unaligned", "a weight between two numbers", offset="8193")
place_attack("offset_negative", "a weight before the file", "StructureError", offset="-4")
place_attack(
    "offset_huge", "an offset of more than 64 bits", "StructureError", offset="18446744073709551616"
)
place_attack(
    "offset_other_digits", "an offset in digits of another script", "StructureError", offset="٨"
)
place_attack("length_other", "a weight that is longer than it says", "StructureError", length="4")
place_attack("length_missing", "a weight of no length", "StructureError", length=None)
place_attack("with_a_checksum", "a weight of which more is said", "StructureError", checksum="0")
change_attack("weight_placed_twice", "a weight in two places",
              lambda model: weight(model).external_data.add(key="offset", value="0"))  # fmt: skip
change_attack(
    "weight_inside_and_outside",
    "a weight inside, too",
    lambda model: setattr(weight(model), "raw_data", bytes(64)),
)
change_attack(
    "weight_neither",
    "a weight that says it is inside, and is not",
    lambda model: setattr(weight(model), "data_location", 0),
)
change_attack(
    "weight_bfloat16",
    "a weight of a dtype that numpy has not",
    lambda model: setattr(weight(model), "data_type", 16),
)
change_attack(
    "weight_of_texts", "a weight of texts", lambda model: setattr(weight(model), "data_type", 8)
)
change_attack(
    "weight_twice",
    "two weights of one name",
    lambda model: model.graph.initializer.append(weight(model)),
)
change_attack(
    "weight_shape", "a weight of another shape", lambda model: weight(model).dims.append(2)
)
change_attack(
    "weight_negative",
    "a weight of negative sizes, whose product is right",
    lambda model: negate(weight(model)),
)
change_attack(
    "weight_overflow",
    "sizes whose product overflows",
    lambda model: weight(model).dims.extend([2**32, 2**32]),
)
change_attack("weight_of_nothing", "sizes of 0 times 2^62 times 2^62",
              lambda model: model.graph.initializer.add(name="z", data_type=1,
                  dims=[0, 2**62, 2**62],
              raw_data=b""))  # fmt: skip
change_attack(
    "weight_of_100_dimensions",
    "100 dimensions of 1",
    lambda model: own(model).dims.extend([1] * 100),
)
change_attack(
    "constant_short",
    "a constant that is shorter than it says",
    lambda model: setattr(own(model), "raw_data", b""),
)
change_attack(
    "constant_typed",
    "a constant in a field of its type",
    lambda model: own(model).int64_data.append(1),
)
change_attack("constant_outside", "an attribute's tensor is in a file anywhere", lambda model: use(
    model,
    node("Constant", value=onnx.TensorProto(data_type=1, dims=[1], data_location="EXTERNAL",
                                            external_data=[
        onnx.StringStringEntryProto(key="location", value="/etc/passwd")]))))  # fmt: skip


def negate(entry: Any) -> None:
    for i in range(2):
        entry.dims[i] = -entry.dims[i]


@graph_attack("ParityError")
def swapped_weights(model):
    """two weights of one shape change places"""
    one, other = (
        next(w for w in model.graph.initializer if w.name == name) for name in (QUERY, KEY)
    )
    one.name, other.name = other.name, one.name


# The bytes.

twice_attack(
    "graph",
    "a second graph, which protobuf merges into the first",
    add=coded(7, coded(2, b"forward")),
)
twice_attack("version", "a second version of the format", add=coded(1, b"\x0a", 0))
twice_attack(
    "operator", "a second operator in a node", ("graph", 0), ("node", 3), add=coded(4, b"Loop")
)
twice_attack(
    "domain",
    "a second domain in a node",
    ("graph", 0),
    ("node", 3),
    add=coded(7, b"") + coded(7, b"com.microsoft"),
)
twice_attack(
    "name", "a second name of a weight", ("graph", 0), ("initializer", 0), add=coded(8, b"x")
)
twice_attack("place", "a weight outside, then inside, then "
                      "outside", ("graph", 0), ("initializer", 0),
             add=coded(14, b"\0", 0) + coded(14, b"\1", 0))  # fmt: skip
twice_attack(
    "dtype", "a second dtype of a weight", ("graph", 0), ("initializer", 0), add=coded(2, b"\1", 0)
)
change_attack(
    "field_unknown", "a field that nobody knows", lambda model: behind(model, add=coded(1000, b"a"))
)
change_attack(
    "field_of_an_extension",
    "a field with the largest number",
    lambda model: behind(model, add=coded(2**29 - 1, b"")),
)
change_attack(
    "field_zero", "a field with the number 0", lambda model: behind(model, add=b"\x02\x00")
)
change_attack("tag_overflows", "a field's number of more than 32 bits, which is another one for "
                               "some",
              lambda model: behind(model, add=varint(2**32 + (7 << 3 | 2)) + b"\0"))  # fmt: skip
change_attack(
    "group",
    "a field as a group, as nobody writes them any more",
    lambda model: behind(model, add=coded(7, b"", 3) + coded(7, b"", 4)),
)
change_attack(
    "wire_lies", "a graph that is a number", lambda model: behind(model, add=coded(7, b"\1", 0))
)
change_attack(
    "wire_of_eight_bytes",
    "a number in eight bytes",
    lambda model: behind(model, add=coded(8, bytes(8), 1)),
)
change_attack(
    "number_endless",
    "a number that does not end",
    lambda model: behind(model, add=b"\x08" + b"\xff" * 20),
)
change_attack(
    "number_of_70_bits",
    "a number of 70 bits",
    lambda model: behind(model, add=b"\x08" + b"\xff" * 9 + b"\x7f"),
)
change_attack(
    "length_beyond",
    "a part that is longer than the file",
    lambda model: behind(model, add=b"\x3a\xff\xff\xff\xff\x07"),
)
change_attack(
    "length_negative",
    "a part of a negative length",
    lambda model: behind(model, add=b"\x3a" + b"\xff" * 9 + b"\x01"),
)
change_attack("cut", "half of the graph", lambda model: model.SerializeToString()[:4000])
change_attack("empty", "an empty file", lambda model: b"")
change_attack(
    "names_no_text",
    "a name that is no text",
    lambda model: behind(model, ("graph", 0), ("node", 3), add=coded(3, b"\xff\xfe")),
)
change_attack("numbers_unpacked", "numbers one by one that others pack, which means the same",
            lambda model: unpacked(model),
              native="loads")  # fmt: skip
change_attack("own_format", "a model that ONNX Runtime takes for one of its own format, which "
                            "nobody checks",
              lambda model: in_own_format(model), native="loads")  # fmt: skip
change_attack("pickled", "a pickle", lambda model: pickle.dumps(Touch(Path("canary"))))


def unpacked(model: Any) -> bytes:
    found = b""
    for i, entry in enumerate(model.graph.initializer):
        if i == 0:
            dims = list(entry.dims)
            entry.ClearField("dims")
            found = b"".join(coded(1, varint(size), 0) for size in dims)
    return behind(model, ("graph", 0), ("initializer", 0), add=found)


def in_own_format(model: Any) -> bytes:
    model.ClearField("producer_name")
    return coded(2, b"abORTM" + bytes(30)) + model.SerializeToString()


# What is said of it, and the file itself.


def facts_attack(
    name: str, doc: str, change: Callable[[Any], Any], native: str = "IntegrityError"
) -> None:
    def damage(target: Target) -> None:
        target.json(target.graph_facts, change)

    damage.__name__, damage.__doc__ = f"graph_{name}", doc
    attack(native, **GRAPH)(damage)


def proof(facts: Any, **changes: Any) -> Any:
    return facts | {"proof": {"onnx": facts["proof"]["onnx"] | changes}}


facts_attack("reason_instead", "a reason where there is a graph, so that the module is rebuilt",
             lambda facts: {"version": 1, "reason": "\x1b[2J"})  # fmt: skip
facts_attack("reason_empty", "a reason without words", lambda facts: {"version": 1, "reason": ""})
facts_attack("reason_too", "a reason beside the proof", lambda facts: facts | {"reason": "a"})
facts_attack(
    "facts_of_the_future", "a version that nobody reads yet", lambda facts: facts | {"version": 99}
)
facts_attack("proof_is_a_text", "a proof in words", lambda facts: facts | {"proof": "trust me"})
facts_attack("proof_with_texts", "a difference that a terminal obeys",
             lambda facts: proof(facts, difference="\x1b[2J"))  # fmt: skip
facts_attack("proof_with_more", "more is said to hold", lambda facts: proof(facts, safe=True))
facts_attack("proof_with_less", "a proof without inputs",
             lambda facts: facts | {"proof": {"onnx": {"threads": True}}})  # fmt: skip
facts_attack(
    "proof_of_a_list", "a proof of many values", lambda facts: proof(facts, batch=[1] * 1000)
)
facts_attack("proof_of_another_engine", "a proof for an engine that a terminal obeys",
             lambda facts: facts | {"proof": {**facts["proof"],
                 "\x1b[2J": facts["proof"]["onnx"]}})  # fmt: skip
facts_attack(
    "proof_in_another_dtype",
    "a proof in a dtype of words",
    lambda facts: proof(facts, dtype="\x1b[2J"),
)
facts_attack("proof_in_openvino_alone", "a proof of no use to ONNX Runtime",
             lambda facts: facts | {"proof": {"openvino": facts["proof"]["onnx"]}})  # fmt: skip


def on_graph(native: str) -> Callable[[Callable[[Target], None]], Any]:
    return attack(native, **GRAPH)


@on_graph("IntegrityError")
def graph_removed(target):
    """the graph is gone, what is said of it is not"""
    target.graph.unlink()
    target.reseal()


@on_graph("IntegrityError")
def graph_facts_removed(target):
    """nothing is said of the graph"""
    target.graph_facts.unlink()
    target.reseal()


@on_graph("IntegrityError")
def graph_is_a_link(target):
    """the graph is a symbolic link"""
    shutil.move(target.graph, target.canary.parent / "graph.onnx")
    target.graph.symlink_to(target.canary.parent / "graph.onnx")


@on_graph("IntegrityError")
def graph_is_a_folder(target):
    """the graph is a folder"""
    target.graph.unlink()
    target.graph.mkdir()


@on_graph("IntegrityError")
def graph_is_a_pipe(target):
    """the graph is a pipe that nobody writes to"""
    target.graph.unlink()
    os.mkfifo(target.graph)


@on_graph("IntegrityError")
def graph_of_40_gigabytes(target):
    """a graph of 40 GB, all of them holes"""
    rewrite(target.graph, b"")
    os.truncate(target.graph, 40 << 30)
    edit_json(
        target.manifest,
        lambda manifest: manifest["files"]["safeflavor/graph.onnx"].update(size=40 << 30),
    )


@on_graph("IntegrityError")
def graph_unsealed(target):
    """the graph is changed, the manifest is not"""
    rewrite(target.graph, target.graph.read_bytes().replace(b"Gelu", b"Relu"))


@on_graph("IntegrityError")
def graph_answers_removed(target):
    """the rows that the graph answered are gone"""
    for path in target.golden("onnx"):
        path.unlink()
    target.reseal()


@on_graph("IntegrityError")
def graph_answers_none(target):
    """no row that the graph answered"""
    target.json(target.golden("onnx")[0], lambda golden: golden | {"rows": [], "answers": []})


@on_graph("IntegrityError")
def graph_answers_anything(target):
    """a tolerance with which any answer would do"""
    target.json(
        target.golden("onnx")[0], lambda golden: golden | {"tolerance": {"atol": 1e9, "rtol": 0}}
    )


@on_graph("ParityError")
def graph_answers_others(target):
    """another answer is recorded"""
    target.json(
        target.golden("onnx")[0], lambda golden: golden | {"answers": golden["answers"][::-1]}
    )


@on_graph("IntegrityError")
def graph_truths_of_a_weight(target):
    """numbers of a weight are taken for truth values, which kernels count and write differently"""
    model = onnx.ModelProto.FromString(target.graph.read_bytes())
    seen = weight(model)
    facts = {pair.key: pair.value for pair in seen.external_data}
    use(model, node("NonZero", "truths"), node("Cast", "<", to=1))
    made = model.graph.initializer.add(
        name="truths", data_type=9, dims=[int(facts["length"])], data_location=1
    )
    made.external_data.extend(seen.external_data)
    rewrite(target.graph, model.SerializeToString())
    target.reseal()
