"""What we agree to rebuild: nothing an artifact names runs before it was looked at here."""

from __future__ import annotations

from collections.abc import Collection

from mlflow_safeflavor.errors import TrustError
from mlflow_safeflavor.spec import ModelSpec

__all__ = ["require_trust"]

_NEEDED = {"transformers": None, "import": "code", "pickle": "pickle"}
"""Structure kind → what the caller has to agree to; classes of transformers itself need nothing."""


def require_trust(spec: ModelSpec, trust: Collection[str]) -> None:
    """Refuse a structure kind that the caller did not agree to.

    Raises:
        TrustError: The kind runs the artifact's own code or a pickle.
    """
    unknown = set(trust) - {"code", "pickle"}
    if unknown:
        raise TrustError("Unknown kind of trust", where="trust", wanted="code | pickle", found=sorted(unknown))
    needed = _NEEDED[spec.structure]
    if needed and needed not in trust:
        raise TrustError(
            f"This model runs its own {needed} when it is loaded",
            where=f"structure kind {spec.structure}, class {spec.model_class}",
            wanted=f"trust={{{needed!r}}}",
            found=f"trust={set(trust) or '{}'}",
            way_out=f"if you know who saved it, pass trust={{{needed!r}}}; `mlflow-safeflavor inspect` runs nothing",
        )
