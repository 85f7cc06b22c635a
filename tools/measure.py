"""The package in numbers: python tools/measure.py [FOLDER …], one column a folder.

By default the package.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def measure(folder: Path) -> dict[str, str]:
    """Label → figure.

    Bodies are counted in lines, without docstrings; comments without those that tools read.
    """
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))]
    files = [len(text.splitlines()) for text in texts]
    functions = [
        node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS)
    ]
    bodies = sorted(map(_lines, functions))
    parameters = sorted(
        len(f.args.posonlyargs) + len(f.args.args) + len(f.args.kwonlyargs) for f in functions
    )
    comments = sum(len(list(_comments(text))) for text in texts)
    longest = max(len(line) for text in texts for line in text.splitlines())
    return {
        "files": f"{len(files)}, median {statistics.median(files):.0f} lines, longest {max(files)}",
        "lines": f"{sum(files):,}",
        "characters": f"{sum(map(len, texts)):,}",
        "functions": f"{len(functions):,}",
        "body of a function": f"median {statistics.median(bodies):.0f}, 9 in 10 up to "
        f"{_nine_in_ten(bodies)}",
        "parameters": f"9 in 10 up to {_nine_in_ten(parameters)}, most {parameters[-1]}",
        "longest line": f"{longest} columns",
        "lines over 100 "
        "columns": f"{sum(len(line) > 100 for text in texts for line in text.splitlines()):,}",
        "comments": f"{100 * comments / sum(files):.1f} a hundred lines",
    }


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _comments(text: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(
            ("# noqa", "# type:", "# pragma")
        ):
            yield token.string


def _nine_in_ten(ordered: list[int]) -> int:
    return ordered[int(0.9 * (len(ordered) - 1))]


def main(folders: list[str]) -> None:
    """Print the figures of each folder side by side."""
    columns = [measure(Path(folder)) for folder in folders or ["mlflow_safeflavor"]]
    for label in columns[0]:
        print(f"{label:24}" + "".join(f"{column[label]:44}" for column in columns).rstrip())


if __name__ == "__main__":
    main(sys.argv[1:])
