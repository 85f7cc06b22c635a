"""Configs of transformers as JSON, and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlflow_safeflavor.artifact.trust import portable
from mlflow_safeflavor.module.user_code import name_of

__all__ = ["NO_CONFIG", "config_from_json", "describe_config"]

NO_CONFIG: dict[str, Any] = {
    "config": None,
    "config_class": None,
    "attn_implementation": {},
    "experts_implementation": {},
}


def describe_config(config: Any) -> dict[str, Any]:
    """Config, class and implementations, JSON only; ``config_from_json`` reads them back."""
    # Implementations are no part of a saved config, but they decide which kernels run, part by
    # part: a backbone may use another than the model around it, and may not even know the model's.
    return {
        "config": _config_to_json(config),
        "config_class": name_of(type(config)),
        **{
            kind: {
                path: getattr(part, f"_{kind}")
                for path, part in _parts(config)
                if hasattr(part, f"_{kind}")
            }
            for kind in _IMPLEMENTATIONS
        },
    }


_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def _parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and the configs of its parts, outer first, each with its path: ``text_config``."""
    yield path, config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part, f"{path}.{name}".removeprefix("."))


def _config_to_json(config: Any) -> dict[str, Any]:
    return dict(portable(json.loads(config.to_json_string(use_diff=False))))


def config_from_json(described: Mapping[str, Any], lookup: Callable[[str], Any]) -> Any:
    """The config that was described, or None; ``lookup`` finds its class by its full name."""
    if described["config_class"] is None:
        return None
    config_class = lookup(described["config_class"])
    # Infinities are written as objects, and read by from_json_file but not by from_dict
    # (transformers 5).
    decode = getattr(config_class, "_decode_special_floats", dict)
    # A copy: some classes change the config of a part that they are given.
    config = config_class.from_dict(decode(copy.deepcopy(described["config"])))
    for kind in _IMPLEMENTATIONS:
        for path, part in _parts(config):  # outer first: setting one sets those of its parts, too
            if path in described.get(kind, {}):
                setattr(part, f"_{kind}", described[kind][path])
    return config
