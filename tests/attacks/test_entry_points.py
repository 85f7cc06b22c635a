"""Hostile artifacts and checkpoints at every door of a process with token, network and consent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from attacks import steering
from attacks.hostile import ATTACKS, MAY_IMPORT, Target
from fake_hub import running_hub
from safetensors.torch import save_file

pytest_plugins = "saved_models"

SCRIPT = """
import contextlib, io, json, sys, warnings
warnings.simplefilter("ignore")
import mlflow.pyfunc, mlflow_safeflavor, transformers
from mlflow_safeflavor import cli
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.checkpoints.prefetch import prefetch

def load(path):
    model = mlflow_safeflavor.load_model(path)
    model.tokenizer, model.processor
    return model

def inspect(path):
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["inspect", path], standalone_mode=False)

ARTIFACT = {
    "load_model": load,
    "pyfunc": lambda path: mlflow.pyfunc.load_model(path, suppress_warnings=True),
    "verify": mlflow_safeflavor.verify_model,
    "inspect": inspect,
}
CHECKPOINT = {
    "from_pretrained": mlflow_safeflavor.from_pretrained,
    "save_model": lambda path: mlflow_safeflavor.save_model(path, path + "-saved", rehearse=False),
    "prefetch": lambda path: prefetch(path, path + "-fetched"),
}

def ends(act, path):
    try:
        act(path)
        return "done"
    except SafeFlavorError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"any {type(error).__name__}: {error}"

job, found = json.loads(sys.argv[1]), {}
for name, path in job["honest"].items():  # with all that is imported for it
    for door, act in (ARTIFACT if name == "artifact" else CHECKPOINT).items():
        found[f"honest {name} {door}"] = ends(act, path)
before = set(sys.modules)
for kind, doors in (("artifacts", ARTIFACT), ("checkpoints", CHECKPOINT)):
    for name, path in job[kind].items():
        for door, act in doors.items():
            found[f"{name} {door}"] = ends(act, path)
found["imported"] = sorted(set(sys.modules) - before)
print("\\n" + json.dumps(found))
"""

PLAIN = {"backbone": "resnet50", "backbone_config": None}
"""Names nothing that is refused by name.

Transformers asks a hub whether there is such a repository.
"""


def checkpoint(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def job(saved, tmp_path, tiny_bert, tiny_tokenizer):
    """Folders of hostile and honest artifacts and checkpoints.

    The canary, which all code that is here would touch.
    """
    canary = tmp_path / "canary"
    payload = f"open({str(canary)!r}, 'w').close()\n"
    artifacts = {}
    for attack in ATTACKS:
        if attack.damage.__module__ == "steering" and attack.base == "classifier":
            target = Target(
                shutil.copytree(saved, tmp_path / attack.name, copy_function=os.link), canary
            )
            attack.damage(target)
            artifacts[attack.name] = str(target.root)
    target = Target(shutil.copytree(saved, tmp_path / "asks_a_hub", copy_function=os.link), canary)
    steering.become(target, steering.DEPTH, PLAIN)
    artifacts["asks_a_hub"] = str(target.root)
    nested = {
        "model_type": "bert",
        "auto_map": {"AutoBackbone": "evil.B"},
        "_name_or_path": str(tmp_path / "code"),
    }
    depth = {"model_type": "depth_anything", "architectures": ["DepthAnythingForDepthEstimation"]}
    configs = {
        "asks a hub": {**depth, **PLAIN},
        "code of a part": {**depth, "backbone_config": nested},
        "code": {
            "model_type": "bert",
            "architectures": ["B"],
            "auto_map": {"AutoConfig": "evil.B", "AutoModel": "evil.B"},
        },
        "code of an unknown type": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.B"}},
    }
    checkpoints = {
        name: str(checkpoint(tmp_path / f"checkpoint {name}", config))
        for name, config in configs.items()
    }
    for folder in (tmp_path / "code", *checkpoints.values()):
        os.makedirs(folder, exist_ok=True)
        (tmp_path / folder / "evil.py").write_text(
            payload + "import torch\nclass B(torch.nn.Module): pass\n"
        )
    honest = tmp_path / "honest"
    tiny_bert().save_pretrained(honest)
    tiny_tokenizer.save_pretrained(honest)
    site = tmp_path / "site"  # a timm that tells whether it was imported
    (site / "timm").mkdir(parents=True)
    (site / "timm" / "__init__.py").write_text(payload)
    (site / "timm-1.0.dist-info").mkdir()
    (site / "timm-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: timm\nVersion: 1.0\n"
    )
    return {
        "artifacts": artifacts,
        "checkpoints": checkpoints,
        "honest": {"artifact": str(saved), "checkpoint": str(honest)},
        "canary": canary,
        "site": site,
    }


@pytest.mark.slow
def test_no_door_asks_a_hub_runs_code_or_imports_what_an_artifact_wants(job, tmp_path):
    canary, site = job.pop("canary"), job.pop("site")
    with running_hub() as hub:
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        online = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(tmp_path / "home"),
        }
        path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(job)], cwd=tmp_path / "code",
            env={**environ, **online, "PYTHONPATH": path},
            input="y\n" * 1000, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    imported = found.pop("imported")
    assert hub.requests == []
    assert not canary.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    others = [name for name in imported if not MAY_IMPORT.fullmatch(name)]
    assert not others, others
    for door, end in found.items():
        kind = end.partition(":")[0]
        # Inspecting builds nothing, and nobody reads the tokenizer of this task, or a processor.
        unread = re.match(r"(tokenizer|processor)_\w+ (pyfunc|verify)", door)
        if door.startswith("honest") or door.endswith("inspect") or unread:
            assert end == "done", (door, end)
        else:
            assert kind in ("TrustError", "IntegrityError", "StructureError"), (door, end)
    assert "looked up 127.0.0.1" in found["asks_a_hub load_model"]
    assert "looked up 127.0.0.1" in found["asks a hub from_pretrained"]
