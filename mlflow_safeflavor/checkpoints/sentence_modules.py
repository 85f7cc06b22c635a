"""Modules of sentence-transformers, as objects and as folders: what each says, and its layer here.

Both say the same things under the same names: what a module's ``get_config_dict`` returns is what
``save`` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints.given import library_class, require_unchanged
from mlflow_safeflavor.checkpoints.preprocessors import tokenizer_of
from mlflow_safeflavor.checkpoints.state_dict import read_state
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.embedding import ACTIVATIONS

__all__ = [
    "HINT",
    "PACKAGE",
    "Part",
    "activation_named",
    "activation_of",
    "files_of",
    "folder_tokenizer",
    "layers_of",
    "name_of",
    "not_done",
    "part_of",
    "require_plain_first",
]

PACKAGE = "sentence_transformers"
HINT = 'save it as a module of your own: task="custom" with preprocess, postprocess and code_paths'


@dataclass(frozen=True)
class Part:
    """One module: its class as ``package.module.Class``, its config, a reader of its tensors."""

    type: str
    config: Mapping[str, Any]
    state: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def kind(self) -> str:
        """Name of a class of the package, which has moved between its modules; of others whole."""
        return self.type.rpartition(".")[2] if self.type.startswith(f"{PACKAGE}.") else self.type


def part_of(module: Any) -> Part:
    """A module of an object.

    Raises:
        StructureError: It has methods of the user's own.
    """
    config = dict(module.get_config_dict()) if hasattr(module, "get_config_dict") else {}
    if hasattr(module, "activation_function"):
        config["activation_function"] = activation_of(module.activation_function)
    require_unchanged(module, library_class(module, PACKAGE) or type(module), HINT)
    return Part(name_of(type(module)), config, module.state_dict)


def files_of(folder: Path) -> tuple[dict[str, Any], Callable[[], Mapping[str, torch.Tensor]]]:
    """The config in a module's folder, empty where there is none, and what reads its tensors."""
    names = (
        "sentence_bert_config.json",
        *sorted(path.name for path in folder.glob("sentence_*_config.json")),
    )
    file = next(
        (folder / name for name in (*names, "config.json") if (folder / name).is_file()), None
    )
    # Tensors when they are needed: most modules have none, and no file to read.
    return {} if file is None else read_json(file, strict=False), lambda: read_state(folder)


def require_plain_first(part: Part) -> None:
    """Refuse a first module but a plain ``Transformer``: a text's tokens into a model."""
    if part.kind != "Transformer":
        raise not_done(part.type, "a Transformer first")
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    # Unknown keys with a value are refused: a later release may do with them what we do not.
    for name, value in part.config.items():
        usual: tuple[Any, ...] = {
            "transformer_task": ("feature-extraction",),
            "module_output_name": ("token_embeddings",),
            "modality_config": ({"text": text},),
        }.get(name, ())
        if (
            value
            and value not in usual
            and name not in ("max_seq_length", "do_lower_case", "unpad_inputs")
        ):
            raise not_done(f"{part.type}, {name}", repr(usual[0]) if usual else "None", repr(value))


_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
# Before one key named all poolings, each had a flag, ``pooling_mode_cls_token`` …, concatenated in
# this order.
_FLAGS = (
    "cls_token",
    "max_tokens",
    "mean_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


def layers_of(
    parts: Sequence[Part],
) -> Iterator[tuple[dict[str, Any], Mapping[str, torch.Tensor]]]:
    """Each module as a layer of ``Embedder``, with its tensors."""
    for part in parts:
        config = part.config
        names = {
            config[key] for key in ("module_input_name", "module_output_name") if config.get(key)
        }
        if part.kind != "Pooling" and (
            len(names) > 1 or not names <= {"sentence_embedding", "token_embeddings"}
        ):
            raise not_done(
                f"{part.type}, module_input_name",
                "the same name in and out",
                ", ".join(sorted(names)),
            )
        if part.kind == "Pooling":
            yield {"kind": "pooling", "kinds": _kinds(part)}, {}
        elif part.kind == "Normalize":
            yield {"kind": "normalize"}, {}
        elif part.kind == "LayerNorm":
            yield {"kind": "layer_norm", "size": config["dimension"]}, part.state()
        elif part.kind == "Dense":
            yield (
                {
                    "kind": "dense",
                    "size": config["in_features"],
                    "new_size": config["out_features"],
                    "bias": config.get("bias", True),
                    "activation": activation_named(
                        config.get("activation_function", "torch.nn.Tanh"), part.type
                    ),
                    "residual": config.get("use_residual", False),
                },
                part.state(),
            )
        # Dropout does nothing when a model is served.
        elif part.kind != "Dropout":
            raise not_done(part.type, "Pooling, Normalize, Dense, LayerNorm or Dropout")


def _kinds(part: Part) -> list[str]:
    said = part.config.get("pooling_mode")
    # Without any flag the package pools by the mean.
    if said is None:
        flags = zip(_POOLINGS, (f"pooling_mode_{flag}" for flag in _FLAGS), strict=True)
        said = [name for name, flag in flags if part.config.get(flag)] or ["mean"]
    said = [said] if isinstance(said, str) else list(said)
    if odd := [name for name in said if name not in _POOLINGS]:
        raise not_done(f"{part.type}, pooling_mode", " | ".join(_POOLINGS), ", ".join(odd))
    return [_POOLINGS[name] for name in said]


def folder_tokenizer(folder: Path, said: Mapping[str, Any]) -> Any:
    """A folder's tokenizer, cut and in lower case as its config says."""
    tokenizer = tokenizer_of(folder)
    # sentence-transformers keeps both beside the tokenizer, whose own files may say otherwise.
    if said.get("max_seq_length"):
        tokenizer.model_max_length = said["max_seq_length"]
    if said.get("do_lower_case"):
        from tokenizers import normalizers

        # First, as the package calls lower() before it tokenises.
        own = tokenizer.backend_tokenizer.normalizer
        lower: list[Any] = [normalizers.Lowercase(), *([] if own is None else [own])]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(lower)
    return tokenizer


def name_of(cls: type) -> str:
    """A class as ``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def activation_of(activation: Any) -> str:
    """Name of an activation's class, followed by its arguments if it has any of its own."""
    cls = type(activation)
    # With arguments the name is none that is known, and so refused: they are stored nowhere.
    try:
        usual = repr(activation) == repr(cls())
    except TypeError:
        usual = False
    return name_of(cls) if usual else f"{name_of(cls)}, {activation!r}"


def activation_named(
    name: str, where: str, known: Sequence[str] = tuple(sorted(ACTIVATIONS))
) -> str:
    """An activation's short name.

    Args:
        name: As ``package.module.Class``.
        where: Module that has it, for messages.
        known: Short names of those that are done.

    Raises:
        StructureError: It is none of torch's, or not known.
    """
    short = name.rpartition(".")[2]
    if not name.startswith("torch.nn.") or short not in known or "," in name:
        raise not_done(f"{where}, activation", " | ".join(f"torch.nn.{one}" for one in known), name)
    return short


def not_done(where: object, wanted: str, found: str | None = None) -> StructureError:
    """The error for a part of sentence-transformers that has no counterpart here."""
    return StructureError(
        "The model holds a part of sentence-transformers that is not supported",
        where=where,
        wanted=wanted,
        found=found,
        hint=HINT,
    )
