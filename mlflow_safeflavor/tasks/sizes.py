"""Free sizes of arrays: dimensions that a forward takes in other sizes than the example's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["free_sizes"]


def free_sizes(
    forward: Callable[[Mapping[str, np.ndarray]], object], arrays: Mapping[str, np.ndarray]
) -> dict[str, list[int]]:
    """Shape of each array with -1 for rows and for sizes that ``forward`` was seen to vary.

    Args:
        forward: Raises where it does not take the arrays.
        arrays: An example that it takes.
    """
    places = [(name, axis) for name, array in arrays.items() for axis in range(1, array.ndim)]
    length = {(name, axis): arrays[name].shape[axis] for name, axis in places}
    together = [
        [place for place in places if length[place] == size]
        for size in sorted(set(length.values()))
    ]
    free: set[tuple[str, int]] = set()
    # Dimensions of equal length first, together, as ids and their mask belong together; then each
    # by itself. One longer, then one shorter, as the example may be the longest that fits.
    for group in [*together, *([place] for place in places)]:
        if not free.issuperset(group) and any(
            _takes(forward, arrays, group, step) for step in (1, -1)
        ):
            free.update(group)
    return {
        name: [
            -1 if axis == 0 or (name, axis) in free else size
            for axis, size in enumerate(array.shape)
        ]
        for name, array in arrays.items()
    }


def _takes(
    forward: Callable[[Mapping[str, np.ndarray]], object],
    arrays: Mapping[str, np.ndarray],
    places: list[tuple[str, int]],
    step: int,
) -> bool:
    changed = dict(arrays)
    for name, axis in places:
        size = changed[name].shape[axis]
        if size + step < 1:
            return False  # an array without entries
        # One longer repeats the last entry, which is as valid as it was the first time.
        changed[name] = changed[name].take(np.arange(size + step).clip(max=size - 1), axis)
    try:
        forward(changed)
    except Exception:  # a forward may raise anything at what it was not made for
        return False
    return True
