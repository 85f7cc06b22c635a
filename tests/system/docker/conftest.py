"""A Docker engine with the base image in it.

Without an engine, tests here are skipped, in CI they fail.

This folder is no package: as one it would stand in the way of the library that MLflow imports as
``docker``.
"""

from __future__ import annotations

import os

import pytest
from system.docker.base_image import base_image
from system.docker.engine import NoEngineError, running_engine
from system.docker.pip_settings import torch_wheels


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skip here, not in the fixture, so that the summary has one line for all skipped tests."""
    try:
        return (yield)
    except NoEngineError as error:
        if os.environ.get("CI"):
            pytest.fail(f"Docker tests cannot be skipped in CI: {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def engine():
    """A running engine; whatever tests make in it is removed."""
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def torch_index(engine):
    """What models are saved with, so that pip finds torch's build inside the image.

    The base image is there, too.
    """
    with base_image(engine) as stands_in:
        folder = torch_wheels()
        yield "auto" if folder is None or not stands_in else str(folder)
