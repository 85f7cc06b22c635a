"""Long tables: chunk by chunk, in order, read no further ahead than they are answered.

Progress for who waits.
"""

import io
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import tqdm.auto

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, PlacementError
from mlflow_safeflavor.predict import progress

COMPILER = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
TEXTS = [f"the cat sat on {'the mat ' * (i % 7)}{i}" for i in range(40)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the model, saved by the first test that asks for it."""
    return tmp_path_factory.mktemp("stream") / "model"


@pytest.fixture
def model(tiny_bert, tiny_tokenizer, saved):
    if not saved.exists():
        bert = tiny_bert(num_labels=3, initializer_range=0.3)
        mlflow_safeflavor.save_model(
            bert, saved, tokenizer=tiny_tokenizer, rehearse=False, graph="no"
        )
    return mlflow_safeflavor.load_model(saved, model_config={"deterministic": True})


@pytest.fixture
def table():
    return pd.DataFrame({"text": TEXTS})


def test_an_iterator_is_answered_chunk_by_chunk(model, table):
    chunks = [table[i : i + 12] for i in range(0, 40, 12)]
    answers = list(model.predict(iter(chunks)))
    assert [list(found.index) for found in answers] == [list(chunk.index) for chunk in chunks]
    pd.testing.assert_frame_equal(pd.concat(answers), model.predict(table))


def test_it_is_read_no_further_ahead_than_two_chunks(model, table):
    read = []

    def chunks():
        for i in range(10):
            read.append(i)
            yield table[i : i + 1]

    answers = model.predict(chunks())
    assert read == []
    next(answers)
    assert len(read) == 2
    answers.close()
    assert len(read) == 2


def test_chunks_may_be_anything_that_predict_takes(model, table):
    answers = list(model.predict(iter([TEXTS[:2], {"text": TEXTS[2]}, TEXTS[3]])))
    assert [len(found) for found in answers] == [2, 1, 1]


def test_a_bad_chunk_is_an_error_where_it_stands(model, table):
    answers = model.predict(iter([table[:2], pd.DataFrame({"text": [None]}), table[2:4]]))
    assert len(next(answers)) == 2
    with pytest.raises(InputError, match="row 0"):
        next(answers)


def test_no_chunks_no_answers(model):
    assert list(model.predict(iter([]))) == []


@pytest.mark.skipif(not hasattr(mlflow, "start_span_no_context"), reason="MLflow without tracing")
def test_all_chunks_are_one_span_of_the_callers_trace(model, table, tracking):
    asked = [table[i : i + 5] for i in range(0, 40, 5)]
    with mlflow.start_span("mine"):
        for _ in model.predict(iter(asked)):
            with mlflow.start_span("between"):
                pass
    mlflow.flush_trace_async_logging()
    (trace,) = mlflow.search_traces(return_type="list")
    mine, stream = (
        [span for span in trace.data.spans if span.name == name]
        for name in ("mine", "safeflavor text-classification")
    )
    assert [span.parent_id for span in stream] == [mine[0].span_id]
    assert stream[0].attributes["rows"] == stream[0].attributes["pieces"] == len(TEXTS)
    assert stream[0].attributes["forwards"] >= 1
    between = [span.parent_id for span in trace.data.spans if span.name == "between"]
    assert between == [mine[0].span_id] * len(asked)


def test_a_parquet_file_is_answered_with_the_rows_numbers(model, table, tmp_path, monkeypatch):
    table.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("mlflow_safeflavor.predict.stream._CHUNK", 15)
    answers = list(model.predict(tmp_path / "rows.parquet"))
    assert [len(found) for found in answers] == [15, 15, 10]
    pd.testing.assert_frame_equal(pd.concat(answers), model.predict(table))


@pytest.mark.parametrize("content", [None, b"", b"text\nhello\n"])
def test_a_path_that_is_no_parquet_file(model, tmp_path, content):
    if content is not None:
        (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"Parquet file[\s\S]*rows\.parquet"):
        model.predict(tmp_path / "rows.parquet")


def test_the_name_of_a_file_is_a_text(model, table, tmp_path):
    table.to_parquet(tmp_path / "rows.parquet")
    assert len(model.predict(str(tmp_path / "rows.parquet"))) == 1


# Progress.


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal would show."""
    screen = io.StringIO()
    vars(screen)["isatty"] = lambda: True

    class Shown(tqdm.auto.tqdm):
        def __init__(self, **options):
            super().__init__(file=screen, **options)

    monkeypatch.setattr("tqdm.auto.tqdm", Shown)
    return screen


def test_a_bar_is_shown_on_a_terminal_when_it_takes_long(model, table, terminal, monkeypatch):
    model.predict(table)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0)
    gate, forward = threading.Event(), type(model.task).forward

    def held(self, *arguments):
        gate.wait(20)
        return forward(self, *arguments)

    monkeypatch.setattr(type(model.task), "forward", held)
    threading.Timer(0.6, gate.set).start()
    model.predict(table)
    assert "0/40" in terminal.getvalue()


def test_streams_count_rows(model, table, terminal, tmp_path, monkeypatch):
    table.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("mlflow_safeflavor.predict.stream._CHUNK", 15)
    list(model.predict(tmp_path / "rows.parquet", progress=True))
    assert "40/40" in terminal.getvalue()


def test_nothing_is_shown_without_a_terminal_or_if_not_wanted(
    model, table, terminal, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "_PATIENCE", 0)
    list(model.predict(iter([table]), progress=False))
    assert terminal.getvalue() == ""
    monkeypatch.undo()
    list(model.predict(iter([table])))
    assert capsys.readouterr() == ("", "")


# torch.compile.


def test_compile_needs_a_compiler(model, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PlacementError, match=r"compile needs a C\+\+ compiler[\s\S]*hint"):
        mlflow_safeflavor.load_model(model.folder, model_config={"compile": True})


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs g++ and Python's headers")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_answers_within_tolerance(model, table):
    compiled = mlflow_safeflavor.load_model(model.folder, model_config={"compile": True})
    assert compiled.report.golden_rows > 0
    pd.testing.assert_frame_equal(
        compiled.predict(table), model.predict(table), check_exact=False, atol=1e-5
    )
