"""Tokenizers of transformers: written as JSON files only, and read again."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.json_files import read_json, write_json
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.artifact.trust import require_harmless
from mlflow_safeflavor.errors import IntegrityError, StructureError, TrustError
from mlflow_safeflavor.module.guarded import guarded
from mlflow_safeflavor.tasks.inputs.backend import TOKENIZER, read_backend
from mlflow_safeflavor.tasks.inputs.ctc_tokenizer import (
    VOCABULARY,
    is_ctc,
    load_ctc_tokenizer,
    write_ctc_tokenizer,
)
from mlflow_safeflavor.tasks.inputs.probes import (
    PROBES,
    probe_with_encoder,
    probe_with_transformers,
    require_same_ids,
)
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder

__all__ = ["load_tokenizer", "write_tokenizer"]

_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_WRITTEN = (TOKENIZER, _CONFIG, _SPECIAL_TOKENS)

# At and above this, ``model_max_length`` stands for no limit in transformers.
_UNLIMITED = int(1e20)

# Keys of the config about the machine it was loaded on, or about code outside transformers.
_NOT_PORTABLE = (
    "auto_map",
    "is_local",
    "local_files_only",
    "name_or_path",
)

# The first three are Whisper's, which decide about the tokens before a text.
_ATTRIBUTES = (
    *("language", "predict_timestamps", "task"),
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)


def write_tokenizer(tokenizer: Any, folder: str | Path) -> dict[str, Any]:
    """Write a transformers tokenizer as JSON files only, and prove that they give the same ids.

    The user's tokenizer is not changed. A chat template goes into ``tokenizer_config.json``.

    Args:
        tokenizer: A fast tokenizer of transformers.
        folder: Made if missing.

    Returns:
        The config of ``TextEncoder``, JSON only; of a tokenizer of CTC, which encodes nothing here,
        that it is one.

    Raises:
        StructureError: The tokenizer has no Rust backend, cannot be written as JSON, or what was
            written gives other ids.
    """
    folder = Path(folder)
    if is_ctc(tokenizer):
        write_ctc_tokenizer(tokenizer, folder)
        return {"ctc": True}
    private = _private_copy(tokenizer)
    config = _encoder_config(private)
    folder.mkdir(parents=True, exist_ok=True)
    _write_files(private, folder)
    encoder = TextEncoder(folder, config)
    wanted = probe_with_transformers(private, config["model_input_names"])
    for reader, found in (
        ("without transformers", probe_with_encoder(encoder)),
        (
            "with transformers",
            probe_with_transformers(load_tokenizer(folder), config["model_input_names"]),
        ),
    ):
        require_same_ids(wanted, found, type(tokenizer).__name__, reader)
    return config


def load_tokenizer(folder: str | Path) -> Any:
    """Read a transformers tokenizer that ``write_tokenizer`` wrote; runs no code but transformers'.

    Args:
        folder: Where it was written.

    Raises:
        IntegrityError: ``tokenizer.json`` cannot be read.
        StructureError: No class of this transformers release reads it unchanged.
    """
    if (Path(folder) / VOCABULARY).exists():
        return load_ctc_tokenizer(Path(folder))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = read_backend(Path(folder) / TOKENIZER)
    require_harmless(read_json(Path(folder) / _CONFIG), Path(folder) / _CONFIG)
    # transformers reads more files than these where they are there: templates, vocabularies, code.
    if odd := sorted({path.name for path in Path(folder).iterdir()} - set(_WRITTEN)):
        raise IntegrityError(
            "A file beside the tokenizer is none that was saved",
            where=Path(folder) / odd[0],
            hint=FETCH_AGAIN,
        )
    wanted = backend.encode_batch(list(PROBES))
    failure: object = None
    # Classes of transformers 5 build their own backend from the vocabulary and may disregard parts
    # of tokenizer.json; the generic class takes it as it is.
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            with guarded(folder):
                tokenizer = cls.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            found = tokenizer.backend_tokenizer.encode_batch(list(PROBES))
        except TrustError:
            raise
        # Each class has its own ways to fail; the error below names the last one.
        except Exception as error:
            failure = error
            continue
        if [e.ids for e in found] == [e.ids for e in wanted]:
            return tokenizer
        failure = f"{type(tokenizer).__name__} gives other ids than {TOKENIZER}"
    raise StructureError(
        "The tokenizer cannot be built again by transformers", where=folder, found=failure
    )


def _private_copy(tokenizer: Any) -> Any:
    """A copy that may be changed, without truncation and padding."""
    if getattr(tokenizer, "backend_tokenizer", None) is None or not getattr(
        tokenizer, "is_fast", False
    ):
        raise StructureError(
            "The tokenizer has no fast backend, so it cannot be stored as JSON",
            where=type(tokenizer).__name__,
            wanted="a fast tokenizer (tokenizer.is_fast), which is backed by the tokenizers "
            "library",
            hint="load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it "
            "with transformers.convert_slow_tokenizer and wrap it in "
            "PreTrainedTokenizerFast(tokenizer_object=...)",
        )
    try:
        # Truncation and padding set on the user's own would change their later calls.
        private = copy.deepcopy(tokenizer)
    except Exception as error:  # a backend with parts written in Python fails in ways of its own
        raise StructureError(
            "The tokenizer cannot be copied, so it cannot be stored as JSON",
            where=type(tokenizer).__name__,
            wanted="a backend without custom parts written in Python",
            found=error,
        ) from error
    # Truncation and padding of the last call, which a backend keeps as state.
    private.backend_tokenizer.no_truncation()
    private.backend_tokenizer.no_padding()
    return private


def _encoder_config(tokenizer: Any) -> dict[str, Any]:
    limit = tokenizer.model_max_length
    made = ("input_ids", "token_type_ids", "attention_mask")
    return {
        # Other names (boxes, pixels) are not made from text; a model that needs them fails at save.
        "model_input_names": [
            name for name in made if name in {"input_ids", *tokenizer.model_input_names}
        ],
        "model_max_length": int(limit) if limit is not None and 0 < limit < _UNLIMITED else None,
        "clean_up": _cleans_up(tokenizer),
        "cls_token_id": tokenizer.cls_token_id,
        "mask_token": tokenizer.mask_token,
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "pad_token_type_id": int(tokenizer.pad_token_type_id),
        "padding_side": str(tokenizer.padding_side),
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "truncation_side": str(tokenizer.truncation_side),
        "unk_token_id": tokenizer.unk_token_id,
    }


def _cleans_up(tokenizer: Any) -> bool:
    """Whether decoding removes spaces before punctuation."""
    # transformers 5 does not for BPE, unless it is forced; older releases have no such attribute.
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    spared = type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not getattr(
        tokenizer, forced, True
    )
    return bool(tokenizer.clean_up_tokenization_spaces) and not spared


def _write_files(tokenizer: Any, folder: Path) -> None:
    """Save to a scratch folder, and take over the JSON files only."""
    # Some classes also write vocabularies, templates or code.
    with scratch_folder("tokenizer") as scratch:
        try:
            tokenizer.save_pretrained(scratch, legacy_format=False, save_jinja_files=False)
        except Exception as error:  # each tokenizer class has its own save and its own ways to fail
            raise StructureError(
                "The tokenizer cannot be written as JSON",
                where=type(tokenizer).__name__,
                found=error,
            ) from error
        config = read_json(scratch / _CONFIG)
        # Files by their name are files of this machine, too.
        config = {
            key: value
            for key, value in config.items()
            if key not in _NOT_PORTABLE and "_file" not in key
        }
        # transformers writes those that were given when the tokenizer was made, not those set since
        # or fixed by its class.
        config.update(
            {name: getattr(tokenizer, name) for name in _ATTRIBUTES if hasattr(tokenizer, name)}
        )
        if type(tokenizer).__module__.partition(".")[0] != "transformers":
            # A class of the user's own is not stored; that the generic one does the same is proven
            # by probes.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / _CONFIG, config)
        for name in (TOKENIZER, _SPECIAL_TOKENS):
            if (scratch / name).exists():
                shutil.copyfile(scratch / name, folder / name)
