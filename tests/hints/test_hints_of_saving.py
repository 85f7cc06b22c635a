"""Hints of ``save_model``, followed.

What is handed over, what rebuilds it, and what is stored of it.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from architectures import tiny_model
from hints.hint_rows import X, follows, refused
from mlflow.models import infer_signature
from torch import nn

import mlflow_safeflavor
from mlflow_safeflavor import from_pretrained, load_model, materialize
from mlflow_safeflavor.errors import InputError, IntegrityError, StructureError, WeightsError
from mlflow_safeflavor.module.subject import Subject

pytest_plugins = "saved_models"

OWN_PARTS = """
import torch

class Scale(torch.nn.Module):
    def forward(self, x):
        return 2 * x

class Whole(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 4), Scale())
"""

# Arguments.


@follows("arguments", "There is no such argument", "is … meant?")
@follows("arguments", "There is no such argument", "leave it out")
@follows("arguments", "An argument is of the wrong type", "pass …=[…]")
@follows("arguments", "An argument is of the wrong type", "pass str(…)")
@follows("arguments", "An argument is of the wrong type", "leave … out, which is …=…")
def test_arguments(save, code, tmp_path):
    given = {"code_paths": [code.file]}
    error = refused(InputError, save, code.Net(), **given, alow_pickle=False)
    save(code.Net(), **given, **{error.hint.split()[1]: False})
    refused(InputError, save, code.Net(), **given, zzz=None)
    save(code.Net(), **given)
    error = refused(InputError, save, code.Net(), code_paths=code.file)
    save(code.Net(), **eval(error.hint.replace("pass ", "dict(") + ")"))
    import pathlib

    task = pathlib.Path("raw")
    error = refused(InputError, save, code.Net(), **given, task=task)
    save(code.Net(), **given, task=eval(error.hint.removeprefix("pass "), {"task": task}))
    error = refused(InputError, save, code.Net(), **given, rehearse=None)
    save(code.Net(), **given, **eval(f"dict({error.hint.rpartition('which is ')[2]})"))


@follows(
    "artifact/staging",
    "The target path exists already",
    "choose another path or remove it first",
)
def test_a_path_that_is_taken(code, tmp_path):
    path, given = tmp_path / "taken", {"task": "raw", "input_example": X, "code_paths": [code.file]}
    path.write_text("mine")
    options: dict[str, Any] = {**given, "graph": "no", "rehearse": False}
    refused(IntegrityError, mlflow_safeflavor.save_model, code.Net(), path, **options)
    mlflow_safeflavor.save_model(code.Net(), tmp_path / "other", **options)
    path.unlink()
    mlflow_safeflavor.save_model(code.Net(), path, **options)


@follows(
    "checkpoints/source",
    "This cannot be saved as a model",
    "name the parts: save_model(model, tokenizer=…)",
)
def test_a_pair(save, tiny_bert, tiny_tokenizer):
    refused(StructureError, save, (tiny_bert(), tiny_tokenizer))
    save(tiny_bert(), tokenizer=tiny_tokenizer)


@follows(
    "tasks/table",
    "The task cannot be told from the model class",
    "say it: save_model(..., task=...)",
)
def test_a_task_that_nobody_told(save, code):
    refused(StructureError, save, code.Net(), task=None, code_paths=[code.file])
    save(code.Net(), task="raw", code_paths=[code.file])


@follows(
    "save/given",
    "preprocess and postprocess belong to the custom task, which needs both",
    'pass task="custom", preprocess=… and postprocess=…',
)
@follows(
    "save/write",
    "The … task needs an example: nobody else knows its rows",
    "pass input_example=… as predict takes it; its answers are recorded and replayed at each load",
)
@follows(
    "save/write",
    "A hook cannot be imported anywhere else",
    "move it to a file and pass code_paths=[file], or pass allow_pickle=True",
)
@follows("save/code", "code_paths must not hold the loader itself", "leave it out")
def test_hooks(save, code):
    from pathlib import Path

    table = pd.DataFrame({"a": [1.0, 2.0]})
    given = {"code_paths": [code.file], "input_example": table}
    refused(InputError, save, code.Net(), **given, preprocess=code.pre)
    custom = {"task": "custom", "preprocess": code.pre, "postprocess": code.post}
    save(code.Net(), **given, **custom)
    refused(InputError, save, code.Net(), **custom, code_paths=[code.file], input_example=None)
    own = {**custom, "postprocess": lambda *given: code.post(*given)}
    refused(StructureError, save, code.Net(), **given, **own)
    save(code.Net(), **given, **custom)
    save(code.Net(), **given, **own, allow_pickle=True)
    loader = str(Path(mlflow_safeflavor.__file__).parent)
    refused(
        InputError, save, code.Net(), **custom, input_example=table, code_paths=[code.file, loader]
    )


@follows(
    "save/graph",
    "The forward of the model cannot be stored as a graph",
    'save it with graph="auto" and engine="auto", which serves the module where there is no graph',
)
def test_a_forward_that_is_no_graph(save, code):
    refused(StructureError, save, code.Asks(), code_paths=[code.file], graph="require")
    refused(StructureError, save, code.Asks(), graph="only")
    save(code.Asks(), code_paths=[code.file], graph="auto")


@follows(
    "save/signature",
    "The signature does not fit the task",
    "leave signature out, or rename columns with input_columns",
)
@follows(
    "save/signature",
    "The signature does not declare %s, so MLflow drops %s from requests; leave signature out to "
    "have all params of the task.",
)
def test_a_signature(save, tiny_bert, tiny_tokenizer):
    frame = pd.DataFrame({"review": ["the cat"]})
    given = {"tokenizer": tiny_tokenizer, "signature": infer_signature(frame)}
    refused(InputError, save, tiny_bert(), **given, input_columns={"text": "code"})
    some = save(tiny_bert(), **given, input_columns={"text": "review"})
    assert len(load_model(some).predict(frame)) == 1
    every = save(tiny_bert(), tokenizer=tiny_tokenizer)
    assert mlflow.models.Model.load(str(every)).signature.params is not None
    assert mlflow.models.Model.load(str(some)).signature.params is None


@follows(
    "module/dtypes",
    "safeflavor: the weights are %s, and become %s because no dtype was given; dtype='as-is' keeps "
    "them, and dtype=%r says that this is meant",
)
def test_weights_of_another_dtype(save, code, caplog):
    given = {"code_paths": [code.file]}

    def saved_as(**more):
        caplog.clear()
        path = save(code.Net().half(), **given, **more)
        said = any("dtype='as-is' keeps them" in record.getMessage() for record in caplog.records)
        layer = load_model(path, trust=["code"]).module.get_submodule("layer")
        return layer.get_parameter("weight").dtype, said

    assert saved_as() == (torch.float32, True)
    assert saved_as(dtype="float32") == (torch.float32, False)
    assert saved_as(dtype="as-is") == (torch.float16, False)


# What rebuilds a module.


@follows(
    "module/constructor",
    "The module's class cannot be imported anywhere else",
    "move it to a file and pass code_paths=[file], or pass allow_pickle=True",
)
def test_a_class_of_a_function(save, user_code):
    class Here(nn.Linear):
        pass

    refused(StructureError, save, Here(4, 2), input_example=np.ones((1, 4), "float32"))
    given = {"input_example": np.ones((1, 4), "float32")}
    load_model(save(Here(4, 2), **given, allow_pickle=True), trust=["pickle"])
    moved, file = user_code("moved_code", "import torch\nclass Here(torch.nn.Linear): pass\n")
    load_model(
        save(
            moved.Here(4, 2),
            **given,
            init_args={"in_features": 4, "out_features": 2},
            code_paths=[file],
        ),
        trust=["code"],
    )


@follows(
    "module/comparison",
    "The constructor does not give back all that the module holds: it was changed after it was "
    "made",
    "…allow_pickle=True, or graph='only'",
)
@follows(
    "module/comparison",
    "The constructor does not give back the module: it was changed after it was made",
    "…allow_pickle=True, or graph='only'",
)
@follows("module/structure", "safeflavor: the module is pickled. %s")
def test_a_module_that_was_changed(save, code, tiny_bert, tiny_tokenizer):
    def changed(width=4):
        model = code.Net(width=width)
        model.f = 2.0
        return model

    given = {"code_paths": [code.file]}
    own = code.Net()
    own.note = "kept"
    refused(StructureError, save, own, **given)
    load_model(save(own, **given, allow_pickle=True), trust=["pickle", "code"])
    load_model(save(own, graph="only"))
    wide = {**given, "input_example": {"x": np.ones((2, 5), "float32")}}
    refused(StructureError, save, changed(5), **wide)
    load_model(save(changed(5), **wide, init_args={"width": 5}), trust=["code"])
    load_model(save(changed(5), **wide, allow_pickle=True), trust=["pickle", "code"])
    bert = tiny_bert()
    bert.classifier = nn.Linear(32, 3)
    refused(StructureError, save, bert, tokenizer=tiny_tokenizer)
    bert.config.num_labels = 3
    load_model(save(bert, tokenizer=tiny_tokenizer))


@follows(
    "module/constructor",
    "A container of torch.nn does not know how modules of other classes were made",
    "write a class whose constructor makes all of it, or pass allow_pickle=True or graph='only'",
)
def test_a_container_of_the_users_modules(save, user_code):
    own, file = user_code("own_parts", OWN_PARTS)
    given = {"input_example": np.ones((1, 4), "float32"), "code_paths": [file]}
    parts = nn.Sequential(nn.Linear(4, 4), own.Scale())
    error = refused(StructureError, save, parts, **given)
    assert (error.where, error.found) == (
        "torch.nn.modules.container:Sequential, 1",
        "own_parts:Scale",
    )
    load_model(save(own.Whole(), **given), trust=["code"])
    load_model(save(parts, **given, allow_pickle=True), trust=["pickle", "code"])
    load_model(save(parts, **given, graph="only"))


@follows(
    "module/constructor",
    "A constructor argument cannot be stored as JSON",
    "pass allow_pickle=True instead of init_args",
)
@follows(
    "module/build",
    "The constructor of the model failed",
    "when saving, pass init_args={…} or allow_pickle=True",
)
def test_constructor_arguments(save, code):
    given = {"code_paths": [code.file]}
    made = SimpleNamespace(width=3)
    refused(StructureError, save, code.Own(made), **given)
    refused(StructureError, save, code.Own(made), **given, init_args={"made": made})
    load_model(save(code.Own(made), **given, allow_pickle=True), trust=["pickle", "code"])


@follows(
    "module/constructor",
    "The config names code, files or repositories, which a load would look for",
    "set them to None in model.config, or pass allow_pickle=True",
)
def test_a_config_that_names_files(save, tiny_bert, tiny_tokenizer):
    model = tiny_bert()
    model.config.vocab_file = "/tmp/words.txt"
    refused(StructureError, save, model, tokenizer=tiny_tokenizer)
    load_model(save(model, tokenizer=tiny_tokenizer, allow_pickle=True), trust=["pickle"])
    model.config.vocab_file = None
    load_model(save(model, tokenizer=tiny_tokenizer))


@follows("module/wrappers", "safeflavor: %s is taken off, and the module inside it saved")
@follows(
    "module/wrappers",
    "The module carries accelerate hooks, which move or offload its tensors",
    "accelerate.hooks.remove_hook_from_module(model, recurse=True) after bringing all weights back",
)
@follows(
    "module/wrappers",
    "The LightningModule holds the trainer that trained it",
    "{model}._trainer = None, or save the network inside it",
)
@follows(
    "module/wrappers",
    "TorchScript keeps no class that could be called again",
    "save the module that was scripted or traced",
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_wrappers(save, code):
    import accelerate

    given = {"code_paths": [code.file]}
    model = code.Net()
    load_model(save(nn.DataParallel(model), task="raw", **given), trust=["code"])
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    error = refused(StructureError, save, model, **given)
    exec(error.hint.partition(" after")[0], {"accelerate": accelerate, "model": model})
    save(model, **given)
    refused(StructureError, save, torch.jit.script(nn.Linear(4, 2)), input_example=X["x"])
    save(nn.Linear(4, 2), input_example=X["x"], init_args={"in_features": 4, "out_features": 2})
    lightning = type(
        "LightningModule", (nn.Module,), {"__module__": "lightning.pytorch.core.module"}
    )()
    lightning.net, lightning._trainer = code.Net(), object()
    error = refused(StructureError, save, lightning, **given)
    exec(error.hint.partition(",")[0], {"model": lightning})
    assert lightning._trainer is None
    save(lightning.net, **given)


@follows(
    "module/wrappers",
    "The module is quantised, and its integer weights cannot be rebuilt from a config",
    "save the model before quantising it",
)
@follows(
    "module/wrappers",
    "The module is quantised, and its integer weights cannot be rebuilt from a config",
    "save the model before quantising it, or model.dequantize() first",
)
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_module(save):
    linear = nn.Sequential(nn.Linear(4, 2))
    example = {"input_example": X["x"], "allow_pickle": True}
    if (
        "fbgemm" in torch.backends.quantized.supported_engines
        or "qnnpack" in torch.backends.quantized.supported_engines
    ):
        quantised = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)
        refused(StructureError, save, quantised, **example)
    load_model(save(linear, **example), trust=["pickle"])

    class Quantised(nn.Sequential):
        is_quantized = True

        def dequantize(self):
            self.is_quantized = False
            return self

    model = Quantised(nn.Linear(4, 2))
    error = refused(StructureError, save, model, **example)
    exec(error.hint.partition("or ")[2].removesuffix(" first"), {"model": model})
    load_model(save(model, **example), trust=["pickle"])


@follows(
    "module/wrappers",
    "Adapters lie beside the weights of the module",
    "{model} = {model}.merge_and_unload()",
)
@follows(
    "module/wrappers",
    "Adapters lie beside the weights of the module",
    "model.merge_and_unload() of the PeftModel; for adapters that transformers itself added "
    "(add_adapter, load_adapter): model = peft.PeftModel.from_pretrained(plain_model, "
    "folder).merge_and_unload()",
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters(save, tiny_bert, tiny_tokenizer, tmp_path):
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model: Any = peft.get_peft_model(tiny_bert(), config)
    model.save_pretrained(tmp_path / "adapter")
    error = refused(StructureError, save, model, tokenizer=tiny_tokenizer)
    named = {"model": model}
    exec(error.hint, named)
    save(named["model"], tokenizer=tiny_tokenizer)
    native = tiny_bert()
    native.load_adapter(str(tmp_path / "adapter"))
    error = refused(StructureError, save, native, tokenizer=tiny_tokenizer)
    named = {"peft": peft, "plain_model": tiny_bert(), "folder": str(tmp_path / "adapter")}
    exec(error.hint.partition("load_adapter): ")[2], named)
    save(named["model"], tokenizer=tiny_tokenizer)


# What is stored of it.


@follows(
    "module/saveable",
    "The module holds tensors without values",
    "load the checkpoint with mlflow_safeflavor.from_pretrained, or fill the module with "
    "mlflow_safeflavor.materialize, then save it",
)
def test_a_module_on_meta(save, tiny_bert, tiny_tokenizer, tmp_path):
    whole = tiny_bert()
    whole.save_pretrained(tmp_path / "checkpoint")
    with torch.device("meta"):
        model = type(whole)(whole.config)
    refused(WeightsError, save, model, tokenizer=tiny_tokenizer)
    save(from_pretrained(tmp_path / "checkpoint"), tokenizer=tiny_tokenizer)
    save(materialize(model, tmp_path / "checkpoint"), tokenizer=tiny_tokenizer)


@follows(
    "module/saveable",
    "The module has lazy parameters that no forward has made yet",
    "call the module once, model(example), and save it then",
)
def test_a_lazy_module(save):
    model, example = nn.LazyLinear(2), torch.ones(1, 4)
    given = {"input_example": {"input": example.numpy()}, "allow_pickle": True}
    error = refused(StructureError, save, model, **given)
    exec(error.hint.split(", ")[1], {"model": model, "example": example})
    load_model(save(model, **given), trust=["code", "pickle"])


@follows(
    "module/inventory",
    "Tensors share memory but not a dtype",
    "give each its own memory (.clone()) before saving",
)
@follows("module/saveable", "Two tensors of the module have the same path", "rename that attribute")
@follows(
    "module/saveable",
    "The module holds a tensor that cannot be stored as plain values",
    "replace it by a dense tensor before saving (dequantise, .to_dense(), .resolve_conj())",
)
@follows(
    "module/tensors",
    "A tensor has the name that safetensors keeps for itself",
    "rename that attribute",
)
def test_odd_tensors(save):
    def net(**tensors):
        model = nn.Linear(4, 2)
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor) if "." not in name else setattr(model, name, tensor)
        return model

    given = {"input_example": X["x"], "allow_pickle": True}
    shared = torch.ones(4)
    refused(StructureError, save, net(a=shared, b=shared.view(torch.int32)), **given)
    save(net(a=shared, b=shared.view(torch.int32).clone()), **given)
    two = net(a=torch.ones(2))
    two.part = nn.Module()
    two.part.a = torch.ones(2)
    setattr(two, "part.a", torch.zeros(2))
    refused(StructureError, save, two, **given)
    delattr(two, "part.a")
    two.part_a = torch.zeros(2)
    save(two, **given)
    sparse = torch.eye(4).to_sparse()
    refused(StructureError, save, net(mask=sparse), **given)
    save(net(mask=sparse.to_dense()), **given)
    turned = torch.ones(2, dtype=torch.complex64).conj()
    refused(StructureError, save, net(turned=turned), **given)
    save(net(turned=turned.resolve_conj()), **given)
    refused(StructureError, save, net(__metadata__=torch.ones(1)), **given)
    save(net(metadata=torch.ones(1)), **given)


@follows(
    "checkpoints/damage",
    "The model looks damaged already, before anything is saved",
    "load its checkpoint with mlflow_safeflavor.from_pretrained; on_damage='warn' saves it as it "
    "is",
)
@follows("checkpoints/damage", "…")
@pytest.mark.filterwarnings("ignore:The model looks damaged")
def test_a_damaged_module(save, tiny_bert, tiny_tokenizer, tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path / "checkpoint")
    model.classifier.weight.data.fill_(float("nan"))
    refused(WeightsError, save, model, tokenizer=tiny_tokenizer)
    save(from_pretrained(tmp_path / "checkpoint"), tokenizer=tiny_tokenizer)
    with pytest.warns(UserWarning, match="looks damaged"):
        mlflow_safeflavor.checkpoints.damage.require_undamaged(Subject.of(model), "warn")


@follows(
    "module/pickled",
    "The model cannot be pickled",
    "take locks, files, loggers and generators out of the module before saving it",
)
def test_a_lock(save):
    model = type("Here", (nn.Linear,), {"__module__": "__main__"})(4, 2)
    model.lock, model.rows = threading.Lock(), (row for row in X["x"])
    given = {"input_example": X["x"], "allow_pickle": True}
    refused(StructureError, save, model, **given)
    del model.lock, model.rows
    save(model, **given)


# Tokenizers, processors, tasks.


@follows(
    "tasks/inputs/tokenizer",
    "The tokenizer has no fast backend, so it cannot be stored as JSON",
    "load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it with "
    "transformers.convert_slow_tokenizer and wrap it in "
    "PreTrainedTokenizerFast(tokenizer_object=...)",
)
@follows(
    "tasks/inputs/vocabulary",
    "The tokenizer has tokens that the model has no embedding for",
    "model.resize_token_embeddings(len(tokenizer)) before training, or pass the tokenizer that "
    "the model was trained with",
)
def test_tokenizers(save, tiny_bert, tiny_tokenizer, tmp_path):
    slow = SimpleNamespace(is_fast=False, get_vocab=tiny_tokenizer.get_vocab)
    refused(StructureError, save, tiny_bert(), tokenizer=slow)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer", use_fast=True)
    save(tiny_bert(), tokenizer=fast)
    save(
        tiny_bert(),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ),
    )
    fast.add_tokens(["dachshund"])
    model = tiny_bert()
    error = refused(StructureError, save, model, tokenizer=fast)
    exec(error.hint.partition(" before")[0], {"model": model, "tokenizer": fast})
    save(model, tokenizer=fast)
    save(tiny_bert(), tokenizer=tiny_tokenizer)


@follows(
    "tasks/classification",
    "The model does not name its labels",
    "set model.config.id2label before saving",
)
@follows(
    "tasks/feature_extraction",
    "The last hidden state of an encoder-decoder model is its decoder's, not that of the text",
    "save the encoder alone, for example T5EncoderModel or model.get_encoder()",
)
@follows(
    "tasks/fill_mask", "The tokenizer has no mask token", "set tokenizer.mask_token before saving"
)
@follows(
    "tasks/zero_shot_classification",
    "The model does not say which of its labels is entailment",
    "set model.config.id2label and label2id to what the model was trained with, before saving",
)
@follows(
    "tasks/outputs",
    "The model does not return what its task reads: …",
    "choose the task this model was made for: task=...",
)
def test_models_that_lack_something(save, tiny_bert, tiny_tokenizer):
    model = tiny_bert()
    model.config.id2label = None
    refused(StructureError, save, model, tokenizer=tiny_tokenizer)
    model.config.id2label = {0: "no", 1: "yes"}
    save(model, tokenizer=tiny_tokenizer)
    shape = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    }
    t5 = transformers.T5Model(transformers.T5Config(**shape)).eval()
    refused(StructureError, save, t5, tokenizer=tiny_tokenizer, task="feature-extraction")
    save(t5.get_encoder(), tokenizer=tiny_tokenizer, task="feature-extraction")
    encoder = transformers.T5EncoderModel(transformers.T5Config(**shape)).eval()
    save(encoder, tokenizer=tiny_tokenizer, task="feature-extraction")
    masked = tiny_model("Bert", "ForMaskedLM")
    tiny_tokenizer.mask_token = None
    refused(StructureError, save, masked, tokenizer=tiny_tokenizer)
    tiny_tokenizer.mask_token = "[MASK]"
    save(masked, tokenizer=tiny_tokenizer)
    nli = tiny_bert()
    zero = {"tokenizer": tiny_tokenizer, "task": "zero-shot-classification"}
    refused(StructureError, save, nli, **zero)
    nli.config.id2label, nli.config.label2id = (
        {0: "no", 1: "entailment"},
        {"no": 0, "entailment": 1},
    )
    save(nli, **zero)
    refused(StructureError, save, tiny_bert(), tokenizer=tiny_tokenizer, task="question-answering")
    save(tiny_bert(), tokenizer=tiny_tokenizer, task="text-classification")
