"""The save-time doctor: was the module damaged before it was handed over?

It looks for three things: tensors that differ from what their constructor computes, tied weights
that went apart, and values of memory that was never written. Each rule is chosen so that sound
models, fresh or trained, do not trip it; so silence is no proof, and an alarm deserves a look.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mlflow_safeflavor.errors import InputError, SafeFlavorError, WeightsError
from mlflow_safeflavor.module.construction import construct_twice, declared_ties, recipe_of
from mlflow_safeflavor.module.embedding import Embedder
from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.slots import Slot, find_meta
from mlflow_safeflavor.module.subject import Subject

__all__ = ["find_damage", "format_damage", "require_undamaged"]

# Elements looked at together: masks of a whole table would take as much memory as a copy of it.
_CHUNK = 2**24

# Trained weights lie far inside; random bits read as float32 lie outside in one of three cases.
_TINY, _HUGE = 1e-30, 1e30

_TINY_SHARE = 0.1
# Smallest number of elements of a matrix whose being constant means something.
_MATRIX = 64


def find_damage(subject: Subject) -> list[str]:
    """Signs of damage in a module, one sentence each; empty for a sound one.

    Where its constructor cannot be called again, as for a class that stores no config, only the
    values themselves are judged.
    """
    # Our own class around a transformer and layers: neither constructor knows of the other.
    if isinstance(subject.module, Embedder):
        inner = replace(
            subject.part("transformer"), structure=subject.structure, skeleton=subject.skeleton
        )
        return [
            *(f"transformer.{one}" for one in find_damage(inner)),
            *find_damage(subject.part("layers")),
        ]
    slots = subject.slots
    found = [
        f"{slot.path}: is on the meta device, it has no values"
        for slot in slots
        if slot.tensor.is_meta
    ]
    slots = [slot for slot in slots if not slot.tensor.is_meta]
    computed, drawn = _constructed(subject)
    found += _find_changed(slots, computed)
    found += _find_broken_ties(subject.module)
    for slot in slots:
        found += [
            f"{slot.path}: {sentence}" for sentence in _find_unwritten(slot, slot.path in drawn)
        ]
    return found


def _constructed(subject: Subject) -> tuple[dict[str, list[torch.Tensor]], set[str]]:
    """Path → values that the constructor computes, by dtype; and paths that it draws at random.

    Built in float32 and in the module's own dtype: a checkpoint may hold either.
    """
    try:
        recipe = recipe_of(subject)
        if recipe is None:
            return {}, set()
        skeleton, own = subject.skeleton, _float_dtype(subject.module)
        # transformers 4 swaps where parameters are allocated while another thread loads.
        if skeleton is not None and find_meta(skeleton.slots):
            skeleton = None
        built = [construct_twice(recipe, torch.float32, skeleton)]
        built += [construct_twice(recipe, own)] if own != torch.float32 else []
    except SafeFlavorError:
        return {}, set()
    computed: dict[str, list[torch.Tensor]] = {}
    drawn: set[str] = set()
    for one, agreed in built:
        for slot in one.slots:
            if slot.path in agreed:
                computed.setdefault(slot.path, []).append(slot.tensor)
            else:
                drawn.add(slot.path)
    return computed, drawn - computed.keys()


def _float_dtype(module: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


# --- differs from its constructor ----------------------------------------------------------------


def _find_changed(
    slots: Sequence[Slot], computed: Mapping[str, Sequence[torch.Tensor]]
) -> Iterator[str]:
    """Non-persistent buffers and plain tensors that differ from the constructor's."""
    # All others are learned. An LSTM lists its own weights once more, as plain tensors.
    learned = {slot.tensor.untyped_storage().data_ptr() for slot in slots if slot.persistent}
    for slot in slots:
        expected = (
            computed.get(slot.path, ())
            if slot.tensor.untyped_storage().data_ptr() not in learned
            else ()
        )
        if (
            not slot.persistent
            and expected
            and not any(_is_close(slot.tensor, value) for value in expected)
        ):
            yield (
                f"{slot.path}: this "
                f"{'non-persistent buffer' if slot.kind == 'buffer' else 'plain tensor'} differs "
                "from what its constructor computes"
            )


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether tensors are equal but for rounding."""
    # By another device, or by a half precision that the module went through on its way.
    if found.shape != expected.shape or found.is_floating_point() != expected.is_floating_point():
        return False
    if not found.is_floating_point():
        return torch.equal(found.cpu().to(expected.dtype), expected)
    ours = found.detach().cpu().double()
    through = (expected, expected.bfloat16(), expected.half())
    return any(
        torch.allclose(ours, way.to(found.dtype).double(), rtol=1e-5, atol=1e-8) for way in through
    )


# --- ties ----------------------------------------------------------------------------------------


def _find_broken_ties(module: torch.nn.Module) -> Iterator[str]:
    """Declared ties whose tensors have different values."""
    # Equal values in two tensors are a waste of memory, but no damage.
    tensors = module.state_dict(keep_vars=True)
    # transformers drops a pair from this list when a checkpoint holds both with different values on
    # purpose.
    tied = getattr(module, "all_tied_weights_keys", None)
    for name, source in declared_ties(module).items():
        pair = [
            tensors[key] for key in (name, source) if key in tensors and not tensors[key].is_meta
        ]
        if len(pair) == 2 and (tied is None or name in tied) and not bits_equal(*pair):
            yield f"{name}: is declared to be tied to {source}, but has other values"


# --- values --------------------------------------------------------------------------------------


def _find_unwritten(slot: Slot, drawn: bool) -> Iterator[str]:
    """Signs of unwritten memory: NaN, infinities, huge or tiny values, one constant.

    Args:
        slot: Its tensor is judged by value.
        drawn: Whether the constructor fills it with random numbers, so that it cannot be constant.
    """
    tensor = slot.tensor.detach()
    if (
        tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        or not tensor.numel()
    ):
        return
    low, high = (float(value) for value in torch.aminmax(tensor))
    # Only NaN differs from itself; aminmax gives it if there is one.
    if low != low:
        yield "holds NaN"
    elif slot.kind == "parameter" and high - low == float("inf") and not _is_finite(low, high):
        yield "holds infinities"
    elif slot.kind == "parameter" and _is_huge(tensor, low, high):
        yield f"holds values up to {max(-low, high):.0e}, as memory that nobody wrote does"
    elif (share := _tiny_share(tensor)) > _TINY_SHARE:
        yield (
            f"{share:.0%} of its values are smaller than {_TINY:.0e}, as in memory that nobody "
            "wrote"
        )
    elif (
        drawn
        and slot.kind == "parameter"
        and tensor.dim() > 1
        and tensor.numel() >= _MATRIX
        and _is_pattern(tensor)
    ):
        yield "is one repeated pattern, where its constructor draws random values"


def _is_finite(*values: float) -> bool:
    return all(abs(value) != float("inf") for value in values)


def _is_huge(tensor: torch.Tensor, low: float, high: float) -> bool:
    """Whether a value lies beyond any weight's."""
    # The dtype's own limits are meant: they are masks of attention.
    limits = torch.finfo(tensor.dtype)
    return any(
        abs(value) > _HUGE and value not in (limits.min, limits.max) for value in (low, high)
    )


def _tiny_share(tensor: torch.Tensor) -> float:
    """Share of nonzero values smaller than any that training gives."""
    # float16 ends at 6e-8.
    if tensor.dtype == torch.float16:
        return 0.0
    flat = tensor.reshape(-1)
    count = 0
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        count += int(((part != 0) & (part.abs() < _TINY)).sum())
    return count / flat.numel()


def _is_pattern(tensor: torch.Tensor) -> bool:
    """Whether all bytes are one run of eight, again and again."""
    # Zeros of a fresh page of memory, or a fill value such as 0xDEADBEEF.
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    words = raw[: raw.numel() // 8 * 8].view(torch.int64)
    return bool((words == words[0]).all())


# --- verdict -------------------------------------------------------------------------------------


def format_damage(damage: Sequence[str], most: int = 10) -> str:
    """Word findings for a message, one a line."""
    more = [f"… and {len(damage) - most} more"] if len(damage) > most else []
    return "\n    ".join([*damage[:most], *more])


def require_undamaged(subject: Subject, on_damage: str = "error") -> None:
    """Refuse a damaged module, or warn about it.

    Args:
        subject: The module, only looked at.
        on_damage: "error" or "warn".

    Raises:
        WeightsError: It is damaged, and ``on_damage`` is "error".
        InputError: ``on_damage`` is neither.
    """
    if on_damage not in ("error", "warn"):
        raise InputError(
            "Unknown value", where="on_damage", wanted="error | warn", found=repr(on_damage)
        )
    damage = find_damage(subject)
    if not damage:
        return
    problem = WeightsError(
        "The model looks damaged already, before anything is saved",
        where=f"{type(subject.module).__name__}, {len(damage)} findings",
        found=format_damage(damage),
        hint="load its checkpoint with mlflow_safeflavor.from_pretrained; on_damage='warn' saves "
        "it as it is",
    )
    if on_damage == "error":
        raise problem
    warnings.warn(str(problem), stacklevel=3)
