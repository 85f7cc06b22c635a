"""PostgreSQL, S3 and an MLflow tracking server, started once for all tests that need them.

For test modules that say ``pytest_plugins = "stack_fixtures"``. Where a program is missing these tests are skipped,
and with ``CI=true`` they fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cutting_proxy import CuttingProxy, cutting_proxy

PATIENCE = {
    # What is interrupted here stays so: nobody needs to try for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "AWS_MAX_ATTEMPTS": "1",
}
"""Variables of clients and of the tracking server."""


@pytest.fixture(scope="session")
def parts() -> Iterator:
    """The running parts; a test that kills one of them starts it again. The tracking server asks S3 by ``to_s3``."""
    from parts import LocalParts, MissingPartError

    # Not below pytest's folder: where this is root, PostgreSQL's user could not enter it.
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o755)
    try:
        made = LocalParts(folder, server_environ=dict(PATIENCE))
    except MissingPartError as error:
        folder.rmdir()
        if os.environ.get("CI"):
            pytest.fail(f"Tests of the stack cannot be skipped in CI: {error}", pytrace=False)
        pytest.skip(str(error))
    try:
        with cutting_proxy(port_of(made.s3_url)) as proxy:
            made.server_environ["MLFLOW_S3_ENDPOINT_URL"] = proxy.url
            made.to_s3 = proxy
            with made, cutting_proxy(port_of(made.tracking_uri)) as made.to_tracking:
                yield made
    finally:
        shutil.rmtree(folder)


def port_of(url: str) -> int:
    """The port at the end of an address."""
    return int(url.rpartition(":")[2])


@pytest.fixture
def to_tracking(parts) -> Iterator[CuttingProxy]:
    """A proxy between clients and the tracking server."""
    yield parts.to_tracking
    parts.to_tracking.mend()


@pytest.fixture
def to_s3(parts) -> Iterator[CuttingProxy]:
    """A proxy between everybody, also the tracking server, and the S3 server."""
    yield parts.to_s3
    parts.to_s3.mend()
