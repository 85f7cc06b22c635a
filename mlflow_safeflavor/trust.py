"""What we agree to rebuild: nothing an artifact names runs before it was looked at here."""

from __future__ import annotations

from collections.abc import Collection

from mlflow_safeflavor.errors import TrustError

__all__ = ["KINDS", "require_agreed", "require_known"]

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
