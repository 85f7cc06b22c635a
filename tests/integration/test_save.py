"""What saving leaves on disk, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import mlflow
import pandas as pd
import pytest
import torch
import yaml
from artifacts import TEXTS
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from safetensors import safe_open
from transformers import (
    BertForNextSentencePrediction,
    Pipeline,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    TextClassificationPipeline,
)

import mlflow_safeflavor
from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.errors import (
    InputError,
    IntegrityError,
    PlacementError,
    StructureError,
    WeightsError,
)
from mlflow_safeflavor.save import save

pytest_plugins = "saved_models"


@pytest.fixture
def save_tiny(tmp_path, tiny_bert, tiny_tokenizer):
    """Save a tiny classifier at ``tmp_path/store/model`` without a rehearsal; its path."""

    def run(model=None, path=tmp_path / "store" / "model", **options):
        options = {"tokenizer": tiny_tokenizer, "rehearse": False, "graph": "no", **options}
        mlflow_safeflavor.save_model(tiny_bert() if model is None else model, path, **options)
        return path

    return run


def stored_dtypes(path):
    with safe_open(path / "safeflavor" / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (not a dict)


# Staging


@pytest.mark.parametrize(
    "step", ["write_module", "write_code", "write_parity", "seal", "find_used"]
)
def test_a_save_that_fails_leaves_nothing_at_the_path_nor_beside_it(
    save_tiny, tmp_path, monkeypatch, step
):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(save, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save_tiny(rehearse=True)
    assert list((tmp_path / "store").iterdir()) == []


def test_an_interrupted_save_leaves_nothing_either(save_tiny, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tiny()
    assert list((tmp_path / "store").iterdir()) == []


def test_a_save_that_fails_leaves_the_empty_folder_that_was_there(save_tiny, tmp_path, tiny_bert):
    (tmp_path / "store" / "model").mkdir(parents=True)
    with pytest.raises(InputError):
        save_tiny(model_config={"poling": "cls"})
    assert list((tmp_path / "store").rglob("*")) == [tmp_path / "store" / "model"]


def test_an_empty_folder_is_replaced_by_the_model(save_tiny, tmp_path):
    (tmp_path / "store" / "model").mkdir(parents=True)
    path = save_tiny()
    assert (path / "MLmodel").is_file()
    assert list((tmp_path / "store").iterdir()) == [path]


def test_a_new_model_has_the_mode_of_any_new_folder(save_tiny, tmp_path):
    path = save_tiny()
    (tmp_path / "ordinary").mkdir()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_at_the_path_already_is_refused_and_kept(save_tiny, tmp_path, kind):
    path = tmp_path / "store" / "model"
    path.parent.mkdir()
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    before = sorted((tmp_path / "store").rglob("*"))
    with pytest.raises(IntegrityError, match="target path exists already") as refused:
        save_tiny()
    assert str(path) in refused.value.message
    assert sorted((tmp_path / "store").rglob("*")) == before


# Files

ALWAYS = {
    *("MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml"),
    *("code/mlflow_safeflavor/__init__.py", "code/mlflow_safeflavor/load/load.py"),
    *("code/mlflow_safeflavor/tasks/text_classification.py", "code/mlflow_safeflavor/py.typed"),
    *(
        f"safeflavor/{name}.json"
        for name in ("config", "structure", "tensors", "environment", "parity", "manifest")
    ),
    *("safeflavor/model.safetensors", "safeflavor/parity.safetensors"),
    *("safeflavor/tokenizer/tokenizer.json", "safeflavor/tokenizer/tokenizer_config.json"),
}


def files_of(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_every_file_of_the_format_is_there(saved):
    assert ALWAYS - files_of(saved) == set()


def test_nothing_else_is_there_but_the_example(saved):
    others = {
        name for name in files_of(saved) - ALWAYS if not name.startswith("code/mlflow_safeflavor/")
    }
    assert others == {"input_example.json", "serving_input_example.json"}


def test_the_loader_is_there_and_nothing_else_of_the_package(saved):
    """It loads and answers in its own process, and says where to get the rest of the package."""
    code = saved / "code"
    assert {path.name for path in (code / "mlflow_safeflavor").iterdir()}.isdisjoint(
        ("checkpoints", "save", "verify")
    )
    assert (
        "checkpoints, cli.py, save, spark.py, spark_daemon.py, verify"
        in (code / "mlflow_safeflavor/LOADER.txt").read_text()
    )
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(code)!r})
        import mlflow_safeflavor
        assert mlflow_safeflavor.__path__ == [{str(code / "mlflow_safeflavor")!r}]
        print(len(mlflow_safeflavor.load_model({str(saved)!r}).predict(["a", "b"])))
        mlflow_safeflavor.save_model
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "2\n", done.stderr
    assert "ImportError: save_model is not in" in done.stderr
    assert "Import mlflow_safeflavor before the first mlflow.pyfunc.load_model" in done.stderr


def test_no_file_holds_a_pickle(saved):
    # A pickle of protocol 2 and later starts with 80 and its protocol, and each ends with a dot;
    # torch.save zips one.
    for file in filter(lambda path: path.is_file(), saved.rglob("*")):
        content = file.read_bytes()
        assert not (content[:1] == b"\x80" and content[-1:] == b"."), file
        assert content[:2] != b"PK", file
        assert file.suffix in {".json", ".yaml", ".txt", ".py", ".typed", ".safetensors", ""}, file


def test_every_file_but_two_is_in_the_manifest(saved):
    manifest = read_json(saved / "safeflavor" / "manifest.json")
    assert files_of(saved) - manifest["files"].keys() == {"MLmodel", "safeflavor/manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["size"] == (saved / name).stat().st_size, name


def test_the_vendored_loader_is_this_loader(saved):
    here = Path(mlflow_safeflavor.__file__).parent
    there = saved / "code" / "mlflow_safeflavor"
    left_out = ("checkpoints", "cli.py", "save", "spark.py", "spark_daemon.py", "verify")
    files = [file for file in here.rglob("*.py") if file.relative_to(here).parts[0] not in left_out]
    wanted = {file.relative_to(here).as_posix(): file.read_bytes() for file in files}
    assert {
        file.relative_to(there).as_posix(): file.read_bytes() for file in there.rglob("*.py")
    } == wanted


def test_the_mlmodel_says_what_it_is(saved):
    content = yaml.safe_load((saved / "MLmodel").read_text())
    assert content["flavors"]["python_function"]["loader_module"] == "mlflow_safeflavor"
    entry = content["flavors"]["safeflavor"]
    assert (entry["task"], entry["dtype"], entry["structure"]) == (
        "text-classification",
        "float32",
        "transformers",
    )
    assert entry["format_version"] == 1
    assert content["metadata"] == {"a": 1}
    assert content["model_size_bytes"] > 0


def test_the_users_code_is_stored_beside_the_loader(save_tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("ANSWER = 42\n")
    path = save_tiny(code_paths=[str(tmp_path / "mine")])
    assert (path / "code" / "mine" / "__init__.py").read_text() == "ANSWER = 42\n"
    assert "code/mine/__init__.py" in read_json(path / "safeflavor" / "manifest.json")["files"]


def test_the_loader_itself_is_no_code_of_the_users(save_tiny):
    with pytest.raises(InputError, match="code_paths must not hold the loader itself"):
        save_tiny(code_paths=[str(Path(mlflow_safeflavor.__file__).parent)])


def test_saving_the_same_model_twice_gives_the_same_bytes(save_tiny, tmp_path):
    # What a forward costs is measured otherwise, and decides which golden rows share a batch, and
    # so their last bits.
    known = {"forward_cost": 64}
    first, second = (save_tiny(path=tmp_path / name, model_config=known) for name in ("one", "two"))
    for name in sorted(files_of(first) - {"MLmodel", "safeflavor/manifest.json"}):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


# What is left alone


def test_the_model_is_left_as_it_was(save_tiny, tiny_bert):
    model = tiny_bert().train()
    model.bert.encoder.layer[1].eval()
    model.classifier.weight.requires_grad_(False)

    def facts():
        return {
            "modes": {name: child.training for name, child in model.named_modules()},
            "objects": {
                name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
            },
            "pointers": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
            "dtypes": {name: tensor.dtype for name, tensor in model.state_dict().items()},
            "requires_grad": {
                name: tensor.requires_grad for name, tensor in model.named_parameters()
            },
            "grads": {name: tensor.grad for name, tensor in model.named_parameters()},
            "attributes": {name: sorted(vars(child)) for name, child in model.named_modules()},
            "config": model.config.to_json_string(),
        }

    before, values = facts(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_tiny(model, dtype="bfloat16")
    after = facts()
    for fact in before:
        assert after[fact] == before[fact], fact
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name


def test_the_process_is_left_as_it_was(save_tiny, tiny_bert):
    model = tiny_bert()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    save_tiny(model)
    assert torch.equal(torch.rand(3), wanted), "saving used random numbers"
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before


def test_the_tokenizer_keeps_its_truncation_and_padding(save_tiny, tiny_tokenizer):
    backend = tiny_tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    before = (backend.truncation, backend.padding)
    path = save_tiny()
    assert (backend.truncation, backend.padding) == before
    stored = json.loads((path / "safeflavor" / "tokenizer" / "tokenizer.json").read_text())
    assert (stored["truncation"], stored["padding"]) == (None, None), (
        "state of earlier calls was saved"
    )


def test_dropout_does_not_reach_the_golden_rows_of_a_model_in_training_mode(save_tiny, tiny_bert):
    path = save_tiny(tiny_bert(hidden_dropout_prob=0.5).train())
    assert mlflow_safeflavor.load_model(str(path)).report.bit_identical


# Serving dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_weights_are_stored_in_the_serving_dtype(save_tiny, tiny_bert, dtype):
    path = save_tiny(dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    floating = {tensor for tensor in stored_dtypes(path).values() if tensor.is_floating_point}
    assert floating == {getattr(torch, name)}
    assert yaml.safe_load((path / "MLmodel").read_text())["flavors"]["safeflavor"]["dtype"] == name
    module = mlflow_safeflavor.load_model(str(path)).module
    for name, tensor in tiny_bert().state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor.to(module.state_dict()[name].dtype)), (
            name
        )


def test_a_half_precision_model_is_stored_in_float32_unless_asked_otherwise(save_tiny, tiny_bert):
    path = save_tiny(tiny_bert().to(torch.bfloat16))
    assert {dtype for dtype in stored_dtypes(path).values() if dtype.is_floating_point} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", ["auto", "int8", "", "as is"])
def test_no_other_dtype_is_a_serving_dtype(save_tiny, dtype):
    with pytest.raises(PlacementError, match=r"float32 \| bfloat16 \| float16") as refused:
        save_tiny(dtype=dtype)
    assert repr(dtype) in refused.value.message


def tiny_t5():
    shape = {
        "vocab_size": 30,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
    }
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**shape, pad_token_id=0)).eval()


def test_what_a_class_keeps_in_float32_stays_so_in_float16(save_tiny):
    path = save_tiny(tiny_t5(), dtype="float16")
    dtypes = stored_dtypes(path)
    islands = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert islands == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    loaded = mlflow_safeflavor.load_model(str(path))
    assert {
        name for name, tensor in loaded.module.named_parameters() if tensor.dtype == torch.float32
    } == islands


def test_tied_weights_are_stored_once_and_tied_again(save_tiny):
    path = save_tiny(tiny_t5())
    rows = read_json(path / "safeflavor" / "tensors.json")["tensors"]
    groups = {row["path"]: row["data"] for row in rows}
    assert groups["shared.weight"] == groups["encoder.embed_tokens.weight"]
    assert len(stored_dtypes(path)) < len(groups)
    module: Any = mlflow_safeflavor.load_model(str(path)).module
    assert module.shared.weight is module.encoder.embed_tokens.weight


def test_a_tie_that_no_class_declares_is_stored_once_and_tied_again(save_tiny, tiny_bert):
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight = model.bert.encoder.layer[
        0
    ].output.dense.weight
    module: Any = mlflow_safeflavor.load_model(str(save_tiny(model))).module
    assert (
        module.bert.encoder.layer[1].output.dense.weight
        is module.bert.encoder.layer[0].output.dense.weight
    )


# What may be handed over


def answers_of(path):
    return mlflow_safeflavor.load_model(str(path)).predict(TEXTS)


def test_a_pipeline_is_taken_apart(save_tiny, tiny_bert, tiny_tokenizer, tmp_path):
    pipeline = TextClassificationPipeline(model=tiny_bert(), tokenizer=tiny_tokenizer)
    path = save_tiny(pipeline, tokenizer=None)
    expected = pipeline(TEXTS)
    found = answers_of(path)
    assert found["label"].tolist() == [answer["label"] for answer in expected]
    assert found["score"].tolist() == pytest.approx(
        [answer["score"] for answer in expected], abs=1e-6
    )


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_a_checkpoint_folder_is_read(save_tiny, tiny_bert, tiny_tokenizer, tmp_path, as_path):
    tiny_bert().save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    path = save_tiny(as_path(tmp_path / "checkpoint"), tokenizer=None)
    assert answers_of(path).equals(answers_of(save_tiny(path=tmp_path / "other")))


def test_nothing_of_the_checkpoint_folder_is_named_in_the_artifact(
    save_tiny, tiny_bert, tiny_tokenizer, tmp_path
):
    tiny_bert().save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    path = save_tiny(tmp_path / "checkpoint", tokenizer=None)
    for file in filter(lambda file: file.is_file(), path.rglob("*")):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_folder_without_a_checkpoint_is_refused(save_tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StructureError) as refused:
        save_tiny(tmp_path / "empty")
    assert str(tmp_path / "empty") in refused.value.message


@pytest.mark.parametrize(
    "model", [None, 7, {"a": 1}, object()], ids=["None", "int", "dict", "object"]
)
def test_what_is_no_model_is_refused(tmp_path, tiny_tokenizer, model):
    with pytest.raises(StructureError, match="cannot be saved as a model") as refused:
        mlflow_safeflavor.save_model(model, tmp_path / "model", tokenizer=tiny_tokenizer)
    assert type(model).__name__ in refused.value.message


def test_a_text_model_without_a_tokenizer_is_refused(save_tiny):
    with pytest.raises(StructureError, match="needs a tokenizer"):
        save_tiny(tokenizer=None)


def test_a_class_of_no_known_task_is_refused(save_tiny, tiny_bert):
    with pytest.raises(StructureError, match="task=") as refused:
        save_tiny(BertForNextSentencePrediction(tiny_bert().config))
    assert "BertForNextSentencePrediction" in refused.value.message


class Unknown(PreTrainedModel):
    """A transformers model of somebody's own that no constructor call gives back."""

    config_class = PretrainedConfig

    def __init__(self, config, sizes):
        super().__init__(config)
        self.layer = torch.nn.Linear(*sizes)
        self.post_init()

    def forward(self, input_ids):
        return self.layer(input_ids.float())


def test_a_class_that_cannot_be_rebuilt_is_refused_with_a_hint(save_tiny, tmp_path):
    with pytest.raises(StructureError, match="hint: ") as refused:
        save_tiny(Unknown(PretrainedConfig(), [4, 2]), task="feature-extraction")
    assert "Unknown" in refused.value.message
    assert not (tmp_path / "store" / "model").exists()


def test_a_module_that_was_changed_after_it_was_made_is_refused(save_tiny, tiny_bert):
    model = tiny_bert()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 2))
    with pytest.raises(StructureError, match="hint: ") as refused:
        save_tiny(model)
    assert "classifier" in refused.value.message


def test_accelerate_hooks_are_refused(save_tiny, tiny_bert):
    model = accelerate.cpu_offload(tiny_bert(), execution_device=torch.device("cpu"))
    with pytest.raises((StructureError, WeightsError), match="hint: ") as refused:
        save_tiny(model)
    assert "hooks" in refused.value.message or "meta" in refused.value.message


def test_a_hook_alone_is_refused_too(save_tiny, tiny_bert):
    model = tiny_bert()
    accelerate.hooks.add_hook_to_module(
        model.bert.pooler, accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    )
    with pytest.raises(StructureError, match="accelerate hooks") as refused:
        save_tiny(model)
    assert "bert.pooler" in refused.value.message
    assert "remove_hook_from_module" in refused.value.message


def test_tensors_on_meta_are_refused_by_name(save_tiny, tiny_bert):
    model = tiny_bert()
    model.classifier.bias = torch.nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(WeightsError, match="without values") as refused:
        save_tiny(model)
    assert "classifier.bias" in refused.value.message
    assert "on the meta device" in refused.value.message
    assert "from_pretrained" in refused.value.message


# Columns, signature, example, options


def test_pairs_are_asked_for_under_the_users_column_names(save_tiny):
    columns = {"text": "buggy_code", "text_pair": "fixed_code"}
    path = save_tiny(input_columns=columns)
    model = mlflow.pyfunc.load_model(str(path))
    assert model.metadata.get_input_schema().input_names() == ["buggy_code", "fixed_code"]
    rows = pd.DataFrame({"fixed_code": ["return x + y"] * 2, "buggy_code": ["return x - y", "x ="]})
    found = model.predict(rows)
    assert len(found) == 2
    assert found["score"][0] != found["score"][1]
    assert found.equals(mlflow_safeflavor.load_model(str(path)).predict(rows))


@pytest.mark.parametrize(
    "columns", [{"txt": "a"}, {"text_pair": "b"}, {"text": "a", "text_pair": "a"}, {"text": 3}]
)
def test_columns_that_do_not_fit_the_task_are_refused(save_tiny, columns):
    with pytest.raises(InputError, match="input_columns") as refused:
        save_tiny(input_columns=columns)
    assert repr(columns) in refused.value.message


def test_a_signature_of_the_same_inputs_is_kept(save_tiny):
    signature = ModelSignature(
        Schema([ColSpec(DataType.string, "text")]), Schema([ColSpec(DataType.string, "label")])
    )
    path = save_tiny(signature=signature)
    assert mlflow.models.get_model_info(str(path)).signature == signature


def test_a_signature_of_other_inputs_is_refused(save_tiny):
    signature = ModelSignature(Schema([ColSpec(DataType.string, "txt")]))
    with pytest.raises(InputError, match="signature does not fit") as refused:
        save_tiny(signature=signature, input_columns={"text": "text"})
    assert "inputs ['text': string (required)]" in refused.value.message
    assert "inputs ['txt': string (required)]" in refused.value.message


def test_a_signature_names_a_sole_column(save_tiny, tmp_path):
    path = str(save_tiny(signature=ModelSignature(Schema([ColSpec(DataType.string, "txt")]))))
    model = mlflow_safeflavor.load_model(path)
    assert model.spec.input_columns == {"text": "txt"}
    assert len(model.predict(pd.DataFrame({"txt": ["a"], "more": ["b"]})[["txt"]])) == 1
    with pytest.raises(InputError, match="column 'txt'"):
        model.predict({"text": "a"})
    with pytest.raises(MlflowException, match="missing inputs"):
        mlflow.pyfunc.load_model(path).predict({"text": "a"})
    unnamed = ModelSignature(Schema([ColSpec(DataType.string)]))
    assert (
        mlflow.models.get_model_info(
            str(save_tiny(path=tmp_path / "any", signature=unnamed))
        ).signature
        == unnamed
    )


@pytest.mark.parametrize(
    ("example", "named"),
    [
        ({"txt": ["a"], "more": ["b"]}, "columns 'txt' and 'more'"),
        ([None], "row 0"),
        (["a", 3], "row 1"),
        ([], "no rows"),
    ],
)
def test_an_example_that_the_model_could_not_answer_is_refused(save_tiny, example, named):
    with pytest.raises(InputError) as refused:
        save_tiny(input_example=example)
    assert named in refused.value.message


def test_the_example_is_stored_and_replayed(save_tiny, saved):
    example: Any = mlflow.models.Model.load(str(saved)).load_input_example(str(saved))
    assert example["text"].tolist() == TEXTS
    rows = read_json(saved / "safeflavor" / "parity.json")["rows"]
    assert [row["text"] for row in rows[: len(TEXTS)]] == TEXTS
    assert mlflow_safeflavor.load_model(str(saved)).report.golden_rows == len(rows) > len(TEXTS)


@pytest.mark.parametrize("key", ["poling", "Device", "max_length", "pooling"])
def test_a_key_of_model_config_that_nobody_reads_is_refused(save_tiny, key):
    with pytest.raises(InputError, match="Unknown key in model_config") as refused:
        save_tiny(model_config={key: "cls"})
    assert f"where: {key}" in refused.value.message
    assert "num_threads" in refused.value.message


def test_options_of_the_task_and_of_the_run_time_are_stored(save_tiny, tiny_bert):
    path = save_tiny(
        tiny_bert(None), model_config={"pooling": "cls", "normalize": True, "max_batch_tokens": 64}
    )
    entry = yaml.safe_load((path / "MLmodel").read_text())["flavors"]["safeflavor"]
    assert (entry["task_config"]["pooling"], entry["task_config"]["normalize"]) == (["cls"], True)
    assert entry["model_config"]["max_batch_tokens"] == 64
    embedding = torch.tensor(
        mlflow_safeflavor.load_model(str(path)).predict(TEXTS)["embedding"].tolist()
    )
    assert torch.allclose(embedding.norm(dim=1), torch.ones(3))


# MLflow's store


def test_a_logged_model_is_registered_and_found_by_name(tracking, tiny_bert, tiny_tokenizer):
    with mlflow.start_run() as run:
        info = mlflow_safeflavor.log_model(
            tiny_bert(),
            "classifier",
            tokenizer=tiny_tokenizer,
            registered_model_name="tiny",
            rehearse=False,
            graph="no",
        )
    assert info.run_id == run.info.run_id
    assert info.registered_model_version == 1
    expected = mlflow_safeflavor.load_model(info.model_uri).predict(TEXTS)
    for uri in ("models:/tiny/1", "models:/tiny/latest"):
        assert mlflow.pyfunc.load_model(uri).predict({"text": TEXTS}).equals(expected), uri
    mlflow.MlflowClient().set_registered_model_alias("tiny", "champion", "1")
    assert mlflow_safeflavor.load_model("models:/tiny@champion").predict(TEXTS).equals(expected)


def test_a_log_that_fails_registers_nothing(tracking, tiny_bert, tiny_tokenizer):
    with mlflow.start_run(), pytest.raises(InputError):
        mlflow_safeflavor.log_model(
            tiny_bert(),
            "classifier",
            tokenizer=tiny_tokenizer,
            registered_model_name="tiny",
            model_config={"a": 1},
        )
    assert mlflow.MlflowClient().search_registered_models() == []


def test_pipelines_are_what_this_release_of_transformers_calls_so():
    assert issubclass(TextClassificationPipeline, Pipeline)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_are_those_of_any_new_file(tmp_path, tiny_bert, tiny_tokenizer, umask):
    """Other users' servers must be able to read what this one saves, as far as it lets them."""
    before = os.umask(umask)
    try:
        mlflow_safeflavor.save_model(
            tiny_bert(), tmp_path / "model", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
        )
    finally:
        os.umask(before)
    for path in [tmp_path / "model", *(tmp_path / "model").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


# Where the weights lie while golden rows are recorded


@pytest.mark.parametrize("inference", [False, True])
def test_golden_rows_are_recorded_with_weights_that_lie_as_they_will_after_a_load(
    tmp_path, inference
):
    class Where(torch.nn.Module):
        """Answers how far its weight is from where torch would put it, in bytes."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x):
            return {"bytes": torch.full((len(x),), float(self.weight.data_ptr() % 64))}

    with torch.inference_mode(inference):
        module, memory = Where(), torch.ones(32)
        # as from_pretrained maps them from a file
        module.weight = torch.nn.Parameter(memory[2:18], not inference)
    at, example = module.weight.data_ptr(), {"x": [1.0]}
    options: dict[str, Any] = {"allow_pickle": True, "graph": "no", "rehearse": False}
    mlflow_safeflavor.save_model(
        module, tmp_path / "m", task="raw", input_example=example, **options
    )
    assert module.weight.data_ptr() == at, "the model is only looked at"
    assert module(torch.ones(1))["bytes"].tolist() == [8.0]
    if not inference:  # torch lets nobody move a tensor that was made so
        loaded = mlflow_safeflavor.load_model(tmp_path / "m", trust={"pickle"})
        assert loaded.predict(example)["bytes"] == [0.0]
        assert loaded.report.max_difference == 0
