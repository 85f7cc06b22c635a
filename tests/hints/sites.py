"""Every place of the package that tells its users what to do, found in its source and named by text alone.

A site is a call that hands over ``hint=`` (or ``instead=``, which becomes one), a constant that is
handed over by position, or a call of a logger or of ``warnings.warn``. What is computed stands in
its text as ``…``.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlflow_safeflavor

PACKAGE = Path(mlflow_safeflavor.__file__).parent
ERRORS = frozenset(
    name
    for name in importlib.import_module("mlflow_safeflavor.errors").__all__
    if name[0].isupper()
)
_HINTS = ("hint", "instead")
_CONSTANT = re.compile(r"_HINT\w*|FETCH_AGAIN|_REFUSED")
_LOGS = {
    ("_logger", "info"),
    ("_logger", "warning"),
    ("_logger", "exception"),
    ("warnings", "warn"),
}


class Site(NamedTuple):
    """What is said, and where.

    Attributes:
        module: Its path in the package, such as ``tasks/raw``.
        what: The message's first sentence.
        hint: What to do; for a line of a log the same as ``what``.
    """

    module: str
    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.module}: {self.what} → {self.hint}"


class Place(NamedTuple):
    """A site, and the lines it stands on now."""

    site: Site
    first: int
    last: int


@cache
def places_of(module: str) -> tuple[Place, ...]:
    """All sites of a module, those inside others last."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    values = vars(
        importlib.import_module(
            "mlflow_safeflavor." + module.removesuffix("/__init__").replace("/", ".")
        )
    )
    return tuple(
        Place(Site(module, *texts), node.lineno, node.end_lineno or 0)
        for node, texts in _found(tree, values)
    )


@cache
def all_sites() -> dict[Site, None]:
    """The sites of all modules, in order."""
    modules = sorted(
        path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
    )
    return dict.fromkeys(place.site for module in modules for place in places_of(module))


def errors_without() -> Iterator[tuple[str, str, bool]]:
    """Errors that are made without a hint.

    Module, first sentence, and whether they say what is wanted.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ERRORS:
                named = {keyword.arg for keyword in node.keywords}
                if "hint" not in named:
                    module = path.relative_to(PACKAGE).with_suffix("").as_posix()
                    yield (
                        module,
                        " | ".join(_firsts(node.args[0], _Known({}, {}))),
                        "wanted" in named,
                    )


def _found(tree: ast.Module, values: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[str, str]]]:
    constants = {
        name: value
        for name, value in {**_imported(tree), **values}.items()
        if isinstance(value, str)
    }
    known = _Known(constants, _assigned(tree))
    used = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    used -= {keyword.value.id for keyword in _keywords(tree) if isinstance(keyword.value, ast.Name)}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and _CONSTANT.fullmatch(target.id) and target.id in used:
            for texts in _spelled(target.id, values[target.id]):
                yield node, texts
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        hints = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg in _HINTS}
        what = " | ".join(_firsts(call.args[0], known)) if call.args else ast.unparse(call.func)
        if "instead" in hints:
            what = ast.unparse(call.func).rpartition(".")[2]
        for value in hints.values():
            for text in known.texts(value):
                yield call, (what, text)
        if (
            isinstance(call.func, ast.Attribute)
            and (ast.unparse(call.func.value), call.func.attr) in _LOGS
        ):
            yield call, (what, what)


def _imported(tree: ast.Module) -> dict[str, Any]:
    """What functions import of the package's own modules."""
    return {
        alias.name: getattr(importlib.import_module(node.module), alias.name, None)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module
        and node.module.startswith("mlflow_safeflavor.")
        for alias in node.names
    }


def _keywords(tree: ast.Module) -> Iterator[ast.keyword]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in _HINTS)


def _firsts(node: ast.expr, known: _Known) -> list[str]:
    return [
        known.template(part)
        for part in ([node.body, node.orelse] if isinstance(node, ast.IfExp) else [node])
    ]


def _spelled(name: str, value: Any) -> list[tuple[str, str]]:
    """What a constant holds.

    A hint, hints by name, or rows of a table that end with what is wrong and a hint.
    """
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [(name, hint) for hint in dict.fromkeys(value.values())]
    return [(what, hint) for _, what, hint in value] if isinstance(value, tuple) else []


class _Part(NamedTuple):
    """An expression, and the lines of the function that it is in."""

    value: ast.expr
    first: int
    last: int


def _assigned(tree: ast.Module) -> dict[str, list[_Part]]:
    """Variables of functions, and functions → the expressions they may stand for, in order."""
    found: dict[str, list[_Part]] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        lines = function.lineno, function.end_lineno or 0
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                pairs: list[tuple[ast.expr, ast.expr]] = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=False))
                for name, part in pairs:
                    found.setdefault(ast.unparse(name), []).append(_Part(part, *lines))
            elif isinstance(node, ast.AugAssign):
                found.setdefault(f"{ast.unparse(node.target)} +", []).append(
                    _Part(node.value, *lines)
                )
            elif isinstance(node, ast.Return) and node.value:
                found.setdefault(f"{function.name}()", []).append(_Part(node.value, *lines))
    return found


class _Known(NamedTuple):
    """What names of a module stand for.

    Attributes:
        constants: Texts by name.
        assigned: From ``_assigned``.
    """

    constants: Mapping[str, str]
    assigned: Mapping[str, list[_Part]]

    def texts(self, node: ast.expr) -> Iterator[str]:
        """The texts that an expression may be; none for None."""
        if isinstance(node, ast.IfExp):
            yield from self.texts(node.body)
            yield from self.texts(node.orelse)
        elif isinstance(node, ast.Call) and (
            results := self.assigned.get(f"{ast.unparse(node.func)}()")
        ):
            for result in results:
                yield from self.texts(result.value)
        elif (
            isinstance(node, ast.Name)
            and node.id not in self.constants
            and self._before(node, node.id)
        ):
            for value in (*self._before(node, node.id), *self._before(node, f"{node.id} +")):
                yield from self.texts(value)
        elif not (isinstance(node, ast.Constant) and node.value is None):
            yield self.template(node)

    def _before(self, node: ast.expr, name: str) -> list[ast.expr]:
        """What a variable was given last in the function that a node is in."""
        parts = self.assigned.get(name, [])
        here = [part.value for part in parts if part.first <= node.lineno <= part.last]
        return [value for value in here if value.lineno <= node.lineno][-1:]

    def template(self, node: ast.expr) -> str:
        """One text, with ``…`` for what is computed."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self.template, node.values))
        name = node.value if isinstance(node, ast.FormattedValue) else node
        return self.constants.get(name.id, "…") if isinstance(name, ast.Name) else "…"
