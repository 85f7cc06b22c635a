"""A call that was watched leaves nothing behind in its thread."""

from __future__ import annotations

import subprocess
import sys

# 3.11 never gets past a traced call while it thinks that an exception waits for the thread.
TRACED = """
import sys
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.bounds import within

def busy():
    while True:
        pass

def swallows():
    try:
        busy()
    except BaseException:
        return 2

def trace(after):
    print(after, flush=True)
    sys.settrace(lambda *_: None)
    (lambda: 3)()
    sys.settrace(None)

assert within(0, lambda: 1) == 1
trace("one that ended in time")
try:
    within(0, busy, most_seconds=0.1, first_look=0.05)
except StructureError as error:
    trace("one that was interrupted")
assert within(0, swallows, most_seconds=0.1, first_look=0.05) == 2
trace("one that swallowed the interruption")
"""


def test_calls_after_it_can_be_traced():
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "time",
        "interrupted",
        "interruption",
    ]
