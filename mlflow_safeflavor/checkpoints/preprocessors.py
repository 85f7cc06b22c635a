"""Tokenizers and processors beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow_safeflavor.checkpoints.folder import own_folders
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.guarded import guarded

__all__ = ["processor_of", "tokenizer_of"]


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer in a local checkpoint folder.

    Raises:
        StructureError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        with guarded(*own_folders(folder)):
            found: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # Where the vocabulary's file is missing, transformers 5 makes a tokenizer to which every
        # word is unknown.
        if found.get_vocab().keys() <= {*found.all_special_tokens}:
            raise ValueError("a vocabulary of special tokens alone: its file is missing")
    except (OSError, ValueError, KeyError) as error:
        raise StructureError(
            "The checkpoint has no readable tokenizer",
            where=folder,
            found=error,
            hint="pass tokenizer=…",
        ) from error
    return found


def processor_of(folder: str | Path, *, sounds: bool) -> Any:
    """The image processor, or feature extractor for sounds, in a local checkpoint folder.

    Raises:
        StructureError: There is none of transformers' own.
    """
    import transformers

    # The torchvision backend gives other pixel values, and would have to be installed to serve.
    pillow = (
        {"backend": "pil"}
        if int(transformers.__version__.partition(".")[0]) >= 5
        else {"use_fast": False}
    )
    auto: Any = transformers.AutoFeatureExtractor if sounds else transformers.AutoImageProcessor
    try:
        with guarded(*own_folders(folder)):
            return auto.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **({} if sounds else pillow)
            )
    # ImportError: the processor's class needs Pillow or torchvision.
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StructureError(
            "The checkpoint has no readable processor",
            where=folder,
            found=error,
            hint="pass processor=…",
        ) from error
