"""Rules of trust: nothing that an artifact names runs before it passed them.

Without agreement only classes are made whose saving was proven, from plain values: neither a config
nor an argument names code, a file or a repository. ``guard`` stands behind, for attacks that these
lists do not foresee.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from mlflow_safeflavor.errors import StructureError, TrustError

__all__ = [
    "KINDS",
    "agreed_to",
    "agreed_to_here",
    "find_steering",
    "is_proven",
    "portable",
    "require_agreed",
    "require_harmless",
    "require_known",
    "require_no_shadows",
]

# Kinds of agreement: to modules from the artifact's code folder, and to a pickle.
KINDS = ("code", "pickle")


def require_known(trust: Collection[str]) -> None:
    """Refuse agreement of an unknown kind, which is a typing mistake.

    Raises:
        TrustError: Names the unknown kind.
    """
    if isinstance(trust, str) or not set(trust) <= set(KINDS):
        raise TrustError(
            "Unknown kind of trust",
            where="trust",
            wanted='a set of "code" and "pickle"',
            found=repr(trust),
        )


_AGREED: ContextVar[frozenset[str]] = ContextVar("agreed", default=frozenset())


@contextmanager
def agreed_to(kinds: Collection[str]) -> Iterator[None]:
    """Agree for loads that this thread's caller cannot hand ``trust`` to.

    ``log_model`` writes a model, and then MLflow loads it to try its example.
    """
    before = _AGREED.set(frozenset(kinds))
    try:
        yield
    finally:
        _AGREED.reset(before)


def agreed_to_here() -> frozenset[str]:
    """Kinds that a surrounding ``agreed_to`` names."""
    return _AGREED.get()


def require_agreed(kind: str, trust: Collection[str], what: str) -> None:
    """Refuse a kind of code that the caller did not agree to.

    Called first thing in a load, and again right before the code would run.

    Args:
        kind: "code" or "pickle".
        trust: Kinds that the caller agreed to.
        what: Name of the class, hook or file that would run.

    Raises:
        TrustError: ``kind`` is not in ``trust``.
    """
    if kind not in trust:
        hint = (
            f"if you know who saved it, pass trust={{{kind!r}}}; `mlflow-safeflavor inspect` runs "
            "nothing of it"
        )
        if kind == "pickle":
            hint += "; under pyfunc, set MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true"
        raise TrustError(
            f"This model runs its own {kind} when it is loaded",
            where=what,
            wanted=f"trust={{{kind!r}}}",
            found=f"trust={set(trust) or '{}'}",
            hint=hint,
        )


# Modules that may come only from the folders of Python and pip. ("test" is in the standard library,
# and a common name for code of one's own.)
_NOT_YOURS = frozenset(sys.stdlib_module_names) - {"test"} | {
    *("accelerate", "cloudpickle", "huggingface_hub", "mlflow", "numpy", "packaging", "pandas"),
    *("safetensors", "tokenizers", "torch", "transformers", "yaml"),
}


def require_no_shadows(code: Path) -> None:
    """Refuse code that Python would import in place of torch or of its own library.

    Called before torch is imported: under pyfunc, MLflow has put the folder first on the path.

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
            hint="rename it and save the model again; if you did not write it, do not load this "
            "model",
        )


# Classes.


def is_proven(class_name: str) -> bool:
    """Whether the sweep saved and loaded the class of transformers of this name, found equal."""
    return class_name in _proven()


@cache
def _proven() -> frozenset[str]:
    lines = Path(__file__).with_name("proven_classes.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(" ".join(line for line in lines if not line.startswith("#")).split())


# Configs. The names are those by which transformers and timm come to load something while they
# build: found by reading every `from_pretrained`, `cached_file`, `hf_hub_download`, `torch.load`,
# `open` and `create_model` in them.

_CODE = frozenset(("auto_map", "custom_pipelines"))
_ELSEWHERE = frozenset(
    (
        *(
            "_name_or_path",
            "cache_dir",
            "checkpoint",
            "name_or_path",
            "pretrained",
            "pretrained_cfg",
        ),
        *("pretrained_cfg_overlay", "target_lang", "use_pretrained_backbone"),
    )
)
_FILES = re.compile(r".*_(file|files|path|paths|dir|url|repo|checkpoint)")
# Names of models that timm knows. What is no plain name is that of a repository or folder.
_REGISTERED = frozenset(("architecture", "backbone"))

_LABELS = frozenset(("id2label", "label2id"))


def find_steering(content: Any, *, trusted: bool = False, where: str = "") -> Iterator[str]:
    """Keys of a config, or of a processor's or tokenizer's JSON, that make libraries load more.

    Args:
        content: JSON, looked at as deep as it is.
        trusted: Whether the code of the artifact runs anyhow: then only keys that bring other code
            are found.
        where: Key of ``content`` itself, as a prefix.

    Yields:
        Key and value.
    """
    pairs = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content if isinstance(content, list) else ())
    )
    for key, value in pairs:
        path = f"{where}.{key}".removeprefix(".")
        if _steers(str(key), value, trusted):
            yield f"{path}: {str(value)[:100]!r}"
        # Labels are words of the user's, such as "file" and "checkpoint", not keys of a library.
        elif isinstance(value, (dict, list)) and key not in _LABELS:
            yield from find_steering(value, trusted=trusted, where=path)


def _steers(key: str, value: Any, trusted: bool) -> bool:
    # owner/name is a kernel on a hub, which transformers would fetch and run
    if key.endswith("_implementation"):
        return "/" in str(value)
    if not value:
        return False
    if key in _CODE or trusted:
        return key in _CODE
    if key in _REGISTERED and isinstance(value, str):
        return re.fullmatch(r"[\w.-]+", value) is None
    # A number is no file: drop_path is a probability.
    return key in _ELSEWHERE or (
        not isinstance(value, (bool, int, float)) and _FILES.fullmatch(key) is not None
    )


def portable(config: Any) -> Any:
    """A config without the names of its origin; config and weights are in the artifact."""
    if isinstance(config, list):
        return [portable(value) for value in config]
    if not isinstance(config, dict):
        return config
    kept = {
        key: portable(value)
        for key, value in config.items()
        if key not in (*_CODE, "_name_or_path")
    }
    # Its weights are in the artifact, and True would have transformers fetch them once more.
    return kept | ({"use_pretrained_backbone": False} if "use_pretrained_backbone" in kept else {})


def require_harmless(content: Any, where: object, *, trusted: bool = False) -> None:
    """Refuse JSON that would have a library load something; see ``find_steering``.

    Raises:
        TrustError: Names the keys.
    """
    if found := list(find_steering(content, trusted=trusted)):
        raise TrustError(
            "A file of the model names code, files or repositories that a library would load",
            where=where,
            found="; ".join(found[:5]),
            hint="if you did not save this model, do not use it; if you did, take this out of its "
            "config and save it again",
        )
