"""Inventory of every tensor a module holds: where it is, what it is, and what it shares memory with.

Three records describe a module's memory:

* a ``Slot`` is a place in a live module that holds a tensor;
* a ``Row`` says what must be in that place: kind, dtype, shape, and which data it looks at;
* a ``Data`` entry is one run of values in a safetensors file, with its SHA-256.

Rows that look at the same data are one alias group: tied weights, declared or not, views of one buffer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mlflow_safeflavor.artifact.inventory_file import ITEM_SIZES, Data, Inventory, Row, contiguous_stride
from mlflow_safeflavor.errors import StructureError, WeightsError

__all__ = [
    "NOT_GIVEN_BACK",
    "OWN_STATE",
    "STORABLE",
    "UNKNOWN",
    "Slot",
    "dtype_name",
    "fill",
    "find_differences",
    "find_meta",
    "find_places",
    "find_slots",
    "hidden_slot",
    "realise",
    "require_saveable",
    "shape_of",
    "some",
    "take_inventory",
]

NOT_GIVEN_BACK = (
    "save the model again; where this comes back, its constructor depends on more than its arguments: "
    "allow_pickle=True or graph='only' does without it"
)
"""What to do where a constructor makes something else now than when the model was saved."""

_TENSOR_TYPES = (
    (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if hasattr(torch.nn, "Buffer")
    else (
        torch.Tensor,
        torch.nn.Parameter,
    )
)


@dataclass(frozen=True)
class Slot:
    """A place in a live module that holds a tensor.

    Attributes:
        path: ``encoder.layer.0.weight``; inside containers ``cache[0]['key']``.
        kind: ``parameter``, ``buffer`` or ``attribute``; ``hidden`` where only a pickle reaches it.
        persistent: Whether ``state_dict`` lists it.
        tensor: What is there now.
        put: Puts another tensor there.
    """

    path: str
    kind: str
    persistent: bool
    tensor: torch.Tensor
    put: Callable[[torch.Tensor], None]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


# --- slots ---------------------------------------------------------------------------------------


def find_slots(module: torch.nn.Module) -> list[Slot]:
    """Every place in the module that holds a tensor, in a fixed order.

    Parameters, buffers and plain attributes of every submodule, also inside lists, tuples and dicts,
    and inside modules that such containers hide from ``named_modules``. A module that is shared is
    listed once, under its first path.
    """
    slots: list[Slot] = []
    seen: set[int] = set()
    _walk_module(module, "", slots, seen)
    return slots


OWN_STATE = frozenset(vars(torch.nn.Module()))
"""Attributes every ``nn.Module`` has: registries and hooks, walked separately or not at all."""

_HOLD_NOTHING = frozenset((bool, int, float, str, type(None)))
"""Types of most attributes, told apart faster than by asking what else they are."""


def _walk_module(module: torch.nn.Module, prefix: str, slots: list[Slot], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    for kind, registry in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in list(registry.items()):
            if tensor is not None:
                persistent = kind == "parameter" or name not in module._non_persistent_buffers_set
                put = _putter(registry, name)
                slots.append(Slot(_join(prefix, name), kind, persistent, tensor, put))
    attributes = vars(module)
    for name, value in list(attributes.items()):
        if name not in OWN_STATE and type(value) not in _HOLD_NOTHING:
            _walk_value(value, _join(prefix, name), _putter(attributes, name), slots, seen)
    for name, child in list(module._modules.items()):
        if child is not None:
            _walk_module(child, _join(prefix, name), slots, seen)


def _walk_value(value: Any, path: str, put: Callable[[Any], None], slots: list[Slot], seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        slots.append(Slot(path, "attribute", False, value, put))
    elif isinstance(value, torch.nn.Module):
        _walk_module(value, path, slots, seen)
    elif isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            _walk_value(item, f"{path}[{key!r}]", _putter(value, key), slots, seen)
    elif isinstance(value, tuple):
        # A tuple cannot be changed: putting an item means putting a new tuple in its place.
        items = list(value)

        def put_item(index: int, item: Any) -> None:
            items[index] = item
            put(type(value)(*items) if hasattr(value, "_fields") else type(value)(items))

        for index, item in enumerate(value):
            _walk_value(item, f"{path}[{index}]", partial(put_item, index), slots, seen)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _putter(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: container.__setitem__(key, value)


def hidden_slot(path: str, tensor: torch.Tensor) -> Slot:
    """The place of a tensor that only a pickle reaches; nothing else can be put there."""
    return Slot(path, "hidden", False, tensor, lambda new: None)


def find_places(module: torch.nn.Module) -> Callable[[str], Callable[[Any], None] | None]:
    """Where a forward pass may have left a tensor: attributes of submodules that are None, and keys of empty dicts.

    Some models keep what a forward pass computed (``rope_deltas``, ``attention_bias_cache``), so a model that was
    used may hold plain tensors where a new one holds nothing.

    Returns:
        Path → what puts something there, or None where nothing may be.
    """
    attributes: dict[str, Callable[[Any], None]] = {}
    dicts: dict[str, dict[Any, Any]] = {}
    for prefix, child in module.named_modules():
        for name, value in list(vars(child).items()):
            if name in OWN_STATE:
                continue
            if value is None:
                attributes[_join(prefix, name)] = _putter(vars(child), name)
            elif type(value) is dict and not value:
                dicts[_join(prefix, name)] = value

    def place(path: str) -> Callable[[Any], None] | None:
        found = _KEY.fullmatch(path)
        if found and found[1] in dicts:
            return _putter(dicts[found[1]], ast.literal_eval(found[2]))
        return attributes.get(path)

    return place


_KEY = re.compile(r"(.+)\[('[^'\\]*'|-?[0-9]+)\]")


UNKNOWN: tuple[int, ...] = (-1,)
"""Shape of a parameter that waits for the first forward, as those of ``torch.nn.LazyLinear`` do."""


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a tensor, or ``UNKNOWN``."""
    return UNKNOWN if torch.nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def find_meta(slots: Sequence[Slot]) -> list[str]:
    """Paths of the tensors that have no memory."""
    return [slot.path for slot in slots if slot.tensor.is_meta]


def require_saveable(slots: Sequence[Slot]) -> None:
    """Refuse tensors that cannot be stored as plain values.

    Raises:
        WeightsError: A tensor is on the meta device: it has no values.
        StructureError: A tensor is sparse, quantised, a lazy or unknown subclass, or a lazy view.
    """
    if meta := find_meta(slots):
        raise WeightsError(
            "The module holds tensors without values",
            where=some(meta),
            wanted="tensors in memory",
            found=f"{len(meta)} of {len(slots)} on the meta device",
            way_out="load the checkpoint with mlflow_safeflavor.from_pretrained, "
            "or fill the module with mlflow_safeflavor.materialize, then save it",
        )
    if waiting := [slot.path for slot in slots if torch.nn.parameter.is_lazy(slot.tensor)]:
        raise StructureError(
            "The module has lazy parameters that no forward has made yet",
            where=some(waiting),
            wanted="parameters of known shape",
            way_out="call the module once, model(example), and save it then",
        )
    seen: set[str] = set()
    for slot in slots:
        tensor = slot.tensor
        if slot.path in seen:
            raise StructureError(
                "Two tensors of the module have the same path",
                where=slot.path,
                found="an attribute whose name has dots or brackets in it",
                way_out="rename that attribute",
            )
        seen.add(slot.path)
        odd = (
            f"a {type(tensor).__name__}" if type(tensor) not in _TENSOR_TYPES
            else f"layout {tensor.layout}" if tensor.layout != torch.strided
            else "a nested tensor" if tensor.is_nested
            else "a quantised tensor" if tensor.is_quantized
            else "a conjugated or negated view" if tensor.is_conj() or tensor.is_neg()
            else f"dtype {tensor.dtype}" if tensor.dtype not in STORABLE
            else None
        )  # fmt: skip
        if odd:
            raise StructureError(
                "The module holds a tensor that cannot be stored as plain values",
                where=slot.path,
                wanted="a dense torch.Tensor, nn.Parameter or buffer",
                found=odd,
                way_out="replace it by a dense tensor before saving (dequantise, .to_dense(), .resolve_conj())",
            )


STORABLE = frozenset(getattr(torch, name) for name in ITEM_SIZES if hasattr(torch, name))


# --- inventory -----------------------------------------------------------------------------------


def take_inventory(
    slots: Sequence[Slot], dtypes: Mapping[str, torch.dtype] | None = None
) -> tuple[Inventory, dict[str, torch.Tensor]]:
    """Describe the slots, and give the values to store.

    Args:
        slots: From ``find_slots``.
        dtypes: Path → dtype to store it in, where that is another than the tensor's own.

    Returns:
        The inventory, without files and digests, and data name → dense tensor on its present device.
        Values are views of the module's memory where no cast or copy is needed.

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
        # No memory, nothing shared: except for the very same object, which may stand in two places. A tensor
        # without elements has an address nevertheless, in a mapped file that of the next tensor.
        none = slot.tensor.is_meta or not slot.tensor.numel()
        pointer = 0 if none else slot.tensor.untyped_storage().data_ptr()
        key = (slot.tensor.device, pointer) if pointer else id(slot.tensor)
        groups.setdefault(key, []).append(slot)
    return list(groups.values())


def _view(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Where a tensor lies in its storage; strides of dimensions of size one mean nothing."""
    stride = tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()), tuple(tensor.shape), stride


def _dense_values(group: Sequence[Slot]) -> tuple[int, torch.Tensor, bool]:
    """The values of a storage group, where they start in the storage (in elements), and whether every tensor is they.

    If not, each tensor is a view of the values by its own shape, stride and offset.
    """
    first = group[0].tensor.detach()
    if len({_view(slot.tensor) for slot in group}) == 1 and (first.is_contiguous() or not _is_dense(first)):
        return int(first.storage_offset()), first.contiguous(), True
    start = min(int(slot.tensor.storage_offset()) for slot in group)
    stop = max(_last_offset(slot.tensor) for slot in group) + 1
    return start, torch.as_strided(first, (stop - start,), (1,), start), False


def _last_offset(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + sum((size - 1) * step for size, step in steps)


def _is_dense(tensor: torch.Tensor) -> bool:
    """A permutation of a contiguous tensor: its memory order is kept, as kernels may depend on it."""
    return _last_offset(tensor) - tensor.storage_offset() + 1 == tensor.numel()


def _dtype_of(group: Sequence[Slot], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    targets = {dtypes.get(slot.path, slot.tensor.dtype) for slot in group}
    if len(targets) > 1 or len({slot.tensor.dtype for slot in group}) > 1:
        raise StructureError(
            "Tensors share memory but not a dtype",
            where=some([slot.path for slot in group]),
            found=", ".join(sorted(dtype_name(dtype) for dtype in targets)),
            way_out="give each its own memory (.clone()) before saving",
        )
    return targets.pop()


# --- back into a module ---------------------------------------------------------------------------


def fill(module: torch.nn.Module, inventory: Inventory, values: Mapping[str, torch.Tensor]) -> None:
    """Put the stored tensors into the module, by assignment.

    Each alias group becomes one object again, and whatever the constructor had put there is dropped.

    Raises:
        WeightsError: The module has other places for tensors than the inventory lists.
    """
    place = find_places(module)
    for path, row in inventory.rows.items():
        if row.kind == "attribute" and row.stride is None and (put := place(path)):
            put(torch.empty(row.shape, device="meta"))  # a place for what a forward pass had left there
    slots = {slot.path: slot for slot in find_slots(module)}
    wanted = {path: row.shape for path, row in inventory.rows.items() if row.kind != "hidden"}
    found = {path: shape_of(slot.tensor) for path, slot in slots.items()}
    # A lazy module waits for any shape, and is an ordinary one with its next forward.
    found |= {path: wanted[path] for path, shape in found.items() if shape == UNKNOWN and path in wanted}
    # Shapes too, before anything works on them: a view with a stride of 0 is of any size and costs nothing.
    for path in sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        raise WeightsError(
            "The rebuilt module has other tensors than the saved one",
            where=path,
            wanted=_describe(inventory.rows.get(path)),
            found=f"{slots[path].kind} {list(shape_of(slots[path].tensor))}" if path in slots else "no such tensor",
            way_out=NOT_GIVEN_BACK,
        )
    tensors = realise(inventory, values)
    for path, slot in slots.items():
        slot.put(tensors[path])


def realise(inventory: Inventory, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Path → tensor as its row says. Rows that say the same of the same data get one object."""
    made: dict[object, torch.Tensor] = {}
    tensors = {}
    for path, row in inventory.rows.items():
        key = (row.data, row.shape, row.stride, row.offset, row.parameter)
        if key not in made:
            made[key] = _look_at(values[row.data], row)
        tensors[path] = made[key]
    return tensors


def _look_at(value: torch.Tensor, row: Row) -> torch.Tensor:
    if row.stride is not None or row.shape != tuple(value.shape):
        stride = row.stride or contiguous_stride(row.shape)
        value = torch.as_strided(value.reshape(-1), row.shape, stride, value.storage_offset() + row.offset)
    return torch.nn.Parameter(value, requires_grad=False) if row.parameter else value


def find_differences(
    module: torch.nn.Module, inventory: Inventory, hidden: Mapping[str, torch.Tensor] | None = None
) -> Iterator[str]:
    """What is not as recorded in the module now, one sentence each. Values are the digests' matter.

    Args:
        module: Rebuilt.
        inventory: What was saved.
        hidden: Path → tensor that only a pickle reaches. Tensors of the module may be views of one.
    """
    slots = [*find_slots(module), *(hidden_slot(path, tensor) for path, tensor in (hidden or {}).items())]
    found, _ = take_inventory([slot for slot in slots if not slot.tensor.is_meta])
    meta = set(find_meta(slots))
    recorded = {path: row for path, row in inventory.rows.items() if row.kind != "hidden" or path in (hidden or {})}
    for path in sorted(found.rows.keys() | recorded.keys() | meta):
        row, wanted = found.rows.get(path), recorded.get(path)
        if path in meta:
            yield f"{path}: is on the meta device, it has no values"
        elif row is None or wanted is None or _facts(row) != _facts(wanted):
            yield f"{path}: wanted {_describe(wanted)}, found {_describe(row)}"
        elif row.data != wanted.data:
            yield f"{path}: wanted to share memory with {wanted.data}, found {row.data}"


def _facts(row: Row) -> tuple[object, ...]:
    return row.kind, row.persistent, row.dtype, row.shape, row.stride, row.offset, row.parameter


def _describe(row: Row | None) -> str:
    if row is None:
        return "no such tensor"
    layout = "" if row.stride is None else f" stride {list(row.stride)} offset {row.offset}"
    return f"{'' if row.persistent else 'non-persistent '}{row.kind} {row.dtype}{list(row.shape)}{layout}"


def some(paths: Sequence[str], most: int = 5) -> str:
    """The first few of many, for a message."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
