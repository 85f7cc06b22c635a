"""Every attack of ``hostile.py`` ends as it says there, and none touches the canary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import transformers
from artifacts import rewrite
from attacks import (
    hostile,
    steering,  # noqa: F401  (adds its own to ATTACKS)
)
from attacks.hostile import ATTACKS, MAY_IMPORT, Attack, Target
from click.testing import CliRunner
from forks import forks
from unit.graph.test_check import needs_openvino
from writers import byte_tokenizer, writer

import mlflow_safeflavor
from mlflow_safeflavor import cli
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.graph import openvino_engine
from mlflow_safeflavor.load.load import load_model

pytest_plugins = "saved_models"

LIGHT = [attack for attack in ATTACKS if not (attack.heavy or attack.bomb)]
BOMBS = [attack for attack in ATTACKS if attack.bomb]
HEAVY = [attack for attack in ATTACKS if attack.heavy]


def names(attacks):
    return [attack.name for attack in attacks]


# Good artifacts.


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """A model with code of its own.

    Made in another process, so that nobody here has imported it.
    """
    folder = tmp_path_factory.mktemp("coded")
    source = folder / "source" / f"{hostile.MODULE}.py"
    source.parent.mkdir()
    source.write_text(hostile.SOURCE)
    script = f"""
import sys; sys.path.insert(0, {str(source.parent)!r})
import {hostile.MODULE} as user, mlflow_safeflavor, torch
torch.manual_seed(0)
rows = [{{"a": 1.0, "b": 2.0}}, {{"a": 3.0, "b": 4.0}}]
common = dict(task="custom", preprocess=user.pre, postprocess=user.post, input_example=rows)
common |= dict(rehearse=False, code_paths=[{str(source)!r}], graph="no")
coded, pickled = {str(folder / "coded")!r}, {str(folder / "pickled")!r}
mlflow_safeflavor.save_model(user.Scale(), coded, init_args={{"size": 4}}, **common)
class Local(user.Scale):
    pass
Local.__qualname__ = "f.<locals>.Local"
mlflow_safeflavor.save_model(Local(), pickled, allow_pickle=True, **common)
"""
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return folder


@pytest.fixture(scope="session")
def others(tmp_path_factory):
    """``others(base)``: a model of images, sounds or chats; made once."""
    folder = tmp_path_factory.mktemp("others")
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    whisper = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
    }
    whisper |= {
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "vocab_size": 64,
    }
    whisper |= {
        "num_mel_bins": 20,
        "max_source_positions": 50,
        "classifier_proj_size": 16,
        "pad_token_id": 0,
    }
    image = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    made = {
        "image": lambda: {
            "model": transformers.ViTForImageClassification(
                transformers.ViTConfig(image_size=32, patch_size=8, **shape)
            ),
            "processor": image(size={"height": 32, "width": 32}),
        },
        "sound": lambda: {
            "model": transformers.WhisperForAudioClassification(
                transformers.WhisperConfig(**whisper)
            ),
            "processor": transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1),
        },
        "chat": lambda: {
            "model": writer("LlamaForCausalLM"),
            "tokenizer": byte_tokenizer(bos=True, chat=True),
            "input_columns": {"messages": "messages"},
        },
    }

    def make(base: str) -> Path:
        if not (folder / base).exists():
            torch.manual_seed(0)
            given = made[base]()
            mlflow_safeflavor.save_model(
                given.pop("model").eval(), folder / base, rehearse=False, graph="no", **given
            )
        return folder / base

    return make


_loaded: set[Path] = set()


@pytest.fixture
def prepare(saved, saved_with_graph, coded, others, tmp_path):
    """``prepare(attack)``: a damaged copy."""

    def make(attack: Attack) -> Target:
        bases = {"classifier": saved, "graph": saved_with_graph}
        bases |= {"coded": coded / "coded", "pickled": coded / "pickled"}
        base = bases.get(attack.base) or others(attack.base)
        if not attack.options.get("trust") and base.parent != coded and base not in _loaded:
            _loaded.add(base)
            # with all that is imported for an honest one
            model = load_model(base, **attack.options)
            assert model.tokenizer or model.processor
        root = shutil.copytree(base, tmp_path / "model", copy_function=os.link)
        target = Target(root, tmp_path / "canary")
        attack.damage(target)
        return target

    return make


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    """Loading through pyfunc puts folders on the path."""
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    path, hooks, modules = list(sys.path), list(sys.path_hooks), set(sys.modules)
    yield
    sys.path[:], sys.path_hooks[:] = path, hooks
    for name in {name.partition(".")[0] for name in set(sys.modules) - modules}:
        if name in (hostile.MODULE, "package") or name.startswith("their_"):
            sys.modules.pop(name)


# Attacks.


def outcome(load, then=lambda model: None) -> str:
    """How loading ends: the name of an error of ours, ``loads``, or what else was raised."""
    try:
        then(load())
    except SafeFlavorError as error:
        return type(error).__name__
    except Exception as error:  # MLflow's own errors, where MLflow reads first
        return f"any: {type(error).__name__}: {error}"
    return "loads"


def as_expected(found: str, wanted: str) -> bool:
    return found == wanted or (wanted == "any" and found != "loads")


@pytest.mark.parametrize("attack", LIGHT, ids=names(LIGHT))
def test_attack_ends_in_its_error_and_leaves_the_canary_alone(attack, prepare):
    target = prepare(attack)
    before = set(sys.modules)
    found = outcome(lambda: load_model(str(target.root), **attack.options), attack.then)
    assert as_expected(found, attack.native), found
    assert not target.canary.exists()
    imported = sorted(name for name in set(sys.modules) - before if not MAY_IMPORT.fullmatch(name))
    assert attack.options.get("trust") or not imported, imported


@pytest.mark.filterwarnings("ignore")  # MLflow's, about files that are damaged on purpose
@pytest.mark.parametrize("attack", LIGHT, ids=names(LIGHT))
def test_attack_through_pyfunc(attack, prepare):
    if attack.pyfunc is None:
        pytest.skip("says nothing to pyfunc")
    target = prepare(attack)

    def load():
        return mlflow.pyfunc.load_model(
            str(target.root), suppress_warnings=True, model_config=attack.config
        )

    found = outcome(load)
    assert as_expected(found, attack.pyfunc), found
    assert not target.canary.exists()


def graphs(*wanted):
    return [attack for attack in LIGHT if attack.name in {f"graph_{name}" for name in wanted}]


REACHING = graphs(
    "row_outside", "shapes_differ", "arity_missing", "arity", "argument_unknown", "other_answer",
    "nan",
    "output_renamed",
)  # fmt: skip
CHECKED = graphs(
    "calls_library",
    "weight_in_memory",
    "weight_absolute",
    "twice_operator",
    "truth_of_seven",
    "cut",
)
# seen in the file; the others in the weights beside it
READ = graphs("calls_library", "twice_operator", "cut")


@needs_openvino
@pytest.mark.parametrize("attack", REACHING, ids=names(REACHING))
def test_attack_that_reaches_openvino(attack, prepare):
    """All others the check refuses, whatever runs the graph."""
    target = prepare(attack)
    found = outcome(lambda: load_model(str(target.root), model_config={"engine": "openvino"}))
    assert found in ("StructureError", "ParityError")
    assert not target.canary.exists()


@pytest.mark.parametrize("attack", CHECKED, ids=names(CHECKED))
def test_openvino_gets_nothing_that_the_check_refuses(attack, prepare, monkeypatch):
    monkeypatch.setattr(openvino_engine, "require_installed", lambda: None)
    monkeypatch.setattr(
        openvino_engine, "Session", lambda *given, **more: pytest.fail("it got a graph")
    )
    target = prepare(attack)
    found = outcome(lambda: load_model(str(target.root), model_config={"engine": "openvino"}))
    assert as_expected(found, attack.native), found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", READ, ids=names(READ))
def test_every_command_that_looks_at_a_graph_refuses_it(attack, prepare, tmp_path):
    root = str(prepare(attack).root)
    commands = {
        "inspect": ["inspect", root, "--graph"],
        "verify": ["verify", root],
        "dockerfile": ["dockerfile", root, "--output", str(tmp_path / "image"), "--no-hashes"],
    }
    for name, command in commands.items():
        done = CliRunner().invoke(cli.main, command)
        assert (done.exit_code, attack.native in done.output) == (2, True), (name, done.output)
    assert not (tmp_path / "image").exists()


IMPORTED = """
import json, resource, sys
import mlflow.pyfunc, mlflow_safeflavor.load.load, mlflow_safeflavor.module.structure, transformers
import mlflow_safeflavor.predict.model
import transformers.models.bert.modeling_bert
from mlflow_safeflavor.errors import SafeFlavorError

def bound():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30,) * 2)
LOADS = (
    mlflow_safeflavor.load.load.load_model,
    lambda path: mlflow.pyfunc.load_model(path, suppress_warnings=True),
)
"""
LOAD = """
def job(root, which):
    bound()
    for load in LOADS[: 1 if which == "native" else 2]:
        try:
            load(root)
            print("loads", flush=True)
        except SafeFlavorError as error:
            print(type(error).__name__, flush=True)
        except Exception as error:
            print(f"any: {type(error).__name__}", flush=True)
"""


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """``bounded(root, which)``: how loads end in a process of their own, with 3 GB and 120 s."""
    with forks(IMPORTED + LOAD, tmp_path_factory.mktemp("bounded") / "stderr") as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("attack", HEAVY, ids=names(HEAVY))
def test_attack_on_time_or_memory_in_a_bounded_process(attack, prepare, bounded):
    target = prepare(attack)
    ended = bounded(str(target.root), "native" if attack.pyfunc is None else "both")
    wanted = [attack.native] if attack.pyfunc is None else [attack.native, attack.pyfunc]
    assert (ended.status, len(ended.lines)) == (0, len(wanted)), ended
    assert all(map(as_expected, ended.lines, wanted)), ended
    assert not target.canary.exists()


ALL_BOUNDED = """
import time
from mlflow_safeflavor.graph import onnx_engine
onnx_engine.available_memory = lambda: 2**31  # as in a container
measured = {}
bound()
for name in sys.argv[1:]:
    measured[name] = []
    for load in LOADS:
        begin = time.process_time()
        try:
            load(name)
            found = "loads"
        except Exception as error:
            found = type(error).__name__ if isinstance(error, SafeFlavorError) else f"any: {error}"
        measured[name].append((found, time.process_time() - begin))
    measured[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
print(json.dumps(measured))
"""


@pytest.mark.slow
def test_bombs_in_one_bounded_process(saved, saved_with_graph, others, tmp_path):
    for attack in BOMBS:
        base = {"classifier": saved, "graph": saved_with_graph}.get(attack.base) or others(
            attack.base
        )
        attack.damage(
            Target(
                shutil.copytree(base, tmp_path / attack.name, copy_function=os.link),
                tmp_path / "canary",
            )
        )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTED + ALL_BOUNDED,
            *(attack.name for attack in BOMBS)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        attack.name: measured[attack.name]
        for attack in BOMBS
        if [found for found, _ in measured[attack.name][:2]] != [attack.native, attack.pyfunc]
    }
    assert not wrong
    slow = {
        name: found
        for name, (*found, _) in measured.items()
        if max(seconds for _, seconds in found) > 15
    }
    assert not slow, "a verdict, but too late"
    assert max(gigabytes for *_, gigabytes in measured.values()) < 3


# What no loader can prevent, and what does. See README.md.

FRESH = """
import sys
{first}
import mlflow.pyfunc
try:
    {load}
    print("loads")
except Exception as error:
    print(type(error).__name__)
"""
PYFUNC = "mlflow.pyfunc.load_model(sys.argv[1], suppress_warnings=True)"
NATIVE = "mlflow_safeflavor.load_model(sys.argv[1])"
THEIR_LOADER = """
class Model:
    def predict(self, data, params=None):
        return data
def _load_pyfunc(path, model_config=None):
    return Model()
"""


@pytest.fixture
def in_a_new_process(saved, tmp_path):
    """Put a file into code/, make the manifest anew, load.

    How it ended, and whether the payload ran.
    """

    def run(file: str, load: str, first: str = "") -> tuple[str, bool]:
        root = shutil.copytree(saved, tmp_path / "model", copy_function=os.link)
        target = Target(root, tmp_path / "canary")
        rewrite(target.code / file, target.payload + THEIR_LOADER)
        target.reseal()
        code = FRESH.format(first=first, load=load)
        done = subprocess.run(
            [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip(), target.canary.exists()

    return run


@pytest.mark.slow
def test_our_loader_refuses_a_shadow_of_torch_before_torch_is_imported(in_a_new_process):
    assert in_a_new_process("torch.py", PYFUNC) == ("StructureError", False)


@pytest.mark.slow
def test_limit_pyfunc_runs_the_loader_that_the_artifact_brings(in_a_new_process):
    assert in_a_new_process("mlflow_safeflavor/__init__.py", PYFUNC) == ("loads", True)


@pytest.mark.slow
@pytest.mark.parametrize("load", [PYFUNC, NATIVE], ids=["pyfunc", "native"])
def test_an_installed_loader_that_was_imported_first_stays(in_a_new_process, load):
    first = "import mlflow_safeflavor"
    assert in_a_new_process("mlflow_safeflavor/__init__.py", load, first) == ("loads", False)


def test_limit_golden_rows_do_not_see_words_that_they_do_not_use(saved, tmp_path):
    target = Target(
        shutil.copytree(saved, tmp_path / "model", copy_function=os.link), tmp_path / "canary"
    )
    unused = -1  # the last word of the vocabulary
    target.values(
        lambda arrays: (
            arrays["bert.embeddings.word_embeddings.weight"].reshape(-1, 32)[unused].fill(9)
        )
    )
    assert load_model(str(target.root)).report.golden_rows


# The table.


def test_readme_lists_every_attack():
    readme = (Path(__file__).parent / "README.md").read_text()
    missing = [
        a.name
        for a in ATTACKS
        if f"| {a.name} | {' '.join(a.attempt.split())} | {a.native} |" not in readme
    ]
    assert not missing, "run compare.py"
