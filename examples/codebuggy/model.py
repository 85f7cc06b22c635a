"""An encoder that ``__init__`` loads, and a head.

The kind of module that no loader gets right by calling it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel

LABELS = ("no fix", "fix")


class FixClassifier(nn.Module):
    """Does a change fix a bug?

    Code before and after the change arrive as one pair, and are read one by one. The head is given
    the difference of their mean hidden states, in which cancels out what stands on both sides.

    Args:
        encoder: Name or folder of a BERT- or RoBERTa-like checkpoint.
        separator: Id of the token that ends a text.
        revision: Commit of the checkpoint, for a name.
    """

    temperature: torch.Tensor

    def __init__(self, encoder: str, separator: int, revision: str | None = None) -> None:
        super().__init__()
        self.encoder = self.load_encoder(encoder, revision)
        self.config = self.encoder.config
        self.config.id2label = dict(enumerate(LABELS))
        self.config.label2id = {label: i for i, label in enumerate(LABELS)}
        self.separator = separator
        width = self.config.hidden_size
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(0.1),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(width, len(LABELS)),
        )
        # Found after training, so that a score is a probability. `state_dict` leaves it out, and so
        # do checkpoints.
        self.register_buffer("temperature", torch.ones(()), persistent=False)

    def load_encoder(self, encoder: str, revision: str | None) -> Any:
        """The encoder with its weights, of the class that the checkpoint names."""
        return AutoModel.from_pretrained(encoder, revision=revision, dtype=torch.float32)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Logits of ``LABELS``.

        Args:
            input_ids: Of pairs, padded on the right; shape (rows, length), int64.
            attention_mask: Same shape, 0 where padded.

        Returns:
            ``logits``, shape (rows, 2), float32.
        """
        before, after = self.embed(*split(input_ids, attention_mask, self.separator)).chunk(2)
        return {"logits": self.judge(after - before)}

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mean hidden state of single texts; (rows, length) twice → (rows, width)."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean

    def judge(self, difference: torch.Tensor) -> torch.Tensor:
        """After minus before, (rows, width) → logits, (rows, 2)."""
        logits: torch.Tensor = self.head(difference)
        return logits / self.temperature


def split(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, separator: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two texts → all first texts, then all second ones, each as a row of its own.

    ``[CLS] a [SEP] b [SEP]`` becomes ``[CLS] a [SEP]`` and ``[CLS] b [SEP]``; ``<s> a </s></s> b
    </s>`` likewise.

    Each stays as long as the pair: a length that depends on the ids is nothing that a graph could
    be recorded of.

    Returns:
        Ids and mask, each of shape (2 · rows, length of the pair), int64.
    """
    length = input_ids.shape[1]  # `len()` would make it a number, and a graph for this length alone
    places = torch.arange(length, device=input_ids.device)
    end = (input_ids == separator).int().argmax(1, keepdim=True)
    twice = input_ids.gather(1, (end + 1).clamp(max=length - 1)) == separator
    shifted = places + end + twice
    inside = shifted.clamp(max=length - 1)
    after = torch.where(places == 0, input_ids[:, :1], input_ids.gather(1, inside))
    masks = (
        attention_mask * (places <= end),
        attention_mask.gather(1, inside) * (shifted < length),
    )
    return torch.cat((input_ids, after)), torch.cat(masks)
