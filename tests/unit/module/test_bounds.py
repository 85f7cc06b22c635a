"""A call that was watched leaves nothing behind in its thread."""

from __future__ import annotations

import subprocess
import sys

# 3.11 never gets past a traced call while it thinks that an exception waits for the thread.
TRACED = """
import sys
from mlflow_safeflavor.module.bounds import within

assert within(0, lambda: 1) == 1
sys.settrace(lambda *_: None)
(lambda: 2)()
"""


def test_calls_after_it_can_be_traced():
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
