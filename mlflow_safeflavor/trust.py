"""What we agree to rebuild: nothing an artifact names runs before it was looked at here."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from mlflow_safeflavor.errors import StructureError, TrustError

__all__ = ["KINDS", "require_agreed", "require_known", "require_no_shadows"]

KINDS = ("code", "pickle")
"""What an artifact may want to run: modules from its code folder, or a pickle."""


def require_known(trust: Collection[str]) -> None:
    """Refuse agreement to something that does not exist, which is a typing mistake.

    Raises:
        TrustError: Names the unknown kind.
    """
    if isinstance(trust, str) or not set(trust) <= set(KINDS):
        raise TrustError(
            "Unknown kind of trust", where="trust", wanted='a set of "code" and "pickle"', found=repr(trust)
        )


def require_agreed(kind: str, trust: Collection[str], what: str) -> None:
    """Refuse to run something the caller did not agree to. Called first thing, and again at the very place.

    Args:
        kind: "code" or "pickle".
        trust: What the caller agreed to.
        what: What would run.

    Raises:
        TrustError: ``kind`` is not in ``trust``.
    """
    if kind not in trust:
        way_out = f"if you know who saved it, pass trust={{{kind!r}}}; `mlflow-safeflavor inspect` runs nothing of it"
        if kind == "pickle":
            way_out += "; under pyfunc, set MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true"
        raise TrustError(
            f"This model runs its own {kind} when it is loaded",
            where=what,
            wanted=f"trust={{{kind!r}}}",
            found=f"trust={set(trust) or '{}'}",
            way_out=way_out,
        )


_NOT_YOURS = frozenset(sys.stdlib_module_names) - {"test"} | {
    *("accelerate", "cloudpickle", "huggingface_hub", "mlflow", "numpy", "packaging", "pandas"),
    *("safetensors", "tokenizers", "torch", "transformers", "yaml"),
}
"""Modules that must come from where Python and pip put them."""


def require_no_shadows(code: Path) -> None:
    """Refuse code that Python would import in place of torch or of its own library.

    Under pyfunc, MLflow has put the folder first on the path: called before torch is imported.

    Raises:
        StructureError: Names the module.
    """
    names = {path.name.partition(".")[0] for path in code.iterdir()} if code.is_dir() else set()
    if shadows := sorted(names & _NOT_YOURS):
        raise StructureError(
            "The model's code would be imported in place of a library",
            where=f"{code.name}/{shadows[0]}",
            wanted="module names of the model's own",
            found=", ".join(shadows),
            way_out="rename it and save the model again; if you did not write it, do not load this model",
        )
