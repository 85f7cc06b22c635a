"""What a soak has seen, and what it comes to: counts, latencies, memory, and what is wrong."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _callers import BURST, FAULTS, Asked

__all__ = ["KILL", "Kill", "Memory", "Seen", "figures", "plot", "settle", "show"]

KILL = "a worker is killed"
WINDOWS = 120
"""Points of a plot, at most."""


@dataclass
class Kill:
    """A worker was killed between two moments, and with it the connections of these ports."""

    before: float
    after: float
    ports: set[int]


@dataclass
class Memory:
    """Bytes: ``pss`` of all workers, and what of the oldest one is no file's.

    ``whole`` says whether all workers had loaded the model.
    """

    at: float
    pss: int
    oldest: int
    whole: bool


@dataclass
class Seen:
    """One run, as it was seen; times are those of ``time.monotonic``.

    Attributes:
        capacity: Good requests that were answered in a second, by callers that wait.
        rate: Good requests that were sent in a second.
        accepted: Ports of the callers that workers were busy with when the server was told to end.
        told: When that was.
        problems: What is wrong beside answers.
    """

    seconds: float
    capacity: float = 0.0
    rate: float = 0.0
    start: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)
    told: float = float("inf")
    problems: list[str] = field(default_factory=list)


def settle(seen: Seen) -> Counter[tuple[str, str]]:
    """Count (kind, outcome); who had no answer was killed with a worker, came too late, or is lost.

    Anything wrong or lost is a problem, too, with what was found.
    """
    found: Counter[tuple[str, str]] = Counter()
    for one in seen.asked:
        outcome = one.outcome if one.outcome != "silent" else _why_silent(one, seen)
        found[one.kind, outcome] += 1
        if outcome in ("wrong", "lost"):
            began, ended = (moment - seen.start for moment in (one.began, one.ended))
            seen.problems.append(f"{outcome}, {one.kind}, {began:.2f}–{ended:.2f} s: {one.why}")
    return found


def _why_silent(one: Asked, seen: Seen) -> str:
    for kill in seen.kills:
        if one.port in kill.ports and one.began <= kill.after and kill.before <= one.ended:
            return "killed with its worker"
    if one.ended >= seen.told and one.port not in seen.accepted:
        return "came when the server ended"
    return "lost"


def met(seen: Seen) -> dict[str, int]:
    """How often each fault happened; a request that was refused as one too many had none."""
    counts = Counter(one.kind for one in seen.asked if one.status != 503)
    return {
        KILL: len(seen.kills),
        BURST: len(seen.bursts),
        **{kind: counts[kind] for kind in FAULTS},
    }


def growth(seen: Seen) -> dict[str, dict[str, float]]:
    """Bytes early, from a fifth to two fifths of the time, and late, in the last fifth."""
    part = seen.seconds / 5

    def between(first: int, last: int) -> list[Memory]:
        start, end = seen.start + first * part, seen.start + last * part
        found = [one for one in seen.memory if start <= one.at < end]
        # Fewer workers have less memory: where it can be, of all of them.
        return [one for one in found if one.whole] or found

    def told(name: str) -> dict[str, float]:
        early, late = (
            statistics.median([getattr(found, name) for found in several] or [0])
            for several in (between(1, 2), between(4, 6))
        )
        return {"early": early, "late": late, "growth": late - early}

    return {"pss": told("pss"), "oldest": told("oldest")}


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    if len(seconds) < 2:
        return (seconds[0], seconds[0]) if seconds else (math.nan, math.nan)
    cut = statistics.quantiles(seconds, n=100, method="inclusive")
    return cut[49], cut[98]


def waited(asked: Iterable[Asked]) -> list[float]:
    """Seconds of good requests from when they were due, so that a late caller counts, too."""
    return [one.ended - one.due for one in asked if one.kind == "good" and one.outcome == "right"]


def series(seen: Seen) -> dict[str, list[float]]:
    """What a plot shows, window by window."""
    width = max(1.0, seen.seconds / WINDOWS)
    windows: list[list[Asked]] = [[] for _ in range(math.ceil(seen.seconds / width))]
    for one in seen.asked:
        place = int((one.due - seen.start) // width)
        if 0 <= place < len(windows):
            windows[place].append(one)
    both = [percentiles(waited(window)) for window in windows]
    return {
        "seconds": [i * width for i in range(len(windows))],
        "p50": [median for median, _ in both],
        "p99": [most for _, most in both],
        **{
            outcome: [sum(one.outcome == outcome for one in window) / width for window in windows]
            for outcome in ("right", "refused")
        },
    }


def figures(seen: Seen) -> dict[str, Any]:
    """All figures of a run, for people and for JSON."""
    found = settle(seen)
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in found.items():
        outcomes[outcome] += count
    in_time = [one for one in seen.asked if seen.start <= one.due < seen.start + seen.seconds]
    faults = [*seen.bursts, *(kill.before for kill in seen.kills)]
    quiet = [one for one in in_time if not any(0 <= one.due - at < 10 for at in faults)]
    median, most = percentiles(waited(in_time))
    last = [one.ended - seen.told for one in seen.asked if one.port in seen.accepted]
    return {
        "seconds": seen.seconds,
        "capacity": seen.capacity,
        "rate": seen.rate,
        "sent": len(seen.asked),
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "kinds": {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(found.items())},
        "statuses": Counter(str(one.status) for one in seen.asked if one.status),
        "met": met(seen),
        "p50": median,
        "p99": most,
        "p50_quiet": percentiles(waited(quiet))[0],
        "p99_quiet": percentiles(waited(quiet))[1],
        "callers_late_p99": percentiles([one.began - one.due for one in in_time])[1],
        "memory": growth(seen),
        "accepted_at_end": len(seen.accepted),
        "seconds_to_end": max(last, default=0.0),
        "problems": seen.problems,
        "series": series(seen),
    }


OUTCOMES = (
    "right", "refused", "left", "killed with its worker", "came when the server ended", "wrong",
    "lost",
)  # fmt: skip


def show(told: Mapping[str, Any]) -> None:
    """Print a run."""
    print(
        f"{told['seconds'] / 60:.1f} minutes; {told['capacity']:.0f} requests/s can be answered, "
        f"{told['rate']:.0f} were sent, and faults"
    )
    print(
        f"  {told['sent']} requests: " + ", ".join(f"{n} {o}" for o, n in told["outcomes"].items())
    )
    print("  statuses: " + ", ".join(f"{n} × {s}" for s, n in sorted(told["statuses"].items())))
    print("  faults: " + ", ".join(f"{n} × {kind}" for kind, n in told["met"].items()))
    print(
        f"  half within {1e3 * told['p50']:.0f} ms, 99 of 100 within {1e3 * told['p99']:.0f} ms; "
        f"{1e3 * told['p50_quiet']:.0f} and {1e3 * told['p99_quiet']:.0f} ms but for 10 s after "
        f"each kill and burst; 99 of 100 sent {1e3 * told['callers_late_p99']:.0f} ms late or less"
    )
    print(
        f"  {told['accepted_at_end']} requests were with workers when SIGTERM came, the last of "
        f"which was answered {told['seconds_to_end']:.1f} s later"
    )
    for name, words in (
        ("pss", "all workers (PSS)"),
        ("oldest", "the worker that lived on, without files"),
    ):
        sizes = {step: size / 1e6 for step, size in told["memory"][name].items()}
        print(
            f"  memory of {words}: {sizes['early']:.0f} MB, then {sizes['late']:.0f} MB "
            f"({sizes['growth']:+.1f} MB)"
        )
    for problem in told["problems"][:50]:
        print(f"  PROBLEM: {problem}")
    print("something is wrong" if told["problems"] else "nothing was wrong, and nothing lost")


def plot(seen: Seen, told: Mapping[str, Any], file: Path) -> None:
    """Latency, requests and memory over time; lines where workers were killed and bursts came."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as letters: a fifth of the bytes
    from matplotlib import pyplot

    drawn = told["series"]
    figure, (above, middle, below) = pyplot.subplots(
        3, figsize=(9, 7), sharex=True, layout="constrained"
    )
    for name in ("p50", "p99"):
        above.plot(drawn["seconds"], [1e3 * value for value in drawn[name]], label=name)
    above.set(yscale="log", ylabel="ms")
    for name in ("right", "refused"):
        middle.plot(drawn["seconds"], drawn[name], label=name)
    # A burst is ten times what else comes.
    middle.set(yscale="symlog", ylabel="requests/s", ylim=(0, None))
    at = [found.at - seen.start for found in seen.memory]
    below.plot(at, [found.pss / 1e6 for found in seen.memory], label="all workers (PSS)")
    below.plot(at, [found.oldest / 1e6 for found in seen.memory], label="never killed (no file's)")
    below.set(ylabel="MB", xlabel="s", ylim=(0, None))
    for axes in (above, middle, below):
        for kill in seen.kills:
            axes.axvline(kill.before - seen.start, color="#c44e52", linewidth=0.8)
        for burst in seen.bursts:
            axes.axvline(burst - seen.start, color="gray", linewidth=0.8, linestyle=":")
        axes.legend(loc="lower left", fontsize="small")
    above.set_title("red: a worker is killed; dots: a burst", fontsize="small")
    figure.savefig(file)
