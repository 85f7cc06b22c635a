"""Rows a second on Spark: the functions over columns of mlflow.transformers, of MLflow with our
model, and `mlflow_safeflavor.spark.score`, on the same rows and weights.

    python benchmarks/spark.py [--rows 2000] [--rounds 3] [--cores 1,2]

Each measures in a Spark of its own on this machine: the first pass over the rows warms up, the
second is timed. They take turns, round by round. Memory is the proportional set size of Spark's
Python workers, in all, after the second pass. The roof is what one core would do if products with
the weights were all there is to a forward. What was seen is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    PYSPARK_PYTHON=sys.executable,
    SPARK_LOCAL_IP="127.0.0.1",
    TRANSFORMERS_VERBOSITY="error",
)
# Spark gives each worker as many threads as a task has cores.
os.environ.pop("OMP_NUM_THREADS", None)
# This folder last: nothing may take this file for a library of its name.
sys.path.append(sys.path.pop(0))

from _common import (
    machine,
    median_and_spread,
    minilm_classifier,
    ratio,
    roofs,
    save_ours,
    save_peer,
    tokenizer,
)
from rich.console import Console
from rich.table import Table

WHO = ("mlflow.transformers", "ours, spark_udf", "ours, score", "ours, score, one import")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]

console = Console(width=None if sys.stdout.isatty() else 120)


def measure(who: str, folder: str, rows: int, cores: int) -> dict[str, float]:
    """Seconds of the second pass, and MB of all workers after it."""
    import mlflow.pyfunc
    import pandas as pd
    import psutil
    from pyspark.sql import SparkSession

    from mlflow_safeflavor.spark import score

    builder = (
        SparkSession.builder.master(f"local[{cores}]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
    )
    if who == WHO[3]:
        builder = builder.config("spark.python.daemon.module", "mlflow_safeflavor.spark_daemon")
    spark = builder.getOrCreate()
    table = spark.createDataFrame(pd.DataFrame({"text": texts_of(rows)}))
    table = table.repartition(4 * cores).cache()
    table.count()
    if who in WHO[2:]:
        scored = score(table, folder)
    else:
        udf = mlflow.pyfunc.spark_udf(spark, folder, result_type="string")
        scored = table.withColumn("prediction", udf("text"))
    for _ in range(2):
        started = time.perf_counter()
        scored.write.format("noop").mode("overwrite").save()
        seconds = time.perf_counter() - started
    memory = sum(map(pss_of_worker, psutil.Process().children(recursive=True)))
    spark.stop()
    return {"seconds": seconds, "megabytes": memory / 1e6}


def texts_of(rows: int) -> list[str]:
    """Lengths as of natural texts: most are short, few are long."""
    return [" ".join(WORDS[j % len(WORDS)] for j in range(3 + (i * i) % 61)) for i in range(rows)]


def roof(rows: int) -> tuple[float, float]:
    """GFLOP/s of one core, and rows a second if products with the weights were all.

    In a process of its own: it ties itself to one core.
    """
    import torch

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokens = tokenizer()(texts_of(rows))["input_ids"]
    layers = minilm_classifier().bert.encoder.modules()
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    most = max(roofs().values())
    return most, most * 1e9 * rows / (2 * weights * sum(map(len, tokens)))


def pss_of_worker(process: Any) -> int:
    """Bytes, of one of Spark's Python workers or the daemon that they are forked from; else 0."""
    import psutil

    try:
        command = process.cmdline()
        return process.memory_full_info().pss if "pyspark.worker" in command else 0
    except psutil.Error:  # gone, or not yet reaped
        return 0


def in_a_process(who: str, folder: Path, rows: int, cores: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure"]
    done = subprocess.run(
        [*command, json.dumps([who, str(folder), rows, cores])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", default="1,2")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*json.loads(given.measure))))
        return
    console.print(machine())
    with TemporaryDirectory() as scratch:
        model = minilm_classifier()
        folders = {
            WHO[0]: save_peer(model, "text-classification", Path(scratch) / "theirs"),
            WHO[1]: (ours := save_ours(model, Path(scratch) / "ours")),
            WHO[2]: ours,
            WHO[3]: ours,
        }
        cores = [int(part) for part in given.cores.split(",")]
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(given.rounds):
            for count in cores:
                for who in WHO:
                    one = in_a_process(who, folders[who], given.rows, count)
                    found.setdefault((who, count), []).append(one)
    show(found, given.rows)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        gigaflops, fastest = pool.submit(roof, given.rows).result()
    console.print(f"roof of one core: {gigaflops:.0f} GFLOP/s, {fastest:.0f} rows/s")


def show(found: dict[tuple[str, int], list[dict[str, Any]]], rows: int) -> None:
    """The table: medians with their spread, and ratios."""
    table = Table("", "cores", "rows/s", "to mlflow.transformers", "MB of all workers", "ratio")
    for (who, cores), runs in found.items():
        theirs = found[WHO[0], cores]
        seconds, their_seconds = ([run["seconds"] for run in one] for one in (runs, theirs))
        memory, their_memory = ([run["megabytes"] for run in one] for one in (runs, theirs))
        faster, low, high = ratio(their_seconds, seconds)
        table.add_row(
            who,
            str(cores),
            median_and_spread([rows / second for second in seconds]),
            f"{faster:.2f} ({low:.2f}–{high:.2f})",
            median_and_spread(memory),
            f"{statistics.median(memory) / statistics.median(their_memory):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
