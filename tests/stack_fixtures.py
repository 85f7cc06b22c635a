"""PostgreSQL, S3 and an MLflow tracking server, started once for all tests that need them.

For test modules that say ``pytest_plugins = "stack_fixtures"``. Where a program is missing these
tests are skipped, and with ``CI=true`` they fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cutting_proxy import CuttingProxy, cutting_proxy
from parts import LocalParts, MissingPartError

PATIENCE = {
    # What is interrupted here stays so: nobody needs to try for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "AWS_MAX_ATTEMPTS": "1",
}
"""Variables of clients and of the tracking server."""


class Running(NamedTuple):
    """The parts, and a proxy before each of two.

    Everybody, also the tracking server, asks S3 by ``to_s3``.
    """

    parts: LocalParts
    to_tracking: CuttingProxy
    to_s3: CuttingProxy


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """The running parts; a test that kills one of them starts it again."""
    # Not below pytest's folder: where this is root, PostgreSQL's user could not enter it.
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o755)
    environ = dict(PATIENCE)
    try:
        parts = LocalParts(folder, server_environ=environ)
        with cutting_proxy(port_of(parts.s3_url)) as to_s3:
            environ["MLFLOW_S3_ENDPOINT_URL"] = to_s3.url
            with parts, cutting_proxy(port_of(parts.tracking_uri)) as to_tracking:
                yield Running(parts, to_tracking, to_s3)
    except MissingPartError as error:
        if os.environ.get("CI"):
            pytest.fail(f"Tests of the stack cannot be skipped in CI: {error}", pytrace=False)
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder)


def port_of(url: str) -> int:
    """The port at the end of an address."""
    return int(url.rpartition(":")[2])


@pytest.fixture
def parts(running: Running) -> LocalParts:
    """PostgreSQL, S3 and the tracking server, all of them running.

    A test that failed may have left one dead.
    """
    running.parts.start()
    return running.parts


@pytest.fixture
def to_tracking(running: Running) -> Iterator[CuttingProxy]:
    """A proxy between clients and the tracking server."""
    yield running.to_tracking
    running.to_tracking.mend()


@pytest.fixture
def to_s3(running: Running) -> Iterator[CuttingProxy]:
    """A proxy between everybody and the S3 server."""
    yield running.to_s3
    running.to_s3.mend()
