"""Spark on this machine. For test modules that say ``pytest_plugins = "spark_fixtures"``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def _session(master: str, **settings: str) -> SparkSession:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false")
    settings = {
        "spark.driver.memory": "1g",
        "spark.driver.host": "127.0.0.1",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "4",
        **settings,
    }
    if jars := os.environ.get("SAFEFLAVOR_DELTA_JARS"):
        # For all tests: jars are the JVM's, which sessions of a process share.
        settings |= {
            "spark.jars": jars,
            "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
            "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
            # Of a table's log, 50 by default.
            "spark.databricks.delta.snapshotPartitions": "2",
        }
    for name, value in settings.items():
        builder = builder.config(name, value)
    made = builder.getOrCreate()
    made.sparkContext.setLogLevel("ERROR")
    return made


@pytest.fixture(scope="module")
def environ() -> Iterator[pytest.MonkeyPatch]:
    """Spark's workers run this Python, and count threads by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield patch


@pytest.fixture(scope="module")
def session(environ: pytest.MonkeyPatch) -> Callable[..., SparkSession]:
    """``session(master, **settings)``: Spark in this process, which can have one at a time."""
    return _session


@pytest.fixture(scope="module")
def spark(environ: pytest.MonkeyPatch) -> Iterator[SparkSession]:
    """Spark in this process, with two workers."""
    made = _session("local[2]")
    yield made
    made.stop()
