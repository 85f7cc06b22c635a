"""Texts → one embedding each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.releases import Array, schema_of
from mlflow_safeflavor.tasks.base import Features, Row, RowOutput
from mlflow_safeflavor.tasks.outputs import pick, require_finite
from mlflow_safeflavor.tasks.text import TextTask, describe_text_model

__all__ = ["FeatureExtraction"]

_POOLINGS = ("mean", "cls", "last")
_HEADS = re.compile(r"(LMHead|DoubleHeads|PreTrained|EncoderDecoder|MT)Model$")


class FeatureExtraction(TextTask):
    """One vector a text, pooled from the last hidden state.

    Options, fixed at save through ``model_config``: ``pooling``, "mean" over real tokens (default), "cls", the
    first real token, or "last", the last one; ``normalize``, whether to scale to length 1 (default False).

    Answers: ``embedding``, a list of as many floats as the model's hidden size.
    """

    name = "feature-extraction"
    task_options = frozenset({"pooling", "normalize"})
    answer = schema_of({"embedding": Array(DataType.double)})

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("Model") and not _HEADS.search(class_name)

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise StructureError(
                "The last hidden state of an encoder-decoder model is its decoder's, not that of the text",
                where=type(model).__name__,
                wanted="an encoder",
                way_out="save the encoder alone, for example T5EncoderModel or model.get_encoder()",
            )
        cls.require_known(options)
        chosen = {"pooling": "mean", "normalize": False, **options}
        _require_option("pooling", chosen["pooling"] in _POOLINGS, " | ".join(_POOLINGS), chosen["pooling"])
        _require_option("normalize", isinstance(chosen["normalize"], bool), "True | False", chosen["normalize"])
        return {**describe_text_model(model), **chosen}

    @property
    def pad_id(self) -> int | None:
        # Behind a mask it does not matter which token fills up, as long as there is a mask.
        if "attention_mask" not in self.config["input_names"]:
            return None
        said = (self.config["pad_token_id"], self.encoder.config["pad_token_id"])
        return next((pad_id for pad_id in said if pad_id is not None), 0)

    def read(self, outputs: Mapping[str, torch.Tensor], mask: torch.Tensor) -> list[RowOutput]:
        hidden = pick(outputs, "last_hidden_state", (*mask.shape, None))
        mask = mask.to(hidden.device)
        pooled = _pooled(hidden, mask, self.config["pooling"])
        if self.config["normalize"]:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        return [{"embedding": row} for row in pooled.cpu().numpy()]

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        require_finite(np.stack([output["embedding"] for output in outputs]))
        return [{"embedding": output["embedding"].tolist()} for output in outputs]


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a row; ``hidden`` has the shape (rows, longest, size) and ``mask`` (rows, longest)."""
    if pooling == "mean":
        # Masked out, not multiplied by zero: a padding position may hold NaN.
        return hidden.masked_fill(~mask[:, :, None], 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    first = mask.int().argmax(dim=1)
    chosen = first if pooling == "cls" else first + mask.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]


def _require_option(name: str, right: bool, wanted: str, found: object) -> None:
    if not right:
        raise InputError(
            "An option of feature-extraction is not allowed",
            where=f"model_config, {name!r}",
            wanted=wanted,
            found=repr(found),
        )
