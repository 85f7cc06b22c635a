"""``stack.py`` and the compose file.

What is stopped after a crash, what is said where something is missing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import parts
import psutil
import pytest
import stack
import yaml
from background import Background, NotReadyError, wait_until
from click.testing import CliRunner
from compose_spec import PyOptions
from servers import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "codebuggy"
WORKER = (
    "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); "
    "time.sleep(600)"
)


@pytest.fixture
def started(tmp_path):
    """A process in the background with a worker of its own."""
    process = Background("model", tmp_path)
    process.start([sys.executable, "-c", WORKER], os.environ)
    wait_until(lambda: "up" in process.tail(), process, 60)
    yield process
    parts.stop_everything(tmp_path)


def group(process):
    """Process ids of a background process and its workers that still run."""
    pid = json.loads(process.pid_file.read_text())["pid"]
    found = [other for other in psutil.process_iter() if _group_of(other) == pid]
    return [other.pid for other in found if other.status() != psutil.STATUS_ZOMBIE]


def _group_of(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def down(folder):
    return CliRunner().invoke(stack.main, ["--folder", str(folder), "down"])


# Processes


def test_down_stops_workers_too(started):
    assert len(group(started)) == 2
    remembered = group(started)
    assert down(started.folder).exit_code == 0
    assert group_is_empty(remembered)
    assert not started.pid_file.exists()


def test_down_after_a_crash_of_the_leader(started):
    leader = json.loads(started.pid_file.read_text())["pid"]
    os.kill(leader, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while started.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started.is_running()
    (left,) = group(started)
    assert left != leader
    assert down(started.folder).exit_code == 0
    assert group_is_empty([left])


def group_is_empty(pids):
    """Orphans are zombies until process 1 collects them."""
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_number_that_is_somebody_elses_now_is_left_alone(tmp_path):
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as innocent:
        try:
            (tmp_path / "app.pid").write_text(
                json.dumps({"pid": innocent.pid, "began": time.time() - 3600})
            )
            assert not Background("app", tmp_path).is_running()
            assert down(tmp_path).exit_code == 0
            assert innocent.poll() is None
            assert not (tmp_path / "app.pid").exists()
        finally:
            innocent.kill()


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"pid": "x"}'])
def test_a_pid_file_that_is_none(tmp_path, content):
    (tmp_path / "app.pid").write_text(content)
    assert down(tmp_path).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_down_where_nothing_runs(tmp_path):
    done = down(tmp_path / "never")
    assert done.exit_code == 0
    assert "nothing" in done.output


def test_what_runs_is_not_started_twice(started):
    with pytest.raises(NotReadyError, match="runs already"):
        started.start(["sleep", "600"], os.environ)


def test_no_two_parts_share_a_port():
    """Asked for one by one, eleven ports were not distinct in 9 of 2,000 tries."""
    assert all(len(set(free_ports(11))) == 11 for _ in range(500))


def test_what_ends_at_once_is_said_with_the_end_of_its_log(tmp_path):
    process = Background("model", tmp_path)
    process.start([sys.executable, "-c", "raise SystemExit('no such model')"], os.environ)
    with pytest.raises(NotReadyError, match=r"model has ended(?s:.*)no such model"):
        wait_until(lambda: False, process, 60)
    process.stop()


def test_the_kernel_ends_it_with_whoever_started_it(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from background import Background; from "
        "pathlib import Path\n"
        "Background('s3', Path(sys.argv[2])).start(['sleep', '600'], os.environ, "
        "death_signal='KILL')"
    )
    subprocess.run([sys.executable, "-c", code, EXAMPLE, tmp_path], check=True, timeout=60)
    process = Background("s3", tmp_path)
    deadline = time.monotonic() + 60
    while process.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.is_running()


# What is missing


@pytest.mark.parametrize("option", [[], ["--local"]], ids=["containers", "processes"])
def test_a_missing_part_is_one_line_and_a_hint(tmp_path, monkeypatch, option):
    def missing(*_, **__):
        raise parts.MissingPartError("this part is not installed")

    monkeypatch.setattr(stack, "compose", missing)
    monkeypatch.setattr(parts, "_postgres_programs", missing)
    done = CliRunner().invoke(stack.main, ["--folder", str(tmp_path / "stack"), "up", *option])
    assert done.exit_code == 1
    assert "this part is not installed" in done.stderr
    assert ("make stack LOCAL=1" in done.stderr) == (not option)
    assert "Traceback" not in done.output


def test_an_engine_that_cannot_pull_says_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr(stack, "compose", lambda: ["false"])
    done = CliRunner().invoke(stack.main, ["--folder", str(tmp_path), "up"])
    assert done.exit_code == 1
    assert "this failed: false up" in done.stderr
    assert "make stack LOCAL=1" in done.stderr


# The compose file


TEXT = (EXAMPLE / "compose.yaml").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


@pytest.fixture(scope="module")
def services():
    """Services of the compose file, with YAML's anchors resolved."""
    return yaml.safe_load(TEXT)["services"]


def test_the_compose_file_is_one(tmp_path):
    settings = {**stack.container_settings(tmp_path), "APP_PORT": "8080"}
    text = VARIABLE.sub(lambda found: settings[found[1]], TEXT)
    parsed = PyOptions(apply_merge=True).from_yaml(text)
    parsed.validate()
    assert set(parsed.service_names()) == {"postgres", "s3", "mlflow", "model", "app"}
    assert parsed.services is not None
    assert parsed.services["app"].ports


def test_only_this_machine_reaches_it(services):
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_whoever_is_waited_for_has_a_health_check(services):
    waited = {name for service in services.values() for name in service.get("depends_on", {})}
    assert waited == {"postgres", "s3", "model"}
    checked = {name for name, service in services.items() if "healthcheck" in service}
    assert waited - checked == {"model"}, (
        "its check is in the image that `mlflow-safeflavor dockerfile` describes"
    )


def test_every_variable_without_a_default_is_said_by_the_command(tmp_path):
    wanted = {name for name, _, _ in VARIABLE.findall(TEXT)}
    said = {*stack.container_settings(tmp_path), "APP_PORT"}
    assert wanted == said
    assert stack.container_settings(tmp_path) == stack.container_settings(tmp_path), "they stay"
    assert (tmp_path / "containers.json").stat().st_mode & 0o077 == 0


def test_what_the_image_copies_is_all_that_the_build_sees():
    lines = (EXAMPLE / "parts.Dockerfile").read_text().splitlines()
    (copied,) = (line.split()[1:-1] for line in lines if line.startswith("COPY"))
    ignored = (EXAMPLE / ".dockerignore").read_text().split()
    assert ignored == ["*", *(f"!{name}" for name in copied)]
    assert [name for name in copied if not (EXAMPLE / name).exists()] == []
