"""Texts with gaps → the tokens that fill them, as transformers' fill-mask pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, schema_of
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.outputs import pick, require_finite, softmax
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION

if TYPE_CHECKING:
    import torch

__all__ = ["FillMask"]

_TOP_K = Param(
    "top_k", "long", 5, "a whole number of at least 1", allows=lambda value: value >= 1, none_is=5
)
_TARGETS = Param(
    "targets",
    "string",
    default=[],
    wanted="a list of tokens to choose from, or an empty list for the whole vocabulary",
    none_is=[],
    many=True,
)

_PREDICTION = {
    "token_str": DataType.string,
    "token": DataType.long,
    "score": DataType.double,
    "sequence": DataType.string,
}

# Logits of one forward, (rows, tokens, vocabulary): 256 MB in float32.
_SCORES = 64_000_000

# Gaps come early, where no tokenizer is so fine that they would be cut off.
_GOLDEN_TEXTS = (
    "{} world.",
    "The {} brown fox jumps over the lazy dog while the cat sleeps.",
    "{} Zürich: 3 € for 😀👍, naïve café!",
    "A {} is {} once it is logged, and answers the same way in a notebook, behind a server and on "
    "a cluster.",
)


class FillMask(TextTask):
    """Tokens for the gaps of a text, written as the tokenizer's mask token ("[MASK]", "<mask>").

    Answers: ``token_str``, ``token``, ``score`` and ``sequence`` of the best token for the (first)
    gap, and ``predictions``: for each gap, in order, a list of the ``top_k`` best, each a dict of
    the same four keys. In a ``sequence`` one gap is filled, and others are left as they are, as
    transformers has it.
    """

    name = "fill-mask"
    params = (_TOP_K, _TARGETS, MAX_LENGTH, TRUNCATION)
    answer = schema_of(
        {
            **_PREDICTION,
            "predictions": Array(
                Array(Object([Property(name, kind) for name, kind in _PREDICTION.items()]))
            ),
        }
    )

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("ForMaskedLM")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return describe_text_model(model)

    @property
    def mask_token(self) -> str:
        """The text of a gap. Raises ``StructureError`` for a tokenizer without a mask token."""
        mask_token: str | None = self.encoder.config["mask_token"]
        if mask_token is None:
            raise StructureError(
                "The tokenizer has no mask token",
                where="tokenizer.mask_token",
                wanted="the token this model was trained to fill",
                hint="set tokenizer.mask_token before saving",
            )
        return mask_token

    def golden_rows(self) -> list[Row]:
        return [{"text": text.replace("{}", self.mask_token)} for text in _GOLDEN_TEXTS]

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """As any, but targets are the ids of their tokens, each once."""
        checked = super().check_params(params)
        return {**checked, "targets": list(dict.fromkeys(map(self._target_id, checked["targets"])))}

    def _target_id(self, target: str) -> int:
        if (token_id := self.encoder.token_id(target)) is not None:
            return int(token_id)
        ids: list[int] = self.encoder.encode([target], special=False, truncation=False)[0][
            "input_ids"
        ]
        # transformers' pipeline warns and takes the first piece, whose score is another word's.
        if len(ids) != 1 or ids[0] == self.encoder.config["unk_token_id"]:
            raise InputError(
                "A target is no token of the vocabulary",
                where=f"params, 'targets', {target!r}",
                wanted="texts that are one token each",
                found=" ".join(self.encoder.token(i) for i in ids) or "no token",
            )
        return ids[0]

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        # For each gap an answer repeats the whole text, once for each of the best tokens.
        kept = min(params["top_k"], len(params["targets"]) or self.encoder.size)
        tokens = 0
        for i, (row, encoded) in enumerate(zip(rows, super().encode(rows, params), strict=True)):
            assert encoded is not None  # noqa: S101  (for mypy: texts are encoded without a pause)
            ids = encoded["input_ids"]
            self._require_gaps(i, row["text"], ids, params["max_length"] or self.limit)
            tokens += kept * len(ids) * self._gaps(ids)
            where, instead = (
                f"params, 'top_k', up to {format_cell(i)}",
                "ask for fewer tokens, or fewer rows at once",
            )
            self.caps.require_answers(tokens, len(rows), where=where, instead=instead)
            yield encoded

    def batch_budget(self, max_batch_tokens: int) -> int:
        # A forward gives logits of all positions, also of those that are no gaps.
        most: int = _SCORES // self.encoder.size
        return min(max_batch_tokens, max(1, most))

    def holds(self, features: Features) -> int:
        # Logits of the gaps, float32 of shape (gaps, vocabulary).
        scores: int = self.encoder.size * self._gaps(features["input_ids"])
        return super().holds(features) + 4 * scores

    def _gaps(self, ids: Sequence[int]) -> int:
        mask: int = self.encoder.config["mask_token_id"]
        return sum(token == mask for token in ids)

    def _require_gaps(self, i: int, text: str, ids: Sequence[int], limit: int | None) -> None:
        """Refuse a text without gaps, or one that lost some when it was cut."""
        # Only a text of exactly the limit may have been cut.
        read = self._gaps(ids)
        written = text.count(self.mask_token) if len(ids) == limit else read
        if read == 0 or read < written:
            raise InputError(
                "A text has a gap beyond what the model reads"
                if written
                else "A text has no gap to fill",
                where=format_cell(i, self.columns["text"]),
                wanted=f"{self.mask_token!r} where a token is missing",
                found=f"{read} of {written} within {limit} tokens" if written else "none",
                hint="shorten the text before the gap"
                if written
                else f"write {self.mask_token!r} into the text",
            )

    def collate(self, batch: Sequence[Features]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As any text, but the mask marks the gaps: no other position is read."""
        inputs, mask = super().collate(batch)
        return inputs, mask & (inputs["input_ids"] == self.encoder.config["mask_token_id"])

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        logits = pick(outputs, "logits", (*mask.shape, None))  # (rows, tokens, vocabulary)
        # (gaps, vocabulary) of each row
        return [{"logits": row[gaps]} for row, gaps in zip(logits, mask, strict=True)]

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, (encoded, output) in enumerate(zip(features, outputs, strict=True), first):
            require_finite([output["logits"]], i)
            ids = encoded["input_ids"]
            gaps = [
                place
                for place, token in enumerate(ids)
                if token == self.encoder.config["mask_token_id"]
            ]
            predictions: list[list[dict[str, Any]]] = []
            for gap, logits in zip(gaps, output["logits"], strict=True):
                scores, found = softmax(logits), list[dict[str, Any]]()
                for token in _best(scores, params["targets"], params["top_k"]):
                    found.append(
                        self._prediction(
                            ids, gap, int(token), float(scores[token]), alone=len(gaps) == 1
                        )
                    )
                    yield None  # each prediction decodes the whole text: others take turns
                predictions.append(found)
            yield {**predictions[0][0], "predictions": predictions}

    def _prediction(
        self, ids: Sequence[int], gap: int, token: int, score: float, *, alone: bool
    ) -> dict[str, Any]:
        filled = [*ids[:gap], token, *ids[gap + 1 :]]
        # Without padding tokens that the text itself has, as transformers' pipeline.
        shown = [i for i in filled if i != self.encoder.config["pad_token_id"]]
        return {
            "token_str": self.encoder.decode([token], skip_special=False),
            "token": token,
            "score": score,
            # Other gaps are special tokens, and would vanish.
            "sequence": self.encoder.decode(shown, skip_special=alone),
        }


def _best(scores: np.ndarray, targets: Sequence[int], top_k: int) -> np.ndarray:
    """Ids of the best of ``targets``, or of all tokens, best first."""
    chosen: np.ndarray = np.asarray(targets) if targets else np.arange(len(scores))
    best: np.ndarray = chosen[np.argsort(-scores[chosen], kind="stable")[:top_k]]
    return best
