"""How many threads: the logic, on faked machines."""

from __future__ import annotations

import os

import pytest

from mlflow_safeflavor.environment import threads as cpu
from mlflow_safeflavor.environment.threads import find_budget
from mlflow_safeflavor.machine import available_cpus

V2 = "0::/service\n"
V1 = "4:memory:/kubepods/pod1\n3:cpu,cpuacct:/kubepods/pod1\n1:name=systemd:/\n"


@pytest.fixture
def cores(monkeypatch):
    """``cores(8)``: as many as this process may run on."""

    def have(count):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)

    have(8)
    return have


@pytest.fixture
def machine(tmp_path, cores):
    """``machine(files, processes)``: a root folder.

    Processes from this one outwards, as command lines.
    """

    def make(files=None, processes=()):
        contents = dict(files or {})
        for i, command in enumerate(processes):
            process = "self" if i == 0 else str(100 + i)
            parent = 100 + i + 1 if i + 1 < len(processes) else 0
            contents[f"proc/{process}/cmdline"] = "\0".join(command) + "\0"
            contents[f"proc/{process}/stat"] = f"7 (a (odd) name) S {parent} 7 7 0"
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


def v2(**quotas):
    """``v2(service="50000 100000")``.

    Cpu.max of cgroups below the root, and the one this process is in.
    """
    files = {
        f"sys/fs/cgroup/{name}/cpu.max".replace("root/", ""): value
        for name, value in quotas.items()
    }
    return {"proc/self/cgroup": V2, **files}


def v1(quota, period="100000", where="sys/fs/cgroup/cpu,cpuacct/kubepods/pod1"):
    return {
        "proc/self/cgroup": V1,
        f"{where}/cpu.cfs_quota_us": quota,
        f"{where}/cpu.cfs_period_us": period,
    }


@pytest.mark.parametrize(("files", "quota"), [
    ({}, None),
    (v2(service="max 100000"), None),
    (v2(service="150000 100000"), 1.5),
    # inside a container the path may be the host's, and the root one's own
    (v2(root="50000 100000"), 0.5),
    (v2(root="400000 100000", service="200000 100000"), 2.0),
    (v2(root="100000 100000", service="200000 100000"), 1.0),
    (v2(service="garbage"), None),
    (v2(service="100000 0"), None),
    (v1("-1"), None),
    (v1("250000"), 2.5),
    (v1("50000", where="sys/fs/cgroup/cpu,cpuacct"), 0.5),
    (v1("50000", where="sys/fs/cgroup/cpu"), 0.5),
    (v1("200000", "50000"), 4.0),
    (v1("many"), None),
])  # fmt: skip
def test_quota(machine, files, quota):
    assert find_budget(environ={}, root=machine(files)).quota == quota


@pytest.mark.parametrize(
    ("quota", "threads"), [("50000", 1), ("100000", 1), ("199999", 1), ("200000", 2), ("990000", 8)]
)
def test_threads_fit_into_quota_and_affinity(machine, quota, threads):
    root = machine(v2(service=f"{quota} 100000"))
    assert find_budget(environ={}, root=root).threads == threads
    assert available_cpus(root) == threads


SERVER = [
    "/usr/bin/python",
    "/usr/bin/uvicorn",
    "--host",
    "0.0.0.0",
    "mlflow.pyfunc.scoring_server.app:app",
]
WORKER = [
    "/usr/bin/python",
    "-c",
    "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)",
]
SHELL = ["bash", "-c", "exec uvicorn --workers 9 mlflow.pyfunc.scoring_server.app:app"]


@pytest.mark.parametrize(("processes", "environ", "workers"), [
    ([["python", "notebook.py"]], {}, 1),
    ([SERVER, SHELL], {}, 1),
    ([WORKER, [*SERVER, "--workers", "4"]], {}, 4),
    ([WORKER, [*SERVER, "--workers=4"]], {}, 4),
    ([WORKER, ["/usr/bin/python", "/usr/bin/gunicorn", "-w", "3", "app"], SHELL], {}, 3),
    ([WORKER, ["uvicorn", "--workers", "2", "app"]], {"MLFLOW_MODELS_WORKERS": "7"}, 2),
    ([SERVER], {"WEB_CONCURRENCY": "5"}, 5),
    ([SERVER], {"MLFLOW_MODELS_WORKERS": "7"}, 1),
    ([["python", "-c", "serve()"]], {"MLFLOW_MODELS_WORKERS": "2"}, 2),
    ([["python", "-c", "serve()"]], {"MLFLOW_MODELS_WORKERS": "many"}, 1),
    ([["python", "train.py", "--workers", "6"]], {}, 1),
    ([], {}, 1),
], ids=str)  # fmt: skip
def test_workers(machine, processes, environ, workers):
    assert find_budget(environ=environ, root=machine(processes=processes)).workers == workers


@pytest.mark.parametrize(("count", "quota", "workers", "threads"), [
    (8, "max", 2, 4), (8, "max", 3, 2), (8, "max", 8, 1), (8, "max", 20, 1), (2, "max", 2, 1),
    (64, "400000", 2, 2),
    (64, "150000", 2, 1),
])  # fmt: skip
def test_workers_share_what_there_is(machine, cores, count, quota, workers, threads):
    cores(count)
    root = machine(v2(service=f"{quota} 100000"), [WORKER, [*SERVER, "--workers", str(workers)]])
    budget = find_budget(environ={}, root=root)
    assert budget.threads == threads
    assert budget.threads * workers <= count or budget.threads == 1


def test_the_user_decides(machine):
    root = machine(v2(service="100000 100000"), [WORKER, [*SERVER, "--workers", "4"]])
    assert find_budget(6, environ={"OMP_NUM_THREADS": "3"}, root=root).threads == 6
    assert find_budget(environ={"OMP_NUM_THREADS": "3"}, root=root).threads == 3
    assert find_budget(environ={"OMP_NUM_THREADS": "0"}, root=root).threads == 1
    assert find_budget(environ={"OMP_NUM_THREADS": "2,1"}, root=root).threads == 1


def test_the_log_line_says_what_was_found_and_chosen(machine):
    root = machine(v2(service="350000 100000"), [WORKER, [*SERVER, "--workers", "2"]])
    assert (
        str(find_budget(environ={}, root=root)) == "8 cores, a quota of 3.5, 2 workers: 1 threads"
    )
    assert (
        str(find_budget(4, environ={}, root=root))
        == "8 cores, a quota of 3.5, 2 workers: 4 threads by num_threads"
    )


@pytest.mark.parametrize(("processes", "serves"), [
    ([["uvicorn", "--workers", "1", "mlflow.pyfunc.scoring_server.app:app"]], True),
    ([["python", "-c", "spawn_main()"],
        ["python", "/bin/uvicorn", "mlflow.pyfunc.scoring_server.app:app"]], True),
    ([["gunicorn", "-w", "3", "mlflow.pyfunc.scoring_server.wsgi:app"]], True),
    ([["python", "-c", "import sys; from somewhere import container; container.serve()"]], True),
    ([["uvicorn", "my.own:app"]], False),
    ([["python", "train.py"], ["bash"]], False),
    ([], False),
], ids=str)  # fmt: skip
def test_what_is_a_scoring_server(machine, processes, serves):
    assert cpu.is_scoring_server(machine(processes=processes)) == serves
