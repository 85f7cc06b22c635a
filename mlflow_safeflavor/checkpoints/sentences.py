"""Models of sentence-transformers, as objects and as folders; they answer as its ``encode`` does.

Both name the same facts: a module's ``get_config_dict`` returns the content of the file that
``save`` writes. The package is never imported: an object has it imported already, and a folder is
read without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints.from_pretrained import read_checkpoint
from mlflow_safeflavor.checkpoints.given import Source, library_class, require_unchanged
from mlflow_safeflavor.checkpoints.preprocessors import tokenizer_of
from mlflow_safeflavor.checkpoints.recipe import bare_model
from mlflow_safeflavor.checkpoints.state_dict import read_state
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.embedding import ACTIVATIONS, Embedder

__all__ = ["from_folder", "from_object", "is_folder", "is_object"]

_PACKAGE = "sentence_transformers"
_CONFIG = "config_sentence_transformers.json"
_HINT = 'save it as a module of your own: task="custom" with preprocess, postprocess and code_paths'


def is_object(model: object) -> bool:
    """Whether it is a model of sentence-transformers, of any kind."""
    cls = library_class(model, _PACKAGE)
    return cls is not None and (hasattr(model, "encode") or hasattr(model, "predict"))


def is_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model of sentence-transformers, a CrossEncoder among them."""
    config = Path(folder) / "config.json"
    return (Path(folder) / "modules.json").is_file() or (
        config.is_file() and {*_ACTIVATION_KEYS} & read_json(config, strict=False).keys() != set()
    )


def from_object(model: Any) -> Source:
    """Take a ``SentenceTransformer`` or ``CrossEncoder`` apart.

    Raises:
        StructureError: It is something else, has methods of the user's own, or a module that is not
            supported.
    """
    cls = cast(type, library_class(model, _PACKAGE))
    require_unchanged(model, cls, _HINT)
    said = {
        name: getattr(model, name, None)
        for name in ("prompts", "default_prompt_name", "truncate_dim")
    }
    if cls.__name__ == "CrossEncoder":
        _require_none(getattr(model, "keep_in_fp32_modules", None), "keep_in_fp32_modules")
        if isinstance(model, torch.nn.Module):
            _require_single([_name_of(type(module)) for module in model.children()])
        activation = getattr(model, "activation_fn", None) or getattr(
            model, "default_activation_function", None
        )
        return _cross_encoder(model.model, model.tokenizer, _activation_of(activation), said)
    if cls.__name__ != "SentenceTransformer":
        raise _not_done(_name_of(cls), "a SentenceTransformer or a CrossEncoder")
    similarity = getattr(model, "similarity_fn_name", None)
    parts = [_part_of(module) for module in model.children()]
    first = next(iter(model.children()))
    _require_plain_first(parts[0])
    return _sentence_transformer(
        first.auto_model, first.tokenizer, parts[1:], {**said, "similarity": similarity}
    )


def from_folder(folder: str | Path, dtype: str | torch.dtype | None) -> Source:
    """Read a folder of ``SentenceTransformer.save`` or ``CrossEncoder.save``, of old releases too.

    Args:
        folder: One for which ``is_folder`` is true.
        dtype: Dtype that the model is read in; see ``dtypes.read_as``.

    Raises:
        StructureError: A file is missing, or speaks of a module that is not supported.
    """
    folder = Path(folder)
    said = read_json(folder / _CONFIG, strict=False) if (folder / _CONFIG).is_file() else {}
    modules = (
        read_json(folder / "modules.json", strict=False)
        if (folder / "modules.json").is_file()
        else []
    )
    # CrossEncoders of older releases have no modules.json.
    if not modules or said.get("model_type") == "CrossEncoder":
        return _cross_encoder_folder(folder, [module["type"] for module in modules], said, dtype)
    if said.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise _not_done(
            f"{folder}, {said['model_type']}", "a SentenceTransformer or a CrossEncoder"
        )
    parts = [_Part(module["type"], *_files_of(folder / module["path"])) for module in modules]
    _require_plain_first(parts[0])
    where = folder / modules[0]["path"]
    if (where / "adapter_config.json").is_file():
        raise _not_done(where, "a whole model", "an adapter of PEFT")
    model, stored = read_checkpoint(where, dtype=dtype, **bare_model(where))
    said = {**said, "similarity": said.get("similarity_fn_name")}
    source = _sentence_transformer(model, _tokenizer_of(where, parts[0].config), parts[1:], said)
    return replace(source, stored=stored)


# --- SentenceTransformer -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One module: its class as ``package.module.Class``, its config, a reader of its tensors."""

    type: str
    config: Mapping[str, Any]
    state: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def kind(self) -> str:
        """Name of a class of the package, which has moved between its modules; of others whole."""
        return self.type.rpartition(".")[2] if self.type.startswith(f"{_PACKAGE}.") else self.type


def _part_of(module: Any) -> _Part:
    config = dict(module.get_config_dict()) if hasattr(module, "get_config_dict") else {}
    if hasattr(module, "activation_function"):
        config["activation_function"] = _activation_of(module.activation_function)
    require_unchanged(module, library_class(module, _PACKAGE) or type(module), _HINT)
    return _Part(_name_of(type(module)), config, module.state_dict)


def _files_of(folder: Path) -> tuple[dict[str, Any], Callable[[], Mapping[str, torch.Tensor]]]:
    names = (
        "sentence_bert_config.json",
        *sorted(path.name for path in folder.glob("sentence_*_config.json")),
    )
    file = next(
        (folder / name for name in (*names, "config.json") if (folder / name).is_file()), None
    )
    # Tensors when they are needed: most modules have none, and no file to read.
    return {} if file is None else read_json(file, strict=False), lambda: read_state(folder)


def _require_plain_first(part: _Part) -> None:
    """Refuse a first module but a plain ``Transformer``: a text's tokens into a model."""
    if part.kind != "Transformer":
        raise _not_done(part.type, "a Transformer first")
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
            raise _not_done(
                f"{part.type}, {name}", repr(usual[0]) if usual else "None", repr(value)
            )


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


def _layers_of(
    parts: Sequence[_Part],
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
            raise _not_done(
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
                    "activation": _activation_named(
                        config.get("activation_function", "torch.nn.Tanh"), part.type
                    ),
                    "residual": config.get("use_residual", False),
                },
                part.state(),
            )
        # Dropout does nothing when a model is served.
        elif part.kind != "Dropout":
            raise _not_done(part.type, "Pooling, Normalize, Dense, LayerNorm or Dropout")


def _kinds(part: _Part) -> list[str]:
    said = part.config.get("pooling_mode")
    # Without any flag the package pools by the mean.
    if said is None:
        flags = zip(_POOLINGS, (f"pooling_mode_{flag}" for flag in _FLAGS), strict=True)
        said = [name for name, flag in flags if part.config.get(flag)] or ["mean"]
    said = [said] if isinstance(said, str) else list(said)
    if odd := [name for name in said if name not in _POOLINGS]:
        raise _not_done(f"{part.type}, pooling_mode", " | ".join(_POOLINGS), ", ".join(odd))
    return [_POOLINGS[name] for name in said]


def _sentence_transformer(
    model: Any, tokenizer: Any, parts: Sequence[_Part], said: Mapping[str, Any]
) -> Source:
    layers = list(_layers_of(parts))
    kinds = [layer["kind"] for layer, _ in layers]
    # Without pooling there is an embedding for each token, and none for the text.
    if kinds.count("pooling") != 1:
        raise _not_done(
            "modules",
            "one Pooling",
            f"{kinds.count('pooling')} of {len(kinds)} modules behind the model",
        )
    # Saved configs hold empty prompts ("query": ""), which mean that there is none.
    prompts = {name: text for name, text in (said.get("prompts") or {}).items() if text}
    default = said.get("default_prompt_name")
    options: dict[str, Any] = {
        "prompts": prompts,
        "include_prompt": all(part.config.get("include_prompt", True) for part in parts),
        "similarity": said.get("similarity"),
    }
    params = {"prompt_name": default} if default in prompts else {}
    if said.get("truncate_dim") is not None:
        params["truncate_dim"] = said["truncate_dim"]
    # The task pools and normalises by itself; further layers need a module around the transformer.
    if kinds in (["pooling"], ["pooling", "normalize"]):
        options |= {"pooling": layers[0][0]["kinds"], "normalize": len(kinds) == 2}
    else:
        model = Embedder(model, [layer for layer, _ in layers])
        for layer, (_, state) in zip(model.layers, layers, strict=True):
            layer.load_state_dict(dict(state), assign=True)
    return Source(model, "feature-extraction", tokenizer, options=options, params=params)


def _tokenizer_of(folder: Path, said: Mapping[str, Any]) -> Any:
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


# --- CrossEncoder --------------------------------------------------------------------------------

# Of ``config.json``: since version 4, and before.
_ACTIVATION_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")
_FUNCTIONS = {"Sigmoid": "sigmoid", "Identity": "none"}


def _cross_encoder_folder(
    folder: Path, types: Sequence[str], said: Mapping[str, Any], dtype: Any
) -> Source:
    if types:
        _require_single(types)
        _require_plain_cross_encoder(_files_of(folder)[0])
    _require_none(said.get("keep_in_fp32_modules"), "keep_in_fp32_modules")
    config = read_json(folder / "config.json", strict=False)
    name = (config.get("architectures") or ["no class"])[0]
    if not name.endswith("ForSequenceClassification"):
        raise _not_done(
            f"{folder}, config.json, architectures", "a model for sequence classification", name
        )
    inside = (config.get(_ACTIVATION_KEYS[0]) or {}).get("activation_fn")
    activation = said.get("activation_fn") or inside or config.get(_ACTIVATION_KEYS[1])
    model, stored = read_checkpoint(folder, dtype=dtype)
    source = _cross_encoder(model, _tokenizer_of(folder, _files_of(folder)[0]), activation, said)
    return replace(source, stored=stored)


def _require_plain_cross_encoder(config: Mapping[str, Any]) -> None:
    known = (
        "transformer_task",
        "modality_config",
        "module_output_name",
        "max_seq_length",
        "do_lower_case",
    )
    for name, value in config.items():
        task = name == "transformer_task" and value != "sequence-classification"
        if value and (task or name not in (*known, "unpad_inputs")):
            raise _not_done(
                f"Transformer, {name}", "sequence-classification" if task else "None", repr(value)
            )


def _cross_encoder(
    model: Any, tokenizer: Any, activation: str | None, said: Mapping[str, Any]
) -> Source:
    if prompt := (said.get("prompts") or {}).get(said.get("default_prompt_name")):
        raise _not_done("CrossEncoder, default_prompt_name", "None", repr(prompt))
    labels = model.config.num_labels
    # As the package chooses where nothing is said: a score of one label, logits of several.
    usual = "torch.nn.Sigmoid" if labels == 1 else "torch.nn.Identity"
    function = _activation_named(activation or usual, "CrossEncoder", tuple(_FUNCTIONS))
    return Source(
        model,
        "text-classification",
        tokenizer,
        params={"function_to_apply": _FUNCTIONS[function], **({"top_k": -1} if labels > 1 else {})},
        columns={"text": "text", "text_pair": "text_pair"},
    )


# --- what is not done ----------------------------------------------------------------------------


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _activation_of(activation: Any) -> str:
    """Name of an activation's class, followed by its arguments if it has any of its own."""
    cls = type(activation)
    # With arguments the name is none that is known, and so refused: they are stored nowhere.
    try:
        usual = repr(activation) == repr(cls())
    except TypeError:
        usual = False
    return _name_of(cls) if usual else f"{_name_of(cls)}, {activation!r}"


def _activation_named(
    name: str, where: str, known: Sequence[str] = tuple(sorted(ACTIVATIONS))
) -> str:
    short = name.rpartition(".")[2]
    if not name.startswith("torch.nn.") or short not in known or "," in name:
        raise _not_done(
            f"{where}, activation", " | ".join(f"torch.nn.{one}" for one in known), name
        )
    return short


def _require_single(types: Sequence[str]) -> None:
    if [name.rpartition(".")[2] for name in types] != ["Transformer"]:
        raise _not_done("CrossEncoder", "a Transformer alone", ", ".join(types))


def _require_none(value: Any, name: str) -> None:
    if value:
        raise _not_done(f"CrossEncoder, {name}", "None", repr(value))


def _not_done(where: object, wanted: str, found: str | None = None) -> StructureError:
    return StructureError(
        "The model holds a part of sentence-transformers that is not supported",
        where=where,
        wanted=wanted,
        found=found,
        hint=_HINT,
    )
