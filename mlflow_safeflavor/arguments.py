"""Arguments of public functions, checked against their annotations."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from typing import Any, ParamSpec, TypeVar

from mlflow_safeflavor.errors import InputError

__all__ = ["checked", "require_arguments"]

P = ParamSpec("P")
R = TypeVar("R")


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # numpy's, too


def _is_whole(value: Any) -> bool:
    # Arrays and tensors have __index__, too, and raise for more than one element: __len__ tells
    # them. Truth values have it as well: max_batch=True would be a batch of 1.
    return hasattr(value, "__index__") and not _is_truth(value) and not hasattr(value, "__len__")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_class(value: Any) -> bool:
    return isinstance(value, type)


def _of(module: str, name: str) -> Callable[[Any], bool]:
    """Whether a value is an instance of a class, told by names."""

    # By names: importing torch to refuse an argument would take seconds.
    def is_one(value: Any) -> bool:
        found = [(base.__module__.partition(".")[0], base.__name__) for base in type(value).__mro__]
        return (module, name) in found

    return is_one


def _listing(kinds: tuple[type, ...], *members: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """One of these kinds of list, each member of which passes one of the predicates."""

    def is_one(value: Any) -> bool:
        # A text is a Sequence of its letters: code_paths="a.py" would copy the files a, ., p and y.
        lists = isinstance(value, kinds) and not isinstance(value, (str, bytes, Mapping))
        return lists and all(any(is_member(member) for is_member in members) for member in value)

    return is_one


def _mapping(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_one(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            _is_text(key) and is_value(value[key]) for key in value
        )

    return is_one


def _anything(value: Any) -> bool:
    return True


# Part of an annotation, as it is written → its name in messages, and its predicate.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Any": ("anything", _anything),
    "None": ("None", lambda value: value is None),
    "str": ("a text", _is_text),
    "Path": ("a path", _is_path),
    "StrPath": ("a text or path", lambda value: _is_text(value) or _is_path(value)),
    "bool": ("True or False", _is_truth),
    "Literal[False]": ("False", lambda value: value is False),
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "type[Any]": ("a class", _is_class),
    "Callable[..., Any]": ("a function", callable),
    "Sequence[str]": ("a list of texts", _listing((Sequence,), _is_text)),
    "Sequence[str | Path]": ("a list of paths", _listing((Sequence,), _is_text, _is_path)),
    "Collection[str]": ("a list or set of texts", _listing((Sequence, Set), _is_text)),
    "Mapping[str, Any]": ("a dict with texts as keys", _mapping(_anything)),
    "Mapping[str, str]": ("a dict of texts", _mapping(_is_text)),
    "Mapping[str, torch.Tensor]": ("a dict of tensors", _mapping(_of("torch", "Tensor"))),
    "torch.dtype": ("a torch.dtype", _of("torch", "dtype")),
    "torch.device": ("a torch.device", _of("torch", "device")),
    "torch.nn.Module": ("a torch.nn.Module", _of("torch", "Module")),
    "ModelSignature": ("an mlflow.models.ModelSignature", _of("mlflow", "ModelSignature")),
    "Model": ("an mlflow.models.Model", _of("mlflow", "Model")),
    "pyspark.sql.DataFrame": ("a DataFrame of Spark", _of("pyspark", "DataFrame")),
    "pd.DataFrame": ("a pandas.DataFrame", _of("pandas", "DataFrame")),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Hold a public function's arguments to its annotations, before its first line runs.

    Its module has to postpone annotations, which makes them texts: classes that they name need not
    be imported.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise _misfit(function.__name__, signature, kwargs, error) from None
        for name, value in given.items():
            # **options have their annotations in another function: see require_arguments.
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                _require(signature.parameters[name], value)
        return function(*args, **kwargs)

    return call


def require_arguments(
    given: Mapping[str, Any], function: Callable[..., Any], known: Collection[str]
) -> None:
    """Refuse keyword arguments of the wrong kind, and those whose name is not among ``known``.

    Raises:
        InputError: It names the argument.
    """
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        if name not in known:
            raise _unknown(name, known)
        if name in parameters:
            _require(parameters[name], value)


def kinds_of(annotation: str) -> Iterator[str]:
    """The alternatives of an annotation: of ``Sequence[str | Path] | None`` two."""
    depth, alternative = 0, ""
    for sign in annotation:
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and not depth:
            yield alternative.strip()
            alternative = ""
        else:
            alternative += sign
    yield alternative.strip()


def _require(parameter: inspect.Parameter, value: Any) -> None:
    kinds = list(kinds_of(parameter.annotation))
    if not any(_KINDS[kind][1](value) for kind in kinds):
        raise InputError(
            "An argument is of the wrong type",
            where=parameter.name,
            wanted=" or ".join(_KINDS[kind][0] for kind in kinds),
            found=_shown(value),
            hint=_hint(parameter, kinds, value),
        )


# Shown in messages. The repr of anything else may be pages long (a module), or raise (a proxy).
_PLAIN = (str, bytes, int, float, os.PathLike, type(None))


def _shown(value: Any) -> str:
    members: Collection[Any] = ()
    if isinstance(value, (list, tuple, set, Mapping)):
        members = value.values() if isinstance(value, Mapping) else value
    shown = isinstance(value, _PLAIN) or (
        0 < len(members) < 10 and all(isinstance(one, _PLAIN) for one in members)
    )
    name = type(value).__name__
    return "None" if value is None else f"{name} {reprlib.repr(value)}" if shown else name


def _hint(parameter: inspect.Parameter, kinds: Collection[str], value: Any) -> str | None:
    # Code that can be pasted: tests/hints evaluates such hints.
    name, one = parameter.name, isinstance(value, (str, os.PathLike))
    if one and any(kind.startswith(("Sequence", "Collection")) for kind in kinds):
        given = (
            repr(value)
            if isinstance(value, str) or "Sequence[str | Path]" in kinds
            else f"str({name})"
        )
        return f"pass {name}=[{given}]"
    if isinstance(value, os.PathLike) and "str" in kinds:
        return f"pass str({name})"
    # None is a common way to say "the default".
    if value is None and parameter.default is not inspect.Parameter.empty:
        return f"leave {name} out, which is {name}={parameter.default!r}"
    return None


def _misfit(
    what: str, signature: inspect.Signature, given: Mapping[str, Any], error: TypeError
) -> InputError:
    for name in given:
        if name not in signature.parameters:
            return _unknown(name, signature.parameters)
    return InputError(f"{what} cannot be called like this", found=error)


# Arguments of MLflow's own flavors.
_CALLED_HERE = {
    "transformers_model": "model",
    "pytorch_model": "model",
    "torch_dtype": "dtype",
    "inference_config": "model_config",
}


def _unknown(name: str, known: Collection[str]) -> InputError:
    here = _CALLED_HERE.get(name)
    close = [here] if here and here in known else difflib.get_close_matches(name, known, 1)
    return InputError(
        "There is no such argument",
        where=name,
        wanted=", ".join(sorted(known)),
        hint=f"is {close[0]} meant?" if close else "leave it out",
    )
