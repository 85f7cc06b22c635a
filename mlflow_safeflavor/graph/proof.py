"""The proof that a graph answers as its module does, and whether its bits stay the same.

Both are run on inputs of many sizes. Outputs must lie within a tolerance. Whether a row has the
same bits for any number of threads, alone and in a batch, unpadded and padded, is measured and
recorded, since ONNX Runtime does not promise it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlflow_safeflavor.graph.engine import Session
from mlflow_safeflavor.graph.graph import Input

__all__ = ["TEXT", "Arrays", "Facts", "Refusal", "prove"]

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Mapping[str, np.ndarray]]

# Inputs of shape (rows, length) that go together.
TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids"))


class Refusal(Exception):
    """Why a forward has no graph, in words."""


@dataclass
class Facts:
    """Findings of a proof.

    Attributes:
        dtype: What the graph was computed in.
        inputs: On how many inputs the graph answered as the module.
        difference: The largest, of any output.
        threads, batch, padding: Whether all bits of a row were the same for each number of threads,
            alone and in a batch, without padding and with it; None where that was never tried.
    """

    dtype: str = "float32"
    inputs: int = 0
    difference: float = 0.0
    threads: bool | None = None
    batch: bool | None = None
    padding: bool | None = None
    sizes: dict[str, set[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As ``graph.json`` has it."""
        return {
            name: getattr(self, name)
            for name in ("dtype", "inputs", "difference", "threads", "batch", "padding")
        }

    def saw(self, name: str, same: bool) -> None:
        """Note one comparison of bits; one that fails counts for all."""
        setattr(self, name, same and getattr(self, name) is not False)


def prove(
    module: Run,
    opened: Callable[[int], Session],
    threads: Sequence[int],
    inputs: Sequence[Input],
    example: Arrays,
    limit: int | None,
    seed: int,
) -> Facts:
    """Run a module and its graph on many inputs.

    Args:
        module: The recorded forward. Inputs that it refuses are left out.
        opened: Makes a session of the graph with so many threads; the first has the tolerance.
        threads: One, two and all.
        inputs: Of the graph.
        example: Arrays that it was recorded with.
        limit: Most tokens of a text.
        seed: Of the sizes and values that are drawn.

    Raises:
        Refusal: An output differs by more than the tolerance, or no input could be found.
    """
    fewest, *others = threads
    # Each session packs most of the weights once more: there is never more than one of them.
    facts, digests = _compare(
        module, opened(fewest), inputs, example, _probes(inputs, example, limit, seed)
    )
    if not facts.inputs:
        raise Refusal("no input could be found on which the module runs")
    for count in others:
        session = opened(count)
        probes = _probes(inputs, example, limit, seed)  # the same again
        for probe, digest in zip(probes, digests, strict=True):
            if digest is not None:
                facts.saw("threads", _digest(_run(session, probe)) == digest)
        del session
    return facts


def _compare(
    module: Run,
    session: Session,
    inputs: Sequence[Input],
    example: Arrays,
    probes: Iterator[Arrays],
) -> tuple[Facts, list[bytes | None]]:
    """Facts of a session beside the module; digests of its answers, None where none is wanted."""
    facts, digests = Facts(session.dtype), list[bytes | None]()
    for probe in probes:
        try:
            wanted = module(probe)
        # The module does not take such sizes, so there is no answer that could be wrong.
        except Exception:
            digests.append(None)
            continue
        found = _run(session, probe)
        off = _difference(wanted, found, probe, session.tolerance)
        facts.difference = max(facts.difference, off)
        facts.inputs += 1
        for known in inputs:
            for name, size in zip(known.shape, probe[known.name].shape, strict=True):
                if isinstance(name, str):
                    facts.sizes.setdefault(name, set()).add(size)
        digests.append(_digest(found))
        _compare_rows(session, probe, found, inputs, facts)
    return facts, digests


def _run(session: Run, inputs: Arrays) -> Mapping[str, np.ndarray]:
    try:
        return session(inputs)
    except Exception as error:  # the runtime has its own ways to refuse a shape
        raise Refusal(
            f"the graph fails on {_shapes(inputs)}: {type(error).__name__}: {error}"
        ) from error


def _shapes(inputs: Arrays) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())


def _difference(
    wanted: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    inputs: Arrays,
    tolerance: float,
) -> float:
    largest = 0.0
    if wanted.keys() != found.keys():
        raise Refusal(f"the graph gives {sorted(found)}, and the module {sorted(wanted)}")
    for name, array in wanted.items():
        other = found[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            raise Refusal(
                f"the graph gives {name} as {other.dtype}{list(other.shape)}, not "
                f"{array.dtype}{list(array.shape)}"
            )
        if array.dtype.kind != "f":
            if not np.array_equal(array, other):
                raise Refusal(f"the graph gives other values of {name} on {_shapes(inputs)}")
            continue
        # Infinities (masked logits) and NaNs have no difference: their places must be the same.
        plain = np.isfinite(array)
        if not np.array_equal(array[~plain], other[~plain], equal_nan=True):
            raise Refusal(f"the graph gives other infinite values of {name} on {_shapes(inputs)}")
        if plain.any():
            off = float(np.abs(array[plain] - other[plain]).max())
            # Of the largest value, since small ones may be differences of large ones.
            allowed = tolerance * (1 + float(np.abs(array[plain]).max()))
            if not off <= allowed:  # so that a NaN is refused, too
                raise Refusal(
                    f"the graph differs by {off:.1e} in {name} on {_shapes(inputs)}, more than "
                    f"{allowed:.1e}"
                )
            largest = max(largest, off)
    return largest


def _digest(outputs: Mapping[str, np.ndarray]) -> bytes:
    """Of all bits: outputs of a whole proof, with a vocabulary's logits, are gigabytes."""
    digest = hashlib.sha256()
    for name in sorted(outputs):
        array = outputs[name]
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


# --- rows of a batch, each by itself -------------------------------------------------------------


def _compare_rows(
    session: Run, probe: Arrays, found: Arrays, inputs: Sequence[Input], facts: Facts
) -> None:
    """Ask for each of the first three rows alone, and without its padding."""
    # Only where all inputs have the same rows: else the row of one is not the row of another.
    rows = {known.shape[0] for known in inputs if known.shape}
    if (
        len(rows) != 1
        or not isinstance(next(iter(rows)), str)
        or any(not known.shape for known in inputs)
    ):
        return
    count = next(iter(probe.values())).shape[0]
    texts = {known.name for known in inputs if known.shape[1:2] == ("length",)}
    outputs = [name for name, array in found.items() if array.ndim and array.shape[0] == count]
    for i in range(min(count, 3)):
        row = {name: array[i : i + 1] for name, array in probe.items()}
        # A single row is the whole probe, which was answered already.
        alone = _run(session, row) if count > 1 else found
        if count > 1:
            facts.saw(
                "batch",
                all(alone[name].tobytes() == found[name][i : i + 1].tobytes() for name in outputs),
            )
        mask = row.get("attention_mask")
        if mask is None or mask.ndim != 2 or mask.all() or not mask.any():
            continue
        kept = np.flatnonzero(mask[0])
        # Padded on the left, positions without the padding would be others; a gap has no meaning.
        if kept[-1] - kept[0] + 1 != len(kept) or kept[0] != 0:
            continue
        short = _run(
            session,
            {
                name: array[:, : len(kept)] if name in texts else array
                for name, array in row.items()
            },
        )
        facts.saw(
            "padding",
            all(
                _cut(alone[name], short[name]).tobytes() == short[name].tobytes()
                for name in outputs
            ),
        )


def _cut(padded: np.ndarray, bare: np.ndarray) -> np.ndarray:
    """An output without the positions of padding."""
    longer = padded.ndim > 1 and bare.ndim == padded.ndim and padded.shape[1] > bare.shape[1]
    return padded[:, : bare.shape[1]] if longer else padded


# --- inputs --------------------------------------------------------------------------------------

_ROWS = (1, 2, 7, 32)
_LENGTHS = (1, 2, 3, 17, 64, 200)
# Rows times tokens of one probe, so that the proof of a large model takes a minute and not an hour.
# A single row may have more. So many numbers of a fixed size, a patch of an image, cost as a token.
_MOST_TOKENS, _PATCH = 1024, 768
_AT_RANDOM = 8
_MOST_PROBES = 200


def _probes(
    inputs: Sequence[Input], example: Arrays, limit: int | None, seed: int
) -> Iterator[Arrays]:
    """Inputs of many sizes, with the example's values in another order, and masks of all kinds."""
    draw = np.random.default_rng(seed)
    yield example
    for i, sizes in enumerate(_sizes(inputs, example, limit, random.Random(seed))):  # noqa: S311
        yield {known.name: _values(known, sizes, example[known.name], draw, i) for known in inputs}


def _sizes(
    inputs: Sequence[Input], example: Arrays, limit: int | None, draw: random.Random
) -> Iterator[dict[str, int]]:
    """A grid of rows, lengths of texts and sizes around the example's, and some sizes at random."""
    choices: dict[str, list[int]] = {}
    for known in inputs:
        for i, (name, size) in enumerate(zip(known.shape, example[known.name].shape, strict=True)):
            if isinstance(name, str) and name not in choices:
                text = i == 1 and known.name in TEXT
                around = dict.fromkeys((1, 2, size, size + 1, 2 * size))  # of 1 and 2, some twice
                choices[name] = list(_ROWS if i == 0 else _lengths(limit) if text else around)
    rows = {known.shape[0] for known in inputs if known.shape}
    fixed = [math.prod(n for n in known.shape if isinstance(n, int)) / _PATCH for known in inputs]
    combined: list[dict[str, int]] = [{}]
    for name, numbers in choices.items():
        combined = [{**one, name: number} for one in combined for number in numbers][:_MOST_PROBES]
    if choices:
        combined += [
            {name: draw.randint(min(numbers), max(numbers)) for name, numbers in choices.items()}
            for _ in range(_AT_RANDOM)
        ]
    yield from (one for one in combined if _affordable(one, rows, max(1, *fixed)))


def _lengths(limit: int | None) -> list[int]:
    return [length for length in _LENGTHS if limit is None or length < limit] + (
        [limit] if limit else []
    )


def _affordable(sizes: Mapping[str, int], rows: set[int | str], fixed: float) -> bool:
    tokens = fixed * math.prod(sizes.values())
    return tokens <= _MOST_TOKENS or all(sizes.get(str(name), 1) == 1 for name in rows)


def _values(
    known: Input, sizes: Mapping[str, int], like: np.ndarray, draw: np.random.Generator, i: int
) -> np.ndarray:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in known.shape)
    values: np.ndarray
    if known.name == "attention_mask" and like.ndim == 2:
        values = _MASKS[i % len(_MASKS)](shape, draw).astype(like.dtype)
        return values
    if known.name == "token_type_ids" and i % 2:
        values = np.zeros(shape, like.dtype)
        return values
    # From the example: token ids, boxes and pixels that the module is known to take.
    chosen = draw.integers(like.size, size=shape)
    values = like.reshape(-1)[chosen]
    # Boxes of words, (rows, words, 4): a left side beyond the right one is an error of the module.
    if like.ndim == 3 and like.dtype.kind == "i" and shape[2] == like.shape[2]:
        boxes = like.reshape(-1, shape[2])
        values = boxes[chosen[..., 0] % len(boxes)]
    if known.name in TEXT and like.ndim == 2 and min(shape[1], like.shape[1]) > 2:
        # Some models (BART) look for the token that ends a text: as many in each row, in its place.
        inner = like[:, 1:-1].reshape(-1)
        values = inner[chosen % inner.size]
        values[:, 0], values[:, -1] = like[0, 0], like[0, -1]
    return values


def _padded(
    shape: tuple[int, ...], draw: np.random.Generator, *, left: bool, empty: bool = False
) -> np.ndarray:
    real = draw.integers(1, shape[1] + 1, size=(shape[0], 1))
    real[0] = 0 if empty else shape[1]
    places = np.arange(shape[1])[None]
    mask: np.ndarray = places >= shape[1] - real if left else places < real
    return mask


# Nothing padded, padded on the right, on the left, and with a row of nothing but padding.
_MASKS: tuple[Callable[[tuple[int, ...], np.random.Generator], np.ndarray], ...] = (
    lambda shape, draw: np.ones(shape),
    lambda shape, draw: _padded(shape, draw, left=False),
    lambda shape, draw: _padded(shape, draw, left=True),
    lambda shape, draw: _padded(shape, draw, left=False, empty=True),
)
