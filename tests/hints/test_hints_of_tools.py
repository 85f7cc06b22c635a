"""Hints about environments, images, servers and libraries' objects, followed."""

from __future__ import annotations

import shutil
import sys

import pandas as pd
import pytest
import transformers
from architectures import tiny_model
from artifacts import edit_json, edit_mlmodel, reseal
from click.testing import CliRunner
from hints.hint_rows import follows, refused
from integration.test_dockerfile import index, model, pins_of, wheels, with_requirements  # noqa: F401  (fixtures)
from integration.test_images import SMALL, make_model, make_processor, other_processor
from integration.test_parity_endpoint import answering, scoring
from mlflow.models import Model
from requirement_files import lines_of, write_files

import mlflow_safeflavor
from mlflow_safeflavor import generate_dockerfile, load_model, mlflow_compat
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.environment import requirements
from mlflow_safeflavor.environment.hashes import lock
from mlflow_safeflavor.errors import (
    EnvironmentMismatchError,
    FormatVersionError,
    InputError,
    IntegrityError,
    ParityError,
    PlacementError,
    SafeFlavorError,
    StructureError,
    TrustError,
)
from mlflow_safeflavor.module import dtype_plan
from mlflow_safeflavor.module.build import build
from mlflow_safeflavor.module.watch import Watch
from mlflow_safeflavor.tasks.inputs import processor
from mlflow_safeflavor.tasks.inputs.images import read_image
from mlflow_safeflavor.tasks.inputs.probes import require_same_ids

pytest_plugins = "saved_models"
FRAME = pd.DataFrame({"text": ["the cat sat"]})


# Versions.


@follows(
    "environment/differences",
    "…",
    "install requirements.txt of the model (`pip install -r requirements.txt`) under the Python "
    "of its python_env.yaml, "
    "or let MLflow do both with --env-manager uv; or accept the differences with "
    'environment="warn"',
)
@follows("environment/differences", "%s")
def test_another_version(copied):
    edit_json(
        copied / "safeflavor" / "environment.json",
        lambda content: content["distributions"].update(packaging="0.1"),
    )
    reseal(copied)
    with pytest.raises(EnvironmentMismatchError) as error:
        load_model(copied, environment="error")
    load_model(copied, **eval(f"dict({str(error.value.hint).rpartition(' with ')[2]})"))


def test_pinned_versions_are_named_only_where_others_are_installed(copied):
    facts = copied / "safeflavor" / "environment.json"
    edit_json(
        copied / "safeflavor" / "parity.json",
        lambda content: content["answers"][0].update(label="LABEL_9"),
    )
    reseal(copied)
    with pytest.raises(ParityError) as error:
        load_model(copied)
    assert error.value.hint == "save the model again in this environment"
    edit_json(facts, lambda content: content["distributions"].update(packaging="0.1"))
    reseal(copied)
    for environment in ("warn", "ignore"):
        with pytest.raises(ParityError) as error:
            load_model(copied, environment=environment)
        assert str(error.value.hint).startswith("install requirements.txt of the model")
        assert "(packaging: wanted 0.1, found " in str(error.value.hint)
        assert str(error.value.hint).endswith("; or save the model again in this environment")
        assert str(error.value.hint) in str(error.value)
    edit_json(facts, lambda content: content["distributions"].update(packaging="0.1"))


@follows(
    "environment/closure", "A distribution that the model needs is not installed", "pip install '…'"
)
@follows(
    "environment/record",
    "Installed versions contradict what is required, so pip could never install these pins",
    "install versions that agree (`pip check` tells), or write all pins yourself with "
    "pip_requirements",
)
@follows(
    "environment/record",
    "Distributions that the model needs were not installed as releases, so no pin could bring "
    "them back",
    "publish it, or build a wheel (`pip wheel --no-deps -w FOLDER SOURCE`) and install that with "
    "`pip install …==… --find-links FOLDER`; or say where others get it, as in "
    "extra_pip_requirements=['… @ git+https://HOST/REPOSITORY@COMMIT']; or write all pins yourself "
    "with pip_requirements",
)
@follows("environment/record", "Installed versions contradict what is required: %s")
def test_closures(flavor_site, tmp_path):
    site = flavor_site
    with pytest.raises(EnvironmentMismatchError) as error:
        site.record("numpy>=2")
    assert error.value.hint == "pip install 'numpy>=2'"
    site.install("numpy", "2.0")  # what that installs
    site.record("numpy>=2")
    given = {"extra_pip_requirements": ["sympy==1.0"]}
    with pytest.raises(EnvironmentMismatchError):
        write_files(site, tmp_path / "a", **given)
    write_files(site, tmp_path / "b", pip_requirements=["mlflow", "torch", "sympy==1.0"])
    shutil.rmtree(next(site.folder.glob("sympy-*")))
    site.install("sympy", "1.0")
    write_files(site, tmp_path / "c", **given)
    site.install("mine", "0.5", direct_url={"url": "file:///m", "dir_info": {"editable": True}})
    with pytest.raises(EnvironmentMismatchError) as error:
        write_files(site, tmp_path / "d", extra_pip_requirements=["mine"])
    said = str(error.value.hint).partition("extra_pip_requirements=")[2].partition(";")[0]
    line = eval(said)[0].replace("HOST/REPOSITORY@COMMIT", "git.example/mine@c0ffee")
    write_files(site, tmp_path / "e", extra_pip_requirements=[line])
    write_files(site, tmp_path / "f", pip_requirements=["mlflow", "torch", "mine==0.5"])
    shutil.rmtree(next(site.folder.glob("mine-*")))
    site.install("mine", "0.5")  # a release, or from a wheel
    write_files(site, tmp_path / "g", extra_pip_requirements=["mine"])


@follows(
    "environment/requirements",
    "PyTorch publishes no wheels with this label",
    "say where the wheel is with torch_index=URL or FOLDER, or drop the label with "
    "torch_index=None",
)
@follows(
    "environment/conda",
    "Only one of conda_env, pip_requirements and extra_pip_requirements can be used",
    "keep …, and write the rest into it",
)
@follows(
    "environment/requirements",
    "torch_index holds a password, and requirements.txt is readable by everybody who can read the "
    "model",
    "write it as ${NAME_OF_A_VARIABLE}, which pip expands, or leave it to pip's own settings",
)
def test_requirements(flavor_site, tmp_path):
    pins = {"torch": "2.13.0+mine"}
    with pytest.raises(EnvironmentMismatchError):
        lines_of(pins)
    for torch_index in ("https://wheels.example/simple", str(tmp_path), None):
        assert lines_of(pins, torch_index)
    with pytest.raises(EnvironmentMismatchError):
        lines_of(pins, "https://me:secret@wheels.example/simple")
    assert lines_of(pins, "https://me:${NAME_OF_A_VARIABLE}@wheels.example/simple")
    assert lines_of(pins, "https://wheels.example/simple")
    both = {"pip_requirements": ["mlflow", "torch"], "extra_pip_requirements": ["sympy"]}
    with pytest.raises(EnvironmentMismatchError) as error:
        write_files(flavor_site, tmp_path / "a", **both)
    kept = str(error.value.hint).split()[1].rstrip(",")
    write_files(
        flavor_site, tmp_path / "b", **{kept: [line for lines in both.values() for line in lines]}
    )


# Images.


@follows(
    "load/image",
    "The pins install a torch for accelerators",
    'target="cuda" for an image with CUDA; or save the model where the CPU build of torch is '
    "installed, with "
    'torch_index="auto", which keeps its label',
)
@follows(
    "load/image",
    "The pins install a torch that knows no GPU",
    'target="cpu", or save the model where a torch with CUDA is installed',
)
@follows(
    "environment/hashes",
    "Hashes are looked up by uv, which is not installed",
    "pip install 'mlflow-safeflavor[docker]', or do without hashes",
)
@follows(
    "environment/hashes",
    "The pins cannot be locked with hashes",
    "say where the wheels are (torch_index=… when saving, UV_DEFAULT_INDEX, UV_FIND_LINKS); where "
    "several indexes have the name, UV_INDEX_STRATEGY=unsafe-best-match looks at all; or do "
    "without hashes",
)
def test_images(model, wheels, tmp_path, monkeypatch):  # noqa: F811
    with_requirements(model, f"--find-links {wheels.as_uri()}", "torch==2.6.0")
    with pytest.raises(EnvironmentMismatchError):
        generate_dockerfile(str(model), tmp_path / "a")
    generate_dockerfile(str(model), tmp_path / "b", target="cuda")
    with_requirements(model, f"--find-links {wheels.as_uri()}", "torch==2.4.0+cpu")
    generate_dockerfile(str(model), tmp_path / "c")
    with pytest.raises(EnvironmentMismatchError):
        generate_dockerfile(str(model), tmp_path / "g", target="cuda")
    generate_dockerfile(str(model), tmp_path / "g", target="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda *given, **options: None)
        with pytest.raises(EnvironmentMismatchError):
            generate_dockerfile(str(model), tmp_path / "d")
        generate_dockerfile(str(model), tmp_path / "d", hashes=False)
    pins = pins_of(tmp_path / "m", "small==1.0")
    with pytest.raises(EnvironmentMismatchError):
        lock(pins, python="3.11.0")
    with monkeypatch.context() as patch:
        patch.setenv("UV_FIND_LINKS", str(wheels))
        patch.setenv("UV_INDEX_STRATEGY", "unsafe-best-match")
        assert lock(pins, python="3.11.0").are_locked
    assert lock(
        pins_of(tmp_path / "m", f"--find-links {wheels.as_uri()}", "small==1.0"), python="3.11.0"
    ).are_locked


@follows(
    "environment/pins",
    "A line of the requirements does not install a wheel by name and version",
    "build wheels of what no index has (`pip wheel -w FOLDER …`), install them from there, and "
    "save the model with torch_index=FOLDER; let pip's own configuration hold other indexes and "
    "passwords",
)
@follows(
    "environment/pins",
    "Some pins have hashes and some have none",
    "save the model with hashes for all of them or for none",
)
def test_lines_that_install_no_wheels(wheels, tmp_path):  # noqa: F811
    with pytest.raises(EnvironmentMismatchError):
        pins_of(tmp_path / "m", "small @ git+https://git.example/small@c0ffee")
    line = f"small==1.0 --hash=sha256:{'0' * 64}"
    with pytest.raises(IntegrityError):
        pins_of(tmp_path / "m", line, "torch==2.0")
    pins_of(tmp_path / "m", line)
    pins_of(tmp_path / "m", "small==1.0", "torch==2.0")
    lines = requirements.requirement_lines({"small": "1.0"}, torch_index=str(wheels))
    assert lock(pins_of(tmp_path / "m", *lines), python="3.11.0").are_locked


# Servers.


@follows(
    "verify/endpoint",
    "This is not an MLflow scoring server",
    "give the address that `mlflow models serve` or the container listens on",
)
@follows(
    "verify/endpoint",
    "The server refuses the request",
    "see that it serves this very model, and look at its log",
)
@follows(
    "verify/endpoint",
    "The server cannot be reached",
    "start it with `mlflow models serve`, and look at its log; or give it more time",
)
@follows(
    "verify/verify", "The server does not answer row by row", "see that it serves this very model"
)
@follows(
    "verify/verify",
    "There is nothing to compare your rows with",
    "pass endpoint=… (--endpoint URL), or leave the rows out",
)
def test_servers(saved, save, tiny_bert, tiny_tokenizer):
    other = save(tiny_bert(), tokenizer=tiny_tokenizer, input_columns={"text": "review"})

    def verify(**given):
        return mlflow_safeflavor.verify_model(str(saved), **given)

    with pytest.raises(InputError):
        verify(rows=FRAME)
    with pytest.raises(SafeFlavorError, match="cannot be reached"):
        verify(endpoint="http://127.0.0.1:1")
    with (
        answering(lambda body: (404, "text/html", b"nothing here")) as url,
        pytest.raises(SafeFlavorError),
    ):
        verify(endpoint=url)
    with (
        answering(lambda body: (200, "application/json", b'{"predictions": [1]}')) as url,
        pytest.raises(SafeFlavorError),
    ):
        verify(endpoint=url)
    with scoring(other) as url, pytest.raises(SafeFlavorError, match="refuses"):
        verify(endpoint=url)
    with scoring(saved) as url:
        verify(endpoint=url)
        verify(endpoint=url, rows=FRAME)
    assert CliRunner().invoke(main, ["verify", str(saved)]).exit_code == 0


@follows(
    "mlflow_compat",
    "A newer MLflow wrote the signature, and this one cannot read it",
    "load it with mlflow_safeflavor.load_model, which does not need the signature, or install the "
    "pins",
)
def test_a_signature_of_a_newer_mlflow(saved, monkeypatch):
    def fails(folder):
        raise TypeError("unknown type")

    monkeypatch.setattr(Model, "load", fails)
    with pytest.raises(EnvironmentMismatchError):
        mlflow_compat.read_mlmodel(saved)
    assert len(load_model(saved).predict(FRAME)) == 1


# Objects of libraries.


@follows(
    "checkpoints/pipelines",
    "An argument of the pipeline is not supported",
    "make the pipeline without it, and do that before or after predict; or save the model as a "
    "custom task",
)
@follows(
    "checkpoints/pipelines",
    "_HINT_OWN",
    "save the model as a custom task: save_model(pipeline.model, tokenizer=pipeline.tokenizer, "
    'task="custom", '
    "preprocess=…, postprocess=…)",
)
def test_a_pipeline(save, user_code, tiny_tokenizer):
    def pipe(**arguments):
        given = {
            "model": tiny_model("Bert", "ForTokenClassification"),
            "tokenizer": tiny_tokenizer,
            **arguments,
        }
        return transformers.pipeline("token-classification", **given)

    class Own(transformers.TokenClassificationPipeline):
        def postprocess(self, *given, **options):
            return super().postprocess(*given, **options)

    refused(InputError, save, pipe(is_split_into_words=True))
    save(pipe())
    pipeline = pipe(pipeline_class=Own)
    refused(StructureError, save, pipeline)
    source = """
        def pre(rows, tokenizer):
            return dict(tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True))

        def post(outputs, rows):
            return [{"best": int(logits[0].argmax())} for logits in outputs["logits"]]
    """
    hooks, file = user_code("pipeline_hooks", source)
    custom = {
        "preprocess": hooks.pre,
        "postprocess": hooks.post,
        "code_paths": [file],
        "input_example": FRAME,
    }
    path = save(pipeline.model, tokenizer=pipeline.tokenizer, task="custom", **custom)
    assert len(load_model(path, trust={"code"}).predict(FRAME)) == 1


@follows(
    "tasks/inputs/processor",
    "This is no processor that can be saved",
    "of a processor of several parts pass one: processor.image_processor or "
    "processor.feature_extractor",
)
@follows(
    "tasks/inputs/processor",
    "The processor, read again, gives other numbers than the one being saved",
    "pass one of transformers' own classes; AutoImageProcessor.from_pretrained(…, "
    'use_fast=False) or backend="pil" gives '
    "the one that uses Pillow",
)
@follows(
    "checkpoints/preprocessors", "The checkpoint has no readable processor", "pass processor=…"
)
@follows("tasks/inputs/images", "Images need Pillow", "pip install 'mlflow-safeflavor[image]'")
def test_processors(save, tmp_path, monkeypatch):
    whole = type("Both", (), {"image_processor": make_processor(size=SMALL), "tokenizer": None})()
    refused(StructureError, save, make_model(), processor=whole)
    save(make_model(), processor=whole.image_processor)
    with pytest.raises(StructureError):
        processor.write_processor(other_processor(0.5), tmp_path / "a")
    (tmp_path / "b").mkdir()
    make_processor(size=SMALL).save_pretrained(tmp_path / "own")
    major = int(transformers.__version__.partition(".")[0])
    asked = {"backend": "pil"} if major >= 5 else {"use_fast": False}
    own = transformers.AutoImageProcessor.from_pretrained(tmp_path / "own", **asked)
    processor.write_processor(own, tmp_path / "b")
    make_model().save_pretrained(tmp_path / "checkpoint")
    refused(StructureError, save, tmp_path / "checkpoint")
    save(tmp_path / "checkpoint", processor=make_processor(size=SMALL))
    caps = load_model(save(make_model(), processor=make_processor(size=SMALL))).task.caps
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(StructureError) as error:
            read_image(b"anything", "row 0", caps)
    extra = str(error.value.hint).partition("[")[2].partition("]")[0]
    import importlib.metadata

    needed = importlib.metadata.requires("mlflow-safeflavor") or []
    assert any(
        "pillow" in line.lower() and f'"{extra}"' in line.replace("'", '"') for line in needed
    )


@follows(
    "tasks/inputs/probes",
    "The tokenizer, read again …, gives other ids than the one being saved",
    "save one whose behaviour is all in its backend: PreTrainedTokenizerFast(tokenizer_object=...)",
)
def test_a_tokenizer_with_a_mind_of_its_own(save, tiny_bert, tiny_tokenizer):
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    backend = tiny_tokenizer.backend_tokenizer
    with pytest.raises(StructureError):
        require_same_ids([[5]], [[6]], "Shouts", "by transformers")
    save(
        tiny_bert(),
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names),
    )


@follows(
    "checkpoints/sentence_modules",
    "The model holds a part of sentence-transformers that is not supported",
    'save it as a module of your own: task="custom" with preprocess, postprocess and code_paths',
)
@pytest.mark.filterwarnings("ignore")
def test_a_sentence_transformer(save, user_code, tiny_tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny_model("Bert", "ForMaskedLM").save_pretrained(tmp_path / "mlm")
    tiny_tokenizer.save_pretrained(tmp_path / "mlm")
    refused(
        StructureError,
        save,
        sentence_transformers.SparseEncoder(str(tmp_path / "mlm"), device="cpu"),
    )
    source = """
        import torch

        class Sparse(torch.nn.Module):
            def __init__(self, inner=None):
                super().__init__()
                self.inner = inner or torch.nn.Linear(1, 1)

            def forward(self, x):
                return {"y": self.inner(x)}

        def pre(rows, tokenizer):
            return {"x": torch.tensor([[float(len(row["text"]))] for row in rows])}

        def post(outputs, rows):
            return [{"y": float(y[0])} for y in outputs["y"]]
    """
    own, file = user_code("sparse_code", source)
    custom = {
        "task": "custom",
        "preprocess": own.pre,
        "postprocess": own.post,
        "code_paths": [file],
    }
    path = save(own.Sparse(), **custom, input_example=FRAME)
    assert len(load_model(path, trust={"code"}).predict(FRAME)) == 1


# Other places of an artifact.


@follows(
    "artifact/spec",
    "The safeflavor entry of MLmodel has a value that no save writes",
    "if you are saving it, give it such a …; otherwise fetch the artifact again, or log the model "
    "again; files of a saved model are not meant to be edited",
)
@follows(
    "artifact/spec",
    "The model was saved in a format that this release does not read",
    "install mlflow-safeflavor … or newer",
)
def test_an_entry_of_mlmodel(save, copied, saved, tiny_bert, tiny_tokenizer):
    given = {"tokenizer": tiny_tokenizer}
    refused(IntegrityError, save, tiny_bert(), **given, input_columns={"text": "x" * 10_000})
    save(tiny_bert(), **given, input_columns={"text": "x"})

    def newer(content):
        content["flavors"]["safeflavor"].update(
            format_version=99, loader_version=mlflow_safeflavor.__version__
        )

    edit_mlmodel(copied, newer)
    with pytest.raises(FormatVersionError) as error:
        load_model(copied)
    wanted = str(error.value.hint).split()[2]
    # the release that wrote it, and what that wrote it reads
    assert wanted == mlflow_safeflavor.__version__
    load_model(saved)


@follows(
    "artifact/trust",
    "A file of the model names code, files or repositories that a library would load",
    "if you did not save this model, do not use it; if you did, take this out of its config and "
    "save it again",
)
def test_a_config_that_was_steered(save, copied, tiny_bert, tiny_tokenizer):
    edit_json(
        copied / "safeflavor" / "config.json",
        lambda config: config.update(vocab_file="/etc/passwd"),
    )
    reseal(copied)
    with pytest.raises(TrustError):
        load_model(copied)
    bert = tiny_bert()
    bert.config.vocab_file = "words.txt"
    refused(StructureError, save, bert, tokenizer=tiny_tokenizer)
    del bert.config.vocab_file
    load_model(save(bert, tokenizer=tiny_tokenizer))


@follows(
    "module/pickled",
    "The pickle holds byte code of another Python",
    "load it with that Python, or save the model with importable classes (code_paths=[…])",
)
def test_a_pickle_of_another_python(save, code):
    own = code.Net()
    own.note = "kept"
    path = save(own, allow_pickle=True, code_paths=[code.file])
    edit_json(
        path / "safeflavor" / "structure.json",
        lambda content: content["pickle"].update(python="3.9"),
    )
    reseal(path)
    with pytest.raises(StructureError):
        load_model(path, trust={"code", "pickle"})
    load_model(save(code.Net(), code_paths=[code.file]), trust={"code"})


@follows(
    "module/dtype_plan",
    "Torch's default dtype kept changing while the model was constructed",
    "do not call torch.set_default_dtype, or transformers' from_pretrained in other threads, "
    "meanwhile",
)
def test_a_default_dtype_that_keeps_changing(save, code, monkeypatch):
    path, calls = save(code.Net(), code_paths=[code.file]), []
    with monkeypatch.context() as patch:

        def disturbed(*given, **options):
            built = build(*given, **options)
            calls.append(1)
            return built.half() if "inventory" not in options and len(calls) % 2 else built

        patch.setattr(dtype_plan, "build", disturbed)
        patch.setattr(
            Watch,
            "disturbed",
            property(lambda self: True, lambda self, value: None),
            raising=False,
        )
        with pytest.raises(PlacementError):
            load_model(path, trust={"code"}, dtype="bfloat16")
    load_model(path, trust={"code"}, dtype="bfloat16")
