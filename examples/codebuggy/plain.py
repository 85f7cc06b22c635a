"""The classifier of ``model.py`` as tutorials would wrap it.

A ``PreTrainedModel`` of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from model import FixClassifier
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel


class PlainConfig(PretrainedConfig):
    """Which encoder, and the token id between two texts."""

    model_type = "codebuggy-plain"

    def __init__(self, encoder: str = "", separator: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder, self.separator = encoder, separator


class Nested(PreTrainedModel):
    """Its ``__init__`` loads the encoder: ``from_pretrained`` within ``from_pretrained``."""

    config_class = PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.classifier = self.make(config)
        self.post_init()

    def make(self, config: PlainConfig) -> FixClassifier:
        """The classifier, as it is."""
        return FixClassifier(config.encoder, config.separator)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """``logits``, shape (rows, 2)."""
        return dict(self.classifier(input_ids, attention_mask))


class NestedOnCpu(Nested):
    """The first way around that one finds: a device of its own for what is nested."""

    def make(self, config: PlainConfig) -> FixClassifier:
        with torch.device("cpu"):
            return super().make(config)


class FromConfig(Nested):
    """The proper way around.

    The encoder is made from its config, and its weights come with the others.
    """

    def make(self, config: PlainConfig) -> FixClassifier:
        return _Unfilled(config.encoder, config.separator)


class _Unfilled(FixClassifier):
    def load_encoder(self, encoder: str, revision: str | None) -> Any:
        return AutoModel.from_config(AutoConfig.from_pretrained(encoder), dtype=torch.float32)
