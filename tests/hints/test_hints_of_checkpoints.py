"""Hints of ``from_pretrained``, ``materialize`` and ``prefetch``, followed."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hints.hint_rows import follows
from integration.test_prefetch import hub  # noqa: F401  (a fixture)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from mlflow_safeflavor import from_pretrained, load_model, materialize, save_model
from mlflow_safeflavor.checkpoints import hub as hubs
from mlflow_safeflavor.checkpoints import transformers_keys
from mlflow_safeflavor.checkpoints.prefetch import MANIFEST, prefetch
from mlflow_safeflavor.errors import (
    InputError,
    IntegrityError,
    StructureError,
    TrustError,
    WeightsError,
)

pytest_plugins = "saved_models"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture
def folder(model, tmp_path):
    """The checkpoint of a tiny classifier."""
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def changed(folder, change):
    """The tensors of a checkpoint, changed."""
    file = folder / "model.safetensors"
    state = change(load_file(file))
    save_file(
        {key: value.contiguous() for key, value in state.items()}, file, metadata={"format": "pt"}
    )


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TinyConfig(PretrainedConfig):
    model_type = "tiny-for-hints"


class Tiny(PreTrainedModel):
    """Four weights, and whatever a test adds."""

    config_class = TinyConfig
    make = staticmethod(lambda module: None)

    def __init__(self, config, **more):
        super().__init__(config)
        self.body = nn.Linear(4, 4)
        type(self).make(self, **more)
        self.post_init()


def tiny(make=None, cls=Tiny):
    """A class like ``Tiny`` whose constructor also calls ``make(module)``."""
    return type("Tiny", (cls,), {"make": staticmethod(make or (lambda module, **more: None))})


@pytest.fixture
def tiny_folder(tmp_path):
    Tiny(TinyConfig()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


# Options of from_pretrained.


@follows(
    "checkpoints/from_pretrained",
    "_REFUSED",
    "say dtype='float32', 'bfloat16', 'float16', 'float64' or 'as-is'",
)
def test_torch_dtype(tiny_folder):
    with pytest.raises(InputError):
        from_pretrained(tiny_folder, model_class=Tiny, torch_dtype=torch.float32)
    for dtype in ("float32", "bfloat16", "float16", "float64", "as-is"):
        assert from_pretrained(tiny_folder, model_class=Tiny, dtype=dtype)


@follows(
    "checkpoints/from_pretrained",
    "_REFUSED",
    "leave it out: nothing is ever on the meta device here",
)
@follows("checkpoints/from_pretrained", "_REFUSED", "leave it out: what does not fit is an error")
@follows("checkpoints/from_pretrained", "_REFUSED", "load the weights without quantisation")
def test_options_to_leave_out(tiny_folder):
    for name in ("low_cpu_mem_usage", "output_loading_info", "load_in_8bit"):
        given: dict[str, Any] = {name: True}
        with pytest.raises(InputError):
            from_pretrained(tiny_folder, model_class=Tiny, **given)
    assert isinstance(from_pretrained(tiny_folder, model_class=Tiny), Tiny)


@follows(
    "checkpoints/from_pretrained",
    "_REFUSED",
    "leave it out; the module comes on the CPU, and load_model(device=…) places a saved one",
)
def test_a_device_map_of_a_checkpoint(saved):
    with pytest.raises(InputError):
        from_pretrained("anything", device_map="auto")
    assert load_model(saved, device="cpu").report.device == "cpu"


@follows("checkpoints/from_pretrained", "_REFUSED", "name what may be fresh: new=('classifier.*',)")
def test_mismatched_sizes(folder):
    with pytest.raises(InputError):
        from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    loaded: Any = from_pretrained(folder, num_labels=5, new=("classifier.*",))
    assert loaded.classifier.out_features == 5


@follows(
    "checkpoints/from_pretrained", "_REFUSED", "mlflow_safeflavor.materialize(module, state_dict)"
)
def test_a_state_dict(tiny_folder):
    wanted = Tiny(TinyConfig())
    with pytest.raises(InputError):
        from_pretrained(tiny_folder, model_class=Tiny, state_dict=wanted.state_dict())
    with torch.device("meta"):
        module = Tiny(TinyConfig())
    filled: Any = materialize(module, wanted.state_dict())
    assert torch.equal(filled.body.weight, wanted.body.weight)


@follows(
    "checkpoints/from_pretrained",
    "_REFUSED",
    "import the class yourself and pass it as model_class=…",
)
def test_remote_code(tiny_folder):
    with pytest.raises(InputError):
        from_pretrained(tiny_folder, trust_remote_code=True)
    assert isinstance(from_pretrained(tiny_folder, model_class=Tiny), Tiny)


@follows(
    "checkpoints/from_pretrained",
    "_REFUSED",
    "give the path of the very folder, or use materialize with the file",
)
def test_a_subfolder(tiny_folder):
    with pytest.raises(InputError):
        from_pretrained(tiny_folder.parent, model_class=Tiny, subfolder="tiny")
    assert from_pretrained(tiny_folder.parent / "tiny", model_class=Tiny)
    with torch.device("meta"):
        module = Tiny(TinyConfig())
    filled: Any = materialize(module, tiny_folder / "model.safetensors")
    assert not filled.body.weight.is_meta


# Which checkpoint, and which class.


@follows(
    "checkpoints/folder",
    "There is no such folder, and a hub repository needs a pinned revision, as its branches and "
    "tags move",
    "take it from huggingface_hub.model_info(…).sha, or from the commit list of the repository",
)
@follows(
    "checkpoints/hub",
    "The hub repository cannot be read",
    "check the id, the revision and the network, or give a local folder",
)
@follows(
    "checkpoints/prefetch",
    "A hub repository needs a pinned revision, as its branches and tags move",
    "take it from the repository's list of commits; or resolve=True (--resolve) takes the commit "
    "that the branch or tag is now, and records it",
)
def test_a_repository_of_the_hub(folder, tmp_path, hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    commit = hub.publish("some/model", folder)
    with pytest.raises(StructureError) as refused:
        from_pretrained("some/model")
    line = str(refused.value.hint).partition("take it from ")[2].partition(", or")[0]
    assert eval(line, {"huggingface_hub": huggingface_hub}) == commit
    assert from_pretrained("some/model", revision=commit)
    with pytest.raises(StructureError, match="cannot be read"):
        from_pretrained("some/modle", revision=commit)
    assert from_pretrained("some/model", revision=commit)  # the id was checked
    assert from_pretrained(folder)  # a local folder
    with pytest.raises(StructureError, match="pinned revision"):
        prefetch("some/model", tmp_path / "a", revision="main")
    assert prefetch("some/model", tmp_path / "a", revision="main", resolve=True).revision == commit
    assert prefetch("some/model", tmp_path / "b", revision=commit).revision == commit


@follows(
    "checkpoints/recipe",
    "The checkpoint's class is not in the installed transformers",
    "say which class to build: model_class=…",
)
def test_a_class_that_transformers_has_not(folder):
    edit(folder / "config.json", architectures=["OwnClassifier"])
    with pytest.raises(StructureError):
        from_pretrained(folder)
    assert from_pretrained(folder, model_class=BertForSequenceClassification)


@follows(
    "checkpoints/recipe",
    "The checkpoint is quantised, and its integer weights cannot be loaded as they are",
    "take the original checkpoint, or dequantise this one and save it",
)
def test_a_quantised_checkpoint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "quantised")
    edit(tmp_path / "quantised" / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(StructureError):
        from_pretrained(tmp_path / "quantised")
    assert from_pretrained(folder)


@follows(
    "checkpoints/recipe",
    "The checkpoint is of another model type than the class",
    "choose a class of the checkpoint's model type, or correct model_type in its config.json",
)
def test_another_model_type(folder):
    edit(folder / "config.json", model_type="roberta")
    with pytest.raises(StructureError):
        from_pretrained(folder, model_class=BertForSequenceClassification)
    edit(folder / "config.json", model_type="bert")
    assert from_pretrained(folder, model_class=BertForSequenceClassification)


@follows(
    "checkpoints/fitted",
    "_HINT",
    "choose the class that the checkpoint was saved from (model_class=…); new=('head.*',) allows "
    "fresh tensors, drop=('head.*',) leaves keys out, tie_word_embeddings=False unties",
)
def test_a_checkpoint_of_another_class(folder):
    with pytest.raises(WeightsError):
        from_pretrained(folder, model_class=BertForMaskedLM)
    assert from_pretrained(folder, model_class=BertForSequenceClassification)
    assert from_pretrained(
        folder, model_class=BertForMaskedLM, new=("cls.*",), drop=("classifier.*", "bert.pooler.*")
    )
    untied: Any = from_pretrained(
        folder,
        model_class=BertForMaskedLM,
        new=("cls.*",),
        drop=("classifier.*", "bert.pooler.*"),
        tie_word_embeddings=False,
    )
    assert (
        untied.cls.predictions.decoder.weight is not untied.bert.embeddings.word_embeddings.weight
    )


@follows(
    "checkpoints/fitted",
    "The checkpoint does not hold a tensor, and the constructor does not compute it",
    "make it a parameter or persistent buffer and save the checkpoint again; new=(…,) accepts the "
    "random values of a new construction, but never unwritten memory",
)
def test_a_tensor_that_no_checkpoint_holds(tiny_folder):
    noisy = tiny(lambda module: module.register_buffer("noise", torch.randn(8), persistent=False))
    with pytest.raises(WeightsError) as refused:
        from_pretrained(tiny_folder, model_class=noisy)
    new = eval(str(refused.value.hint).partition("new=")[2].partition(" accepts")[0])
    loaded: Any = from_pretrained(tiny_folder, model_class=noisy, new=new)
    assert loaded.noise.std() > 0.1
    kept = tiny(lambda module: module.register_buffer("noise", torch.randn(8)))
    kept(TinyConfig()).save_pretrained(tiny_folder)
    assert from_pretrained(tiny_folder, model_class=kept)


@follows(
    "checkpoints/preprocessors", "The checkpoint has no readable tokenizer", "pass tokenizer=…"
)
def test_a_folder_with_half_a_tokenizer(folder, tiny_tokenizer, tmp_path):
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(StructureError):
        save_model(folder, tmp_path / "model", task="text-classification", rehearse=False)
    save_model(
        folder,
        tmp_path / "model",
        task="text-classification",
        tokenizer=tiny_tokenizer,
        rehearse=False,
        graph="no",
    )


# State dicts.


@follows(
    "checkpoints/state_dict",
    "The folder holds no model weights",
    "load the base model with peft, merge_and_unload() and save that",
)
def test_an_adapter_in_place_of_a_checkpoint(model, tmp_path):
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    adapted: Any = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(StructureError):
        from_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert from_pretrained(tmp_path / "merged")


@follows(
    "checkpoints/state_dict",
    "The folder holds no model weights",
    "mlflow_safeflavor.materialize(module, FILE) takes a file of any name",
)
def test_weights_under_another_name(tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "weights.safetensors")
    with pytest.raises(StructureError):
        from_pretrained(tiny_folder, model_class=Tiny)
    with torch.device("meta"):
        module = Tiny(TinyConfig())
    assert materialize(module, tiny_folder / "weights.safetensors")


@follows(
    "checkpoints/fit",
    "The checkpoint and the module do not fit each other",
    "take … off the keys; it comes from …",
)
def test_keys_of_a_wrapped_model(tiny_folder):
    changed(tiny_folder, lambda state: {f"module.{key}": value for key, value in state.items()})
    with pytest.raises(WeightsError) as refused:
        from_pretrained(tiny_folder, model_class=Tiny)
    prefix = str(refused.value.hint).split("'")[1]
    changed(
        tiny_folder, lambda state: {key.removeprefix(prefix): value for key, value in state.items()}
    )
    assert from_pretrained(tiny_folder, model_class=Tiny)


@follows("checkpoints/fit", "A weight is too large for float16", "dtype='bfloat16' or 'float32'")
def test_weights_beyond_float16(tiny_folder):
    changed(tiny_folder, lambda state: {**state, "body.bias": state["body.bias"] + 70000})
    with pytest.raises(WeightsError):
        from_pretrained(tiny_folder, model_class=Tiny, dtype="float16")
    for dtype in ("bfloat16", "float32"):
        assert from_pretrained(tiny_folder, model_class=Tiny, dtype=dtype)


@follows(
    "checkpoints/state_dict",
    "The checkpoint holds something else than tensors with values",
    "hand the state dict itself to mlflow_safeflavor.materialize, like torch.load(file, "
    "weights_only=True)['state_dict']",
)
@follows(
    "checkpoints/state_dict",
    "The file holds more than tensors, and nothing of it was run",
    "torch.save(model.state_dict(), …) where the model comes from, or better: safetensors",
)
def test_a_file_of_a_trainer(tmp_path):
    model, file = Tiny(TinyConfig()), tmp_path / "last.ckpt"

    def empty():
        with torch.device("meta"):
            return Tiny(TinyConfig())

    torch.save({"state_dict": model.state_dict(), "epoch": 3}, file)
    with pytest.raises(WeightsError):
        materialize(empty(), file)
    assert materialize(empty(), torch.load(file, weights_only=True)["state_dict"])
    torch.save(model, file)
    with pytest.raises(TrustError):
        materialize(empty(), file)
    torch.save(model.state_dict(), file)
    assert materialize(empty(), file)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert materialize(empty(), tmp_path / "model.safetensors")


# Constructors.


@follows(
    "module/construction",
    "Torch's default dtype changed while the model was constructed",
    "do not call torch.set_default_dtype, or transformers' from_pretrained in other threads, "
    "meanwhile",
)
def test_a_default_dtype_that_does_not_stay(tiny_folder, monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.module.construction._TRIES", 2)

    def restless():
        while not over.is_set():
            for dtype in (torch.float64, torch.float32):
                torch.set_default_dtype(dtype)
                time.sleep(0)

    def slow(module):
        for _ in range(50):
            torch.zeros(1)
            time.sleep(0.001)

    over = threading.Event()
    thread = threading.Thread(target=restless)
    thread.start()
    try:
        with pytest.raises(StructureError):
            from_pretrained(tiny_folder, model_class=tiny(slow))
    finally:
        over.set()
        thread.join()
        torch.set_default_dtype(torch.float32)
    assert from_pretrained(tiny_folder, model_class=tiny(slow))


@follows(
    "module/construction",
    "The constructor leaves sizes to the first forward",
    "replace lazy modules (torch.nn.LazyLinear) by those of fixed sizes",
)
def test_a_lazy_module_in_a_checkpoint(tmp_path):
    class Lazy(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.head = nn.LazyLinear(2)

    fixed = tiny(lambda module: setattr(module, "head", nn.Linear(4, 2)))
    fixed(TinyConfig()).save_pretrained(tmp_path)
    with pytest.raises(StructureError):
        from_pretrained(tmp_path, model_class=Lazy)
    assert from_pretrained(tmp_path, model_class=fixed)


@follows(
    "module/construction",
    "Tensors are on the meta device although the model was constructed on real memory",
    "its constructor itself asks for the meta device: take that out; or another thread was inside "
    "transformers' or accelerate's loader, which can break a process for good: load in a new one",
)
def test_a_constructor_that_asks_for_meta(tmp_path):
    plain = tiny(lambda module: setattr(module, "head", nn.Linear(4, 2)))
    plain(TinyConfig()).save_pretrained(tmp_path)
    with pytest.raises(WeightsError):
        from_pretrained(
            tmp_path,
            model_class=tiny(
                lambda module: setattr(module, "head", nn.Linear(4, 2, device="meta"))
            ),
        )
    assert from_pretrained(tmp_path, model_class=plain)


@follows(
    "module/construction",
    "The constructor makes another module each time",
    "make its structure depend on its arguments alone",
)
def test_a_constructor_that_counts(tmp_path):
    made = []

    def count(module):
        made.append(1)
        module.head = nn.Linear(4, len(made))

    plain = tiny(lambda module, width=3: setattr(module, "head", nn.Linear(4, width)))
    plain(TinyConfig()).save_pretrained(tmp_path)
    with pytest.raises(StructureError):
        from_pretrained(tmp_path, model_class=tiny(count))
    assert from_pretrained(tmp_path, model_class=plain, width=3)


@follows(
    "module/construction",
    "The constructor of the model failed",
    "pass from_pretrained what it needs, as further keyword arguments; where it failed is chained "
    "to this error",
)
def test_a_constructor_with_an_argument_of_its_own(tiny_folder):
    wide = tiny(lambda module, *, width: setattr(module, "width", width))
    with pytest.raises(StructureError) as refused:
        from_pretrained(tiny_folder, model_class=wide)
    assert refused.value.__cause__ is not None
    assert from_pretrained(tiny_folder, model_class=wide, width=3).width == 3


@follows(
    "checkpoints/transformers_keys",
    "transformers' loader changed a tensor that it was only to rename",
    "store torch.save(model.state_dict(), …) of this release, and use materialize",
)
def test_a_loader_that_changes_weights(tmp_path, monkeypatch):
    model = Tiny(TinyConfig())
    with pytest.raises(WeightsError):
        transformers_keys._require_unchanged(
            {"body.bias": model.body.bias + 1}, {"body.bias": model.body.bias.detach()}, model
        )
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.device("meta"):
        module = Tiny(TinyConfig())
    filled: Any = materialize(module, tmp_path / "weights.pt")
    assert torch.equal(filled.body.bias, model.body.bias)


# Modules on meta.


@follows(
    "checkpoints/materialize",
    "_HINT_META",
    "take the checkpoint that was saved from this very class; the keys and shapes must be those "
    "of module.state_dict()",
)
def test_a_state_dict_of_another_class():
    other, model = tiny(lambda module: setattr(module, "head", nn.Linear(4, 2))), Tiny(TinyConfig())
    with torch.device("meta"):
        module = Tiny(TinyConfig())
    with pytest.raises(WeightsError):
        materialize(module, other(TinyConfig()).state_dict())
    assert materialize(module, model.state_dict())


@follows(
    "checkpoints/materialize",
    "There is no data for tensors on the meta device",
    "build the module without torch.device('meta') and load the state dict into it, or add the "
    "values to the state dict under these names",
)
def test_a_buffer_without_values(monkeypatch):
    class Steps(nn.Module):
        def __init__(self, width, extra):
            super().__init__()
            self.body = nn.Linear(width, width)
            self.steps: torch.Tensor
            self.register_buffer("steps", torch.arange(width), persistent=False)

    wanted = Steps(4, extra=object())
    with torch.device("meta"):
        module = Steps(4, extra=object())
    with pytest.raises(WeightsError) as refused:
        materialize(module, wanted.state_dict())
    assert materialize(module, {**wanted.state_dict(), str(refused.value.where): wanted.steps})
    Steps(4, extra=object()).load_state_dict(wanted.state_dict())


@follows(
    "checkpoints/materialize",
    "The module carries accelerate's hooks, which would take its tensors away again",
    "accelerate.hooks.remove_hook_from_module(model, recurse=True) first",
)
def test_a_module_with_hooks_of_accelerate():
    import accelerate

    wanted = Tiny(TinyConfig())
    with torch.device("meta"):
        model = Tiny(TinyConfig())
    accelerate.hooks.add_hook_to_module(model.body, accelerate.hooks.ModelHook())
    with pytest.raises(StructureError) as refused:
        materialize(model, wanted.state_dict())
    exec(str(refused.value.hint).removesuffix(" first"), {"accelerate": accelerate, "model": model})
    assert materialize(model, wanted.state_dict())


# Prefetching.


@follows(
    "checkpoints/prefetch",
    "The checkpoint has no safetensors",
    "convert=True (--convert) reads the pickled weights, without running anything, and stores "
    "them as safetensors",
)
@follows(
    "checkpoints/prefetch",
    "The checkpoint has no safetensors",
    "choose another checkpoint or revision",
)
@follows("checkpoints/prefetch", "A local folder has no revision", "leave it out")
@follows(
    "checkpoints/prefetch",
    "The folder holds another checkpoint",
    "choose another folder, or remove this one",
)
@follows(
    "checkpoints/prefetch",
    "Files of the folder are not the ones that were prefetched",
    "remove the folder and prefetch again",
)
@follows(
    "checkpoints/prefetch", "The manifest is malformed", "remove the folder and prefetch again"
)
def test_a_folder_that_is_prefetched(model, folder, tmp_path):
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    with pytest.raises(StructureError):
        prefetch(tmp_path / "pickled", tmp_path / "none")
    target = tmp_path / "here"
    prefetch(folder, tmp_path / "none")  # another checkpoint
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(StructureError):
        prefetch(tmp_path / "pickled", target)
    prefetch(tmp_path / "pickled", target, convert=True)
    with pytest.raises(IntegrityError, match="another checkpoint"):
        prefetch(folder, target)
    prefetch(folder, tmp_path / "there")  # another folder
    shutil.rmtree(target)
    with pytest.raises(InputError):
        prefetch(folder, target, revision="main")
    prefetch(folder, target)
    for name in ("config.json", MANIFEST):
        (target / name).write_text("{}")
        with pytest.raises(IntegrityError):
            prefetch(folder, target)
        shutil.rmtree(target)
        prefetch(folder, target)


@follows(
    "checkpoints/prefetch",
    "A downloaded file is not the one that the hub lists",
    "remove … and what it links to, and prefetch again",
)
def test_a_file_that_was_changed_in_the_cache(folder, tmp_path, hub):  # noqa: F811
    commit = hub.publish("some/model", folder)
    cached = hubs.download("some/model", commit, ["config.json"], exact=True)
    (cached / "config.json").resolve().write_text("{}")
    with pytest.raises(IntegrityError) as refused:
        prefetch("some/model", tmp_path / "here", revision=commit)
    removed = Path(str(refused.value.hint).partition("remove ")[2].partition(" and what")[0])
    for path in (removed.resolve(), removed):
        path.unlink()
    assert prefetch("some/model", tmp_path / "here", revision=commit).fresh


@follows(
    "checkpoints/state_dict",
    "A safetensors file cannot be read",
    "fetch the checkpoint again, or save it again where it comes from",
)
@follows(
    "checkpoints/state_dict",
    "A checkpoint file cannot be read",
    "fetch the checkpoint again, or save it again where it comes from",
)
@follows(
    "checkpoints/state_dict",
    "The index of shards is malformed",
    "fetch the checkpoint again, or save it again where it comes from",
)
@follows(
    "checkpoints/state_dict",
    "The index of shards points outside its folder",
    "fetch the checkpoint again, or save it again where it comes from",
)
@follows(
    "checkpoints/state_dict",
    "A shard of the checkpoint is missing",
    "fetch the checkpoint again, or save it again where it comes from",
)
@follows(
    "checkpoints/state_dict",
    "The shards do not hold what their index lists",
    "fetch the checkpoint again, or save it again where it comes from",
)
def test_damaged_files_of_a_checkpoint(tmp_path):
    model = Tiny(TinyConfig())
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    model.save_pretrained(whole)
    index, shard = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    (whole / "model.safetensors").rename(whole / shard)
    (whole / index).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), shard)}))
    outside, odd = (
        {"weight_map": {name: value}} for name, value in (("a", "../a.safetensors"), ("a", shard))
    )
    for name, content in (
        (shard, b"cut"),
        (shard, None),
        (index, b"{"),
        (index, json.dumps(outside).encode()),
        (index, json.dumps(odd).encode()),
    ):
        shutil.copytree(whole, copy)
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        with pytest.raises(IntegrityError):
            from_pretrained(copy, model_class=Tiny)
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        assert from_pretrained(copy, model_class=Tiny)
        shutil.rmtree(copy)
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with torch.device("meta"):
        module = Tiny(TinyConfig())
    with pytest.raises((IntegrityError, TrustError)):
        materialize(module, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 a zip file that was cut")
    with pytest.raises(IntegrityError):
        materialize(module, tmp_path / "a.pt")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert materialize(module, tmp_path / "a.pt")


@follows(
    "checkpoints/adapters",
    "The adapter does not fit its base model",
    "name the model that it was trained on: base_model_name_or_path in its adapter_config.json",
)
def test_an_adapter_of_another_base(tiny_bert, tiny_tokenizer, tmp_path):
    import peft

    base, other = tiny_bert(), tiny_bert(num_hidden_layers=1)
    for model, name in ((base, "base"), (other, "other")):
        model.save_pretrained(tmp_path / name)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    said = tmp_path / "adapter" / "adapter_config.json"
    given = {"tokenizer": tiny_tokenizer, "rehearse": False}
    edit(said, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(WeightsError):
        save_model(tmp_path / "adapter", tmp_path / "model", **given)
    edit(said, base_model_name_or_path=str(tmp_path / "base"))
    save_model(tmp_path / "adapter", tmp_path / "model", graph="no", **given)
