"""Tables of Spark: the bits of this process, each row once, and loaded once in each worker."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zipimport
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, TrustError
from mlflow_safeflavor.spark import score

pytest_plugins = ("saved_models", "spark_fixtures")
pytestmark = [
    pytest.mark.slow,
    # pyspark leaves its sockets to the collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

WORDS = ("the", "cat", "sat", "on", "a", "mat")
TEXTS = [" ".join(WORDS[: 1 + i % 6]) for i in range(200)]


def table_of(spark, texts=TEXTS, name="text"):
    return spark.createDataFrame([*enumerate(texts)], f"id long, {name} string")


def plain(value):
    """A value of Spark as MLflow's answers have it."""
    if hasattr(value, "asDict"):
        return {name: plain(part) for name, part in value.asDict().items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def rows_of(table, column="prediction"):
    return [plain(row[column]) for row in sorted(table.collect(), key=lambda row: row["id"])]


def natively(path, data, **options):
    return mlflow_safeflavor.load_model(path, **options).predict(data)


def test_the_bits_of_this_process_and_each_row_once(spark, saved_with_graph):
    scored = score(table_of(spark), saved_with_graph)
    assert scored.columns == ["id", "text", "prediction"]
    wanted = natively(saved_with_graph, TEXTS).to_dict(orient="records")
    assert len({row["score"] for row in wanted}) == 6, "answers that are all alike prove nothing"
    assert rows_of(scored) == wanted
    assert sorted(row["id"] for row in scored.collect()) == list(range(len(TEXTS)))


def test_other_columns_are_what_they_were(spark, saved_with_graph, tmp_path):
    """No column but the model's passes through pandas, which has no Decimal and no missing int."""
    table = spark.createDataFrame(
        [(1, "the cat", Decimal("1.10"), None, {"a": 1}), (2, "a mat", None, 3, None)],
        "id long, text string, d decimal(10,2), n int, m map<string,int>",
    )
    table.write.parquet(str(tmp_path / "in"))
    read = spark.read.parquet(str(tmp_path / "in"))
    score(read, saved_with_graph, output="p").write.parquet(str(tmp_path / "out"))
    there = spark.read.parquet(str(tmp_path / "out"))
    assert there.drop("p").schema == read.schema
    assert sorted(there.drop("p").collect()) == sorted(table.collect())
    wanted = natively(saved_with_graph, ["the cat", "a mat"]).to_dict(orient="records")
    assert rows_of(there, "p") == wanted


def test_a_stream_that_goes_on(spark, saved_with_graph, tmp_path):
    """Each row once, over two runs; ``isStreaming`` tables have no partitions to count."""
    half, there = len(TEXTS) // 2, str(tmp_path / "in")
    for ids in (range(half), range(half, len(TEXTS))):
        rows = spark.createDataFrame([(i, TEXTS[i]) for i in ids], "id long, text string")
        rows.write.mode("append").parquet(there)
        source = spark.readStream.schema(rows.schema).parquet(there)
        stream = score(source, saved_with_graph).writeStream.trigger(availableNow=True)
        stream = stream.option("checkpointLocation", str(tmp_path / "checkpoint"))
        stream.start(str(tmp_path / "out"), format="parquet").awaitTermination()
    found = spark.read.parquet(str(tmp_path / "out"))
    assert rows_of(found, "id") == [*range(len(TEXTS))]
    assert rows_of(found) == natively(saved_with_graph, TEXTS).to_dict(orient="records")


def test_a_delta_table_in_and_out(spark, saved_with_graph, tmp_path):
    """Written and read by delta-rs: Spark's own connector is a jar, no Python package."""
    there, scored = str(tmp_path / "in"), str(tmp_path / "out")
    half = len(TEXTS) // 2
    for ids in (range(half), range(half, len(TEXTS))):
        new = pa.table({"id": [*ids], "text": [TEXTS[i] for i in ids]})
        write_deltalake(there, new, mode="append")
        found = score(spark.createDataFrame(DeltaTable(there).to_pyarrow_table()), saved_with_graph)
        write_deltalake(scored, found.toArrow(), mode="overwrite")
    wanted = natively(saved_with_graph, TEXTS).to_dict(orient="records")
    for version, count in ((0, half), (1, len(TEXTS))):
        rows = DeltaTable(scored, version=version).to_pyarrow_table().sort_by("id").to_pylist()
        assert [row["text"] for row in rows] == TEXTS[:count]
        assert [row["prediction"] for row in rows] == wanted[:count]


@pytest.mark.skipif(
    "SAFEFLAVOR_DELTA_JARS" not in os.environ, reason="SAFEFLAVOR_DELTA_JARS names no jars"
)
def test_a_delta_table_by_sparks_own_connector(spark, saved_with_graph, tmp_path):
    """Versions, MERGE, a stream that goes on, reasons: each row once, with the bits of the host."""
    there, scored, reasoned, streamed = (str(tmp_path / name) for name in ("in", "out", "r", "s"))
    half, table = len(TEXTS) // 2, "id long, text string"

    def read(path, **options):
        return spark.read.format("delta").options(**options).load(path)

    def append(rows):
        rows = spark.createDataFrame(rows, table)
        rows.write.format("delta").mode("append").save(there)
        source = spark.readStream.format("delta").load(there)
        stream = score(source, saved_with_graph, on_error="null", partitions=2).writeStream
        stream = stream.option("checkpointLocation", str(tmp_path / "checkpoint"))
        stream = stream.format("delta").trigger(availableNow=True)
        stream.start(streamed).awaitTermination()

    append([*enumerate(TEXTS[:half])])
    score(read(there), saved_with_graph).write.format("delta").save(scored)
    append([*enumerate(TEXTS)][half:])
    score(read(there), saved_with_graph).createOrReplaceTempView("found")
    spark.sql(
        f"MERGE INTO delta.`{scored}` s USING found f ON s.id = f.id "
        "WHEN MATCHED THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *"
    )
    wanted = natively(saved_with_graph, TEXTS).to_dict(orient="records")
    for version, count in ((0, half), (1, len(TEXTS))):
        then = read(there, versionAsOf=version)
        for found in (score(then, saved_with_graph), read(scored, versionAsOf=version)):
            assert rows_of(found, "id") == [*range(count)]
            assert rows_of(found, "text") == TEXTS[:count]
            assert rows_of(found) == wanted[:count]

    append([(len(TEXTS), None)])
    score(read(there), saved_with_graph, on_error="null").write.format("delta").save(reasoned)
    for path in (reasoned, streamed):
        found = read(path)
        assert rows_of(found, "id") == [*range(len(TEXTS) + 1)]
        assert rows_of(found) == [*wanted, None]
        *none, reason = rows_of(found, "prediction_reason")
        assert not any(none)
        assert reason.startswith("A value is missing; wanted: a value")
        # delta-rs agrees about what Spark's connector wrote.
        rows = DeltaTable(path).to_pyarrow_table().sort_by("id").to_pylist()
        assert [row["prediction"] for row in rows] == [*wanted, None]


def test_rows_that_cannot_be_answered_have_a_reason(spark, saved):
    texts = [*TEXTS[:40], None, *TEXTS[:7], "the " * 100_001, "a mat"]
    table = table_of(spark, texts)
    with pytest.raises(Exception, match="A value is missing"):
        score(table, saved).collect()
    scored = score(table, saved, on_error="null")
    answers, reasons = rows_of(scored), rows_of(scored, "prediction_reason")
    assert [i for i, answer in enumerate(answers) if answer is None] == [40, 48]
    assert [i for i, reason in enumerate(reasons) if reason is not None] == [40, 48]
    assert reasons[40].startswith("A value is missing; wanted: a value")
    assert "characters" in reasons[48]
    good = [text for i, text in enumerate(texts) if i not in (40, 48)]
    wanted = natively(saved, good)["label"].tolist()
    assert [answer["label"] for answer in answers if answer is not None] == wanted


def test_params_and_a_type_that_was_asked_for(spark, saved):
    scored = score(table_of(spark), saved, params={"top_k": 2}, result_type="labels array<string>")
    assert scored.schema["prediction"].dataType.simpleString() == "struct<labels:array<string>>"
    assert {tuple(sorted(row["labels"])) for row in rows_of(scored)} == {("LABEL_0", "LABEL_1")}
    # No row is at fault for what the request asks for.
    with pytest.raises(Exception, match="nothing"):
        score(table_of(spark), saved, params={"nothing": 1}, on_error="null").collect()


def test_what_is_refused_before_anything_runs(spark, saved, tmp_path, tiny_bert, tiny_tokenizer):
    table = table_of(spark)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"on_error": "skip"}, "on_error"),
        ({"output": "text"}, "has a column of that name"),
        ({"columns": ["texts"]}, "does not have the columns"),
        ({"columns": ["id", "text"]}, "does not have the columns"),
        ({"model_config": {"threads": 1}}, "Unknown key"),
    ]
    for options, said in refused:
        with pytest.raises(InputError, match=said):
            score(table, saved, **options)
    with pytest.raises(InputError, match="a DataFrame of Spark"):
        score(pd.DataFrame({"text": TEXTS}), saved)
    mlflow_safeflavor.save_model(
        tiny_bert(None),
        tmp_path / "llm",
        task="llm/v1/embeddings",
        tokenizer=tiny_tokenizer,
        rehearse=False,
        graph="no",
    )
    with pytest.raises(InputError, match="one answer for all rows"):
        score(table, tmp_path / "llm")


def test_code_of_the_model_runs_where_it_is_agreed_to(spark, user_code, tmp_path):
    code, file = user_code(
        "two_arrays",
        """
        import torch

        class Two(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(3, 2)

            def forward(self, x, y):
                deep = self.linear(x)
                return {"flat": deep.sum(1) + y, "deep": deep[:, :, None].expand(-1, 2, 2)}
        """,
    )
    example = {"x": np.ones((4, 3), np.float32), "y": np.arange(4, dtype=np.float32)}
    mlflow_safeflavor.save_model(
        code.Two().eval(),
        tmp_path / "two",
        task="raw",
        input_example=example,
        code_paths=[file],
        rehearse=False,
        graph="no",
    )
    table = spark.createDataFrame(
        pd.DataFrame({"id": range(4), "x": [[1.0, 1.0, 1.0]] * 4, "y": [0.0, 1.0, 2.0, 3.0]})
    )
    with pytest.raises(TrustError):
        score(table, tmp_path / "two")
    answers = rows_of(score(table, tmp_path / "two", trust={"code"}))
    wanted = natively(tmp_path / "two", example, trust={"code"})
    assert np.allclose([answer["flat"] for answer in answers], wanted["flat"])
    assert np.allclose([answer["deep"] for answer in answers], wanted["deep"])


def loads_by_worker(spark):
    """Process → models that it holds, of the workers that run functions over pandas."""
    from pyspark.sql.pandas.functions import pandas_udf

    def held(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        module = sys.modules.get("mlflow_safeflavor.load.once")
        kept = [id(model) for model in getattr(module, "_kept", {}).values()]
        for batch in batches:
            yield pd.Series([f"{os.getpid()} {kept}"] * len(batch))

    held.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    told: Any = pandas_udf(held, "string")  # type: ignore[call-overload]  # told by annotations
    answers = spark.range(0, 80, 1, 8).select(told("id").alias("held"))
    return dict(row["held"].split(" ", 1) for row in answers.collect())


def test_mlflows_own_function_loads_once_in_each_worker(saved_with_graph, environ, spark):
    table = table_of(spark).repartition(6)
    udf = mlflow.pyfunc.spark_udf(spark, str(saved_with_graph))
    scored = table.withColumn("prediction", udf("text"))
    wanted = natively(saved_with_graph, TEXTS).to_dict(orient="records")
    assert rows_of(scored) == wanted
    before = {worker: held for worker, held in loads_by_worker(spark).items() if held != "[]"}
    assert before
    assert rows_of(scored) == wanted
    after = loads_by_worker(spark)
    assert before.keys() & after.keys()
    assert all(after[worker] == held for worker, held in before.items() if worker in after)


# A cluster of processes on loopback: one master, and two workers with a core each.


@contextlib.contextmanager
def cluster(folder: Path, environ):
    import pyspark

    home = Path(pyspark.__file__).parent
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    master = f"spark://127.0.0.1:{port}"
    deploy = [str(home / "bin" / "spark-class"), "org.apache.spark.deploy"]
    web = ["--host", "127.0.0.1", "--webui-port", "0"]
    worker = [*web, "--cores", "1", "--memory", "1g", "--work-dir"]
    commands = [
        [deploy[0], f"{deploy[1]}.master.Master", *web, "--port", str(port)],
        [deploy[0], f"{deploy[1]}.worker.Worker", *worker, str(folder / "first"), master],
        [deploy[0], f"{deploy[1]}.worker.Worker", *worker, str(folder / "second"), master],
    ]
    processes = []
    with (folder / "log").open("w") as log:
        try:
            for command in commands:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            deadline = time.monotonic() + 60
            while (folder / "log").read_text().count("Registering worker") < 2:
                assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
            yield master
        finally:
            for process in processes:
                process.kill()
                process.wait()


def executors():
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("CoarseGrainedExecutorBackend" in part for part in process.info["cmdline"] or ())
    ]


def test_a_cluster_that_loses_an_executor_loses_no_row(
    saved_with_graph, tmp_path, environ, spark, session
):
    spark.stop()
    with cluster(tmp_path, environ) as master:
        made = session(master, **{"spark.executor.memory": "512m", "spark.executor.cores": "1"})
        try:
            # Small batches, so that an executor is in the middle of its rows for a while.
            made.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "20")
            texts = TEXTS * 30
            scored = score(table_of(made, texts), saved_with_graph, partitions=12)
            wanted = natively(saved_with_graph, texts).to_dict(orient="records")
            assert rows_of(scored) == wanted
            scored.write.parquet(str(tmp_path / "warm"))
            before = executors()
            assert len(before) == 2
            thread = threading.Thread(target=scored.write.parquet, args=(str(tmp_path / "out"),))
            thread.start()
            time.sleep(0.5)
            before[0].send_signal(signal.SIGKILL)
            thread.join()
            there = made.read.parquet(str(tmp_path / "out"))
            assert rows_of(there) == wanted
        finally:
            made.stop()


def test_an_archive_is_read_once_by_a_daemon_and_its_workers(tmp_path, monkeypatch):
    """Its list of files is 22 MB for Spark's own, which each task would read anew."""
    from mlflow_safeflavor.spark_daemon import _forget_archives

    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for name in ("archived_here", "archived_too"):
            made.writestr(f"{name}.py", f"NAME = {name!r}")
    monkeypatch.syspath_prepend(str(archive))
    importlib.import_module("archived_here")
    assert str(archive) in sys.path_importer_cache
    _forget_archives()
    monkeypatch.setattr(zipimport, "_read_directory", lambda path: pytest.fail(f"read {path}"))
    importlib.invalidate_caches()  # as a worker does for each task
    assert importlib.import_module("archived_too").NAME == "archived_too"


def test_workers_that_are_forked_after_their_imports(saved_with_graph, environ, spark, session):
    """Of a daemon that has imported this package, as ``docs/spark.md`` says."""
    from pyspark.sql.pandas.functions import pandas_udf

    spark.stop()
    made = session("local[2]", **{"spark.python.daemon.module": "mlflow_safeflavor.spark_daemon"})
    try:

        def forked(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
            command = psutil.Process(os.getppid()).cmdline()
            for batch in batches:
                shared = gc.get_freeze_count() > 0 and "onnxruntime" in sys.modules
                yield pd.Series([f"{command[-2]} {shared}"] * len(batch))

        forked.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
        udf: Any = pandas_udf(forked, "string")  # type: ignore[call-overload]  # told by annotations
        answers = made.range(0, 80, 1, 8).select(udf("id").alias("told")).collect()
        assert {row["told"] for row in answers} == {"mlflow_safeflavor.spark_daemon True"}
        wanted = natively(saved_with_graph, TEXTS).to_dict(orient="records")
        assert rows_of(score(table_of(made), saved_with_graph)) == wanted
    finally:
        made.stop()
