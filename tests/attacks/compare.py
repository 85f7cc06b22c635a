"""What MLflow's own flavors do with the attacks that apply to them; prints the table of README.md.

    python tests/attacks/compare.py

Pins are given by hand when saving, because mlflow.transformers cannot find them for a text
classifier where torchvision is not installed. Everything runs in a temporary folder, offline.
"""

# ruff: noqa: E402  (what is set in the environment, and the path, come before the imports)

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true")
sys.path[:0] = [str(Path(__file__).parent.parent)]

import mlflow
import mlflow.pytorch
import mlflow.transformers
import torch
import transformers
from artifacts import edit_json, edit_mlmodel, read_header, rewrite, write_header
from attacks import steering  # noqa: F401  (adds its own to ATTACKS)
from attacks.hostile import ATTACKS, PATTERN, Touch
from tokenizers import Tokenizer, models, pre_tokenizers

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY = QUERY.replace("query", "key")
TEXTS = ["the cat sat", "a dog ran on the mat"]
PINS = ["torch", "transformers"]
WORDS = "[PAD] [UNK] the a cat dog sat ran on mat".split()
SHAPE = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SHAPE |= {"intermediate_size": 64, "max_position_embeddings": 32}


def make_bert() -> transformers.PreTrainedModel:
    """A seeded classifier, with weights so large that every change of them shows."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SHAPE, initializer_range=0.5)
    ).eval()


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Ten words."""
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )


@dataclass
class Peer:
    """A model saved with one of MLflow's flavors."""

    root: Path
    canary: Path

    @property
    def weights(self) -> Path:
        return self.root / "model" / "model.safetensors"

    @property
    def payload(self) -> str:
        return f"open({str(self.canary)!r}, 'w').close()\n"

    def header(
        self, change: Callable[[Any], Any], data: Callable[[bytes], bytes] = lambda data: data
    ) -> None:
        header, content = read_header(self.weights)
        change(header)
        write_header(self.weights, header, data(content))

    def json(self, name: str, change: Callable[[Any], Any]) -> None:
        folder = "components/tokenizer" if name.startswith("tokenizer") else "model"
        edit_json(self.root / folder / name, change)

    def swap(self, name: str, other: str) -> None:
        self.header(lambda h: h.update({name: h[other], other: h[name]}))


def save_transformers(root: Path) -> None:
    pipeline = transformers.pipeline(
        "text-classification", model=make_bert(), tokenizer=make_tokenizer()
    )
    mlflow.transformers.save_model(
        pipeline, str(root), pip_requirements=PINS, code_paths=[str(helper(root))]
    )


def save_pytorch(root: Path) -> None:
    path = helper(root)
    sys.path.insert(0, str(path.parent))
    model = make_bert()
    model.__class__ = importlib.import_module(path.stem).Mine
    # The other format, pt2, is a graph without the module, for inputs of the example's shape.
    mlflow.pytorch.save_model(
        model,
        str(root),
        pip_requirements=PINS,
        code_paths=[str(path)],
        serialization_format="pickle",
    )


def helper(root: Path) -> Path:
    """A module of the user's, for code_paths."""
    path = root.parent / "helper_of_the_user.py"
    path.write_text(
        "import transformers\nclass Mine(transformers.BertForSequenceClassification):\n    pass\n"
    )
    return path


def ask_transformers(root: Path) -> Any:
    answers = mlflow.pyfunc.load_model(str(root), suppress_warnings=True).predict(TEXTS)
    return [[row["label"], round(row["score"], 4)] for row in answers.to_dict("records")]


def ask_pytorch(root: Path) -> Any:
    model = mlflow.pytorch.load_model(str(root))
    batch = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return [[round(value, 4) for value in row] for row in model.eval()(**batch).logits.tolist()]


def pickled(peer: Peer) -> None:
    rewrite(pth(peer), pickle.dumps(Touch(peer.canary)))


def bin_only(peer: Peer) -> None:
    peer.weights.unlink()
    torch.save(Touch(peer.canary), peer.root / "model" / "pytorch_model.bin")


def code_file(name: str) -> Callable[[Peer], None]:
    return lambda peer: rewrite(peer.root / "code" / name, peer.payload)


SHADOW = code_file("torch.py")
"""Shows only where torch is not imported yet."""


def in_a_new_process(root: Path) -> None:
    code = (
        "import sys, mlflow.pyfunc; mlflow.pyfunc.load_model(sys.argv[1], suppress_warnings=True)"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True)


def auto_map_config(peer: Peer) -> None:
    rewrite(peer.root / "model" / "their_model.py", peer.payload)
    edit = {
        "auto_map": {"AutoModelForSequenceClassification": "their_model.M"},
        "model_type": "theirs",
    }
    peer.json("config.json", lambda c: c.update(edit))


def auto_map_tokenizer(peer: Peer) -> None:
    rewrite(peer.root / "components" / "tokenizer" / "their_tokenizer.py", peer.payload)
    edit = {
        "auto_map": {"AutoTokenizer": ["their_tokenizer.T", "their_tokenizer.T"]},
        "tokenizer_class": "T",
    }
    peer.json("tokenizer_config.json", lambda c: c.update(edit))


def index_url(peer: Peer) -> None:
    path = peer.root / "requirements.txt"
    rewrite(path, "--index-url http://127.0.0.1:9/simple\n" + path.read_text())


def yaml_object(peer: Peer) -> None:
    path = peer.root / "MLmodel"
    rewrite(
        path, path.read_text() + f"evil: !!python/object/apply:os.system ['touch {peer.canary}']\n"
    )


def pytorch_loader(peer: Peer) -> None:
    rewrite(peer.root / "code" / "their_pickle.py", peer.payload)
    rewrite(peer.root / "data" / "pickle_module_info.txt", "their_pickle")


def other_python(peer: Peer) -> None:
    edit_mlmodel(
        peer.root,
        lambda content: content["flavors"]["python_function"].update(python_version="2.7.18"),
    )


def link(peer: Peer) -> None:
    elsewhere = peer.canary.parent / "elsewhere"
    shutil.move(peer.weights, elsewhere)
    peer.weights.symlink_to(elsewhere)


def classifier(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the classifier's weights, which lie in the file as they do in memory."""
    old = make_bert().classifier.weight.detach().numpy().tobytes()
    content = path.read_bytes()
    assert content.count(old) == 1
    rewrite(path, content.replace(old, change(old)))


def negated(old: bytes) -> bytes:
    return bytes(byte ^ 0x80 if i % 4 == 3 else byte for i, byte in enumerate(old))


def flipped(old: bytes) -> bytes:
    return old[:3] + bytes([old[3] ^ 1]) + old[4:]


def pth(peer: Peer) -> Path:
    return peer.root / "data" / "model.pth"


def swapped_vocabulary(content: Any) -> None:
    words = content["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]


PEERS = {
    "mlflow.transformers": (save_transformers, ask_transformers),
    "mlflow.pytorch": (save_pytorch, ask_pytorch),
}

# Attack → the equivalent on mlflow.transformers and mlflow.pytorch; None where there is none.
EQUIVALENT: dict[str, tuple[Callable[[Peer], Any] | None, Callable[[Peer], Any] | None]] = {
    "pickle_payload": (bin_only, pickled),
    "kernel_of_a_hub": (lambda p: p.json("config.json",
        lambda c: c.update(_attn_implementation="a/kernel")), None),
    "config_auto_map": (auto_map_config, None),
    "tokenizer_auto_map": (auto_map_tokenizer, None),
    "import_os_system": (None, pytorch_loader),
    "code_added": (code_file("other_helper.py"), code_file("other_helper.py")),
    "code_changed": (code_file("helper_of_the_user.py"), code_file("helper_of_the_user.py")),
    "code_shadows_torch": (SHADOW, SHADOW),
    "yaml_python_object": (yaml_object, yaml_object),
    "requirements_index": (index_url, index_url),
    "link_weights": (link, None),
    "bit_flipped": (lambda p: classifier(p.weights, flipped),
        lambda p: classifier(pth(p), flipped)),
    "weights_swapped": (lambda p: p.swap(QUERY, KEY), None),
    "weights_scaled": (lambda p: classifier(p.weights, negated),
        lambda p: classifier(pth(p), negated)),
    "header_renamed": (lambda p: p.header(lambda h: h.update({"module." + QUERY: h.pop(QUERY)})),
        None),
    "header_extra_tensor": (
        lambda p: p.header(lambda h: h.update(extra={"dtype": "F32", "shape": [0],
            "data_offsets": [0, 0]})), None),
    "header_dtype": (lambda p: p.header(lambda h: h[QUERY].update(dtype="I32")), None),
    "header_shape": (lambda p: p.header(lambda h: h[QUERY].update(shape=[1024])), None),
    "header_overlap": (lambda p: p.header(lambda h: h[QUERY].update(h[KEY])), None),
    "header_gap": (lambda p: p.header(lambda h: None, lambda data: data + bytes(64)), None),
    "weights_cut": (lambda p: rewrite(p.weights, p.weights.read_bytes()[:50_000]),
                    lambda p: rewrite(pth(p), pth(p).read_bytes()[:50_000])),
    "config_heads": (lambda p: p.json("config.json", lambda c: c.update(num_attention_heads=8)),
        None),
    "config_epsilon": (lambda p: p.json("config.json", lambda c: c.update(layer_norm_eps=1.0)),
        None),
    "labels_swapped": (
        lambda p: p.json("config.json",
            lambda c: c.update(id2label={"0": "LABEL_1", "1": "LABEL_0"})), None),
    "dtype_other": (lambda p: p.json("config.json", lambda c: c.update(dtype="bfloat16")), None),
    "tokenizer_vocabulary": (lambda p: p.json("tokenizer.json", swapped_vocabulary), None),
    "tokenizer_regex_bomb": (lambda p: p.json("tokenizer.json",
        lambda c: c.update(pre_tokenizer=PATTERN)), None),
    "environment_lies": (other_python, other_python),
}  # fmt: skip


def try_peer(name: str, damage: Callable[[Peer], Any], good: Path, wanted: Any) -> str:
    """What loading and asking a damaged copy did, in words."""
    with tempfile.TemporaryDirectory() as scratch:
        peer = Peer(Path(scratch) / "model", Path(scratch) / "canary")
        shutil.copytree(good, peer.root)
        damage(peer)
        path = list(sys.path)
        sys.modules.pop("helper_of_the_user", None)
        try:
            with quiet():
                if damage is SHADOW:
                    in_a_new_process(peer.root)
                found = PEERS[name][1](peer.root)
            said = (
                "loads, same answers" if found == wanted else "**loads, other answers, no error**"
            )
        except BaseException as error:  # the Rust side panics with what is no Exception
            said = type(error).__name__
        sys.path[:] = path
        return "**ran the payload**" if peer.canary.exists() else said


@contextlib.contextmanager
def quiet() -> Any:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def peers() -> dict[str, dict[str, str]]:
    """Peer → attack → what it did."""
    said: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for column, (name, (save, ask)) in enumerate(PEERS.items()):
            root = Path(folder) / name / "model"
            root.parent.mkdir()
            with quiet():
                save(root)
                wanted = ask(root)
            pairs = {attack: pair[column] for attack, pair in EQUIVALENT.items()}
            said[name] = {
                a: try_peer(name, damage, root, wanted) for a, damage in pairs.items() if damage
            }
    return said


def table(said: dict[str, dict[str, str]]) -> str:
    """The table of README.md."""
    lines = [
        "| attack | what is attempted | `load_model` | `mlflow.pyfunc` | "
        + " | ".join(PEERS)
        + " |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for attack in ATTACKS:
        pyfunc = {None: "–", "any": "refused by MLflow"}.get(attack.pyfunc, attack.pyfunc or "")
        cells = [
            attack.name,
            attack.attempt,
            attack.native,
            pyfunc,
            *(said[n].get(attack.name, "") for n in PEERS),
        ]
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    # What cannot be compared is left blank: mlflow.pytorch has no config, no header and no
    # tokenizer.
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(peers()))
