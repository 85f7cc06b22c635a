"""Values that a constructor computes, told from random ones and from memory it never wrote."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlflow_safeflavor.errors import SafeFlavorError, StructureError, WeightsError
from mlflow_safeflavor.module.configs import config_from_json
from mlflow_safeflavor.module.equality import bits_equal
from mlflow_safeflavor.module.layers import make_layers
from mlflow_safeflavor.module.memory import real_memory
from mlflow_safeflavor.module.random_state import seed_generators
from mlflow_safeflavor.module.slots import UNKNOWN, find_meta, find_slots, shape_of, some
from mlflow_safeflavor.module.structure import describe_constructor
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.module.user_code import import_name, name_of
from mlflow_safeflavor.module.watch import FIRST_MARK, SECOND_MARK, Watch

__all__ = [
    "Recipe",
    "construct",
    "construct_fresh",
    "construct_twice",
    "declared_ties",
    "find_agreement",
    "recipe_of",
    "require_memory",
]

_TRIES = 25
_PAIRS = 3


@dataclass(frozen=True)
class Recipe:
    """A constructor with its arguments, to be called any number of times.

    Attributes:
        cls: The module's class, or a function that makes it.
        config: First argument of its constructor, if not None; each call gets a copy.
        arguments: Further arguments.
    """

    cls: Any
    config: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self, dtype: torch.dtype) -> torch.nn.Module:
        """Call the constructor with a config that says ``dtype`` at every level.

        Raises:
            StructureError: It fails.
        """
        config = copy.deepcopy(self.config)  # some constructors change their config
        try:
            # Constructors of submodels obey the dtype in their config, not torch's default.
            if config is not None:
                _set_dtype(config, dtype)
            module: torch.nn.Module = self.cls(
                *(() if config is None else (config,)), **self.arguments
            )
        except Exception as error:
            raise StructureError(
                "The constructor of the model failed",
                where=name_of(self.cls),
                found=f"{type(error).__name__}: {error}",
                hint="pass from_pretrained what it needs, as further keyword arguments; where it "
                "failed is chained to this error",
            ) from error
        return module


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Set the dtype of a config and of the configs of its parts."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", None) or ():
        if getattr(config, name, None) is not None:
            _set_dtype(getattr(config, name), dtype)


def recipe_of(subject: Subject) -> Recipe | None:
    """The call of the module's constructor, as far as it can be told; None if it cannot.

    The result may make another module than the given one: compare before relying on it.
    """
    module, described = subject.module, subject.structure
    config = getattr(module, "config", None)
    try:
        if described is None or described["kind"] in ("pickle", "graph"):
            described = describe_constructor(subject)
    except SafeFlavorError:
        # A class of a script or function: no other process could import it, but this one has it.
        return (
            Recipe(type(module), config)
            if hasattr(module, "config_class") and config is not None
            else None
        )
    if described["kind"] == "torch":
        return Recipe(make_layers, arguments={"node": described["tree"]})
    arguments = {
        name: value["value"] if "value" in value else config_from_json(value, import_name)
        for name, value in described["arguments"].items()
    }
    return Recipe(type(module), config if described["config_class"] else None, arguments)


def construct(
    recipe: Recipe, dtype: torch.dtype, *, mark: int = FIRST_MARK, seed: int | None = None
) -> Subject:
    """Call a constructor on real CPU memory, again if another thread got in between.

    transformers' loader swaps torch's default dtype and ``PreTrainedModel.tie_weights`` for the
    whole process while any thread loads, and transformers 4 even where parameters are allocated.
    The first and last are noticed, and the constructor called again; declared ties that the second
    left out are tied here.

    Args:
        recipe: What to call.
        dtype: Torch's default dtype meanwhile.
        mark: Written into memory beforehand.
        seed: Run the random initialisers, from this seed; by default they are skipped.

    Raises:
        StructureError: The constructor fails, or the default dtype keeps changing.
        WeightsError: Its tensors are on the meta device nevertheless.
    """
    for attempt in range(_TRIES):
        watch = Watch(dtype, mark)
        with real_memory(dtype, initialise=seed is not None), watch:
            # Other random values at each mark; real_memory puts the random states back.
            seed_generators(mark if seed is None else seed)
            module = recipe.make(dtype)
        built = Subject.of(module)
        _require_sizes(built, recipe)
        # On meta: transformers 4 swaps where parameters are allocated while another thread loads.
        if not watch.disturbed and not find_meta(built.slots):
            return Subject.of(module) if _tie(module) else built
        time.sleep(0.01 * attempt)  # 3 s in all
    require_memory(module)
    raise StructureError(
        "Torch's default dtype changed while the model was constructed",
        where=name_of(recipe.cls),
        wanted=str(dtype),
        found=f"another dtype at some point, in each of {_TRIES} attempts",
        hint="do not call torch.set_default_dtype, or transformers' from_pretrained in other "
        "threads, meanwhile",
    )


def _require_sizes(built: Subject, recipe: Recipe) -> None:
    if lazy := [slot.path for slot in built.slots if shape_of(slot.tensor) == UNKNOWN]:
        raise StructureError(
            "The constructor leaves sizes to the first forward",
            where=f"{name_of(recipe.cls)}, {some(lazy)}",
            wanted="sizes that follow from its arguments",
            hint="replace lazy modules (torch.nn.LazyLinear) by those of fixed sizes",
        )


def construct_twice(
    recipe: Recipe, dtype: torch.dtype, first: Subject | None = None
) -> tuple[Subject, set[str]]:
    """A module, random initialisers skipped where they can be; paths of all that is not random.

    ``first`` is one of the two, where it was constructed already, with ``FIRST_MARK``.
    """
    return _agreeing(lambda mark: construct(recipe, dtype, mark=mark), first)


def construct_fresh(recipe: Recipe, dtype: torch.dtype) -> tuple[Subject, set[str]]:
    """A module whose random initialisers ran, and paths of all that they or the constructor wrote.

    Two constructions from one seed, with different marks in memory: a tensor that differs was never
    written.
    """
    # Drawn from torch's generator, so that ``torch.manual_seed`` decides as ever.
    seed = int(torch.randint(2**31, (), device="cpu"))
    return _agreeing(lambda mark: construct(recipe, dtype, mark=mark, seed=seed))


def _agreeing(
    make: Callable[[int], Subject], first: Subject | None = None
) -> tuple[Subject, set[str]]:
    """A module, and the paths of tensors that are equal in two of them."""
    for attempt in range(_PAIRS):
        built = make(FIRST_MARK) if first is None or attempt else first
        other = make(SECOND_MARK)
        try:
            agreed = find_agreement(built, other)
            break
        except StructureError:  # of another structure: another thread's loader came between
            if attempt == _PAIRS - 1:
                raise
    return built, agreed


def find_agreement(built: Subject, other: Subject) -> set[str]:
    """Paths of the tensors that have the same values in two modules of one structure.

    Raises:
        StructureError: They do not hold the same tensors.
    """
    ours, theirs = ({slot.path: slot.tensor for slot in each.slots} for each in (built, other))
    facts = [
        {path: (tensor.shape, tensor.dtype) for path, tensor in each.items()}
        for each in (ours, theirs)
    ]
    for path in sorted(ours.keys() | theirs.keys()):
        if facts[0].get(path) != facts[1].get(path):
            raise StructureError(
                "The constructor makes another module each time",
                where=f"{name_of(type(built.module))}, {path}",
                wanted=facts[0].get(path, "no such tensor"),
                found=facts[1].get(path, "no such tensor"),
                hint="make its structure depend on its arguments alone",
            )
    return {path for path, tensor in ours.items() if bits_equal(tensor, theirs[path])}


def require_memory(module: torch.nn.Module) -> None:
    """Refuse a module of which some tensor is on meta after all.

    Raises:
        WeightsError: It names them.
    """
    if meta := find_meta(find_slots(module)):
        raise WeightsError(
            "Tensors are on the meta device although the model was constructed on real memory",
            where=some(meta),
            hint="its constructor itself asks for the meta device: take that out; or another "
            "thread was inside transformers' or accelerate's loader, which can break a process for "
            "good: load in a new one",
        )


# --- ties ----------------------------------------------------------------------------------------


def declared_ties(module: torch.nn.Module) -> dict[str, str]:
    """State-dict name → the name that the module's classes declare it tied to.

    Empty if undeclared.
    """
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    if expand is not None:  # transformers 5
        found: Mapping[str, str] = expand(all_submodels=True)
        return dict(found)
    return _embedding_tie(module)


def _embedding_tie(module: torch.nn.Module) -> dict[str, str]:
    """In transformers 4.57 methods declare one pair: output and input embeddings."""
    if not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
        return {}
    try:
        ends = [
            getattr(module, f"get_{end}_embeddings", lambda: None)() for end in ("output", "input")
        ]
    # A class of the user's without embeddings where 4.57 looks for them.
    except NotImplementedError:
        return {}
    wanted = [getattr(end, "weight", None) for end in ends]
    names = {id(tensor): name for name, tensor in module.named_parameters(remove_duplicate=False)}
    pair = [names.get(id(tensor)) for tensor in wanted]
    return {pair[0]: pair[1]} if pair[0] and pair[1] and pair[0] != pair[1] else {}


def _tie(module: torch.nn.Module) -> bool:
    """Tie the declared pairs, as constructors do unless another thread is in the loader.

    Returns whether one was not tied.
    """
    tied = False
    for name, source in declared_ties(module).items():
        tensor = _tensor_at(module, source)
        if tensor is not None and _tensor_at(module, name) is not tensor:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, tensor)
            tied = True
    return tied


def _tensor_at(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    parent, _, leaf = name.rpartition(".")
    try:
        found = getattr(module.get_submodule(parent), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None
