"""Hints of ``load_model`` and of what it gives back, followed."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import edit_json, reseal, rewrite
from hints.hint_rows import X, follows, refused
from mlflow.pyfunc.model import PythonModel

import mlflow_safeflavor
from mlflow_safeflavor import load_model
from mlflow_safeflavor.errors import (
    AnswerError,
    DeadlineError,
    DownloadError,
    IntegrityError,
    OverloadedError,
    ParityError,
    PlacementError,
    RehearsalError,
    SafeFlavorError,
    StructureError,
    TrustError,
    WeightsError,
)
from mlflow_safeflavor.module import placement

pytest_plugins = "saved_models"

FRAME = pd.DataFrame({"text": ["the cat sat"]})
CODE: dict[str, Any] = {"trust": {"code"}}


def wrong(kind, path, **options):
    with pytest.raises(kind) as error:
        load_model(path, **options)
    return error.value


# Damage.


@follows(
    "artifact/spec",
    "MLmodel cannot be read",
    "fetch the artifact again, or log the model again; files of a saved model are not meant to be "
    "edited",
)
def test_a_damaged_artifact(saved, copied, tmp_path, tiny_bert, tiny_tokenizer):
    """Whatever was changed after saving has this one hint.

    The artifact as it was, or another one.
    """
    rewrite(copied / "MLmodel", "{")
    wrong(IntegrityError, copied)
    shutil.rmtree(copied)
    shutil.copytree(saved, copied)
    load_model(copied)
    mlflow_safeflavor.save_model(
        tiny_bert(), tmp_path / "again", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    load_model(tmp_path / "again")


@follows(
    "load/download",
    "The model could not be downloaded",
    "load it again once the store answers, with the credentials that its client wants",
)
def test_a_store_that_breaks_off(saved, tmp_path, monkeypatch):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def cut(self, path=None):
        raise RuntimeError("closed by the store")

    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "list_artifacts", cut)
        error = wrong(DownloadError, saved, dst_path=tmp_path)
    assert error.where == str(saved)
    load_model(saved, dst_path=tmp_path)


@follows(
    "artifact/plain_files",
    "A file of the artifact is no plain file",
    "copy the model with `cp -rL`, which copies what links point to",
)
def test_links(copied, tmp_path):
    file = next(copied.rglob("tokenizer.json"))
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    error = wrong(IntegrityError, copied)
    with pytest.raises(IntegrityError):
        mlflow_safeflavor.artifact.plain_files.read_bytes(file, 10**6)
    subprocess.run([*error.hint.split("`")[1].split(), copied, tmp_path / "whole"], check=True)
    load_model(tmp_path / "whole")


@follows(
    "artifact/plain_files",
    "A file of the artifact may not be read by this user",
    "let its owner run `chmod -R a+rX` on the model's folder, or load it as another user",
)
def test_a_file_of_another_user(copied, monkeypatch):
    file = next(copied.rglob("tokenizer.json"))
    if os.geteuid():
        file.chmod(0)
        error = wrong(IntegrityError, copied)
    else:  # root reads everything
        opened = os.open

        def refuse(path, *args, **options):
            if os.fspath(path) == os.fspath(file):
                raise PermissionError(13, "Permission denied", path)
            return opened(path, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            patch.setattr("builtins.open", lambda path, *args, **options: refuse(path) and None)
            with pytest.raises(IntegrityError) as caught:
                mlflow_safeflavor.artifact.plain_files.read_bytes(file, 10**6)
        error = caught.value
    subprocess.run([*error.hint.split("`")[1].split(), copied], check=True)
    load_model(copied)


@follows(
    "artifact/spec",
    "This MLflow model was not saved by mlflow-safeflavor",
    "load it with the flavor that saved it",
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_another_flavor(tmp_path):
    class Model(PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input

    mlflow.pyfunc.save_model(tmp_path / "other", python_model=Model(), pip_requirements=[])
    wrong(IntegrityError, tmp_path / "other")
    mlflow.pyfunc.load_model(str(tmp_path / "other"))


@follows(
    "predict/replay",
    "The model answers recorded rows differently from when it was saved",
    "save the model again in this environment",
)
@follows(
    "load/replay",
    "The model cannot answer the rows that were recorded with it",
    "save the model again in this environment",
)
def test_other_answers(copied, tiny_bert, tiny_tokenizer, tmp_path):
    def other(content):
        content["answers"][0] = {**content["answers"][0], "label": "LABEL_9"}

    edit_json(copied / "safeflavor" / "parity.json", other)
    reseal(copied)
    wrong(ParityError, copied)
    edit_json(
        copied / "safeflavor" / "parity.json",
        lambda content: content["rows"].__setitem__(0, {"text": 1}),
    )
    reseal(copied)
    wrong(ParityError, copied)
    mlflow_safeflavor.save_model(
        tiny_bert(), tmp_path / "again", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    load_model(tmp_path / "again")


@follows(
    "module/fill",
    "The rebuilt module has other tensors than the saved one",
    "save the model again; where this comes back, its constructor depends on more than its "
    "arguments: allow_pickle=True or graph='only' does without it",
)
@follows(
    "module/rebuild",
    "The rebuilt module is not the one that was saved",
    "save the model again; where this comes back, its constructor depends on more than its "
    "arguments: allow_pickle=True or graph='only' does without it",
)
def test_a_constructor_that_depends_on_the_process(save, user_code, monkeypatch):
    source = """
        import os, torch

        class Moody(torch.nn.Linear):
            def __init__(self):
                super().__init__(4, 2)
                if "MOOD" in os.environ:
                    getattr(self, os.environ["MOOD"])()

            def more(self):
                self.register_buffer("extra", torch.ones(2))
    """
    moody, file = user_code("moody_code", source)
    given: dict[str, Any] = {"code_paths": [file], "input_example": X["x"]}
    path = save(moody.Moody(), **given)
    model = moody.Moody()
    others = [save(model, **given, graph="only")]
    monkeypatch.setenv("MOOD", "more")
    wrong(WeightsError, path, **CODE)
    monkeypatch.setattr("mlflow_safeflavor.module.rebuild.fill", lambda *given: None)
    wrong(WeightsError, path, **CODE)
    monkeypatch.undo()
    monkeypatch.setenv("MOOD", "more")
    load_model(save(moody.Moody(), **given), **CODE)  # saved again
    for other in others:
        load_model(other)
    pickled = save(model, **given, allow_pickle=True)
    load_model(pickled, trust={"code", "pickle"})


# What may run.


@follows(
    "artifact/trust",
    "This model runs its own … when it is loaded",
    "if you know who saved it, pass trust={…}; `mlflow-safeflavor inspect` runs nothing of it",
)
@follows(
    "artifact/trust",
    "This model runs its own … when it is loaded",
    "; under pyfunc, set MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true",
)
def test_trust(save, code, monkeypatch):
    from click.testing import CliRunner

    from mlflow_safeflavor.cli import main

    path = save(code.Net(), code_paths=[code.file])
    error = wrong(TrustError, path)
    assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 0
    load_model(path, **eval(f"dict({error.hint.partition('pass ')[2].partition(';')[0]})"))
    own = code.Net()
    own.note = "kept"
    path = save(own, code_paths=[code.file], allow_pickle=True)
    wrong(TrustError, path, **CODE)
    # which CodeBuggy's training sets
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    with pytest.raises(TrustError) as refused_there:
        mlflow.pyfunc.load_model(str(path))
    name, value = str(refused_there.value.hint).rpartition("set ")[2].split("=")
    monkeypatch.setenv(name, value)
    mlflow.pyfunc.load_model(str(path))


@follows(
    "artifact/trust",
    "The model's code would be imported in place of a library",
    "rename it and save the model again; if you did not write it, do not load this model",
)
def test_code_named_like_a_library(save, code, tmp_path):
    (tmp_path / "json.py").write_text("X = 1\n")
    path = save(code.Net(), code_paths=[code.file, tmp_path / "json.py"])
    wrong(StructureError, path, **CODE)
    (tmp_path / "json.py").rename(tmp_path / "own_json.py")
    load_model(save(code.Net(), code_paths=[code.file, tmp_path / "own_json.py"]), **CODE)


@follows(
    "module/user_code",
    "The model's own code cannot be imported",
    "when saving, pass code_paths=[…] with the file or package that defines it",
)
@follows(
    "module/user_code",
    "Another module of the same name is imported already",
    "load models whose code differs under the same module name in separate processes",
)
def test_code_that_is_not_with_the_model(save, code, user_code, clean_process):
    name = code.Net.__module__
    without = save(code.Net())
    sys.modules.pop(code.Net.__module__)
    sys.path.remove(os.path.dirname(code.file))
    wrong(StructureError, without, **CODE)
    sys.path.insert(0, os.path.dirname(code.file))
    code = SimpleNamespace(**vars(importlib.import_module(name)), file=code.file)
    path = save(code.Net(), code_paths=[code.file])
    load_model(path, **CODE)
    other, file = user_code(name, "import torch\nclass Net(torch.nn.Linear): pass\n", "other")
    given: dict[str, Any] = {
        "input_example": X["x"],
        "init_args": {"in_features": 4, "out_features": 2},
    }
    load_model(save(other.Net(4, 2), code_paths=[file], **given), **CODE)
    wrong(StructureError, path, **CODE)
    load = (
        "import sys, mlflow_safeflavor\nmlflow_safeflavor.load_model(sys.argv[1], trust={'code'})"
    )
    clean_process(load, str(path))


@follows(
    "save/rehearsal",
    "A clean process cannot load the model as saved, so nothing was published",
    "…",
)
@follows(
    "save/rehearsal",
    "A clean process cannot load the model as saved, so nothing was published",
    "make it load without this process's state: no __main__ classes, no network, no files of this "
    "machine; "
    'graph="only" keeps neither the class nor what its constructor reads',
)
@pytest.mark.slow
def test_a_rehearsal(save, code, user_code, tmp_path):
    error = refused(RehearsalError, save, code.Net(), rehearse=True)
    assert f"pass code_paths=['{code.file}']" in error.hint
    load_model(save(code.Net(), rehearse=True, code_paths=[code.file]), **CODE)
    (tmp_path / "mine.txt").touch()
    line = f"open({os.fspath(tmp_path / 'mine.txt')!r}).close()"
    reads, file = user_code("hints_reads", CONSTRUCTOR.format(line=line))
    refused(RehearsalError, save, reads.Net(), rehearse=True, code_paths=[file])
    load_model(save(reads.Net(), rehearse=True, graph="only"))


CONSTRUCTOR = """
    import torch

    class Net(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            {line}

        def forward(self, x):
            return super().forward(x)
"""


@follows(
    "save/rehearsal",
    "The clean process died while loading the model",
    "free memory and processors for a second copy of the model; rehearse=False publishes without "
    "this proof",
)
@follows(
    "save/rehearsal",
    "The clean process did not finish loading the model",
    "free memory and processors for a second copy of the model; rehearse=False publishes without "
    "this proof",
)
def test_a_rehearsal_that_died(save, code, tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os; os._exit(9)")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    given: dict[str, Any] = {"code_paths": [code.file]}
    with monkeypatch.context() as patch:
        patch.setattr("mlflow_safeflavor.save.rehearsal._PROGRAM", tmp_path / "dies.py")
        error = refused(RehearsalError, save, code.Net(), **given, rehearse=True)
        patch.setattr("mlflow_safeflavor.save.rehearsal._PROGRAM", tmp_path / "sleeps.py")
        patch.setattr("mlflow_safeflavor.save.rehearsal._TIMEOUT", 0.2)
        refused(RehearsalError, save, code.Net(), **given, rehearse=True)
    skipped = eval(f"dict({error.hint.partition('; ')[2].partition(' ')[0]})")
    load_model(save(code.Net(), **given, **skipped), **CODE)


@follows(
    "module/pickled",
    "The model cannot be unpickled here",
    "when saving, pass code_paths=[…] with the modules it needs",
)
def test_a_pickle_without_its_code(save, code):
    own, given = code.Net(), {"allow_pickle": True}
    own.note = "kept"
    without, whole = save(own, **given), save(own, **given, code_paths=[code.file])
    sys.modules.pop(code.Net.__module__)
    sys.path.remove(os.path.dirname(code.file))
    wrong(StructureError, without, trust={"code", "pickle"})
    load_model(whole, trust={"code", "pickle"})


@follows(
    "module/guarded",
    "Building the model tried what no model may do while it is built",
    "if you did not save this model, do not use it; if you did, take this out of what it runs "
    "when it is built, or save "
    'it with graph="only", which builds nothing',
)
def test_a_constructor_that_reads_a_file(save, user_code, tmp_path):
    source = """
        import torch

        class Reads(torch.nn.Linear):
            def __init__(self, path=None):
                super().__init__(4, 2)
                if path:
                    open(path).close()
    """
    (tmp_path / "words.txt").write_text("the cat")
    reads, file = user_code("reads_code", source)
    given: dict[str, Any] = {"code_paths": [file], "input_example": X["x"]}
    path = str(tmp_path / "words.txt")
    wrong(TrustError, save(reads.Reads(path), **given, init_args={"path": path}), **CODE)
    load_model(save(reads.Reads(path), **given, init_args={}), **CODE)
    load_model(save(reads.Reads(path), input_example=X["x"], graph="only"))


@follows(
    "module/build",
    "The class of transformers is not among those proven to come back as saved",
    'save the model again with this release: it is then of the kind "import", for trust={"code"}',
)
def test_a_class_that_is_proven_no_more(tiny_bert, tiny_tokenizer, tmp_path, saved, monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.artifact.trust._proven", frozenset)
    wrong(StructureError, saved)
    mlflow_safeflavor.save_model(
        tiny_bert(), tmp_path / "again", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    load_model(tmp_path / "again", **CODE)


# Placing.


@follows("module/devices", "There is no such device here", "device='auto' takes what there is")
@follows(
    "load/engines",
    "device_map says where everything goes, in the dtype it was saved in",
    "leave device and dtype out, or device_map",
)
@follows("module/device_map", "accelerate cannot spread the model like this", 'device_map="auto"')
def test_devices(saved, monkeypatch):
    error = wrong(PlacementError, saved, device="cuda:9")
    load_model(saved, **eval(f"dict({error.hint.partition(' takes')[0]})"))
    wrong(PlacementError, saved, device_map="auto", dtype="bfloat16")
    load_model(saved, device_map="auto")
    load_model(saved, dtype="bfloat16")

    import accelerate

    def fail(*args, **options):
        raise ValueError("cannot")

    with monkeypatch.context() as patch:
        patch.setattr(accelerate, "dispatch_model", fail)
        error = wrong(PlacementError, saved, device_map={"bert": "cpu", "classifier": "disk"})
    load_model(saved, **eval(f"dict({error.hint})"))


@follows(
    "module/device_map",
    "Tensors that lie inside other tensors, or not in order, cannot be offloaded to disk",
    "map their modules to a device",
)
def test_a_view_on_disk(save, user_code):
    source = """
        import torch

        class Sliced(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.whole, self.last = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2)
                self.part = torch.nn.Linear(4, 2, bias=False)
                self.part.weight = torch.nn.Parameter(self.whole.weight[:2])

            def forward(self, x):
                return {"y": self.last(self.whole(x)) + self.part(x)}
    """
    sliced, file = user_code("sliced_code", source)
    path = save(sliced.Sliced(), code_paths=[file])
    wrong(PlacementError, path, **CODE, device_map={"": "cpu", "part": "disk"})
    load_model(path, **CODE, device_map={"whole": "cpu", "part": "cpu", "last": "disk"}).predict(X)


@follows(
    "module/placement",
    "The model does not fit on the device",
    "device='cpu', or a smaller serving dtype when saving",
)
def test_a_device_that_is_too_small(saved, monkeypatch):
    model = load_model(saved).module
    with monkeypatch.context() as patch:

        def too_large(tensor, *args, **options):
            raise torch.OutOfMemoryError("out of memory")

        patch.setattr(torch.Tensor, "to", too_large)
        patch.setattr(
            placement,
            "take_inventory",
            lambda slots, casts: (SimpleNamespace(nbytes=1), {"a": torch.ones(1)}),
        )
        with pytest.raises(PlacementError) as error:
            placement.place(model, torch.device("meta"), {})
    load_model(saved, **eval(f"dict({str(error.value.hint).partition(', or')[0]})"))


@follows(
    "module/devices",
    "The device cannot be used in a process that was forked after it had been used",
    "start processes with multiprocessing's 'spawn' or 'forkserver' and load the model in each, "
    "fork before anything uses the device, or load with device='cpu'",
)
def test_a_device_before_a_fork(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    error = wrong(PlacementError, saved)
    load_model(saved, **eval(f"dict({error.hint.rpartition('load with ')[2]})"))


@follows(
    "module/failures",
    "Memory ran out, and there is nothing smaller to try",
    "ask with fewer or shorter rows, or for fewer tokens, or later, when what else is on the "
    "device needs less; or serve the model on one with more memory",
)
def test_memory_that_runs_out(saved, monkeypatch):
    model, forward = load_model(saved), torch.nn.Linear.forward

    def full(self, x):
        if x.shape[-2] > 8:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", full)
    with pytest.raises(OverloadedError):
        model.predict(["the cat " * 8])
    assert len(model.predict(["the cat"])) == 1


# Engines.


@follows(
    "load/engine_choice",
    "The model was stored as a graph alone, so there is no module to rebuild",
    'leave it out, or save the model with graph="auto"',
)
@follows(
    "load/engine_choice",
    "The model cannot be served as a graph like this",
    'leave those out, or pass engine="module" where the model was saved with its module',
)
@follows(
    "graph/engine",
    "The model was stored as a graph, which does not take this input",
    'save the model with its module, too: graph="auto"',
)
@follows(
    "graph/engine",
    "The model was stored as a graph of one forward, which cannot do this",
    'save the model with its module, too: graph="auto"',
)
def test_graphs_alone_and_beside_a_module(save, code):
    alone = save(code.Net(), graph="only")
    both = save(code.Net(), graph="auto", code_paths=[code.file])
    module: dict[str, Any] = {"model_config": {"engine": "module"}}
    graph: dict[str, Any] = {"model_config": {"engine": "onnx"}}
    wrong(PlacementError, alone, **module)
    load_model(alone)
    load_model(both, **CODE, **module)
    wrong(PlacementError, both, **CODE, **graph, dtype="bfloat16")
    load_model(both, **CODE, **graph)
    load_model(both, **CODE, **module, dtype="bfloat16")
    wholes = {"x": np.ones((2, 4), "int64")}
    with pytest.raises(StructureError):
        load_model(alone).engine(wholes)
    engine: Any = load_model(alone).engine
    with pytest.raises(StructureError):
        engine.fallback()
    assert load_model(both, **CODE, **graph).module is not None


@follows(
    "module/engine",
    "The module's forward returns something that is no tensor",
    "return tensors alone, or wrap the module in one whose forward does",
)
@follows(
    "module/engine",
    "Two outputs of forward have the same name when they are flattened",
    "return them under other names",
)
def test_outputs(save, user_code):
    source = """
        import torch

        class Says(torch.nn.Linear):
            def __init__(self, kind="text"):
                super().__init__(4, 2)
                self.kind = kind

            def forward(self, x):
                y = super().forward(x)
                return {
                    "text": {"y": y, "note": "text"},
                    "same": {"a": {"b_c": y}, "a_b": {"c": y}},
                    "other": {"a": {"b": y}, "c": {"d": y}},
                }[self.kind]

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Says()

            def forward(self, x):
                return {"y": self.inner(x)["y"]}
    """
    says, file = user_code("says_code", source)
    given: dict[str, Any] = {"code_paths": [file]}
    refused(StructureError, save, says.Says("text"), **given)
    save(says.Wrapped(), **given)
    refused(StructureError, save, says.Says("same"), **given)
    save(says.Says("other"), **given)


@follows(
    "module/engine",
    "compile needs a C++ compiler, and this machine has none",
    "install one (Debian: apt-get install g++), or leave compile out",
)
def test_compile_without_a_compiler(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mlflow_safeflavor.module.engine.shutil.which", lambda name: None)
        wrong(PlacementError, saved, model_config={"compile": True})
    load_model(saved)


@follows(
    "tasks/hooks",
    "… failed over a row",
    "ask without that row, or mend that function and save the model again; the cause is chained to "
    "this error, and in the log of the server",
)
@follows(
    "tasks/row_outputs",
    "An output of forward does not have the rows of its batch as its first dimension",
    "let forward return it with the rows first, or save the model with task='raw'",
)
@follows(
    "tasks/cells",
    "A value of a row or an answer cannot be stored",
    "convert it before, or in the hook",
)
def test_custom_answers(save, user_code):
    source = """
        import torch

        class Divides(torch.nn.Linear):
            turned = False

            def __init__(self):
                super().__init__(1, 1)

            def forward(self, x):
                if (x > 90).any():
                    raise ArithmeticError("too much")
                return {"y": super().forward(x).t() if self.turned else super().forward(x)}

        def pre(rows, tokenizer):
            return {"x": torch.tensor([[float(row["a"])] for row in rows])}

        def post(outputs, rows):
            return [{"y": 1 / row["a"] + 0 * float(y[0])} for y, row in zip(outputs["y"], rows)]

        def kept(outputs, rows):
            return [{"y": object()} for row in rows]

        def told(outputs, rows):
            return [{"y": repr(object)} for row in rows]
    """
    own, file = user_code("divides_code", source)
    given: dict[str, Any] = {
        "task": "custom",
        "preprocess": own.pre,
        "postprocess": own.post,
        "code_paths": [file],
        "input_example": pd.DataFrame({"a": [1.0, 2.0]}),
    }
    model = load_model(save(own.Divides(), **given), **CODE)
    for bad in (99.0, 0.0):
        with pytest.raises(AnswerError) as error:
            model.predict(pd.DataFrame({"a": [1.0, bad]}))
        assert error.value.__cause__ is not None
        assert len(model.predict(pd.DataFrame({"a": [1.0, 3.0]}))) == 2
    refused(SafeFlavorError, save, own.Divides(), **{**given, "postprocess": own.kept})
    save(own.Divides(), **{**given, "postprocess": own.told})
    own.Divides.turned = True
    refused(SafeFlavorError, save, own.Divides(), **given)
    save(
        own.Divides(),
        **{
            **given,
            "task": "raw",
            "preprocess": None,
            "postprocess": None,
            "input_example": {"x": np.ones((2, 1), "float32")},
        },
    )
    own.Divides.turned = False
    save(own.Divides(), **given)


# Serving.


@follows(
    "module/failures",
    "The model failed over the rows it was asked",
    "ask with fewer or other rows; the cause is chained to this error, and in the log of the "
    "server",
)
def test_a_forward_that_fails(saved, monkeypatch):
    model = load_model(saved)
    forward = type(model.engine).__call__

    def fails(self, inputs):
        if inputs["input_ids"].shape[0] > 1:
            raise SystemExit("out of memory")
        return forward(self, inputs)

    monkeypatch.setattr(type(model.engine), "__call__", fails)
    with pytest.raises(AnswerError) as error:
        model.predict(pd.concat([FRAME] * 3))
    assert isinstance(error.value.__cause__, SystemExit)
    assert len(model.predict(FRAME)) == 1


@follows(
    "predict/deadline",
    "The model did not answer in time",
    "send fewer rows at once, run more workers, or raise timeout",
)
@follows(
    "predict/scheduler",
    "More requests wait at the model than it may queue",
    "ask again later, run more workers, or raise max_queue",
)
def test_too_many_rows_and_requests(saved):
    slow = load_model(saved, model_config={"timeout": 0.0001})
    with pytest.raises(DeadlineError):
        slow.predict(pd.concat([FRAME] * 200))
    assert (
        len(load_model(saved, model_config={"timeout": 60}).predict(pd.concat([FRAME] * 200)))
        == 200
    )
    full = load_model(saved, model_config={"max_queue": 1})
    forward, go = full.engine.__class__.__call__, threading.Event()

    def wait(self, inputs):
        go.wait(10)
        return forward(self, inputs)

    failed, threads = [], []

    def ask(model):
        try:
            model.predict(FRAME)
        except OverloadedError as error:
            failed.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full.engine.__class__, "__call__", wait)
        for _ in range(6):
            threads.append(threading.Thread(target=ask, args=[full]))
            threads[-1].start()
        for _ in range(200):
            if failed:
                break
            time.sleep(0.02)
        go.set()
        for thread in threads:
            thread.join()
    assert failed
    assert len(full.predict(FRAME)) == 1  # later
    many = load_model(saved, model_config={"max_queue": 100})
    failed.clear()
    threads = [threading.Thread(target=ask, args=[many]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@follows(
    "artifact/weights_files",
    "A file of weights was changed since it was compared with what was saved",
    "load the model again; see MLFLOW_SAFEFLAVOR_CACHE in docs/limits.md",
)
def test_weights_that_change_under_a_model(saved, copied, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_CACHE", "off")
    monkeypatch.setattr("mlflow_safeflavor.artifact.weights_files._SMALL", 0)
    model = load_model(copied, verify="structure")
    weights = next(copied.rglob("model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    with pytest.raises(IntegrityError) as error:
        model.predict(FRAME)
    again = load_model(copied)
    assert len(again.predict(FRAME)) == 1
    from pathlib import Path

    assert (
        "MLFLOW_SAFEFLAVOR_CACHE" in (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    )
    assert str(error.value.hint).startswith("load the model again")


@follows(
    "predict/stream",
    "A path must be that of a Parquet file",
    "read the file yourself and pass a DataFrame; a text is passed as str, not as Path",
)
def test_a_path_of_rows(saved, tmp_path):
    model = load_model(saved)
    FRAME.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(SafeFlavorError):
        model.predict(tmp_path / "rows.csv")
    assert len(model.predict(pd.read_csv(tmp_path / "rows.csv"))) == 1
    assert len(model.predict("the cat sat")) == 1
