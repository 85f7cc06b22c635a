"""Pairs of code before and after a change, made from Python's own standard library.

Functions of a suitable length get seeded changes of their syntax tree. A *mutation* puts a bug in:
(mutated, original) is then a fix, and (original, mutated) the opposite of one. A *rewording* says
the same in other words, and is no fix in either direction. All code goes through ``ast.unparse``,
so that formatting and comments give nothing away. Files, and not pairs, are dealt to the three
splits, and a function that stands in several files is used once.
"""

from __future__ import annotations

import ast
import copy
import json
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

LINES = range(2, 10)
"""Lines of a function without its docstring.

The encoder cuts long ones, and of one line little can be told.
"""
CHARACTERS = 280
PER_FUNCTION = 3
"""Changes of one function at the most, each by another rule."""
PER_FILE = 90
"""Pairs of one file at the most: some are long, and all of one kind."""
REWORDED = 0.4
"""Share of rewordings among the changes that fix nothing, where one fits."""
SPLITS = {"train": 0.75, "validation": 0.1, "heldout": 0.15}
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "__pycache__",
}

Node = TypeVar("Node", bound=ast.AST)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[Any, random.Random], "ast.AST | None"]
"""A node → what stands in its place, or None where the rule does not apply.

The node itself is never changed.
"""


@dataclass(frozen=True)
class Pair:
    """One change of one function.

    Attributes:
        buggy_code: Before the change.
        fixed_code: After it.
        label: 1 if the change fixes a bug, else 0.
        rule: The name of the mutation or rewording that made it.
        file: Where the function stands, below the standard library.
    """

    buggy_code: str
    fixed_code: str
    label: int
    rule: str
    file: str


def _but(node: Node, **fields: Any) -> Node:
    """A copy of ``node`` with some fields replaced."""
    new = copy.copy(node)
    vars(new).update(fields)
    return new


# Mutations

FLIPPED: dict[type[ast.AST], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NEIGHBOURS: dict[type[ast.AST], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
}
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def swap_comparison(node: Any, rng: random.Random) -> ast.AST | None:
    """``a < b`` → ``a <= b``, ``a == b`` → ``a != b``, ``a in b`` → ``a not in b`` and so on."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        return None
    old = type(node.ops[0])
    return _but(node, ops=[FLIPPED[old]() if old in FLIPPED else rng.choice(NEIGHBOURS[old])()])


def swap_operator(node: Any, rng: random.Random) -> ast.AST | None:
    """``a + b`` → ``a - b``, ``a and b`` → ``a or b``, ….

    Never on texts, where it could not even run.
    """
    if not isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) or type(node.op) not in SWAPPED:
        return None
    texts = any(_is_text(child) for child in ast.walk(node))
    return None if texts else _but(node, op=SWAPPED[type(node.op)]())


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def shift_by_one(node: Any, rng: random.Random) -> ast.AST | None:
    """Of a number, an index, a slice or a range.

    ``a + 1`` → ``a``, ``3`` → ``4``, ``range(n)`` → ``range(n - 1)``, ``a[i:]`` → ``a[i + 1:]``.
    """
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, (ast.Add, ast.Sub))
        and _is_one(node.right)
    ):
        return node.left
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 100:
        return ast.Constant(node.value + rng.choice((-1, 1)) if node.value else 1)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "range"
        and node.args
    ):
        end = 0 if len(node.args) == 1 else 1
        return _but(
            node, args=[*node.args[:end], _moved(node.args[end], rng), *node.args[end + 1 :]]
        )
    if isinstance(node, ast.Slice) and isinstance(node.lower, ast.Name):
        return _but(node, lower=_moved(node.lower, rng))
    return None


def _is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value == 1


def _moved(node: ast.expr, rng: random.Random) -> ast.expr:
    return ast.BinOp(node, rng.choice((ast.Add, ast.Sub))(), ast.Constant(1))


def negate_condition(node: Any, rng: random.Random) -> ast.AST | None:
    """``if a:`` → ``if not a:``.

    Comparisons are left to ``swap_comparison``, and ``not a`` to ``drop_not``.
    """
    if not isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return None
    if isinstance(node.test, (ast.Compare, ast.Constant)) or _is_not(node.test):
        return None
    return _but(node, test=ast.UnaryOp(ast.Not(), node.test))


def drop_not(node: Any, rng: random.Random) -> ast.AST | None:
    """``not a`` → ``a``."""
    return node.operand if _is_not(node) else None


def _is_not(node: Any) -> TypeGuard[ast.UnaryOp]:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def swap_arguments(node: Any, rng: random.Random) -> ast.AST | None:
    """``f(a, b)`` → ``f(b, a)``."""
    if (
        not isinstance(node, ast.Call)
        or len(node.args) < 2
        or any(isinstance(a, ast.Starred) for a in node.args)
    ):
        return None
    i, args = rng.randrange(len(node.args) - 1), list(node.args)
    args[i], args[i + 1] = args[i + 1], args[i]
    return _but(node, args=args)


def change_default(node: Any, rng: random.Random) -> ast.AST | None:
    """``def f(a=True)`` → ``def f(a=False)``, ``def f(n=1)`` → ``def f(n=10)`` and so on."""
    if not isinstance(node, ast.arguments) or not node.defaults:
        return None
    i, defaults = rng.randrange(len(node.defaults)), list(node.defaults)
    others = _other_values(defaults[i])
    if not others:
        return None
    defaults[i] = ast.Constant(rng.choice(others))
    return _but(node, defaults=defaults)


def _other_values(node: ast.expr) -> list[Any]:
    value = getattr(node, "value", ...)
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [0, True, False]
    return (
        [other for other in (None, 0, 1, value * 10) if other != value]
        if isinstance(value, (int, float))
        else []
    )


# Rewordings

MIRRORED: dict[type[ast.AST], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}
NAMES = ("value", "item", "result", "current", "entry", "data")


def mirror_comparison(node: Any, rng: random.Random) -> ast.AST | None:
    """``a < b`` → ``b > a``, of names and constants, whose order of evaluation has no effect."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in MIRRORED:
        return None
    left, right = node.left, node.comparators[0]
    if not isinstance(left, (ast.Name, ast.Constant)) or not isinstance(
        right, (ast.Name, ast.Constant)
    ):
        return None
    return ast.Compare(right, [MIRRORED[type(node.ops[0])]()], [left])


def reword_negation(node: Any, rng: random.Random) -> ast.AST | None:
    """``a is not b`` → ``not a is b``, ``a not in b`` → ``not a in b``."""
    if (
        not isinstance(node, ast.Compare)
        or len(node.ops) != 1
        or not isinstance(node.ops[0], (ast.IsNot, ast.NotIn))
    ):
        return None
    return ast.UnaryOp(ast.Not(), _but(node, ops=[FLIPPED[type(node.ops[0])]()]))


def swap_branches(node: Any, rng: random.Random) -> ast.AST | None:
    """``if a: x else: y`` → ``if not a: y else: x``."""
    if not isinstance(node, ast.If) or not node.orelse or isinstance(node.orelse[0], ast.If):
        return None
    test = node.test.operand if _is_not(node.test) else ast.UnaryOp(ast.Not(), node.test)
    return ast.If(test, node.orelse, node.body)


def rename_variable(node: Any, rng: random.Random) -> ast.AST | None:
    """One local variable gets another name throughout."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    inside = list(ast.walk(node))
    if any(isinstance(child, (ast.Global, ast.Nonlocal)) for child in inside):
        return None
    # Names that more than `Name` nodes say (arguments, handlers, imports, inner functions) are left
    # alone.
    elsewhere = {
        getattr(child, field, None)
        for child in inside
        for field in ("name", "arg", "asname", "rest")
    }
    names = [child for child in inside if isinstance(child, ast.Name)]
    local = sorted({name.id for name in names if isinstance(name.ctx, ast.Store)} - elsewhere)
    fresh = sorted(set(NAMES) - {name.id for name in names} - elsewhere)
    if not local or not fresh:
        return None
    old, new = rng.choice(local), rng.choice(fresh)
    return copy.deepcopy(node, {id(name): _but(name, id=new) for name in names if name.id == old})


MUTATIONS: tuple[Rule, ...] = (
    swap_comparison,
    swap_operator,
    shift_by_one,
    negate_condition,
    drop_not,
    swap_arguments,
    change_default,
)
REWORDINGS: tuple[Rule, ...] = (mirror_comparison, reword_negation, swap_branches, rename_variable)


def label_of_the_opposite(pair: Pair) -> int:
    """Whether the same change backwards fixes a bug.

    What puts one in does, and a rewording never.
    """
    return 0 if pair.rule in {rule.__name__ for rule in REWORDINGS} else 1 - pair.label


def apply(rule: Rule, function: Function, rng: random.Random) -> str | None:
    """The code of ``function`` with ``rule`` applied in one random place.

    None where it fits nowhere.
    """
    nodes = list(ast.walk(function))
    for old in rng.sample(nodes, len(nodes)):
        new = rule(old, rng)
        if new is not None:
            # A copy in which one node is another: what `deepcopy` remembers, it takes for copied.
            return ast.unparse(copy.deepcopy(function, {id(old): new}))
    return None


def changes(function: Function, code: str, file: str, rng: random.Random) -> Iterator[Pair]:
    """Pairs of one function, each by another rule, half of them fixes.

    Args:
        function: Its syntax tree.
        code: Its source, as ``ast.unparse`` writes it.
        file: Where it stands.
        rng: Chooses rules, places, what comes there, and the order.
    """
    mutations, rewordings = (rng.sample(rules, len(rules)) for rules in (MUTATIONS, REWORDINGS))
    for _ in range(PER_FUNCTION):
        label = rng.randrange(2)
        reworded = (
            _first(rewordings, function, code, rng)
            if not label and rng.random() < REWORDED
            else None
        )
        found = reworded or _first(mutations, function, code, rng)
        if found:
            rule, changed = found
            backwards = rng.random() < 0.5 if reworded else bool(label)
            before, after = (changed, code) if backwards else (code, changed)
            yield Pair(before, after, label, rule.__name__, file)


def _first(
    rules: list[Rule], function: Function, code: str, rng: random.Random
) -> tuple[Rule, str] | None:
    """The first rule that fits, and the code it makes; takes from ``rules`` what was tried."""
    while rules:
        rule = rules.pop()
        changed = apply(rule, function, rng)
        if changed is not None and changed != code:
            return rule, changed
    return None


# Functions and files


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(root: Path) -> list[Path]:
    """Python files below ``root`` but tests, tables and what pip installed, in a fixed order.

    Relative to ``root``.
    """
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    return sorted(
        file
        for file in files
        if not SKIPPED & set(file.parts) and not file.name.startswith("test_")
    )


def split_files(files: Sequence[Path], seed: int) -> dict[str, list[Path]]:
    """Deal files to the splits, shuffled by ``seed``."""
    shuffled = random.Random(seed).sample(list(files), len(files))
    first, second = (
        round(len(files) * share) for share in (SPLITS["train"], 1 - SPLITS["heldout"])
    )
    return {
        "train": shuffled[:first],
        "validation": shuffled[first:second],
        "heldout": shuffled[second:],
    }


def read_functions(file: Path) -> Iterator[tuple[Function, str]]:
    """Functions and methods of a suitable length, without their docstrings, each with its code."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files in other encodings
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            # Writing code takes long, and a function of far more nodes than characters allowed is
            # too long anyway.
            if node.body and sum(1 for _ in ast.walk(node)) < CHARACTERS:
                code = ast.unparse(node)
                if len(code) <= CHARACTERS and code.count("\n") + 1 in LINES:
                    yield node, code


def pairs_of(file: Path, root: Path, seed: int, seen: set[str]) -> list[Pair]:
    """Pairs of one file's functions, each function once; adds to ``seen`` what it used."""
    rng = random.Random(f"{seed} {file.as_posix()}")
    pairs: list[Pair] = []
    for function, code in read_functions(root / file):
        if code not in seen:
            seen.add(code)
            pairs += changes(function, code, file.as_posix(), rng)
    return rng.sample(pairs, min(len(pairs), PER_FILE))


def make_pairs(count: int, *, seed: int = 0, root: Path | None = None) -> dict[str, list[Pair]]:
    """Split → pairs, shuffled.

    Args:
        count: Pairs in all splits together, at the most; each split gets its share of it.
        seed: The same seed, files and Python give the same pairs.
        root: A folder of Python files; by default the standard library.
    """
    root = root or standard_library()
    seen: set[str] = set()
    splits = {}
    for split, files in split_files(find_files(root), seed).items():
        pairs: list[Pair] = []
        wanted = round(count * SPLITS[split])
        for file in files:
            if len(pairs) < wanted:
                pairs += pairs_of(file, root, seed, seen)
        splits[split] = random.Random(seed).sample(pairs, len(pairs))[:wanted]
    return splits


def write_rows(pairs: Sequence[Pair], file: Path) -> None:
    """JSON lines of ``buggy_code``, ``fixed_code`` and ``label``.

    What a model is asked, and the right answer.
    """
    rows = [
        {"buggy_code": pair.buggy_code, "fixed_code": pair.fixed_code, "label": pair.label}
        for pair in pairs
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
