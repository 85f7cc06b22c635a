"""Inventory of every tensor that a module holds: path, facts, and sharing of memory.

Three records describe a module's memory:

* a ``Slot`` is a place in a live module that holds a tensor (``slots``);
* a ``Row`` has the facts of the tensor in that place: kind, dtype, shape, stride, offset, data;
* a ``Data`` entry is one run of values in a safetensors file, with its SHA-256.

Rows of the same data are one alias group: tied weights, declared or not, and views of one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from mlflow_safeflavor.artifact.inventory_file import Data, Inventory, Row
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.slots import Slot, find_meta, find_slots, hidden_slot, some

__all__ = ["dtype_name", "find_differences", "format_row", "take_inventory"]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


def take_inventory(
    slots: Sequence[Slot], dtypes: Mapping[str, torch.dtype] | None = None
) -> tuple[Inventory, dict[str, torch.Tensor]]:
    """Describe the slots, and give the values to store.

    Args:
        slots: From ``find_slots``.
        dtypes: Path → dtype to store it in, where that is another than the tensor's own.

    Returns:
        The inventory, without files and digests, and data name → dense tensor on its present
        device. Values are views of the module's memory where no cast or copy is needed.

    Raises:
        StructureError: Tensors share memory but differ in dtype.
    """
    rows: dict[str, Row] = {}
    data: dict[str, Data] = {}
    values: dict[str, torch.Tensor] = {}
    for group in _storage_groups(slots):
        name = group[0].path
        target = _dtype_of(group, dtypes or {})
        start, dense, as_is = _dense_values(group)
        values[name] = dense.to(target)
        data[name] = Data(dtype_name(target), tuple(dense.shape))
        for slot in group:
            tensor = slot.tensor
            rows[slot.path] = Row(
                path=slot.path,
                kind=slot.kind,
                persistent=slot.persistent,
                dtype=dtype_name(target),
                shape=tuple(tensor.shape),
                data=name,
                stride=None if as_is or tensor.is_contiguous() else tuple(tensor.stride()),
                offset=0 if as_is else int(tensor.storage_offset()) - start,
                parameter=isinstance(tensor, torch.nn.Parameter),
                requires_grad=tensor.requires_grad,
            )
    order = {slot.path: i for i, slot in enumerate(slots)}
    return Inventory(dict(sorted(rows.items(), key=lambda item: order[item[0]])), data, {}), values


def _storage_groups(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Slots that share memory, together."""
    groups: dict[object, list[Slot]] = {}
    for slot in slots:
        # Without memory only the very same object in two places is shared. A tensor without
        # elements has an address nevertheless: in a mapped file that of the next tensor.
        none = slot.tensor.is_meta or not slot.tensor.numel()
        pointer = 0 if none else slot.tensor.untyped_storage().data_ptr()
        key = (slot.tensor.device, pointer) if pointer else id(slot.tensor)
        groups.setdefault(key, []).append(slot)
    return list(groups.values())


def _view(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, shape and stride of a tensor in its storage."""
    # Strides of dimensions of size 1 are any: equal tensors may differ in them.
    stride = tuple(
        0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(tensor.storage_offset()), tuple(tensor.shape), stride


def _dense_values(group: Sequence[Slot]) -> tuple[int, torch.Tensor, bool]:
    """The values of a storage group, their offset (in elements), whether all tensors equal them.

    If not, each tensor is a view of the values by its own shape, stride and offset.
    """
    first = group[0].tensor.detach()
    # All views are the same: contiguous, or with gaps (an expanded or sliced tensor by itself),
    # which are not stored.
    if len({_view(slot.tensor) for slot in group}) == 1 and (
        first.is_contiguous() or not _is_dense(first)
    ):
        return int(first.storage_offset()), first.contiguous(), True
    # The span of the storage from the first to the last element that any of them reaches, flat.
    start = min(int(slot.tensor.storage_offset()) for slot in group)
    stop = max(_last_offset(slot.tensor) for slot in group) + 1
    return start, torch.as_strided(first, (stop - start,), (1,), start), False


def _last_offset(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + sum((size - 1) * step for size, step in steps)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a permutation of a contiguous one."""
    # Its order in memory (channels last) is kept, since the choice of a kernel may depend on it.
    return _last_offset(tensor) - tensor.storage_offset() + 1 == tensor.numel()


def _dtype_of(group: Sequence[Slot], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    targets = {dtypes.get(slot.path, slot.tensor.dtype) for slot in group}
    if len(targets) > 1 or len({slot.tensor.dtype for slot in group}) > 1:
        raise StructureError(
            "Tensors share memory but not a dtype",
            where=some([slot.path for slot in group]),
            found=", ".join(sorted(dtype_name(dtype) for dtype in targets)),
            hint="give each its own memory (.clone()) before saving",
        )
    return targets.pop()


def find_differences(
    module: torch.nn.Module, inventory: Inventory, hidden: Mapping[str, torch.Tensor] | None = None
) -> Iterator[str]:
    """Differences of the module's tensors from the inventory, a sentence each; not of values.

    Args:
        module: Rebuilt.
        inventory: What was saved.
        hidden: Path → tensor that only a pickle reaches. Tensors of the module may be views of one.
    """
    slots = [
        *find_slots(module),
        *(hidden_slot(path, tensor) for path, tensor in (hidden or {}).items()),
    ]
    # The same code that described the module at save, so that sharing of memory is compared, too.
    found, _ = take_inventory([slot for slot in slots if not slot.tensor.is_meta])
    meta = set(find_meta(slots))
    recorded = {
        path: row
        for path, row in inventory.rows.items()
        if row.kind != "hidden" or path in (hidden or {})
    }
    for path in sorted(found.rows.keys() | recorded.keys() | meta):
        row, wanted = found.rows.get(path), recorded.get(path)
        if path in meta:
            yield f"{path}: is on the meta device, it has no values"
        elif row is None or wanted is None or _facts(row) != _facts(wanted):
            yield f"{path}: wanted {format_row(wanted)}, found {format_row(row)}"
        elif row.data != wanted.data:
            yield f"{path}: wanted to share memory with {wanted.data}, found {row.data}"


def _facts(row: Row) -> tuple[object, ...]:
    return row.kind, row.persistent, row.dtype, row.shape, row.stride, row.offset, row.parameter


def format_row(row: Row | None) -> str:
    """Kind, dtype, shape and layout, for a message."""
    if row is None:
        return "no such tensor"
    layout = "" if row.stride is None else f" stride {list(row.stride)} offset {row.offset}"
    return (
        f"{'' if row.persistent else 'non-persistent '}{row.kind} "
        f"{row.dtype}{list(row.shape)}{layout}"
    )
