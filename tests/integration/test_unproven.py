"""Trust in saved models: configs that steer a library, and classes that nobody has proven."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from artifacts import edit_json, reseal

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.trust import is_proven
from mlflow_safeflavor.errors import StructureError, TrustError
from mlflow_safeflavor.module import constructor

pytest_plugins = "saved_models"


def test_every_proven_class_is_one_of_transformers():
    import transformers

    assert is_proven("BertForSequenceClassification")
    assert is_proven("LlamaForCausalLM")
    assert not is_proven("TimmBackbone")
    assert not is_proven("BertConfig")
    listed = is_proven.__globals__["_proven"]()
    assert len(listed) > 1200
    if int(transformers.__version__.partition(".")[0]) >= 5:
        assert len(listed - set(dir(transformers))) < 30  # which releases take away


# At save.


def test_where_a_config_came_from_is_not_saved(tmp_path, tiny_bert, tiny_tokenizer):
    model = tiny_bert()
    model.config.name_or_path = "/home/somebody/model"
    model.config.auto_map = {"AutoModel": "somebody/model--code.Model"}
    model.config.custom_pipelines = {"task": {"impl": "code.Pipeline"}}
    model.config.part = {"auto_map": {"AutoModel": "code.Model"}, "size": 3}
    mlflow_safeflavor.save_model(
        model, tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    saved = json.loads(Layout(tmp_path / "m").config.read_text())
    assert saved["part"] == {"size": 3}
    assert not {"auto_map", "custom_pipelines", "_name_or_path"} & saved.keys()
    assert mlflow_safeflavor.load_model(str(tmp_path / "m")).report.golden_rows


def test_a_config_that_names_files_is_refused_before_anything_is_written(
    tmp_path, tiny_bert, tiny_tokenizer
):
    model = tiny_bert()
    model.config.part = {"index_path": "/home/somebody/index"}
    with pytest.raises(
        StructureError, match=r"config\.part\.index_path: '/home/somebody/index'"
    ) as refused:
        mlflow_safeflavor.save_model(
            model, tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False
        )
    assert not (tmp_path / "m").exists()
    model.config.part = None  # as the message says
    assert "None" in str(refused.value.hint)
    mlflow_safeflavor.save_model(
        model, tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )


# Classes that nobody has proven.


def test_an_unproven_class_is_code_that_somebody_has_to_agree_to(
    tmp_path, tiny_bert, tiny_tokenizer, monkeypatch
):
    model = tiny_bert()
    with monkeypatch.context() as patch:
        patch.setattr(constructor, "is_proven", lambda name: False)
        mlflow_safeflavor.save_model(
            model, tmp_path / "m", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
        )
    assert json.loads(Layout(tmp_path / "m").structure.read_text())["kind"] == "import"
    with pytest.raises(TrustError, match="BertForSequenceClassification"):
        mlflow_safeflavor.load_model(str(tmp_path / "m"))
    assert mlflow_safeflavor.load_model(str(tmp_path / "m"), trust={"code"}).report.golden_rows


def test_of_which_no_module_is_imported(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "m")
    name = "transformers.models.longformer.modeling_longformer"
    edit_json(
        Layout(root).structure, lambda old: old | {"class": f"{name}:LongformerForMultipleChoice"}
    )
    reseal(root)
    before = set(sys.modules)
    with pytest.raises(StructureError, match="not among those proven"):
        mlflow_safeflavor.load_model(str(root))
    assert name not in set(sys.modules) - before
