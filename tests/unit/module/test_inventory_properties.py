"""Inventory and files on random module trees: all comes back, and any single change is seen."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from memory import all_bits, memory, read_into, round_trip, write
from torch import nn

from mlflow_safeflavor.errors import WeightsError
from mlflow_safeflavor.module.inventory import find_differences, take_inventory
from mlflow_safeflavor.module.slots import find_slots

DTYPES = (
    "float32",
    "bfloat16",
    "float64",
    "int64",
    "int32",
    "uint8",
    "bool",
    "complex64",
    "float8_e4m3fn",
)
PLACES = ("parameter", "buffer", "transient", "attribute", "list", "tuple", "dict")
VIEWS = ("same", "detached", "flat half", "transposed", "one number", "every second")

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Tensor:
    """One tensor to make: its own memory, or a view of the ``of``-th one made before."""

    place: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    of: int | None
    view: str


@dataclass(frozen=True)
class Tree:
    """One module to make. A shared child is the same module under a second name."""

    tensors: tuple[Tensor, ...]
    children: tuple[Tree, ...]
    hidden: bool
    shared: bool


TENSORS = st.builds(
    Tensor,
    place=st.sampled_from(PLACES),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    layout=st.sampled_from(("plain", "plain", "permuted", "strided", "expanded")),
    of=st.none() | st.integers(0, 30),
    view=st.sampled_from(VIEWS),
)
TREES = st.recursive(
    st.builds(
        Tree,
        st.lists(TENSORS, min_size=1, max_size=5).map(tuple),
        st.just(()),
        st.booleans(),
        st.booleans(),
    ),
    lambda trees: st.builds(
        Tree,
        st.lists(TENSORS, max_size=5).map(tuple),
        st.lists(trees, max_size=3).map(tuple),
        st.booleans(),
        st.booleans(),
    ),
    max_leaves=5,
)


def build(tree: Tree, seed: int) -> nn.Module:
    return _build(tree, torch.Generator().manual_seed(seed), [])


def _build(tree, generator, made):
    module = nn.Module()
    for i, wanted in enumerate(tree.tensors):
        tensor = (
            _view(made[wanted.of % len(made)], wanted.view)
            if wanted.of is not None and made
            else None
        )
        tensor = _own(wanted, generator) if tensor is None else tensor
        made.append(tensor)
        _put(module, f"t{i}", wanted.place, tensor)
    for i, child in enumerate(tree.children):
        built = _build(child, generator, made)
        if child.hidden:
            setattr(module, f"m{i}", [built])
        else:
            module.add_module(f"m{i}", built)
        if child.shared:
            module.add_module(f"again{i}", built)
    return module


def _own(wanted, generator):
    shape = (
        (*wanted.shape[:-1], 2 * wanted.shape[-1])
        if wanted.layout == "strided" and wanted.shape
        else wanted.shape
    )
    count = torch.Size(shape).numel() * getattr(torch, wanted.dtype).itemsize
    random = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
    values = (
        (random % 2).bool() if wanted.dtype == "bool" else random.view(getattr(torch, wanted.dtype))
    )
    values = values.reshape(shape)
    if wanted.layout == "permuted":
        return values.permute(tuple(reversed(range(values.dim()))))
    if wanted.layout == "strided" and shape:
        # The gaps belong to somebody: a view of the whole is made where another tensor asks for it.
        return values[..., ::2]
    if wanted.layout == "expanded" and values.numel():
        return values.reshape(-1)[0].expand(3)
    return values


def _view(tensor, view):
    """None where the tensor has no such view."""
    tensor = tensor.detach()
    if view == "detached":
        return tensor.detach()
    if view == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1)
    if view == "one number" and tensor.numel():
        return tensor[(0,) * tensor.dim()].expand(tensor.numel())
    if view == "flat half" and tensor.is_contiguous() and tensor.numel():
        return tensor.view(-1)[tensor.numel() // 2 :]
    if view == "every second" and tensor.dim():
        return tensor[::2]
    return None if view != "same" else tensor


def _put(module, name, place, tensor):
    if place == "parameter":
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    elif place in ("buffer", "transient"):
        module.register_buffer(name, tensor, persistent=place == "buffer")
    else:
        thing = {
            "attribute": tensor,
            "list": [[tensor]],
            "tuple": (1, (tensor,)),
            "dict": {"k": tensor},
        }[place]
        setattr(module, name, thing)


@EXAMPLES
@given(TREES)
def test_what_was_written_is_what_is_read(tree):
    module, fresh = build(tree, 0), build(tree, 1)
    with tempfile.TemporaryDirectory() as folder:
        layout, written = write(module, Path(folder) / "m")
        inventory = read_into(fresh, layout)
        assert inventory == written
        assert all_bits(fresh) == all_bits(module)
        groups, expected = (
            {path: where[0] for path, where in memory(each).items()} for each in (fresh, module)
        )
        assert groups == expected, "other tensors share memory"
        assert list(find_differences(fresh, inventory)) == []
        # What is stored a second time is the same, so nothing depends on how the tensors came to
        # be.
        again = build(tree, 2)
        assert round_trip(fresh, again, Path(folder) / "n") == inventory


@EXAMPLES
@given(TREES)
def test_writing_and_comparing_change_nothing(tree):
    module = build(tree, 0)
    before = all_bits(module), memory(module), [id(slot.tensor) for slot in find_slots(module)]
    inventory, values = take_inventory(find_slots(module))
    assert list(find_differences(module, inventory)) == []
    assert (
        all_bits(module),
        memory(module),
        [id(slot.tensor) for slot in find_slots(module)],
    ) == before
    assert values.keys() == inventory.data.keys()
    for row in inventory.rows.values():
        assert inventory.data[row.data].dtype == row.dtype


# Mutations of one slot; each says whether it changed anything at all.


def untie(module, slot):
    groups = memory(module)
    leaders = [leader for leader, _, _ in groups.values()]
    if slot.path not in groups or leaders.count(groups[slot.path][0]) < 2:
        return False
    clone = torch.empty_strided(slot.tensor.shape, slot.tensor.stride(), dtype=slot.tensor.dtype)
    overlaps_itself = 0 in slot.tensor.stride() and slot.tensor.numel() > 1
    clone = slot.tensor.clone() if overlaps_itself else clone.copy_(slot.tensor)
    slot.put(
        nn.Parameter(clone, requires_grad=False) if isinstance(slot.tensor, nn.Parameter) else clone
    )
    return True


def tie(module, slot):
    mine = memory(module).get(slot.path)
    for other in find_slots(module):
        theirs = memory(module).get(other.path)
        same = other.tensor.shape == slot.tensor.shape and other.tensor.dtype == slot.tensor.dtype
        if mine and theirs and same and mine[0] != theirs[0]:
            data = other.tensor.detach()
            slot.put(
                nn.Parameter(data, requires_grad=False)
                if isinstance(slot.tensor, nn.Parameter)
                else data
            )
            return True
    return False


def _replace(slot, tensor):
    slot.put(
        nn.Parameter(tensor, requires_grad=False)
        if isinstance(slot.tensor, nn.Parameter)
        else tensor
    )
    return True


def cast(module, slot):
    return _replace(slot, torch.zeros(slot.tensor.shape, dtype=torch.float16))


def reshape(module, slot):
    return _replace(slot, slot.tensor.detach().clone().unsqueeze(0))


def restride(module, slot):
    tensor = slot.tensor.detach()
    long = [size for size in tensor.shape if size > 1]
    if len(long) < 2 or not tensor.is_contiguous():
        return False
    turned = torch.empty_strided(
        tensor.shape, tuple(reversed(torch.empty(tensor.shape[::-1]).stride()))
    )
    return _replace(slot, turned.to(tensor.dtype)) and not turned.is_contiguous()


def to_meta(module, slot):
    return _replace(slot, slot.tensor.detach().to("meta"))


def other_kind(module, slot):
    """Parameter → buffer → attribute → parameter."""
    parent, name = _parent(module, slot)
    if parent is None:
        return False
    if slot.kind == "parameter":
        del parent._parameters[name]
        parent.register_buffer(name, slot.tensor.detach())
    elif slot.kind == "buffer":
        del parent._buffers[name]
        parent.__dict__[name] = slot.tensor
    else:
        del parent.__dict__[name]
        parent.register_parameter(name, nn.Parameter(slot.tensor, requires_grad=False))
    return True


def other_persistence(module, slot):
    parent, name = _parent(module, slot)
    if parent is None or slot.kind != "buffer":
        return False
    parent._non_persistent_buffers_set ^= {name}
    return True


def drop(module, slot):
    parent, name = _parent(module, slot)
    if parent is not None:
        delattr(parent, name)
    return parent is not None


def to_none(module, slot):
    slot.put(None)
    return True


def add(module, slot):
    module.register_buffer("new", torch.ones(1), persistent=False)
    return True


def _parent(module, slot):
    """The submodule that holds the slot, and under which name; None inside containers."""
    for child in module.modules():
        for registry in (child._parameters, child._buffers, vars(child)):
            for name, value in registry.items():
                if value is slot.tensor and slot.path.endswith(name):
                    here = [
                        each
                        for each in find_slots(child)
                        if each.path == name and each.kind == slot.kind
                    ]
                    if here and here[0].tensor is slot.tensor:
                        return child, name
    return None, ""


MUTATIONS = (
    untie, tie, cast, reshape, restride, to_meta, other_kind, other_persistence, drop, to_none, add,
)  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@settings(EXAMPLES, max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])
@given(tree=TREES, pick=st.integers(0, 100))
def test_any_single_change_is_seen(mutate, tree, pick):
    module = build(tree, 0)
    slots = find_slots(module)
    assume(slots)
    inventory, _ = take_inventory(slots)
    order = slots[pick % len(slots) :] + slots[: pick % len(slots)]
    assume(any(mutate(module, slot) for slot in order))
    assert list(find_differences(module, inventory)), f"{mutate.__name__} went unseen"


@EXAMPLES
@given(tree=TREES, extra=TENSORS)
def test_a_tree_with_one_more_tensor_is_not_filled(tree, extra):
    bigger = Tree((*tree.tensors, extra), tree.children, tree.hidden, tree.shared)
    with tempfile.TemporaryDirectory() as folder:
        for written, fresh in (
            (build(tree, 0), build(bigger, 1)),
            (build(bigger, 0), build(tree, 1)),
        ):
            before = all_bits(fresh)
            layout, _ = write(written, Path(tempfile.mkdtemp(dir=folder)) / "m")
            with pytest.raises(WeightsError, match="has other tensors"):
                read_into(fresh, layout)
            assert all_bits(fresh) == before
