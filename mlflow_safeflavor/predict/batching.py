"""Grouping of pieces into calls, so that time goes into tokens, not into padding or calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from mlflow_safeflavor.module.failures import is_out_of_memory
from mlflow_safeflavor.module.random_state import kept_random_state
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["cut_into_batches", "measure_forward_cost", "measures_forward_cost"]

# Tokens; on an accelerator a call may cost more, but no batch is that large.
_MOST = 4096


def cut_into_batches(
    costs: Sequence[int], max_batch_tokens: int, forward_cost: int = 0
) -> list[list[int]]:
    """Indices of ``costs`` in the batches that take the least time together.

    A batch takes ``forward_cost`` and, for each of its pieces, the cost of its longest one. Sorted
    by cost, the best batches are runs of neighbours; which runs is found by dynamic programming
    over their ends.

    Args:
        costs: Tokens of each piece; none of them needs more than one place in a batch.
        max_batch_tokens: Most tokens of a batch when its pieces are padded; a longer single piece
            goes alone.
        forward_cost: What a batch costs beside its tokens, in tokens.

    Returns:
        Batches, the longest pieces first.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    # At least 1: any number of pieces that cost 0 would fit into one batch.
    lengths = [max(1, costs[i]) for i in order]
    # Of batches that cost the same the fewest: a batch costs one more, where everything else counts
    # n + 1 times.
    n, unit = len(order), len(order) + 1
    each = 1 + unit * forward_cost
    padded, counts = unit * np.array(lengths, dtype=np.int64), np.arange(n, 0, -1)
    # best[i]: least cost of the first i pieces; before[i]: where the last batch of these begins.
    best: np.ndarray = np.zeros(unit, dtype=np.int64)
    before = [0] * unit
    low = 0
    for end in range(1, unit):
        # lengths[low] is the longest of the batch, to which the others are padded. ``low`` only
        # grows, since a batch that begins there is too large for later ends, too.
        while low < end - 1 and (end - low) * lengths[low] > max_batch_tokens:
            low += 1
        totals = best[low:end] + counts[n - end + low :] * padded[low:end]
        last = int(totals[::-1].argmin())  # the last one, so that full batches come first
        best[end], before[end] = totals[-1 - last] + each, end - 1 - last
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.insert(0, order[before[end] : end])
        end = before[end]
    return batches


def measures_forward_cost(known: int, on_cpu: bool, *, saves: bool = False) -> bool:
    """Whether this process measures ``forward_cost``, or takes the known one.

    The stored one is that of a CPU, measured once, when the model was saved, so that all hosts cut
    the same batches. On an accelerator it is measured at each load, and never stored.

    Args:
        known: As stored or asked for; 0 where it was not measured.
        on_cpu: Whether the engine is on a CPU.
        saves: Whether the model is being saved.
    """
    return not known if on_cpu else not saves


# A hook may draw random numbers: the process's generators go on as if nothing had been run.
@kept_random_state()
def measure_forward_cost(
    task: Task, engine: Engine, rows: Sequence[Row], max_batch_tokens: int
) -> int:
    """Constant cost of a forward, in tokens that take as long.

    Two forwards are timed, of the shortest piece and of a full batch of the longest one, and a line
    is drawn through both.

    Args:
        task: Encodes the rows and calls the engine.
        engine: Runs the model; it has answered these rows before, so that it is warm.
        rows: Golden rows.
        max_batch_tokens: As in ``cut_into_batches``.

    Returns:
        A power of two, at least 1: a stored 0 says that it was not measured.
    """
    params = task.check_params(task.golden(task.config))
    pieces = [piece for row in task.uncapped.encoded(rows, params) for piece in task.pieces(row)]
    shortest, longest = min(pieces, key=task.cost), max(pieces, key=task.cost)
    count = max(1, task.batch_budget(max_batch_tokens) // max(1, task.cost(longest)))
    few, many = task.cost(shortest), count * task.cost(longest)
    if task.cost(shortest) == task.cost(longest):
        return 1  # there is nothing to choose: batches are as large as they may be
    try:
        small = _seconds(lambda: task.forward(engine, [shortest], params))
        large = _seconds(lambda: task.forward(engine, [longest] * count, params))
    except Exception as error:
        if is_out_of_memory(error):
            return 1  # there is no room for full batches, so none is made fuller than it has to be
        raise
    token = (large - small) / (many - few)  # seconds
    # small = (forward_cost + few) · token
    tokens = min(_MOST, small / token - few) if token > 0 else 0
    # More digits would be noise, and noise would cut other batches, which have other last bits.
    return 1 << round(math.log2(max(1, tokens)))


def _seconds(run: Callable[[], object]) -> float:
    """Wall time of a run, the fastest of three."""
    times = []  # the least, not the mean: disturbances only ever make a run slower
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
