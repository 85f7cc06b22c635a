"""Where metrics are served; what they count is seen in ``tests/system/test_server.py``."""

import os
import time

import pytest

from mlflow_safeflavor.server.metrics import Metrics, address_of


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("9090", ("127.0.0.1", 9090)),
        ("0.0.0.0:9090", ("0.0.0.0", 9090)),
        (":9090", ("127.0.0.1", 9090)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_places(text, place):
    assert address_of(text) == place


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners")
def test_the_folder_is_one_for_a_server_and_this_users_alone(tmp_path, monkeypatch):
    from mlflow_safeflavor.server import shared

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = shared.shared_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shared.shared_folder() == folder
    ended = tmp_path / f"mlflow-safeflavor-server-{os.getuid()}-{os.getpid()}-1"
    ended.mkdir()
    others = tmp_path / f"mlflow-safeflavor-server-{os.getuid()}-notes"
    others.mkdir()
    shared.shared_folder()
    assert not ended.exists()
    assert others.exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners")
@pytest.mark.parametrize("kind", ["link", "open"])
def test_a_folder_that_somebody_else_may_write(tmp_path, monkeypatch, kind):
    from mlflow_safeflavor.errors import InputError
    from mlflow_safeflavor.server import shared

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = shared.shared_folder()
    if kind == "link":
        folder.rmdir()
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.chmod(0o777)
    with pytest.raises(InputError, match="not this user's alone"):
        shared.shared_folder()


def test_a_place_that_can_never_be_had_is_told(tmp_path, caplog):
    """Of one that another worker has, nothing is said: it comes when that ends."""
    pytest.importorskip("prometheus_client")
    metrics = Metrics.__new__(Metrics)
    metrics._folder = tmp_path
    with caplog.at_level("ERROR"):
        metrics.serve("192.0.2.1", 9090)  # an address of nobody's
        until = time.monotonic() + 20
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
    assert "no metrics at 192.0.2.1:9090" in caplog.text
