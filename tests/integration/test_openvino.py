"""The graph in OpenVINO: its proof, its golden rows, its tolerance.

And nothing told to its makers.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from integration.test_graph import TEXTS, X, bert, make_private, near, same
from onnx import helper
from packaging.utils import canonicalize_name
from unit.graph.test_check import made, needs_openvino

import mlflow_safeflavor
from mlflow_safeflavor import cli
from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import (
    InputError,
    ParityError,
    PlacementError,
    StructureError,
    TrustError,
)
from mlflow_safeflavor.graph import openvino_engine
from mlflow_safeflavor.graph.check import read
from mlflow_safeflavor.graph.file import read_graph
from mlflow_safeflavor.graph.onnx_file import parse_model, write_model
from mlflow_safeflavor.graph.weights import Extent
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.predict import golden
from mlflow_safeflavor.save import graph as recording

pytest_plugins = "saved_models"
pytestmark = needs_openvino

ASKED: dict[str, Any] = {"model_config": {"engine": "openvino"}}
ROWS = pd.DataFrame({"text": TEXTS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture
def asked(folder, tiny_tokenizer):
    """A classifier that was saved to be served by OpenVINO; made once."""
    if not (folder / "asked").exists():
        model = bert("ForSequenceClassification")
        mlflow_safeflavor.save_model(
            model, folder / "asked", tokenizer=tiny_tokenizer, rehearse=False, **ASKED
        )
    return folder / "asked"


def test_what_is_saved_for_it_is_proven_with_it(asked):
    proof = read_json(Layout(asked).graph_facts)["proof"]
    assert proof.keys() == {"onnx", "openvino"}
    assert proof["onnx"]["inputs"] == proof["openvino"]["inputs"] > 20
    assert 0 < proof["openvino"]["difference"] < 1e-4
    recorded = read_json(Layout(asked).golden("openvino")[0])
    assert recorded["tolerance"] == golden.TOLERANCES["float32"]
    told = CliRunner().invoke(cli.main, ["inspect", str(asked)], env={"COLUMNS": "200"}).output
    assert "graph in OpenVINO" in told


def test_it_answers_as_the_others_do(asked):
    served = mlflow.pyfunc.load_model(str(asked))
    model = served._model_impl.model
    assert (model.engine.name, model.report.engine, model.report.bit_identical) == (
        "openvino",
        "openvino",
        True,
    )
    assert model.report.golden_rows > 0
    found = served.predict(ROWS)
    for engine in ("onnx", "module"):
        near(
            mlflow_safeflavor.load_model(asked, model_config={"engine": engine}).predict(ROWS),
            found,
        )
    same(mlflow_safeflavor.load_model(asked, **ASKED).predict(ROWS), found)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_that_are_given(asked, threads):
    model = mlflow_safeflavor.load_model(
        asked, model_config={"engine": "openvino", "num_threads": threads}
    )
    engine: Any = model.engine
    compiled = engine.session._compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert str(compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_from_many_threads(asked):
    engine = mlflow_safeflavor.load_model(asked, **ASKED).engine
    draw = np.random.default_rng(0)
    inputs = []
    for i in range(24):
        ids = draw.integers(0, 35, (1 + i % 3, 5 + i % 7))
        inputs.append({"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})
    alone = [engine(one)["logits"] for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        together = [found["logits"] for found in pool.map(engine, inputs)]
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


# A model that was saved for ONNX Runtime.


def test_without_rows_of_its_own_it_is_compared_with_onnx_runtime(saved_with_graph):
    layout = Layout(saved_with_graph)
    assert not layout.golden("openvino")[0].exists()
    model = mlflow_safeflavor.load_model(saved_with_graph, **ASKED)
    assert (model.report.engine, model.report.golden_rows > 0) == ("openvino", True)
    near(model.predict(ROWS), mlflow_safeflavor.load_model(saved_with_graph).predict(ROWS))
    done = CliRunner().invoke(cli.main, ["verify", str(saved_with_graph), "--engine", "openvino"])
    assert done.exit_code == 0, done.output


def spoil(monkeypatch, factor, constant=openvino_engine._constant):
    """Let OpenVINO have other weights."""
    kept = []

    def spoiled(array):
        kept.append(array * np.float32(factor) if array.dtype == np.float32 else array)
        return constant(kept[-1])

    monkeypatch.setattr(openvino_engine, "_constant", spoiled)


def test_other_answers_are_found(saved_with_graph, monkeypatch):
    spoil(monkeypatch, 1.01)
    with pytest.raises(ParityError, match=r"parity-onnx\.json"):
        mlflow_safeflavor.load_model(saved_with_graph, **ASKED)


def test_other_answers_are_not_saved(monkeypatch):
    spoil(monkeypatch, 1.01)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval().requires_grad_(False)
    runtime = openvino_engine.Session
    with pytest.raises(recording.Refusal, match="differs by"):
        recording.record(
            module, find_slots(module), *places(module), runtimes={"openvino": runtime}
        )


def places(module):
    """Of tensors that lie in a file, and inputs of two sizes."""
    found = {
        slot.path: Extent("model.safetensors", 0, slot.tensor.nbytes) for slot in find_slots(module)
    }
    return found, [{"input": torch.rand(rows, 4)} for rows in (3, 2)]


# What it gets, and what it does not do.


def test_it_gets_no_file(asked):
    graph = read_graph(Layout(asked))
    assert graph.weights
    parts = parse_model(openvino_engine._without_weights(graph))["graph"]
    assert not any(tensor["external_data"] for tensor in parts["initializer"])
    assert len(parts["input"]) == len(graph.inputs) + len(graph.weights)


ACTS = """
import json, sys
seen = []
bad = ["os.fork", "os.posix_spawn", "os.system", "os.mkdir", "subprocess.Popen"]
bad += ["socket.connect", "socket.getaddrinfo"]
def hook(event, args):
    if args[:1] == ("uname",):  # platform.processor()
        return
    writes = event == "open" and isinstance(args[0], str) and set(args[1] or "") & set("wax+")
    if event in bad or writes:
        seen.append(f"{event} {args[:2]}")
import mlflow_safeflavor
sys.addaudithook(hook)
model = mlflow_safeflavor.load_model(sys.argv[1], model_config={"engine": "openvino"})
model.predict("the cat")
import openvino
unwanted = ("openvino_telemetry", "torch", "transformers")
there = [name for name in sys.modules if name.split(".")[0] in unwanted]
print("FOUND", json.dumps([seen, there, hasattr(openvino, "convert_model")]))
"""


def test_nothing_is_told_to_its_makers(asked, clean_process):
    """It would on import: a process of its own, a connection, files in the user's home."""
    printed = clean_process(ACTS, str(asked), env={"MLFLOW_SAFEFLAVOR_CACHE": "off"}).stdout
    assert json.loads(printed.split("FOUND")[1]) == [[], [], True]


def test_it_runs_only_where_somebody_wants_it(asked, monkeypatch):
    """Its kernels read and write outside of arrays if a graph makes them."""
    with pytest.raises(TrustError, match="OpenVINO"):
        mlflow_safeflavor.load_model(asked)
    assert CliRunner().invoke(cli.main, ["verify", str(asked)]).exit_code == 2
    for agreed in (ASKED, {"trust": {"code"}}):
        assert mlflow_safeflavor.load_model(asked, **agreed).engine.name == "openvino"
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_ENGINE", "openvino")
    assert mlflow_safeflavor.load_model(asked).engine.name == "openvino"
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_ENGINE", "onnx")
    assert mlflow_safeflavor.load_model(asked).engine.name == "onnx"


def test_where_it_is_not_installed(asked, saved_with_graph, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PlacementError, match=r"pip install 'mlflow-safeflavor\[openvino\]'"):
        mlflow_safeflavor.load_model(saved_with_graph, **ASKED)
    with pytest.raises(PlacementError, match="not installed"):
        mlflow_safeflavor.save_model(
            bert("Model"), tmp_path / "m", tokenizer=tiny_tokenizer, **ASKED
        )
    assert (
        mlflow_safeflavor.load_model(asked, model_config={"engine": "auto"}).engine.name == "onnx"
    )


def test_what_it_does_not_know(saved_with_graph, monkeypatch):
    """An operator that a later release of it may have; without the engine the model is served."""
    written = write_model
    monkeypatch.setattr(
        openvino_engine, "write_model", lambda model: written(model).replace(b"MatMul", b"MulMat")
    )
    with pytest.raises(StructureError, match="does not take the graph"):
        mlflow_safeflavor.load_model(saved_with_graph, **ASKED)
    assert mlflow_safeflavor.load_model(saved_with_graph).engine.name == "onnx"


@pytest.mark.parametrize(
    "wrong", [{"graph": "no"}, {"model_config": {"engine": "openvino", "dtype": "float16"}}]
)
def test_what_it_cannot_be_saved_with(tiny_tokenizer, tmp_path, wrong):
    with pytest.raises(InputError, match="openvino"):
        mlflow_safeflavor.save_model(
            bert("Model"),
            tmp_path / "m",
            tokenizer=tiny_tokenizer,
            rehearse=False,
            **{**ASKED, **wrong},
        )
    assert not (tmp_path / "m").exists()


# Inputs that the graph does not take.


def test_other_inputs_go_to_the_module(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    given: dict[str, Any] = {"task": "raw", "input_example": X, "rehearse": False, **ASKED}
    mlflow_safeflavor.save_model(make_private(), tmp_path / "m", allow_pickle=True, **given)
    mlflow_safeflavor.save_model(make_private(), tmp_path / "alone", graph="only", **given)
    model = mlflow_safeflavor.load_model(tmp_path / "m", trust={"code", "pickle"})
    engine: Any = model.engine
    plain = model.predict(X)["y"]
    assert engine._rebuilt is None
    np.testing.assert_allclose(
        model.predict({**X, "scale": np.float32(2)})["y"], 2 * plain, rtol=1e-5
    )
    assert engine._rebuilt is not None
    alone = mlflow_safeflavor.load_model(tmp_path / "alone", **ASKED)
    np.testing.assert_array_equal(alone.predict(X)["y"], plain)
    with pytest.raises(StructureError, match="does not take this input"):
        alone.predict({**X, "scale": np.float32(2)})


def test_numbers_of_more_than_32_bits():
    """It would answer with others: 2**40 would be 0."""
    cast = [
        helper.make_node("Cast", ["input.ids"], ["z"], to=1),
        helper.make_node("Neg", ["z"], ["output.y"]),
    ]
    graph = read(made(*cast, inputs=(("ids", 7, ["rows"]),)))
    session = openvino_engine.Session(graph, {}, threads=1)
    most = np.iinfo(np.int32).max
    assert session({"ids": np.array([most, -most])})["y"].tolist() == [
        -float(np.float32(most)),
        float(np.float32(most)),
    ]
    assert session({"ids": np.zeros(0, np.int64)})["y"].shape == (0,)
    with pytest.raises(OverflowError, match="ids"):
        session({"ids": np.array([1, 2**40])})


# bfloat16.

HALF = {"engine": "openvino", "dtype": "bfloat16"}


def has_bfloat16():
    return "BF16" in openvino_engine._imported().Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )


def test_bfloat16_where_the_cpu_has_it(saved_with_graph):
    if has_bfloat16():
        model = mlflow_safeflavor.load_model(saved_with_graph, dtype="bfloat16", **ASKED)
        wanted = mlflow_safeflavor.load_model(saved_with_graph).predict(ROWS)["score"]
        # Eight bits of each number, large weights, and a score in the middle: 0.054 was seen.
        assert 0 < np.abs(model.predict(ROWS)["score"] - wanted).max() < 0.1
    else:
        with pytest.raises(PlacementError, match="no arithmetic"):
            mlflow_safeflavor.load_model(saved_with_graph, dtype="bfloat16", **ASKED)
    for engine, dtype in (("openvino", "float16"), ("onnx", "bfloat16")):
        with pytest.raises(PlacementError, match="cannot be served as a graph"):
            mlflow_safeflavor.load_model(
                saved_with_graph, dtype=dtype, model_config={"engine": engine}
            )


def test_bfloat16_is_chosen_recorded_and_tolerated(tmp_path, monkeypatch):
    """The way of the option; on a CPU without, float32 takes its place, a little off."""
    if not has_bfloat16():
        monkeypatch.setitem(openvino_engine._NAMES, "bfloat16", ("f32", "FP32"))
        spoil(monkeypatch, 1 + 2**-9)
    given: dict[str, Any] = {
        "task": "raw",
        "input_example": X,
        "rehearse": False,
        "graph": "only",
        "model_config": HALF,
    }
    mlflow_safeflavor.save_model(make_private(), tmp_path / "m", **given)
    layout = Layout(tmp_path / "m")
    assert read_json(layout.graph_facts)["proof"]["openvino"]["dtype"] == "bfloat16"
    assert read_json(layout.golden("openvino")[0])["tolerance"] == golden.TOLERANCES["bfloat16"]
    assert read_json(layout.golden("onnx")[0])["tolerance"] == golden.TOLERANCES["float32"]
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"))._model_impl.model
    assert (served.engine.session.dtype, served.report.bit_identical) == ("bfloat16", True)
    plain = mlflow_safeflavor.load_model(tmp_path / "m", **ASKED)
    engine: Any = plain.engine
    assert (engine.session.dtype, plain.report.max_difference < 0.05) == ("float32", True)


def test_bfloat16_has_a_tolerance_of_its_own(saved_with_graph, monkeypatch):
    """Beyond float32's, and no license: against rows that ONNX Runtime answered."""
    monkeypatch.setitem(openvino_engine._NAMES, "bfloat16", ("f32", "FP32"))

    def load(factor, **dtype):
        spoil(monkeypatch, factor)
        return mlflow_safeflavor.load_model(saved_with_graph, **dtype, **ASKED)

    assert load(1 + 2**-9, dtype="bfloat16").report.max_difference > 1e-3
    for factor, dtype in ((1 + 2**-9, {}), (1.5, {"dtype": "bfloat16"})):
        with pytest.raises(ParityError):
            load(factor, **dtype)


# Pins.


@pytest.mark.slow
def test_pins_and_rehearsal(tiny_tokenizer, saved_with_graph, tmp_path):
    """Saved with a rehearsal, whose guard refuses processes and connections."""
    mlflow_safeflavor.save_model(
        bert("Model"), tmp_path / "m", tokenizer=tiny_tokenizer, graph="only", **ASKED
    )
    version = importlib.metadata.version("openvino")
    assert f"openvino=={version}" in Layout(tmp_path / "m").requirements.read_text().splitlines()
    pins = (
        Environment.from_json(read_json(Layout(tmp_path / "m").environment))
        .for_graph()
        .distributions
    )
    assert pins["openvino"] == version
    assert not {"torch", "transformers"} & {canonicalize_name(name) for name in pins}
    assert "openvino" not in Layout(saved_with_graph).requirements.read_text()


def test_images_of_what_was_saved_for_it(asked, saved_with_graph, tmp_path):
    def variables(path, name, **options):
        made = mlflow_safeflavor.generate_dockerfile(path, tmp_path / name, hashes=False, **options)
        return made.read_text(), next(made.parent.rglob("requirements*.txt")).read_text()

    for name, options in {"a": {}, "b": {"engine": "openvino"}}.items():
        lines, pins = variables(asked, name, **options)
        assert "MLFLOW_SAFEFLAVOR_ENGINE=openvino" in lines
        assert "openvino==" in pins
    assert "MLFLOW_SAFEFLAVOR_ENGINE=onnx" in variables(asked, "c", engine="onnx")[0]
    assert "MLFLOW_SAFEFLAVOR_ENGINE=onnx" in variables(saved_with_graph, "d")[0]
    with pytest.raises(InputError, match="not among its pins"):
        variables(saved_with_graph, "e", engine="openvino")
