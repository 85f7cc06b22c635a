"""Folders of PEFT: merged into their base model where it is there, else refused with a hint."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import tiny_model

import mlflow_safeflavor
from mlflow_safeflavor.errors import StructureError, WeightsError

peft = pytest.importorskip("peft")

# peft's own, of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TEXTS = ["the cat sat on the mat", "a dog ran", "return x + y"]


@pytest.fixture
def adapter(tmp_path, tiny_tokenizer):
    """A folder with an adapter of a classifier.

    ``base``, that of its base model, lies beside it.
    """
    base = tiny_model("Bert", "ForSequenceClassification", num_labels=3)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, 0, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    rename(tmp_path / "adapter", str(tmp_path / "base"))
    model.eval()
    with torch.inference_mode():
        rows = [
            model(**tiny_tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS
        ]
    return tmp_path / "adapter", np.stack(rows)


def rename(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": base})
    )


@pytest.mark.parametrize("base", ["absolute", "relative"])
def test_an_adapter_is_merged_into_its_base(adapter, tmp_path, base):
    folder, wanted = adapter
    if base == "relative":
        rename(folder, "../base")
    mlflow_safeflavor.save_model(
        folder,
        tmp_path / "model",
        rehearse=False,
        params={"top_k": None, "function_to_apply": "none"},
        graph="no",
    )
    loaded = mlflow_safeflavor.load_model(tmp_path / "model")
    answers = loaded.predict(pd.DataFrame({"text": TEXTS}))
    names = [f"LABEL_{i}" for i in range(3)]
    pairs = zip(answers["labels"], answers["scores"], strict=True)
    found = np.array([[dict(zip(*pair, strict=True))[name] for name in names] for pair in pairs])
    assert np.abs(found - wanted).max() < 1e-5
    assert (loaded.spec.structure, loaded.spec.runs) == ("transformers", ())


def test_a_base_of_another_dtype_says_what_it_becomes(adapter, tmp_path, caplog):
    folder, _ = adapter
    transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "base")
    mlflow_safeflavor.save_model(folder, tmp_path / "model", rehearse=False, graph="no")
    spec = mlflow_safeflavor.load_model(tmp_path / "model").spec
    assert (spec.dtype, spec.cast_from) == ("float32", "bfloat16")
    assert caplog.text.count("the weights are bfloat16") == 1


def test_a_base_that_is_not_here_is_named_with_what_to_do(adapter, tmp_path):
    folder, _ = adapter
    rename(folder, "owner/base")
    with pytest.raises(
        StructureError, match=r"'owner/base' is no folder[\s\S]*hint[\s\S]*merge_and_unload"
    ) as refused:
        mlflow_safeflavor.save_model(folder, tmp_path / "model")
    # Followed literally.
    base = tiny_model("Bert", "ForSequenceClassification", num_labels=3)
    line = str(refused.value.hint).partition("model = ")[2].partition(", where base")[0]
    model = eval(line, {"peft": peft, "base": base})
    assert type(model) is type(base)


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    folder, _ = adapter
    shutil.rmtree(tmp_path / "base")
    tiny_model("Bert", "Model").save_pretrained(tmp_path / "base")
    with pytest.raises(StructureError, match="base is a BertModel"):
        mlflow_safeflavor.save_model(folder, tmp_path / "model")
    tiny_model(
        "Bert", "ForSequenceClassification", num_labels=3, num_hidden_layers=1
    ).save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError, match=r"layer\.1"):
        mlflow_safeflavor.save_model(folder, tmp_path / "model")


def test_without_peft_it_says_so(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlflow_safeflavor.checkpoints.adapters.importlib.util.find_spec", lambda name: None
    )
    with pytest.raises(StructureError, match="pip install peft"):
        mlflow_safeflavor.save_model(adapter[0], tmp_path / "model")
