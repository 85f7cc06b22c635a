"""Outcome of a replay, kept on this host for the processes that load the same model next.

Of the workers of a server one answers all golden rows. The others answer the first, which shows
that they compute at all, and take its word for the rest. It counts until the machine starts again,
and for no longer than a week.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact import host_cache
from mlflow_safeflavor.artifact.weights_files import boot
from mlflow_safeflavor.environment.threads import find_budget
from mlflow_safeflavor.load.saved import Saved
from mlflow_safeflavor.machine import cpu_features
from mlflow_safeflavor.predict.parity import ParityReport

__all__ = ["Kept", "Outcome", "entry_of", "kept"]

_FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """What a replay found, in numbers; see ``LoadReport``."""

    golden_rows: int = 0
    answered_now: int = 0
    max_difference: float = 0.0
    bit_identical: bool = False

    @classmethod
    def of(cls, report: ParityReport) -> Outcome:
        """That of a report whose rows are all within tolerance."""
        count = len(report.rows)
        return cls(count, count, report.max_difference, report.bit_identical)


def entry_of(
    saved: Saved, engine: str, chosen: Mapping[str, Any], differences: Sequence[object]
) -> str | None:
    """Name of the entry in this host's cache: a digest of all that an answer depends on.

    None where that is more than can be told: the module, which is placed anew by each process; code
    of a user, which may read anything; a loader that is not the artifact's own, whose digests were
    not compared.

    Args:
        saved: The model, with the digests of all files compared.
        engine: What answers.
        chosen: Every run-time option.
        differences: Of this environment from the recorded one.
    """
    own = saved.layout.code.resolve() in Path(__file__).resolve().parents
    if engine == "module" or saved.spec.runs or not own or not boot():
        return None
    threads = find_budget(chosen["num_threads"]).threads
    computes = (boot(), cpu_features(), engine, threads)
    here = (*computes, sorted(chosen.items()), [*map(str, differences)])
    content = saved.digest, saved.layout.read_bytes(saved.layout.mlmodel)
    return f"replay-{hashlib.sha256(repr((here, content)).encode()).hexdigest()[:32]}"


@dataclass
class Kept:
    """An entry, held by this process alone: its outcome, None where nobody has replayed yet."""

    outcome: Outcome | None = None


@contextmanager
def kept(name: str | None) -> Iterator[Kept]:
    """Hold an entry, for which others wait; the outcome that is set meanwhile is written.

    Args:
        name: From ``entry_of``; with None nothing is kept.
    """
    with nullcontext() if name is None else host_cache.entry(name) as folder:
        path = None if folder is None else folder / _FILE
        there = Kept(None if path is None else _read(path))
        before = there.outcome
        yield there  # an error leaves nothing behind
        if path is not None and there.outcome not in (before, None):
            with suppress(OSError):  # a full disk costs time, nothing else
                path.write_text(json.dumps(asdict(there.outcome)), encoding="utf-8")


def _read(path: Path) -> Outcome | None:
    # Cut short by a crash, or junk: as if it were not there.
    with suppress(OSError, ValueError, TypeError):
        if host_cache.is_fresh(path):
            found = Outcome(**json.loads(path.read_text(encoding="utf-8")))
            return found if found.golden_rows > 0 else None
    return None
