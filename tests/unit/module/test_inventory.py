"""Every tensor a module holds is found, stored, put back where it was, and compared."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from memory import all_bits, bits, memory, read_into, round_trip, write
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from mlflow_safeflavor.errors import StructureError, WeightsError
from mlflow_safeflavor.module.fill import fill
from mlflow_safeflavor.module.inventory import dtype_name, find_differences, take_inventory
from mlflow_safeflavor.module.saveable import STORABLE, require_saveable
from mlflow_safeflavor.module.slots import find_setters, find_slots
from mlflow_safeflavor.module.tensors import read_tensors


class Holder(nn.Module):
    """A module with whatever attributes it is given."""

    def __init__(self, **things):
        super().__init__()
        for name, thing in things.items():
            setattr(self, name, thing)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def facts(module):
    return {slot.path: (slot.kind, slot.persistent) for slot in find_slots(module)}


def refused(module):
    with pytest.raises(StructureError) as caught:
        require_saveable(find_slots(module))
    return caught.value


# Where tensors are


class Zoo(nn.Module):
    """A tensor in every kind of place."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.weight = nn.Parameter(torch.randn(4, 3))
            self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
            self.register_parameter("nothing", None)
            self.register_buffer("kept", torch.randn(5))
            self.register_buffer("lost", torch.randn(2, 2), persistent=False)
            self.register_buffer("none", None)
            self.plain = torch.randint(9, (3,))
            self.listed = [torch.randn(2), "text", [torch.randn(1)], None]
            self.tupled = (torch.randn(2), 3, (torch.randn(1), [torch.randn(1)]))
            self.named = Pair(torch.randn(1), torch.randn(2))
            self.table = {
                "a": torch.randn(1),
                3: torch.randn(1),
                "deep": OrderedDict(b=(torch.randn(1),)),
            }
            self.loose = [nn.Parameter(torch.randn(2))]
            self.hidden = [nn.Linear(2, 1)]
            self.layers = nn.ModuleList([nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2)])
            self.dictionary = nn.ParameterDict({"p": nn.Parameter(torch.randn(1))})
            self.ring: list[Any] = [torch.randn(1)]
            self.ring.append(self.ring)


ZOO = {
    "weight": ("parameter", True),
    "frozen": ("parameter", True),
    "kept": ("buffer", True),
    "lost": ("buffer", False),
    "plain": ("attribute", False),
    "listed[0]": ("attribute", False),
    "listed[2][0]": ("attribute", False),
    "tupled[0]": ("attribute", False),
    "tupled[2][0]": ("attribute", False),
    "tupled[2][1][0]": ("attribute", False),
    "named[0]": ("attribute", False),
    "named[1]": ("attribute", False),
    "table['a']": ("attribute", False),
    "table[3]": ("attribute", False),
    "table['deep']['b'][0]": ("attribute", False),
    "loose[0]": ("attribute", False),
    "hidden[0].weight": ("parameter", True),
    "hidden[0].bias": ("parameter", True),
    "ring[0]": ("attribute", False),
    "layers.0.weight": ("parameter", True),
    "layers.1.weight": ("parameter", True),
    "layers.1.bias": ("parameter", True),
    "layers.1.running_mean": ("buffer", True),
    "layers.1.running_var": ("buffer", True),
    "layers.1.num_batches_tracked": ("buffer", True),
    "dictionary.p": ("parameter", True),
}


def test_tensors_are_found_wherever_a_module_holds_them():
    assert facts(Zoo()) == ZOO


def test_everything_comes_back_in_its_place(tmp_path):
    fresh = Zoo(seed=1)
    inventory = round_trip(Zoo(), fresh, tmp_path / "m")
    assert inventory.rows.keys() == ZOO.keys()
    assert isinstance(fresh.named, Pair), "a named tuple must stay one"
    assert isinstance(fresh.tupled, tuple)
    assert isinstance(fresh.loose[0], nn.Parameter)
    assert fresh.ring[1] is fresh.ring


def test_requires_grad_is_recorded_and_off_afterwards(tmp_path):
    fresh = Zoo(seed=1)
    rows = round_trip(Zoo(), fresh, tmp_path / "m").rows
    assert rows["weight"].requires_grad
    assert rows["loose[0]"].requires_grad
    assert not rows["frozen"].requires_grad
    assert not rows["kept"].requires_grad
    assert not fresh.weight.requires_grad


def test_a_shared_module_is_listed_once_and_stays_shared(tmp_path):
    def make(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.Linear(3, 3)
        return Holder(first=layer, second=layer, third=[layer])

    fresh = make(1)
    # Attributes come before submodules, so the list has it first.
    assert round_trip(make(0), fresh, tmp_path / "m").rows.keys() == {
        "third[0].weight",
        "third[0].bias",
    }
    assert fresh.second is fresh.first
    assert fresh.third[0] is fresh.first


def test_a_shared_module_is_not_two_modules_with_shared_weights(tmp_path):
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    layout, _ = write(Holder(first=layer, second=layer), tmp_path / "m")
    with pytest.raises(WeightsError, match=r"second\.(bias|weight)"):
        read_into(Holder(first=layer, second=other), layout)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 2}], ids=str
)
def test_the_flat_weights_of_an_lstm_are_its_weights(tmp_path, options):
    torch.manual_seed(0)
    module, fresh = nn.LSTM(3, 4, **options).eval(), nn.LSTM(3, 4, **options).eval()
    rows = round_trip(module, fresh, tmp_path / "m").rows
    assert rows["_flat_weights[0]"].data == "weight_ih_l0"
    assert fresh._flat_weights[0] is fresh.weight_ih_l0
    x = drawn(5, 1, 3)
    with torch.no_grad():
        assert torch.equal(module(x)[0], fresh(x)[0])
    assert list(find_differences(fresh, take_inventory(find_slots(module))[0])) == [], (
        "a forward changed the module"
    )


def test_weight_norm_as_a_hook_keeps_a_plain_weight(tmp_path):
    with warnings.catch_warnings():
        # deprecated, and all over existing checkpoints
        warnings.simplefilter("ignore", FutureWarning)
        module, fresh = (nn.utils.weight_norm(nn.Linear(3, 2)) for _ in range(2))
    assert facts(module)["weight"] == ("attribute", False)
    round_trip(module, fresh, tmp_path / "m")
    x = drawn(4, 3)
    with torch.no_grad():
        assert torch.equal(module(x), fresh(x))


@pytest.mark.parametrize(
    ("parametrize", "paths"),
    [
        (parametrizations.weight_norm, {"weight.original0", "weight.original1"}),
        (parametrizations.orthogonal, {"weight.original", "weight.0.base"}),
        (parametrizations.spectral_norm, {"weight.original", "weight.0._u", "weight.0._v"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_parametrizations_come_back(tmp_path, parametrize, paths):
    torch.manual_seed(0)
    module, fresh = (parametrize(nn.Linear(3, 3)).eval() for _ in range(2))
    rows = round_trip(module, fresh, tmp_path / "m").rows
    assert rows.keys() == {"bias", *(f"parametrizations.{path}" for path in paths)}
    x = drawn(4, 3)
    with torch.no_grad():
        assert torch.equal(module(x), fresh(x))


def test_two_tensors_of_one_path_are_refused():
    module = Holder(layer=nn.Linear(2, 2))
    vars(module)["layer.weight"] = torch.zeros(7)
    error = refused(module)
    assert error.where == "layer.weight"


# What tensors look like


LAYOUTS = {
    "permuted": lambda: drawn(2, 3, 4).permute(2, 0, 1),
    "transposed": lambda: drawn(3, 5).t(),
    "sliced": lambda: drawn(6, 6)[1:5:2, ::3],
    "last column": lambda: drawn(4, 5)[:, -1],
    "channels_last": lambda: drawn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last of one": lambda: drawn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "size one": lambda: drawn(1, 4, 1).permute(2, 1, 0),
    "scalar": lambda: torch.tensor(2.5),
    "scalar of a row": lambda: drawn(5)[3],
    "empty": lambda: torch.empty(0),
    "empty with sizes": lambda: torch.empty(3, 0, 2),
    "empty slice": lambda: drawn(5)[2:2],
    "special values": lambda: torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
}


@pytest.mark.parametrize("place", ["parameter", "buffer", "attribute"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_sizes_come_back(tmp_path, layout, place):
    def make(tensor):
        module = nn.Module()
        if place == "buffer":
            module.register_buffer("tensor", tensor)
        else:
            module.tensor = nn.Parameter(tensor) if place == "parameter" else tensor
        return module

    module, fresh = make(LAYOUTS[layout]()), make(torch.ones(LAYOUTS[layout]().shape))
    dense = LAYOUTS[layout]()
    if dense.numel() and not dense.is_contiguous() and layout in ("sliced", "last column"):
        # Gaps between values are nobody's data: only the values are kept.
        inventory = write(module, tmp_path / "m")[1]
        read_into(fresh, write(module, tmp_path / "n")[0])
        assert inventory.nbytes == dense.nbytes
        assert all_bits(fresh) == all_bits(module)
        assert list(find_differences(fresh, inventory)) == []
    else:
        round_trip(module, fresh, tmp_path / "m")


def test_an_expanded_tensor_by_itself_is_stored_as_it_reads(tmp_path):
    module, fresh = Holder(tensor=drawn(1, 3).expand(4, 3)), Holder(tensor=torch.zeros(4, 3))
    layout, _ = write(module, tmp_path / "m")
    inventory = read_into(fresh, layout)
    assert all_bits(fresh) == all_bits(module)
    assert list(find_differences(fresh, inventory)) == []


@pytest.mark.parametrize("dtype", sorted(map(dtype_name, STORABLE)))
def test_every_storable_dtype_comes_back(tmp_path, dtype):
    random = torch.randint(
        256, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    values = (random % 2).bool() if dtype == "bool" else random.view(getattr(torch, dtype))
    module, fresh = (
        Holder(tensor=values, one=values[0, 0].clone()),
        Holder(tensor=torch.ones(values.shape), one=torch.ones(())),
    )
    assert round_trip(module, fresh, tmp_path / "m").rows["tensor"].dtype == dtype


def test_names_of_every_sort_come_back(tmp_path):
    names = ["a b", "ü", "x/../y", "__metadata__", "a[0]", "", "\n", "'"]
    round_trip(
        Holder(t={name: drawn(2, seed=i) for i, name in enumerate(names)}),
        Holder(t={name: torch.zeros(2) for name in names}),
        tmp_path / "m",
    )


def test_a_parameter_named_like_the_files_own_entry(tmp_path):
    """Safetensors reserves that name for itself, so it must not swallow a tensor in silence."""
    with pytest.raises(StructureError, match="that safetensors keeps for itself"):
        round_trip(
            Holder(__metadata__=nn.Parameter(drawn(2))),
            Holder(__metadata__=nn.Parameter(drawn(2))),
            tmp_path,
        )


# Where the files have them


def odd_and_even():
    """Tensors of multiples of 64 bytes, and others between them, by name and by place."""
    return Holder(
        a=nn.Parameter(drawn(16)),
        bias=nn.Parameter(drawn(2)),
        c=nn.Parameter(drawn(3, 16)),
        flags=nn.Buffer(torch.ones(3, dtype=torch.bool)),
        five=nn.Parameter(drawn(5, dtype=torch.bfloat16)),
        z=nn.Parameter(drawn(32, dtype=torch.float64)),
    )


def test_tensors_are_aligned_and_those_of_even_size_without_a_copy(tmp_path):
    fresh = odd_and_even()
    round_trip(odd_and_even(), fresh, tmp_path)
    assert {slot.path for slot in find_slots(fresh) if slot.tensor.data_ptr() % 64} == set()
    maps = Path("/proc/self/maps").read_text().splitlines()
    # a small file is mapped from memory
    spans = [line.split()[0].split("-") for line in maps if "/memfd:" in line]

    def is_mapped(tensor):
        return any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in spans)

    assert {slot.path for slot in find_slots(fresh) if is_mapped(slot.tensor)} >= {"a", "c", "z"}


def test_what_other_writers_wrote_anywhere_is_aligned_too(tmp_path):
    layout, inventory = write(odd_and_even(), tmp_path)
    values = read_tensors(inventory, layout)
    file = layout.data / "model.safetensors"
    for spaces in range(0, 64, 8):
        save_file(
            values, file.with_suffix(".new"), metadata={"format": "pt", "filled": " " * spaces}
        )
        file.with_suffix(".new").replace(file)
        found = read_tensors(inventory, layout)
        assert {name for name, value in found.items() if value.data_ptr() % 64} == set()
        assert all(torch.equal(found[name], value) for name, value in values.items())


def test_the_library_reads_every_dtype_as_it_was_written(tmp_path):
    dtypes = sorted(STORABLE, key=str)
    module = Holder(**{dtype_name(dtype): torch.arange(11).to(dtype) for dtype in dtypes})
    write(module, tmp_path)
    found = load_file(tmp_path / "safeflavor" / "model.safetensors")
    assert {name: value.dtype for name, value in found.items()} == {
        dtype_name(dtype): dtype for dtype in dtypes
    }
    assert all(bits(getattr(module, name)) == bits(value) for name, value in found.items())


# What shares memory


def tied(seed, *, tie=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    if tie:
        head.weight = embedding.weight
    return Holder(embedding=embedding, head=head)


def test_tied_weights_are_one_object_again_even_where_the_constructor_does_not_tie(tmp_path):
    fresh = tied(1, tie=False)
    inventory = round_trip(tied(0), fresh, tmp_path / "m")
    assert fresh.head.weight is fresh.embedding.weight
    assert list(inventory.data) == ["embedding.weight"]


def test_weights_that_only_look_tied_stay_apart(tmp_path):
    module = tied(0, tie=False)
    module.head.weight.data.copy_(module.embedding.weight.data)
    fresh = tied(1)
    round_trip(module, fresh, tmp_path / "m")
    assert fresh.head.weight is not fresh.embedding.weight


def alias(**views):
    """A module with a buffer of 12 numbers and views of it."""

    def make(seed):
        base = drawn(12, seed=seed)
        module = nn.Module()
        module.register_buffer("base", base)
        for name, view in views.items():
            setattr(module, name, view(base))
        return module

    return make


ALIASES = {
    "the same": alias(view=lambda base: base),
    "another object": alias(view=lambda base: base.detach()),
    "a parameter": alias(view=lambda base: nn.Parameter(base)),
    "reshaped": alias(view=lambda base: base.view(3, 4)),
    "transposed": alias(view=lambda base: base.view(3, 4).t()),
    "halves": alias(low=lambda base: base[:6], high=lambda base: base[6:]),
    "an offset": alias(view=lambda base: base[5:9]),
    "every third": alias(view=lambda base: base[1::3]),
    "one number": alias(view=lambda base: base[7]),
    "one number, as long": alias(view=lambda base: base[0].expand(12)),
    "one number, as a matrix": alias(view=lambda base: base[3].expand(2, 2)),
    "a row many times": alias(view=lambda base: base[:3].expand(4, 3)),
    "nothing": alias(view=lambda base: base[4:4]),
    "a diagonal": alias(view=lambda base: base[:9].view(3, 3).diagonal()),
    "windows": alias(view=lambda base: base.unfold(0, 4, 2)),
}


@pytest.mark.parametrize("case", ALIASES)
def test_views_of_one_memory_stay_views_of_one_memory(tmp_path, case):
    make = ALIASES[case]
    fresh = make(1)
    inventory = round_trip(make(0), fresh, tmp_path / "m")
    expected = make(0)
    for module in (fresh, expected):
        module.base.add_(1)
    assert all_bits(fresh) == all_bits(expected), (
        "a change of the base is not seen through the view"
    )
    assert len(inventory.data) == (2 if case == "nothing" else 1)


@pytest.mark.parametrize(
    "case", ["reshaped", "transposed", "halves", "an offset", "one number, as long"]
)
def test_views_that_went_apart_are_a_difference(tmp_path, case):
    module = ALIASES[case](0)
    inventory = write(module, tmp_path / "m")[1]
    for name in ("view", "low"):
        if hasattr(module, name):
            setattr(module, name, getattr(module, name).clone())
            assert any(line.startswith(f"{name}: ") for line in find_differences(module, inventory))


def test_views_without_their_base(tmp_path):
    def make(seed):
        base = drawn(10, seed=seed)
        return Holder(a=base[2:5], b=base[4:8])

    inventory = round_trip(make(0), make(1), tmp_path / "m")
    assert inventory.nbytes == 6 * 4, "only what can be seen is stored"


def test_a_transposed_view_of_a_tied_weight(tmp_path):
    def make(seed):
        module = tied(seed)
        module.back = nn.Parameter(module.embedding.weight.t())
        return module

    fresh = make(1)
    inventory = round_trip(make(0), fresh, tmp_path / "m")
    assert len(inventory.data) == 1
    assert fresh.back.data_ptr() == fresh.embedding.weight.data_ptr()
    assert fresh.head.weight is fresh.embedding.weight


def test_one_empty_tensor_in_two_places_stays_one_and_two_stay_two(tmp_path):
    empty = torch.empty(0)
    module = Holder(a=empty, b=empty, c=torch.empty(0))
    fresh = Holder(a=torch.empty(0), b=torch.empty(0), c=torch.empty(0))
    round_trip(module, fresh, tmp_path / "m")
    assert fresh.a is fresh.b
    assert fresh.c is not fresh.a


@pytest.mark.parametrize(
    "other",
    [lambda base: base.view(torch.int32), lambda base: torch.view_as_complex(base.view(-1, 2))],
)
def test_one_memory_in_two_dtypes_is_refused(other):
    base = drawn(4)
    with pytest.raises(StructureError, match="share memory but not a dtype") as caught:
        take_inventory(find_slots(Holder(base=base, other=other(base))))
    assert caught.value.where == "base, other"
    assert "clone" in str(caught.value.hint)


def test_a_cast_of_half_of_an_alias_group_is_refused():
    slots = find_slots(tied(0))
    with pytest.raises(StructureError, match="share memory but not a dtype"):
        take_inventory(slots, {"head.weight": torch.bfloat16})


def test_a_module_filled_from_a_file_can_be_stored_again(tmp_path):
    """Its tensors are parts of one memory map, which makes them no alias group."""
    fresh = Zoo(seed=1)
    first = round_trip(Zoo(), fresh, tmp_path / "m")
    second = round_trip(fresh, Zoo(seed=2), tmp_path / "n")
    assert {path: row.data for path, row in second.rows.items()} == {
        p: row.data for p, row in first.rows.items()
    }
    assert {name: entry.sha256 for name, entry in second.data.items()} == {
        name: entry.sha256 for name, entry in first.data.items()
    }


# What is refused


class Labelled(torch.Tensor):
    """A subclass, as quantisation libraries have them."""


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in checkpoints
        return torch.quantize_per_tensor(drawn(3), 0.1, 0, torch.qint8)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says it is a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


ODD = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "quantised": (quantised, "quantised"),
    "subclass": (lambda: drawn(3).as_subclass(Labelled), "Labelled"),
    "conjugated": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "conjugated"),
    "negated": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "negated"),
    "complex128": (lambda: torch.ones(3, dtype=torch.complex128), "complex128"),
    "nested": (nested, "nested"),
    "mkldnn": (lambda: drawn(3, 3).to_mkldnn(), "mkldnn"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_plain_values_are_refused_by_name(kind):
    make, named = ODD[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR says it is in beta
        module = Holder(deep=Holder(listed=[make()]))
    error = refused(module)
    assert error.where == "deep.listed[0]"
    assert named in str(error.found)
    assert error.hint


def test_a_lazy_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that lazy modules are new
        module = Holder(layer=nn.LazyLinear(2))
    error = refused(module)
    assert error.what == "The module has lazy parameters that no forward has made yet"
    assert error.where == "layer.weight, layer.bias"


def test_tensors_on_meta_are_refused_by_name():
    module = Zoo()
    module.table["a"] = torch.empty(1, device="meta")
    module.layers[0].to("meta")
    with pytest.raises(WeightsError) as caught:
        require_saveable(find_slots(module))
    assert caught.value.where == "table['a'], layers.0.weight"
    assert "2 of 26" in str(caught.value.found)
    assert "materialize" in str(caught.value.hint)


# What is compared


MUTATIONS = {
    "dtype": (lambda m: setattr(m, "plain", m.plain.int()), "plain"),
    "dtype of a parameter": (lambda m: m.layers[0].to(torch.bfloat16), "layers.0.weight"),
    "shape": (lambda m: m._parameters.update(weight=nn.Parameter(torch.zeros(3, 4))), "weight"),
    "stride": (
        lambda m: m._parameters.update(weight=nn.Parameter(torch.zeros(3, 4).t())),
        "weight",
    ),
    "persistence": (lambda m: m._non_persistent_buffers_set.clear(), "lost"),
    "buffer to attribute": (lambda m: setattr(m, "kept", m._buffers.pop("kept")), "kept"),
    "parameter to buffer": (
        lambda m: m._buffers.update(weight=m._parameters.pop("weight").data),
        "weight",
    ),
    "parameter to tensor": (lambda m: m.loose.__setitem__(0, m.loose[0].data), "loose[0]"),
    "gone": (lambda m: m.table.pop(3), "table[3]"),
    "new": (lambda m: m.table.update(new=torch.ones(1)), "table['new']"),
    "gone to None": (lambda m: m._buffers.update(kept=None), "kept"),
    "tied": (lambda m: setattr(m, "named", Pair(m.named.right[:1], m.named.right)), "named[1]"),
    "meta": (lambda m: setattr(m, "plain", m.plain.to("meta")), "plain"),
    "hidden module": (lambda m: m.hidden.clear(), "hidden[0].weight"),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_any_change_of_facts_is_named(case):
    change, path = MUTATIONS[case]
    inventory, _ = take_inventory(find_slots(Zoo()))
    module = Zoo(seed=1)
    assert list(find_differences(module, inventory)) == []
    change(module)
    assert any(line.startswith(f"{path}: ") for line in find_differences(module, inventory))


def test_places_that_are_not_there_are_named_before_anything_is_put(tmp_path):
    layout, _ = write(Zoo(), tmp_path / "m")
    fresh = Zoo(seed=1)
    fresh.table["b"] = torch.ones(1)
    before = all_bits(fresh)
    with pytest.raises(WeightsError, match="has other tensors") as caught:
        read_into(fresh, layout)
    assert caught.value.where == "table['b']"
    assert caught.value.wanted == "no such tensor"
    assert all_bits(fresh) == before, "a refused module was half filled"


def test_filling_puts_the_very_tensors_and_copies_nothing():
    module, fresh = Zoo(), Zoo(seed=1)
    inventory, values = take_inventory(find_slots(module))
    fill(fresh, inventory, values)
    ours, theirs = (
        {slot.path: slot.tensor.data_ptr() for slot in find_slots(each)} for each in (module, fresh)
    )
    assert ours == theirs


def test_the_judge_of_these_tests_sees_sharing():
    """``memory`` must tell tied from untied, or nothing above means anything."""
    assert memory(tied(0)) != memory(tied(0, tie=False))
    assert memory(ALIASES["an offset"](0))["view"] == ("base", 20, (1,))
    assert memory(ALIASES["transposed"](0))["view"] == ("base", 0, (1, 4))


class Remembers(nn.Module):
    """Keeps what a forward pass computed, as some models of transformers do."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(2, 2)
        vars(self.child)["last"], self.cache = None, {}

    def forward(self, x):
        self.child.last = self.child(x).detach()
        self.cache.update({"cpu": x + 1, 3: x + 2})
        return x


def test_what_a_forward_left_behind_comes_back():
    used: Any = Remembers()
    fresh: Any = Remembers()
    used(torch.ones(2))
    inventory, values = take_inventory(find_slots(used))
    assert {"child.last", "cache['cpu']", "cache[3]"} <= inventory.rows.keys()
    fill(fresh, inventory, values)
    assert list(find_differences(fresh, inventory)) == []
    assert torch.equal(fresh.cache[3], torch.full((2,), 3.0))
    assert torch.equal(fresh.child.last, used.child.last)


@pytest.mark.parametrize(
    "path",
    ["cache['a']['b']", "cache[__import__('os')]", "cache['it\\'s']", "other['cpu']", "cache"],
)
def test_nothing_else_finds_a_place(path):
    assert find_setters(Remembers())(path) is None
