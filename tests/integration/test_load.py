"""What loading gives back, how it can be told to, and what it leaves alone."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import shutil
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from artifacts import TEXTS, edit_json, edit_mlmodel, reseal

import mlflow_safeflavor
from mlflow_safeflavor.artifact import weights_files
from mlflow_safeflavor.errors import (
    EnvironmentMismatchError,
    FormatVersionError,
    InputError,
    IntegrityError,
    PlacementError,
    TrustError,
    WeightsError,
)
from mlflow_safeflavor.module import rebuild as rebuilding
from mlflow_safeflavor.predict.options import asked_options, run_time_options

pytest_plugins = "saved_models"


@pytest.fixture
def wanted(saved):
    return mlflow_safeflavor.load_model(str(saved)).predict(TEXTS)


@pytest.fixture
def original(tiny_bert):
    """The model that was saved."""
    return tiny_bert(initializer_range=0.5)


def load(path, **options):
    return mlflow_safeflavor.load_model(str(path), **options)


def served(path, **options):
    """The loaded model behind pyfunc."""
    return mlflow.pyfunc.load_model(str(path), **options)._model_impl.model


def verified(path, model_config=None):
    """What ``verify_model`` finds, with the engine of ``model_config``."""
    report = mlflow_safeflavor.verify_model(str(path), engine=(model_config or {}).get("engine"))
    assert report.ok
    return report


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_is_paused_and_left_as_it_was(saved, tmp_path, monkeypatch, collects):
    """Also where loading fails half-way."""
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    edit_json(next(broken.rglob("config.json")), lambda config: config.update(num_hidden_layers=1))
    reseal(broken)
    rebuild, seen = rebuilding.rebuild, []
    monkeypatch.setattr(
        rebuilding, "rebuild", lambda *given: (seen.append(gc.isenabled()), rebuild(*given))[1]
    )
    try:
        (gc.enable if collects else gc.disable)()
        load(saved)
        assert gc.isenabled() is collects
        with pytest.raises(WeightsError):
            load(broken)
        assert gc.isenabled() is collects
    finally:
        gc.enable()
    assert seen == [False, False]


def test_weights_are_hashed_while_libraries_are_imported(saved, monkeypatch):
    story = importlib.import_module("mlflow_safeflavor.load.load")
    imports, hashes = story._import, story._weights_of
    begun, imported = threading.Event(), threading.Event()

    def imports_once_hashing(engine):
        assert begun.wait(60)
        imports(engine)
        imported.set()

    def hashes_once_imported(*given):
        begun.set()
        assert imported.wait(60)
        return hashes(*given)

    monkeypatch.setattr(story, "_import", imports_once_hashing)
    monkeypatch.setattr(story, "_weights_of", hashes_once_imported)
    assert load(saved).report.hashed_bytes > 0


def test_of_a_failed_import_and_wrong_weights_the_import_is_told(saved, tmp_path, monkeypatch):
    """After hashing has ended: nothing of a load goes on behind it."""
    story = importlib.import_module("mlflow_safeflavor.load.load")
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    weights = next(broken.rglob("model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    hashes, ended = story._weights_of, []

    def fails(engine):
        raise ImportError("a library")

    def noting(*given):
        try:
            return hashes(*given)
        finally:
            ended.append(threading.current_thread())

    monkeypatch.setattr(story, "_weights_of", noting)
    with pytest.raises(IntegrityError, match="Weights are not"):
        load(broken)
    monkeypatch.setattr(story, "_import", fails)
    with pytest.raises(ImportError, match="a library"):
        load(broken)
    assert len(ended) == 2
    assert not any(thread.is_alive() for thread in ended)


# What is read


def counted(monkeypatch, function):
    """Calls of a function of ours, wherever it was imported to."""
    calls: list[str] = []
    name = function.__name__

    def noting(*given, **named):
        calls.append(name)
        return function(*given, **named)

    for home, module in list(sys.modules.items()):
        if home.startswith("mlflow_safeflavor.") and getattr(module, name, None) is function:
            monkeypatch.setattr(module, name, noting)
    return calls


@pytest.mark.parametrize("how", [load, served, verified])
def test_run_time_options_are_read_once_a_load(saved, monkeypatch, how):
    """Each reading asks the environment, and two could differ."""
    how(saved)  # so that all that looks at them is imported
    calls = [counted(monkeypatch, function) for function in (asked_options, run_time_options)]
    how(saved)
    assert calls == [["asked_options"], ["run_time_options"]]


_opened: list[str] | None = None


@sys.addaudithook  # which is for good, and does nothing while nobody counts
def _note(event, args):
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


@pytest.fixture
def readings(monkeypatch):
    """Runs something; how often each file of a folder was opened, and its content read as JSON."""

    def run(folder, act):
        global _opened
        texts = {path.read_text(): str(path) for path in folder.rglob("*.json")}
        parsed, loads, _opened = [], json.loads, []

        def counting(text, *given, **named):
            found = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            parsed.extend([texts[found]] if found in texts else [])
            return loads(text, *given, **named)

        monkeypatch.setattr(json, "loads", counting)
        try:
            act()
            opened = Counter(path for path in _opened if path.startswith(str(folder)))
        finally:
            _opened = None
            monkeypatch.undo()
        return opened, Counter(parsed)

    return run


READ = ("manifest.json", "environment.json", "tensors.json", "structure.json", "config.json")


@pytest.mark.parametrize("engine", ["onnx", "module"])
@pytest.mark.parametrize("how", [load, served, verified])
def test_every_file_is_opened_once_a_load_and_its_json_parsed_once(
    saved_with_graph, tmp_path, monkeypatch, readings, engine, how
):
    """Beside what MLflow reads of it; what is read twice can be two things."""
    path = Path(shutil.copytree(saved_with_graph, tmp_path / "model"))
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_TELL_ENVIRONMENT", "true")
    opened, parsed = readings(path, lambda: how(path, model_config={"engine": engine}))
    golden = "parity.json" if engine == "module" else "parity-onnx.json"
    names = {*READ, "graph.json", golden}
    assert {Path(name).name for name in parsed} >= names
    assert {name: count for name, count in parsed.items() if count != 1} == {}
    ours = [] if how is served else [path / "MLmodel"]
    ours += (path / "safeflavor").rglob("*.json")
    assert {file.name: opened[str(file)] for file in ours if opened[str(file)] != 1} == {}


# Answers


def test_native_pyfunc_and_the_model_that_was_saved_answer_the_same(
    saved, wanted, original, tiny_tokenizer
):
    behind_pyfunc = mlflow.pyfunc.load_model(str(saved)).predict(pd.DataFrame({"text": TEXTS}))
    assert behind_pyfunc.equals(wanted)
    with torch.inference_mode():
        logits = original(**tiny_tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    scores, labels = logits.softmax(dim=1).max(dim=1)
    assert wanted["label"].tolist() == [f"LABEL_{i}" for i in labels]
    assert wanted["score"].tolist() == pytest.approx(scores.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "data",
    [pd.DataFrame({"text": TEXTS}), {"text": TEXTS}, [{"text": text} for text in TEXTS]],
    ids=["frame", "dict of lists", "dicts"],
)
def test_pyfunc_takes_rows_in_every_shape(saved, wanted, data):
    assert mlflow.pyfunc.load_model(str(saved)).predict(data).equals(wanted)


def test_params_reach_the_task_through_pyfunc(saved):
    found = mlflow.pyfunc.load_model(str(saved)).predict(
        pd.DataFrame({"text": TEXTS}), params={"top_k": 2}
    )
    assert found["labels"].map(sorted).tolist() == [["LABEL_0", "LABEL_1"]] * len(TEXTS)
    assert found["scores"].map(sum).tolist() == pytest.approx([1.0] * len(TEXTS))


def test_the_module_is_the_one_that_was_saved(saved, original):
    module = load(saved).module
    assert type(module) is type(original)
    assert module.config.to_dict() == original.config.to_dict()
    expected = dict(original.named_parameters()) | dict(original.named_buffers())
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert not tensor.is_meta, name
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_the_tokenizer_is_the_one_that_was_saved(saved, tiny_tokenizer):
    assert load(saved).tokenizer(TEXTS)["input_ids"] == tiny_tokenizer(TEXTS)["input_ids"]


def test_no_gradients_and_no_training(saved):
    module = load(saved).module
    assert [name for name, tensor in module.named_parameters() if tensor.requires_grad] == []
    assert [name for name, child in module.named_modules() if child.training] == []


# Report and verification


def test_the_report_says_in_numbers_what_was_checked(saved, original):
    report = load(saved).report
    tensors = [*original.parameters(), *original.buffers()]
    assert report.tensors == len(tensors)
    assert report.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    listed = yaml.safe_load((saved / "safeflavor" / "manifest.json").read_text())["files"]
    assert report.files == len(listed)
    assert report.hashed_bytes == sum(entry["size"] for entry in listed.values())
    assert report.golden_rows == len(
        yaml.safe_load((saved / "safeflavor" / "parity.json").read_text())["rows"]
    )
    assert report.bit_identical
    assert report.max_difference == 0
    assert report.environment == ()
    assert report.device == "cpu"
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert {"digest", "rebuild", "replay"} <= report.seconds.keys()
    assert f"{report.golden_rows} golden rows bit-identical" in str(report)


def test_structure_hashes_nothing_but_replays(saved, wanted):
    model = load(saved, verify="structure")
    assert (model.report.hashed_bytes, model.report.golden_rows > 0) == (0, True)
    assert model.predict(TEXTS).equals(wanted)


def test_off_replays_nothing_but_still_compares_tensors(saved, wanted):
    model = load(saved, verify="off")
    assert (model.report.hashed_bytes, model.report.golden_rows, model.report.tensors > 0) == (
        0,
        0,
        True,
    )
    assert "no golden rows" in str(model.report)
    assert model.predict(TEXTS).equals(wanted)


@pytest.mark.parametrize("verify", ["Full", "", "none"])
def test_there_is_no_other_way_to_verify(saved, verify):
    with pytest.raises(InputError, match=r"full \| rehash \| structure \| off") as refused:
        load(saved, verify=verify)
    assert "where: verify" in refused.value.message
    assert repr(verify) in refused.value.message


def test_unknown_kinds_of_trust_are_refused(saved):
    with pytest.raises(TrustError, match="code") as refused:
        load(saved, trust={"everything"})
    assert "everything" in refused.value.message


# Device and dtype


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto", torch.device("cpu")], ids=str)
def test_devices_that_are_there(saved, wanted, device):
    model = load(saved, device=device)
    if device != "auto":
        assert {tensor.device.type for tensor in model.module.parameters()} == {"cpu"}
    assert model.predict(TEXTS)["label"].equals(wanted["label"])


@pytest.mark.parametrize(
    "device", ["tpu", "cuda:99", 99, "meta", "cpu:1", "", True, None], ids=repr
)
def test_devices_that_are_not_there_are_named(saved, device):
    with pytest.raises(InputError if device in (True, None) else PlacementError) as refused:
        load(saved, device=device)
    assert "where: device" in refused.value.message
    assert str(device) in refused.value.message


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16], ids=str)
def test_another_dtype_on_request(saved, original, dtype):
    model = load(saved, dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    for name, tensor in model.module.named_parameters():
        assert tensor.dtype == expected, name
        assert torch.equal(tensor, original.get_parameter(name).to(expected)), name
    assert len(model.predict(TEXTS)) == len(TEXTS)


def test_the_saved_dtype_on_request_changes_nothing(saved, wanted):
    model = load(saved, dtype="float32")
    assert model.report.bit_identical
    assert model.predict(TEXTS).equals(wanted)


@pytest.mark.parametrize("dtype", ["auto", "int8", "as-is"])
def test_other_dtypes_are_refused(saved, dtype):
    with pytest.raises(PlacementError, match=r"float32 \| bfloat16 \| float16") as refused:
        load(saved, dtype=dtype)
    assert repr(dtype) in refused.value.message


# What is around


def test_loading_leaves_the_process_as_it_was(saved):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    load(saved)
    assert torch.equal(torch.rand(3), expected), "loading used random numbers"
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before


def test_a_default_dtype_set_by_somebody_changes_nothing(saved, wanted):
    torch.set_default_dtype(torch.float64)
    try:
        model = load(saved)
        assert torch.get_default_dtype() == torch.float64
        assert model.report.bit_identical
        assert model.predict(TEXTS).equals(wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def meta_by_default():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "around", [lambda: torch.device("meta"), meta_by_default], ids=["context", "default device"]
)
def test_a_meta_device_around_it_reaches_no_tensor(saved, wanted, around):
    with around():
        model = load(saved)
        found = model.predict(TEXTS)
        assert torch.empty(1).is_meta, "the context is gone"
    assert not any(tensor.is_meta for tensor in model.module.state_dict().values())
    assert found.equals(wanted)


def test_a_meta_device_of_another_thread_reaches_no_tensor(saved, wanted):
    inside, done = threading.Event(), threading.Event()

    def stay_on_meta():
        with torch.device("meta"):
            inside.set()
            done.wait(60)

    other = threading.Thread(target=stay_on_meta)
    other.start()
    try:
        assert inside.wait(60)
        model = load(saved)
    finally:
        done.set()
        other.join()
    assert not any(tensor.is_meta for tensor in model.module.state_dict().values())
    assert model.predict(TEXTS).equals(wanted)


def test_many_threads_load_at_once(saved, wanted):
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(saved), range(8)))
    assert len({id(model.module) for model in models}) == len(models)
    for model in models:
        assert model.report.bit_identical
        assert model.predict(TEXTS).equals(wanted)
    assert torch.get_default_dtype() == torch.float32


def test_many_threads_ask_one_model(saved, wanted):
    model = load(saved)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: model.predict(TEXTS[i % 3 :]), range(60)))
    for i, answer in enumerate(answers):
        expected = wanted[i % 3 :].reset_index(drop=True)
        assert answer["label"].equals(expected["label"]), i
        assert answer["score"].tolist() == pytest.approx(expected["score"].tolist(), abs=1e-6), i


# Memory


def mapped_ranges(name):
    """Address ranges of this process in which a file is mapped whose name holds ``name``."""
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if name in line]
    return [tuple(int(address, 16) for address in line[0].split("-")) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows what is mapped")
@pytest.mark.parametrize("kind", ["memory", "copy", "file"])
def test_weights_are_a_mapped_file_and_no_copy_of_it(saved, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(weights_files, "_SMALL", {"memory": 10**7}.get(kind, -1))
    monkeypatch.setenv(
        "MLFLOW_SAFEFLAVOR_CACHE", "off" if kind == "file" else str(tmp_path / "cache")
    )
    model = load(saved)
    assert model.report.weights == kind
    name = {
        "memory": "memfd:safeflavor-weights (deleted)",
        "copy": f"{tmp_path}/cache",
        "file": str(saved),
    }[kind]
    ranges = mapped_ranges(name)
    assert ranges, "the file is not mapped"
    for name, tensor in model.module.state_dict().items():
        inside = any(
            first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= last
            for first, last in ranges
        )
        assert inside, f"{name} is a copy"


def test_changing_a_loaded_model_does_not_change_its_file(saved):
    before = (saved / "safeflavor" / "model.safetensors").read_bytes()
    with torch.no_grad():
        load(saved).module.classifier.bias += 1
    assert (saved / "safeflavor" / "model.safetensors").read_bytes() == before


# What MLflow does to a saved model, and what others may not


def test_what_mlflow_adds_to_the_mlmodel_is_no_damage(
    tracking, tiny_bert, tiny_tokenizer, tmp_path
):
    with mlflow.start_run():
        info = mlflow_safeflavor.log_model(
            tiny_bert(), "tiny", tokenizer=tiny_tokenizer, rehearse=False, graph="no"
        )
    model = mlflow_safeflavor.load_model(info.model_uri, str(tmp_path))
    content = yaml.safe_load(next(tmp_path.rglob("MLmodel")).read_text())
    assert content["model_id"] == info.model_id
    assert content["run_id"] == info.run_id
    assert model.report.golden_rows > 0


def test_what_others_add_to_the_mlmodel_is_no_damage(copied, wanted):
    edit_mlmodel(
        copied,
        lambda content: content.update(run_id="0" * 32, metadata={"x": 1}, prompts=["a"], note="b"),
    )
    assert load(copied).predict(TEXTS).equals(wanted)


def test_a_newer_format_is_refused_with_the_release_that_reads_it(copied):
    def newer(content):
        content["flavors"]["safeflavor"].update(format_version=99, loader_version="7.1.0")

    edit_mlmodel(copied, newer)
    reseal(copied)
    with pytest.raises(
        FormatVersionError, match=r"install mlflow-safeflavor 7\.1\.0 or newer"
    ) as refused:
        load(copied)
    assert "format_version 99" in refused.value.message
    with pytest.raises(FormatVersionError):
        mlflow.pyfunc.load_model(str(copied))


@pytest.mark.parametrize("version", ["1", True, 0, -1, None, 1.0])
def test_a_format_version_that_is_none_is_refused(copied, version):
    edit_mlmodel(
        copied, lambda content: content["flavors"]["safeflavor"].update(format_version=version)
    )
    reseal(copied)
    with pytest.raises(IntegrityError, match="format_version") as refused:
        load(copied)
    assert repr(version) in refused.value.message


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match="no MLflow model") as refused:
        load(tmp_path)
    assert str(tmp_path) in refused.value.message


def test_a_model_of_another_flavor_is_refused(copied):
    edit_mlmodel(copied, lambda content: content["flavors"].pop("safeflavor"))
    with pytest.raises(IntegrityError, match="not saved by mlflow-safeflavor") as refused:
        load(copied)
    assert "load it with the flavor that saved it" in refused.value.message


# Environment


def other_environment(copied):
    edit_json(
        copied / "safeflavor" / "environment.json", lambda content: content.update(python="3.9.1")
    )
    reseal(copied)


def test_another_environment_is_reported_and_served_unless_that_is_an_error(copied, wanted, caplog):
    other_environment(copied)
    model = load(copied)
    assert len(model.report.environment) == 1
    assert "wanted 3.9.1" in model.report.environment[0]
    assert "3.9.1" in caplog.text
    assert model.predict(TEXTS).equals(wanted)
    with pytest.raises(EnvironmentMismatchError, match=r"3\.9\.1"):
        load(copied, environment="error")
    assert load(copied, environment="ignore").report.environment == ()


def test_there_is_no_other_policy(saved):
    with pytest.raises(EnvironmentMismatchError, match="where: environment"):
        load(saved, environment="strict")


# Options through pyfunc


def test_options_come_through_model_config(saved):
    model = served(
        saved,
        model_config={
            "verify": "off",
            "dtype": "bfloat16",
            "max_batch_tokens": 7,
            "num_threads": 2,
        },
    )
    assert model.report.golden_rows == 0
    assert {tensor.dtype for tensor in model.module.parameters()} == {torch.bfloat16}
    assert (model.options["max_batch_tokens"], model.options["num_threads"]) == (7, 2)


def test_variables_win_over_model_config(saved, monkeypatch):
    for name, value in {
        "VERIFY": "structure",
        "DTYPE": "float16",
        "MAX_BATCH_TOKENS": "9",
        "NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(f"MLFLOW_SAFEFLAVOR_{name}", value)
    model = served(
        saved,
        model_config={
            "verify": "off",
            "dtype": "bfloat16",
            "max_batch_tokens": 7,
            "num_threads": 2,
        },
    )
    assert (model.report.hashed_bytes, model.report.golden_rows > 0) == (0, True)
    assert {tensor.dtype for tensor in model.module.parameters()} == {torch.float16}
    assert (model.options["max_batch_tokens"], model.options["num_threads"]) == (9, 1)


def test_a_variable_set_to_nothing_is_not_set(saved, monkeypatch):
    monkeypatch.setenv("MLFLOW_SAFEFLAVOR_VERIFY", "")
    assert served(saved, model_config={"verify": "off"}).report.golden_rows == 0


def test_defaults_are_the_ones_stored_with_the_model(tmp_path, tiny_bert, tiny_tokenizer):
    options = {"verify": "off", "max_batch_tokens": 7}
    mlflow_safeflavor.save_model(
        tiny_bert(),
        tmp_path / "model",
        tokenizer=tiny_tokenizer,
        model_config=options,
        rehearse=False,
        graph="no",
    )
    model = served(tmp_path / "model")
    assert (model.report.golden_rows, model.options["max_batch_tokens"]) == (0, 7)


WRONG = [
    ("device", "tpu", PlacementError, "device"),
    ("dtype", "auto", PlacementError, "dtype"),
    ("engine", "turbo", InputError, "engine"),
    ("num_threads", "many", InputError, "num_threads"),
    ("num_threads", "-1", InputError, "num_threads"),
    ("max_batch_tokens", "1.5", InputError, "max_batch_tokens"),
    ("max_batch_tokens", "0", InputError, "max_batch_tokens"),
    ("verify", "yes", InputError, "verify"),
    ("environment", "strict", EnvironmentMismatchError, "environment"),
]


@pytest.mark.parametrize(
    ("name", "value", "kind", "named"), WRONG, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.parametrize("by", ["variable", "model_config"])
def test_wrong_values_are_named(saved, monkeypatch, by, name, value, kind, named):
    config = {}
    if by == "variable":
        monkeypatch.setenv(f"MLFLOW_SAFEFLAVOR_{name.upper()}", value)
    else:
        config = {name: value}
    with pytest.raises(kind) as refused:
        mlflow.pyfunc.load_model(str(saved), model_config=config)
    assert f"where: {named}" in refused.value.message
    assert value in refused.value.message
