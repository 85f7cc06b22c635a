"""How many threads torch takes, in real processes."""

from __future__ import annotations

import json

import pytest

from mlflow_safeflavor.environment import threads as cpu

REPORT = """
import json, os, sys
from mlflow_safeflavor.environment import threads as cpu
os.sched_getaffinity = lambda _: {0, 1}
budget = cpu.limit_threads(int(sys.argv[1]))
assert "torch" not in sys.modules
import torch
spin = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
print(json.dumps({"threads": torch.get_num_threads(), "said": budget.threads, **spin}))
"""


@pytest.mark.parametrize(("requested", "env", "threads", "spin"), [
    (0, {}, 2, str(cpu.SPIN_COUNT)),
    (1, {}, 1, None),
    (2, {}, 2, str(cpu.SPIN_COUNT)),
    (0, {"OMP_NUM_THREADS": "1"}, 1, None),
    (0, {"GOMP_SPINCOUNT": "7"}, 2, "7"),
    (0, {"OMP_WAIT_POLICY": "PASSIVE"}, 2, None),
])  # fmt: skip
def test_torch_starts_with_what_was_chosen(clean_process, requested, env, threads, spin):
    found = json.loads(clean_process(REPORT, str(requested), env=env).stdout)
    assert found == {
        "threads": threads, "said": threads, "GOMP_SPINCOUNT": spin,
        "OMP_WAIT_POLICY": env.get("OMP_WAIT_POLICY"),
    }  # fmt: skip
