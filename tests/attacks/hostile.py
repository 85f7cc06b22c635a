"""Artifacts made by somebody who may write every file, and who makes the manifest anew where that helps.

Each function below is one attack: it takes a copy of a good artifact and damages it. Its docstring is
what is attempted, its decorator says how loading must end: the names of our errors, ``loads`` where
the damage is rightly disregarded, ``any`` where MLflow reads the file before we do.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifacts import edit_json, edit_mlmodel, flip, read_header, reseal, rewrite, write_header

from mlflow_safeflavor.artifact import Layout, digest_json, digest_of_file

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
        base: Which good artifact is damaged: "classifier", "graph", "coded", "pickled", "image", "sound" or "chat".
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

    def header(self, change: Callable[[Any], Any], data: Callable[[bytes], bytes] = lambda data: data) -> None:
        """Change header and data of the weights, and make every digest anew."""
        header, content = read_header(self.weights)
        changed = change(header)
        write_header(self.weights, header if changed is None else changed, data(content))
        self.redigest()

    def redigest(self) -> None:
        """Write into tensors.json the digests that the weights have now, and make the manifest anew."""
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
        spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        arrays = {name: np.frombuffer(data[a:b], np.float32).copy() for name, (a, b) in spans.items()}
        change(arrays)
        ordered = sorted(spans, key=lambda name: spans[name])
        write_header(self.weights, header, b"".join(arrays[name].tobytes() for name in ordered))
        self.redigest()


MAY_IMPORT = re.compile(
    r"transformers\.(models\.\w+(\.(modeling|configuration)_\w+|\.\w+_auto)?|(image|video)_processing_\w+)"
)
"""What a hostile load may import that an honest one does not: what defines models, and transformers' own tables. No
pipeline, no timm."""

ATTACKS: list[Attack] = []
SAME = "same"


def attack(native: str, pyfunc: str | None = SAME, **more: Any) -> Callable[[Callable[[Target], None]], Any]:
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
    class_name: str, doc: str, arguments: Mapping[str, Any] | None = None, outcome: str = "StructureError", **more: Any
) -> None:
    """A transformers artifact whose class is something else; arguments that are no flags are refused before it is."""
    outcome = "IntegrityError" if arguments else outcome

    def damage(target: Target) -> None:
        given = {k: {"value": v.replace("CANARY", str(target.canary))} for k, v in (arguments or {}).items()}
        target.structure_of(**{"class": class_name, "arguments": given, **more})

    damage.__name__ = "class_" + re.sub(r"\W+", "_", class_name)
    damage.__doc__ = doc
    attack(outcome)(damage)


NO_CONFIG = {"config_class": None, "config": None}
class_attack("os:system", "the class is os.system, its argument a command", {"command": "touch CANARY"}, **NO_CONFIG)
class_attack("builtins:eval", "the class is eval", {"source": "open('CANARY','w')"}, **NO_CONFIG)
class_attack("subprocess:Popen", "the class is subprocess.Popen", {"args": "touch CANARY"}, **NO_CONFIG)
class_attack("transformers.utils.hub:cached_file", "the class is a function of transformers that downloads")
class_attack("transformers.utils.import_utils:subprocess.Popen", "a class is reached through what transformers imports")
class_attack("transformers.models.auto.auto_factory:importlib", "the class is a module that transformers imports")
class_attack(f"{BERT}:__builtins__", "the class is a dunder name of a transformers module")
class_attack(f"{BERT}:BertModel.__init__.__globals__", "the class is reached through attributes of a class")
class_attack("transformers.testing_utils:TestCasePlus", "the class is in a transformers module with side effects")
class_attack("transformers.models.bert.tokenization_bert:BertTokenizer", "the class reads a file of its choice",
             {"vocab": "/etc/hostname"}, **NO_CONFIG)  # fmt: skip
class_attack("transformers.models.bert.configuration_bert:BertConfig", "the class is no module", **NO_CONFIG)
class_attack("transformers.models.bert.modeling_bert\n:BertModel", "the class name has a line break",
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
    target.structure_of(**{"class": "os:system", "arguments": {"command": {"value": f"touch {target.canary}"}}})


@attack("TrustError", "StructureError", base="coded")
def import_popen(target):
    """the same with a class that is no module"""
    target.structure_of(
        **{"class": "subprocess:Popen", "arguments": {"args": {"value": ["touch", str(target.canary)]}}}
    )


@attack("TrustError", "ParityError", base="coded")
def hook_is_eval(target):
    """the user's hook is eval"""
    target.structure_of(hooks={"preprocess": "builtins:eval", "postprocess": f"{MODULE}:post"})


@attack("IntegrityError")
def kind_switched(target):
    """structure.json says import, MLmodel says transformers"""
    rewrite(target.code / "their_module.py", target.payload)
    target.json(target.structure, lambda old: old | {"kind": "import", "class": "their_module:Model"})


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
    edit = {"auto_map": {"AutoTokenizer": ["their_tokenizer.T", "their_tokenizer.T"]}, "tokenizer_class": "T"}
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
    target.json(target.config, lambda old: old | {"text_config": {"_attn_implementation": "somebody/kernel@main:f"}})


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
manifest_attack("manifest_parent", "a name with ..", lambda m: m["files"].update({"safeflavor/../../x": ENTRY}))
manifest_attack("manifest_absolute", "an absolute name", lambda m: m["files"].update({"/etc/hostname": ENTRY}))
manifest_attack("manifest_backslash", "a name of another system", lambda m: m["files"].update({"..\\x": ENTRY}))
manifest_attack("manifest_long_name", "a name no file system takes", lambda m: m["files"].update({"x" * 9000: ENTRY}))
manifest_attack("manifest_nul", "a name with a NUL", lambda m: m["files"].update({"a\0b": ENTRY}))
manifest_attack("manifest_empty", "no file is listed", lambda m: m.update(files={}))
manifest_attack("manifest_without_weights", "the weights are not listed",
                lambda m: m["files"].pop("safeflavor/model.safetensors"))  # fmt: skip
manifest_attack("manifest_is_a_list", "a list instead of a mapping", lambda m: [m])
manifest_attack("manifest_sizes", "sizes that are no numbers", lambda m: m["files"].update(x={**ENTRY, "size": True}))
manifest_attack("manifest_mlmodel", "another digest of MLmodel", lambda m: m.update(mlmodel="0" * 64))


@attack("IntegrityError")
def requirements_index(target):
    """requirements.txt gets another index, from which pip would install anything"""
    rewrite(target.requirements, "--index-url http://127.0.0.1:9/simple\n" + target.requirements.read_text())


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


link_attack("link_weights", "the weights are a symbolic link", lambda t, e: _behind_link(t.weights, e))
link_attack("link_manifest", "the manifest is a symbolic link", lambda t, e: _behind_link(t.manifest, e))
link_attack("link_tokenizer", "the tokenizer folder is a symbolic link", lambda t, e: _behind_link(t.tokenizer, e))
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
    """Make a file huge without writing it, and tell the manifest so; nobody is to read it to find that it lies."""
    rewrite(path, b"")
    os.truncate(path, size)

    def change(manifest: Any) -> None:
        manifest["files"][target.name_of(path)] = {"sha256": "0" * 64, "size": size}
        manifest["sha256"] = digest_json({name: manifest[name] for name in manifest.keys() - {"sha256"}})

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
    """MLmodel has 3 MB, which a YAML parser needs half a minute for (through pyfunc MLflow reads it first)"""
    rewrite(target.mlmodel, target.mlmodel.read_text() + "more:\n" + "- [a, b]\n" * 333_000)


def text_attack(name: str, doc: str, file: str, change: Callable[[str], str | bytes], outcome: str) -> None:
    """The text of one file below safeflavor/ is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        rewrite(target.data / file, change((target.data / file).read_text()))
        target.reseal()

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome)(damage)


text_attack("json_huge_number", "a number of 5,000 digits", "tensors.json",
            lambda text: text.replace('"version": 1', f'"version": {"1" * 5000}'), "IntegrityError")  # fmt: skip
text_attack("json_deep", "100,000 nested lists", "structure.json", lambda text: "[" * 10**5, "IntegrityError")
text_attack("json_deep_config", "900 nested dicts in a config", "config.json",
            lambda text: '{"a":' * 900 + "1" + "}" * 900, "IntegrityError")  # fmt: skip
text_attack("json_twice", "a key stands there twice, so that readers differ", "structure.json",
            lambda text: text.replace("{", '{"class": "os:system",', 1), "IntegrityError")  # fmt: skip
text_attack("json_nan", "a NaN in a config", "config.json",
            lambda text: text.replace("1e-12", "NaN"), "IntegrityError")  # fmt: skip
text_attack("json_not_utf8", "bytes that are no text", "parity.json", lambda text: b"\xff\xfe{}", "IntegrityError")
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
    rewrite(target.mlmodel, target.mlmodel.read_text() + "deep: " + "[" * 10**4 + "]" * 10**4 + "\n")


@attack("IntegrityError", "any")
def yaml_keys(target):
    """keys of different types, which cannot be sorted"""
    text = target.mlmodel.read_text()
    rewrite(target.mlmodel, text.replace("  safeflavor:\n", "  safeflavor:\n    1: a\n    2001-01-01: b\n"))


# --- the safetensors header -------------------------------------------------------------------------


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


header_attack("header_overlap", "two tensors over the same bytes", lambda h: h[QUERY].update(h[KEY]))
header_attack("header_out_of_range", "a tensor past the end", _offsets(QUERY, lambda a, b: [a + 10**9, b + 10**9]))
header_attack("header_negative", "a tensor before the start", _offsets(QUERY, lambda a, b: [a - 10**6, b - 10**6]))
header_attack("header_backwards", "a tensor that ends before it starts", _offsets(QUERY, lambda a, b: [b, a]))
header_attack("header_huge_offsets", "offsets beyond 64 bits", _offsets(QUERY, lambda a, b: [a + 2**64, b + 2**64]))
header_attack("header_float_offsets", "offsets that are no whole numbers", _offsets(QUERY, lambda a, b: [a, b + 0.5]))
header_attack("header_infinite_offsets", "offsets that are infinite", _offsets(QUERY, lambda a, b: [a, float("inf")]))
header_attack("header_gap", "bytes that belong to no tensor", lambda h: None, lambda data: data + bytes(64))
header_attack("header_dtype", "another dtype of the same size", lambda h: h[QUERY].update(dtype="I32"), lambda d: d,
              "WeightsError")  # fmt: skip
header_attack("header_unknown_dtype", "a dtype that nobody has", lambda h: h[QUERY].update(dtype="X99"))
header_attack("header_shape", "another shape of as many values", lambda h: h[QUERY].update(shape=[1024]), lambda d: d,
              "WeightsError")  # fmt: skip
header_attack("header_shape_overflow", "a shape whose size wraps to 0", lambda h: h[QUERY].update(shape=[2**62, 4]))
header_attack("header_terabytes", "a shape of 10^12 values", lambda h: h[QUERY].update(shape=[10**12]))
header_attack("header_zero_size", "an empty tensor in the place of a full one",
              lambda h: h[QUERY].update(shape=[0], data_offsets=[0, 0]))  # fmt: skip
header_attack("header_extra_tensor", "a tensor that nobody listed",
              lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), lambda d: d,
              "WeightsError")  # fmt: skip
header_attack("header_renamed", "a tensor under another name", lambda h: h.update({"module." + QUERY: h.pop(QUERY)}))
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


bytes_attack("header_length_beyond", "a header longer than the file", lambda c: struct.pack("<Q", len(c)) + c[8:])
bytes_attack("header_length_huge", "a header of 2^63 bytes", lambda c: struct.pack("<Q", 2**63) + c[8:])
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


# --- the inventory ----------------------------------------------------------------------------------


def inventory_attack(
    name: str, doc: str, change: Callable[[dict[str, Any], Any], Any], outcome: str = "IntegrityError", **more: Any
) -> None:
    """tensors.json is changed: ``change`` gets rows by path, and all of it."""

    def damage(target: Target) -> None:
        target.json(
            target.tensors, lambda content: change({row["path"]: row for row in content["tensors"]}, content) and None
        )

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome, **more)(damage)


inventory_attack("view_past_the_end", "a view that reaches past its data",
                 lambda rows, c: rows[QUERY].update(shape=[32, 32], stride=[32, 1], offset=1))  # fmt: skip
inventory_attack("view_far_outside", "a view far outside", lambda rows, c: rows[QUERY].update(stride=[2**40, 1]))
inventory_attack("view_negative_stride", "a negative stride", lambda rows, c: rows[QUERY].update(stride=[-32, 1]))
inventory_attack("view_negative_offset", "a negative offset", lambda rows, c: rows[QUERY].update(offset=-1))
inventory_attack("view_beyond_64_bits", "a shape beyond 64 bits", lambda rows, c: rows[QUERY].update(shape=[2**70, 0]))
inventory_attack("view_of_terabytes", "10^12 values with a stride of 0, which cost nothing until they are copied",
                 lambda rows, c: rows[QUERY].update(shape=[10**12, 32], stride=[0, 1]), "WeightsError",
                 heavy=True)  # fmt: skip
inventory_attack("view_transposed", "a square matrix transposed", lambda rows, c: rows[QUERY].update(stride=[1, 32]),
                 "ParityError")  # fmt: skip
inventory_attack("alias_made", "two tensors share one's data", lambda rows, c: rows[QUERY].update(data=KEY),
                 "WeightsError")  # fmt: skip
inventory_attack("alias_swapped", "two tensors have each other's data",
                 lambda rows, c: (rows[QUERY].update(data=KEY), rows[KEY].update(data=QUERY)),
                 "WeightsError")  # fmt: skip
inventory_attack("alias_to_nothing", "data that does not exist", lambda rows, c: rows[QUERY].update(data="nothing"))
inventory_attack("row_missing", "a tensor is left out", lambda rows, c: c["tensors"].remove(rows[QUERY]),
                 "WeightsError")  # fmt: skip
inventory_attack("row_twice", "a tensor stands there twice", lambda rows, c: c["tensors"].append(rows[QUERY]))
inventory_attack("row_kind", "a parameter becomes a buffer", lambda rows, c: rows[QUERY].update(kind="buffer"),
                 "WeightsError")  # fmt: skip
inventory_attack("row_hidden", "a parameter is hidden from the comparison",
                 lambda rows, c: rows[QUERY].update(kind="hidden"), "WeightsError")  # fmt: skip
inventory_attack("row_dtype", "a row of another dtype than its data",
                 lambda rows, c: rows[QUERY].update(dtype="float64"))  # fmt: skip
inventory_attack("dtype_is_anything", "a dtype that is another attribute of torch",
                 lambda rows, c: (rows[QUERY].update(dtype="os"), c["data"][QUERY].update(dtype="os")))  # fmt: skip
inventory_attack("file_above", "weights outside the artifact",
                 lambda rows, c: (c["files"].update({"../../x.safetensors": ""}),
                                  c["data"][QUERY].update(file="../../x.safetensors")))  # fmt: skip
inventory_attack("file_absolute", "weights at an absolute path",
                 lambda rows, c: c["files"].update({"/tmp/x.safetensors": ""}))  # fmt: skip
inventory_attack("file_missing", "a shard that is not there",
                 lambda rows, c: c["files"].update({"model-00002-of-00002.safetensors": ""}))  # fmt: skip


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
    target.json(target.tensors, lambda c: c["files"].update({shard.name: hashlib.sha256(header).hexdigest()}))


# --- values and recorded answers --------------------------------------------------------------------


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
    target.values(lambda arrays: arrays.update({QUERY: arrays["classifier.weight"].repeat(16), KEY: arrays[QUERY]}))


@attack("ParityError")
def weights_scaled(target):
    """the classifier's weights change sign, all digests made anew"""
    target.values(lambda arrays: arrays.update({"classifier.weight": -arrays["classifier.weight"]}))


@attack("ParityError")
def weights_not_numbers(target):
    """the classifier's bias becomes NaN, all digests made anew"""
    target.values(lambda arrays: arrays["classifier.bias"].fill(np.nan))


def json_attack(name: str, doc: str, file: str, change: Callable[[Any], Any], outcome: str, **more: Any) -> None:
    """A JSON file below safeflavor/ is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        target.json(target.data / file, change)

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome, **more)(damage)


json_attack("golden_rows_gone", "no golden row is left", "parity.json", lambda c: c.update(rows=[], answers=[]),
            "IntegrityError")  # fmt: skip
json_attack("golden_answers_changed", "another answer is recorded", "parity.json",
            lambda c: c["answers"][0].update(score=0.9), "ParityError")  # fmt: skip
json_attack("golden_rows_changed", "another row is recorded", "parity.json",
            lambda c: c["rows"][0].update(text="green tree"), "ParityError")  # fmt: skip
json_attack("golden_row_is_a_number", "a row that is none", "parity.json", lambda c: c["rows"].__setitem__(0, 5),
            "ParityError")  # fmt: skip
for _number in (1e308, 1.0, -1.0):
    json_attack(f"tolerance_{_number:g}", f"a tolerance of {_number:g}", "parity.json",
                lambda c, n=_number: c["tolerance"].update(atol=n), "IntegrityError")  # fmt: skip
json_attack("environment_lies", "another Python and torch were there", "environment.json",
            lambda c: c.update(python="2.7.18", distributions=c["distributions"] | {"torch": "0.1"}),
            "EnvironmentMismatchError", options={"environment": "error"}, config={"environment": "error"})  # fmt: skip
json_attack("environment_types", "versions that are no strings", "environment.json",
            lambda c: c["distributions"].update(torch=["2.0"]), "IntegrityError")  # fmt: skip
json_attack("config_heads", "another number of heads, which no shape shows", "config.json",
            lambda c: c.update(num_attention_heads=8), "ParityError")  # fmt: skip
json_attack("config_epsilon", "another epsilon, which no shape shows", "config.json",
            lambda c: c.update(layer_norm_eps=1.0), "ParityError")  # fmt: skip
json_attack("config_terabytes", "a hidden size of 10^9", "config.json",
            lambda c: c.update(hidden_size=10**9, num_attention_heads=1), "StructureError", heavy=True)  # fmt: skip
json_attack("config_endless", "10^9 layers", "config.json", lambda c: c.update(num_hidden_layers=10**9),
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
environment_attack("python_is_an_image", "a Python version that is a tag", lambda e: e.update(python="3.11@sha256:0"))
environment_attack("machine_with_escape", "a machine that a terminal obeys", lambda e: e.update(machine="\x1b[2J"))
environment_attack("pin_is_an_option", "a distribution that is an option of pip",
                   lambda e: e["distributions"].update({"--index-url=http://x": "1"}))  # fmt: skip
environment_attack("pin_of_two_lines", "a version of two lines",
                   lambda e: e["distributions"].update(numpy="1\n--index-url http://x"))  # fmt: skip
environment_attack("torch_build_nested", "a fact of torch that is a list", lambda e: e["torch_build"].update(cuda=[[]]))
environment_attack("wheel_outside", "a wheel named like a path outside",
                   lambda e: e.update(wheels={"torch": {"file": "../x.whl", "sha256": "0" * 64, "content": "0" * 64}}),
                   )  # fmt: skip


# --- MLmodel --------------------------------------------------------------------------------------


def flavor_attack(name: str, doc: str, change: Callable[[Any], Any], outcome: str = "IntegrityError") -> None:
    """Our entry of MLmodel is changed, and the manifest made anew."""

    def damage(target: Target) -> None:
        target.flavor(change)

    damage.__name__, damage.__doc__ = name, doc
    attack(outcome)(damage)


flavor_attack("version_newer", "a format of the future", lambda e: e.update(format_version=99), "FormatVersionError")
flavor_attack("version_2_70", "a version of 71 bits", lambda e: e.update(format_version=2**70), "FormatVersionError")
flavor_attack("version_zero", "a format before the first", lambda e: e.update(format_version=0))
flavor_attack("version_true", "a version that is true", lambda e: e.update(format_version=True))
flavor_attack("version_text", "a version that is text", lambda e: e.update(format_version="1"))
flavor_attack("dtype_auto", "dtype auto", lambda e: e.update(dtype="auto"))
flavor_attack("dtype_other", "another dtype than the weights have", lambda e: e.update(dtype="bfloat16"),
              "WeightsError")  # fmt: skip
flavor_attack("task_unknown", "a task that nobody has", lambda e: e.update(task="os:system"))
flavor_attack("task_switched", "another task", lambda e: e.update(task="feature-extraction"), "ParityError")
flavor_attack("task_config_gone", "what the task recorded is gone", lambda e: e.update(task_config={}), "ParityError")
flavor_attack("labels_swapped", "labels change places", lambda e: e["task_config"]["labels"].reverse(), "ParityError")
flavor_attack("runs_nested", "runs is no list of words", lambda e: e.update(runs=[["code"]]))
flavor_attack("runs_unknown", "runs something unheard of", lambda e: e.update(runs=["shell"]))
flavor_attack("column_of_two_lines", "a column whose name goes on in another line",
              lambda e: e["input_columns"].update(text="text\nRUN id"))  # fmt: skip
flavor_attack("column_with_escape", "a column that a terminal obeys",
              lambda e: e["input_columns"].update(text="\x1b]0;owned\x07"))  # fmt: skip
flavor_attack(
    "option_is_a_list", "a run-time option that is a list", lambda e: e["model_config"].update(device=["cpu"])
)
flavor_attack("option_of_two_lines", "a run-time option of two lines",
              lambda e: e["model_config"].update(device="cpu\nENV A=b"))  # fmt: skip
flavor_attack("loader_version_of_two_lines", "a version of two lines",
              lambda e: e.update(loader_version="1.0\nRUN id"))  # fmt: skip
flavor_attack("loader_digest_text", "a digest that is a path", lambda e: e.update(loader_digest="../../etc/passwd"))
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
        edit_mlmodel(target.root, lambda content: content["flavors"]["python_function"]["config"].update(options))
        target.reseal()

    damage.__name__, damage.__doc__ = name, doc
    attack("loads", outcome)(damage)


option_attack("option_engine", "an engine that nobody has", "InputError", engine="os:system")
option_attack("option_batch", "a negative batch", "InputError", max_batch_tokens=-1)
option_attack("option_device", "the meta device", "PlacementError", device="meta")
option_attack("option_dtype", "dtype auto at run time", "PlacementError", dtype="auto")
option_attack("option_verify", "a level of verification that nobody has", "InputError", verify="none")


# --- the tokenizer --------------------------------------------------------------------------------

PATTERN = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "A" * 24}


@attack("ParityError", heavy=True)
def tokenizer_regex_bomb(target):
    """a regular expression that takes exponential time, and a golden row for it"""
    edit_json(target.tokenizer_json, lambda c: c.update(pre_tokenizer=PATTERN))
    target.json(target.parity, lambda c: c["rows"][0].update(text="a" * 60 + "!"))


json_attack("tokenizer_panic", "a normaliser that makes the Rust side panic", "tokenizer/tokenizer.json",
            lambda c: c.update(normalizer=CHARSMAP), "ParityError")  # fmt: skip
json_attack("tokenizer_vocabulary", "two words change places", "tokenizer/tokenizer.json",
            lambda c: c["model"]["vocab"].update(cat=c["model"]["vocab"]["dog"], dog=c["model"]["vocab"]["cat"]),
            "ParityError")  # fmt: skip
text_attack("tokenizer_not_json", "a tokenizer.json that is none", "tokenizer/tokenizer.json", lambda text: "{",
            "IntegrityError")  # fmt: skip


# --- what building, encoding and rendering may take ---------------------------------------------------


def config_attack(name: str, doc: str, **change: Any) -> None:
    """Numbers of config.json, and no label has a name."""

    def edit(config: Any) -> None:
        config.pop("id2label", None)
        config.pop("label2id", None)
        config.update(change)

    json_attack(name, doc, "config.json", edit, "StructureError", bomb=True)


config_attack("bomb_labels", "3 million labels without names, for which a config makes two dicts", num_labels=3_000_000)
config_attack("bomb_labels_in_a_part", "the same in a part of the config", text_config={"num_labels": 3_000_000})
config_attack("bomb_positions", "30 million positions", max_position_embeddings=3 * 10**7)
config_attack("bomb_layers", "a million layers, a number that no bound of numbers sees", num_hidden_layers=10**6)
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


flavor_attack("token_pad", "a token that fills up rows, beyond the table", lambda e: e["task_config"].update(
    pad_token_id=10**6))  # fmt: skip
json_attack("token_added", "a word that the model has no embedding for", "tokenizer/tokenizer.json",
            lambda c: c["model"]["vocab"].update(zebra=len(c["model"]["vocab"])), "IntegrityError")  # fmt: skip
json_attack("tokenizer_padding", "every text is filled up to 10^9 tokens", "tokenizer/tokenizer.json",
            lambda c: c.update(padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                                        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}),
            "IntegrityError", bomb=True)  # fmt: skip
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
json_attack("tokenizer_doubling", "sixty rules that each double a text", "tokenizer/tokenizer.json",
            lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 60}),
            "IntegrityError", bomb=True)  # fmt: skip
json_attack("tokenizer_insertion", "a megabyte in the place of each letter", "tokenizer/tokenizer.json",
            lambda c: c.update(normalizer={**DOUBLING, "content": "a" * 10**6}), "IntegrityError",
            bomb=True)  # fmt: skip


def processor_attack(name: str, doc: str, base: str, **change: Any) -> None:
    """Numbers of a processor."""
    json_attack(name, doc, "processor/preprocessor_config.json", lambda c: c.update(change), "IntegrityError",
                base=base, bomb=True)  # fmt: skip


processor_attack("pixels", "every image becomes 12,000 x 12,000", "image", size={"height": 12_000, "width": 12_000})
processor_attack("pixels_of_an_edge", "the same by its short edge", "image", size={"shortest_edge": 12_000})
processor_attack("pixels_as_a_product", "edges that are fine one by one", "image", size={"height": 8000, "width": 8000})
processor_attack("bands", "2 million mel bands", "sound", feature_size=2_000_000)
processor_attack("windows", "windows of 10^9 samples", "sound", n_fft=10**9)
processor_attack("windows_densely", "a window at every sample", "sound", hop_length=1, n_fft=8192)
processor_attack("filling", "every sound is filled up to two days", "sound", chunk_length=172_800)


def template_attack(name: str, doc: str, template: str) -> None:
    """A chat template, which the golden rows go through."""
    json_attack(name, doc, "tokenizer/tokenizer_config.json", lambda c: c.update(chat_template=template),
                "ParityError", base="chat", bomb=True)  # fmt: skip


template_attack("template_range", "a loop of 10^9 rounds", "{% for i in range(1000000000) %}{% endfor %}")
template_attack("template_loops", "loops in loops", "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3)
template_attack("template_product", "a text times 10^10", "{{ 'x' * 10000000000 }}")
template_attack("template_doubling", "a text beside itself, 60 times", "{% set ns = namespace(s='xxxx') %}"
                "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}")  # fmt: skip
template_attack(
    "template_recursion", "a macro that calls itself", "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"
)
template_attack("template_tree", "a macro that calls itself twice, 60 deep",
                "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
                "{{ m(60) }}")  # fmt: skip
template_attack("template_format", "a number as wide as the memory", "{{ '%99999999999d' % 1 }}")


# --- a graph --------------------------------------------------------------------------------------

GRAPH: Mapping[str, Any] = {"base": "graph", "options": {"model_config": {"engine": "onnx"}}}
HERE = {"device": {"device": "here"}}
FLOATS = {"dtype": {"dtype": "float32"}, **HERE}
"""Native loading rebuilds the module unless it is asked for the graph; pyfunc takes the graph."""


def graph_attack(native: str = "StructureError", **more: Any) -> Callable[[Callable[[Any], Any]], Any]:
    """Register a change of graph.json, made by a function whose docstring is what is attempted."""

    def register(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def damage(target: Target) -> None:
            def with_canary(content: Any) -> Any:
                changed = change(content)
                text = json.dumps(content if changed is None else changed)
                return json.loads(text.replace("CANARY", str(target.canary)))

            target.json(target.graph, with_canary)

        damage.__name__, damage.__doc__ = f"graph_{change.__name__}", change.__doc__
        attack(native, **{**GRAPH, **more})(damage)
        return change

    return register


def use(content: Any, *calls: tuple[Any, ...]) -> None:
    """Let these calls run last, and the last of them be what the graph answers; ``-1`` is the call before."""
    for name, args, kwargs in calls:
        before = {"call": len(content["calls"]) - 1}
        args = [before if arg == -1 else [before if item == -1 else item for item in arg] if isinstance(arg, list)
                else arg for arg in args]  # fmt: skip
        content["calls"].append([name, args, kwargs, ""])
    name = next(iter(content["outputs"]))
    content["outputs"][name] = {"call": len(content["calls"]) - 1}


def call_attack(name: str, doc: str, *calls: tuple[Any, ...], native: str = "StructureError") -> None:
    """The answer of the graph goes through these calls."""

    def change(content: Any) -> None:
        use(content, *calls)

    change.__name__, change.__doc__ = name, doc
    graph_attack(native)(change)


TOUCH = "__import__('os').system('touch CANARY')"

call_attack("calls_os", "an operator is os.system", ("os.system", [{"text": "touch"}], {}))
call_attack("calls_eval", "an operator is eval", ("builtins.eval", [{"text": "a"}], {}))
call_attack("calls_aten_os", "an operator of aten by the name of os.system", ("aten.os.system", [-1], {}))
call_attack("calls_dunder", "an operator is a dunder name of aten", ("aten.__init__.__globals__", [-1], {}))
call_attack("calls_code", "the name of an operator is Python code", (f"aten.relu.default({TOUCH})", [-1], {}))
call_attack("calls_line", "the name of an operator has a line of code", (f"aten.relu.default\n{TOUCH}", [-1], {}))
call_attack("calls_other_namespace", "an operator of another namespace of torch", ("prims.relu.default", [-1], {}))
call_attack("calls_from_file", "an operator that reads a file", ("aten.from_file.default", [{"text": "etc"}], {}))
call_attack("calls_random", "an operator that draws at random", ("aten.rand.default", [[2, 2]], FLOATS))
call_attack("calls_in_place", "an operator that writes to its argument", ("aten.add_.Tensor", [-1, 1], {}))
call_attack("calls_out", "an operator that writes to out=", ("aten.add.out", [-1, 1], {"out": {"constant": 0}}))
call_attack("calls_empty", "an operator whose memory nobody wrote", ("aten.empty.memory_format", [[2, 2]], FLOATS))
call_attack("calls_strided", "an operator that looks past a tensor", ("aten.as_strided.default", [-1, [9], [1]], {}))
call_attack("calls_resize", "an operator that changes a constant's size", ("aten.resize_.default", [-1, [9]], {}))
call_attack("arity", "too many arguments", ("aten.relu.default", [-1, 1], {}))
call_attack("arity_missing", "too few arguments", ("aten.linear.default", [-1], {}))
call_attack("keyword_unknown", "an argument that the operator does not have", ("aten.relu.default", [-1], {"x": 1}))
call_attack("keyword_code", "the name of an argument is code", ("aten.relu.default", [-1], {f"self={TOUCH}": 1}))
call_attack("keyword_twice", "an argument by place and by name", ("aten.relu.default", [-1], {"self": {"call": 0}}))
call_attack("type_text", "a text in the place of a tensor", ("aten.relu.default", [{"text": "a"}], {}))
call_attack("type_list", "a list in the place of a number", ("aten.softmax.int", [-1, [1]], {}))
call_attack("text_code", "a text that is code", ("aten.gelu.default", [-1], {"approximate": {"text": TOUCH}}))
call_attack("int_huge", "a number beyond 64 bits", ("aten.add.Scalar", [-1, 10**4000], {}))
call_attack("deep", "a list nested 900 deep", ("aten.view.default", [-1, json.loads("[" * 900 + "]" * 900)], {}),
            native="IntegrityError")  # fmt: skip
call_attack("kind_unknown", "a value of a kind that nobody knows", ("aten.relu.default", [{"eval": TOUCH}], {}))
call_attack("dtype_unknown", "a dtype that is another attribute of torch", ("aten.zeros.default", [[1]],
            {"dtype": {"dtype": "load"}, **HERE}))  # fmt: skip
call_attack("device_unknown", "a device of its choice", ("aten.zeros.default", [[1]], {"device": {"device": "cuda:9"}}))
call_attack("dropout", "attention that drops half of its values", ("aten.unsqueeze.default", [-1, 0], {}),
            ("aten.scaled_dot_product_attention.default", [-1, -1, -1], {"dropout_p": 0.5}))  # fmt: skip
call_attack("batch_norm_trains", "a norm that writes to its running mean", ("aten.batch_norm.default",
            [-1, None, None, {"constant": 0}, {"constant": 0}, True, 0.1, 1e-5, False], {}))  # fmt: skip
call_attack("norms_missing", "a kernel that reads norms which are not there", ("aten.zeros.default", [[0, 3]], FLOATS),
            ("aten._weight_norm.default", [-1, -1, 1], {}), native="ParityError")  # fmt: skip
call_attack("item_out_of_range", "a result that an operator does not have", ("aten.topk.default", [-1, 1], {}),
            ("operator.getitem", [-1, 7], {}))  # fmt: skip
call_attack("item_by_name", "an item by a name", ("operator.getitem", [-1, {"text": "a"}], {}))
call_attack("answers_a_number", "a number is answered", ("aten.sym_size.int", [-1, 0], {}))
call_attack("memory", "4 TB in one call", ("aten.zeros.default", [[2**40]], FLOATS))
call_attack("memory_by_repeat", "a tensor repeated 10^12 times", ("aten.repeat.default", [-1, [10**12, 1]], {}))
call_attack("memory_by_range", "a range of 10^12 numbers", ("aten.arange.default", [10**12], FLOATS))
call_attack("memory_by_steps", "a range of tiny steps", ("aten.arange.start_step", [0, 1, 1e-12], FLOATS))
call_attack("memory_by_padding", "10^12 zeros beside a tensor", ("aten.pad.default", [-1, [0, 10**12]], {}))
call_attack("memory_by_eye", "a matrix of a million rows", ("aten.eye.default", [10**6], FLOATS))
call_attack("memory_by_broadcast", "a column plus a row, each small", ("aten.zeros.default", [[10**6]], FLOATS),
            ("aten.outer.default", [-1, -1], {}))  # fmt: skip
call_attack("memory_by_doubling", "a tensor beside itself, 40 times", ("aten.zeros.default", [[2**20]], FLOATS),
            *[("aten.cat.default", [[-1, -1]], {})] * 40)  # fmt: skip
call_attack("memory_by_sum", "many small tensors, all kept", *[("aten.zeros.default", [[2**22]], FLOATS)] * 200)
call_attack("memory_by_size", "a size times itself", ("aten.sym_size.int", [{"input": 0}, 0], {}),
            ("operator.add", [-1, 10**7], {}), ("operator.mul", [-1, -1], {}),
            ("aten.zeros.default", [[-1]], FLOATS))  # fmt: skip
call_attack("product_explodes", "sizes multiplied until their digits fill the memory",
            ("aten.sym_size.int", [{"input": 0}, 1], {}), ("operator.add", [-1, 2**40], {}),
            *[("operator.mul", [-1, -1], {})] * 60, ("aten.zeros.default", [[-1]], FLOATS),
            native="ParityError")  # fmt: skip


@graph_attack()
def forward_reference(content):
    """a call uses what comes after it"""
    content["calls"][0][1] = [{"call": 5}]


@graph_attack()
def self_reference(content):
    """a call uses itself"""
    content["calls"][3][1] = [{"call": 3}]


@graph_attack()
def negative_reference(content):
    """a reference before the first"""
    content["calls"][0][1] = [{"constant": -1}]


@graph_attack()
def no_such_constant(content):
    """a constant that is not listed"""
    content["calls"][0][1] = [{"constant": 10**6}]


@graph_attack("IntegrityError")
def constant_dtype(content):
    """a constant of another dtype than its tensor"""
    content["constants"][0]["dtype"] = "float64"


@graph_attack("IntegrityError")
def constant_shape(content):
    """a constant of another shape than its tensor"""
    content["constants"][0]["shape"].append(1)


@graph_attack("IntegrityError")
def constant_renamed(content):
    """a constant that is no tensor of the model"""
    content["constants"][0] |= {"tensor": "no.such.tensor", "own": False}


@graph_attack("IntegrityError")
def constant_outside(content):
    """a constant named like a path outside"""
    content["constants"][0] |= {"tensor": "../../../etc/passwd", "own": True}


@graph_attack("IntegrityError")
def constant_not_own(content):
    """a constant that is to be in a file which is not there"""
    content["constants"][-1] |= {"tensor": "constant_99", "own": True}


@graph_attack()
def constant_size_huge(content):
    """a constant with a size beyond 64 bits"""
    content["constants"][0]["shape"] = [2**70]


@graph_attack("loads")
def input_code(content):
    """an input and a size are named like code; the module answers what the graph does not take"""
    content["inputs"][0]["name"] = TOUCH
    content["sizes"][TOUCH] = [1, None]
    content["inputs"][0]["shape"][0] = TOUCH


@graph_attack("loads")
def input_missing(content):
    """an input has another name, which is code; the module answers what the graph does not take"""
    content["inputs"][-1]["name"] = "x); import os; os.system('touch CANARY'"


@graph_attack()
def output_code(content):
    """an output is named like code"""
    content["outputs"] = {TOUCH: next(iter(content["outputs"].values()))}


@graph_attack()
def output_missing(content):
    """an output of a call that does not exist"""
    content["outputs"]["logits"] = {"call": 10**6}


@graph_attack()
def version_of_the_future(content):
    """a version that nobody reads yet"""
    content["version"] = 99


@graph_attack()
def key_unknown(content):
    """a key that nobody knows"""
    content["code"] = TOUCH


@graph_attack()
def calls_300000(content):
    """300,000 calls"""
    content["calls"] += [["aten.relu.default", [{"call": 0}], {}, ""]] * 300_000


@graph_attack()
def list_huge(content):
    """a list of 100,000 sizes"""
    use(content, ("aten.view.default", [-1, [1] * 100_000], {}))


@graph_attack("PlacementError", pyfunc="loads")
def reason_instead(content):
    """a reason in the place of the graph, so that the module is rebuilt"""
    return {"version": 1, "reason": TOUCH}


@graph_attack("ParityError")
def other_answer(content):
    """a graph that is right in form, and answers something else"""
    use(content, ("aten.neg.default", [-1], {}))


@attack("IntegrityError", **GRAPH)
def graph_twice(target):
    """a key of the graph stands there twice, so that readers differ"""
    rewrite(target.graph, target.graph.read_text().replace('"version"', '"version": 1, "version"', 1))
    target.reseal()


@attack("IntegrityError", **GRAPH)
def graph_nan(target):
    """a NaN in the graph"""
    target.json(target.graph, lambda content: use(content, ("aten.add.Scalar", [-1, float("nan")], {})))


@attack("IntegrityError", **GRAPH)
def graph_is_a_link(target):
    """the graph is a symbolic link"""
    shutil.move(target.graph, target.canary.parent / "graph.json")
    target.graph.symlink_to(target.canary.parent / "graph.json")


@attack("IntegrityError", **GRAPH)
def graph_unsealed(target):
    """the graph is changed, the manifest is not"""
    edit_json(target.graph, lambda content: use(content, ("aten.neg.default", [-1], {})))


@attack("IntegrityError", **GRAPH)
def graph_tensors_pickled(target):
    """the graph's own constants are a pickle"""
    target.graph_tensors.unlink(missing_ok=True)
    torch.save(Touch(target.canary), target.graph_tensors)
    target.reseal()
