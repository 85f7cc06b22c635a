"""Texts → labelled tokens or entities, as transformers' token-classification pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, answer_of
from mlflow_safeflavor.tasks.classification import labels_of
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_texts
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.outputs import pick, require_finite, softmax
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.text import TextTask, groups
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION
from mlflow_safeflavor.tasks.windows import count_windows, windows

if TYPE_CHECKING:
    import torch

__all__ = ["TokenClassification"]

_STRATEGIES = ("none", "simple", "first", "average", "max")
_STRATEGY = Param(
    "aggregation_strategy",
    "string",
    default="none",
    wanted=" | ".join(_STRATEGIES),
    allows=lambda value: value in _STRATEGIES,
    none_is="none",
)
_IGNORE = Param(
    "ignore_labels", "string", default=["O"], wanted="a list of labels", none_is=["O"], many=True
)
_STRIDE = Param(
    "stride",
    "long",
    default=-1,
    wanted="how many tokens the windows of a long text share, or -1 to cut it off instead",
    allows=lambda value: value >= -1,
    none_is=-1,
)

_ENTITY = Object(
    [
        Property("entity", DataType.string, required=False),
        Property("entity_group", DataType.string, required=False),
        Property("score", DataType.double),
        Property("index", DataType.long, required=False),
        Property("word", DataType.string),
        Property("start", DataType.long),
        Property("end", DataType.long),
    ]
)

# A token, or a word of tokens: word, scores of all labels, start, end, index, is_subword.
_Token = dict[str, Any]


class TokenClassification(TextTask):
    """Entities of a text.

    Answers: ``entities``, a list of dicts with ``entity``, ``score``, ``index``, ``word``,
    ``start`` and ``end`` for each token with a label that is not ignored; with an
    ``aggregation_strategy`` other than "none" one for each group of tokens, and ``entity_group`` in
    place of ``entity`` and ``index``. ``start`` and ``end`` count characters of the text; ``word``
    is the tokenizer's text of its tokens.

    A text that is longer than the model takes is cut; with ``stride`` it is read in windows
    instead, where of entities that overlap the longer one is kept.
    """

    name = "token-classification"
    params = (_STRATEGY, _IGNORE, _STRIDE, MAX_LENGTH, TRUNCATION)
    spans = True
    answer = answer_of({"entities": Array(_ENTITY)})

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("ForTokenClassification")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {**describe_text_model(model), "labels": labels_of(model)}

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        length = checked["max_length"] or self.limit
        room = length - self.encoder.special_tokens(pair=False) if length else None
        stride, strategy = checked["stride"], checked["aggregation_strategy"]
        # Entities of several windows can be joined, tokens cannot.
        if stride >= 0 and (strategy == "none" or (room is not None and stride >= room)):
            raise InputError(
                "A param does not fit the others",
                where="params, 'stride'",
                wanted=f"-1, or less than {room or 'max_length'} and an aggregation_strategy "
                "other than none",
                found=f"{stride}, and aggregation_strategy {strategy}",
            )
        return checked

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        limit = params["max_length"] or self.limit
        if params["stride"] >= 0 and limit:
            yield from self._in_windows(
                rows, limit - self.encoder.special_tokens(pair=False), params["stride"]
            )
            return
        for row in super().encode(rows, params):  # cut, as without ``stride``
            yield {"windows": [row]}

    def _in_windows(
        self, rows: Sequence[Row], room: int, overlap: int
    ) -> Iterator[Features | None]:
        require_texts(rows, self.columns)
        pieces, instead = 0, "send less text at once, or lower stride"
        for first, some in groups(rows):
            # By the beginnings first: no long text is tokenised whole only to be refused.
            for i, given in enumerate(some, first):
                where = f"windows up to {format_cell(i)}"
                self.require_few_windows(
                    given["text"], pieces, len(rows), room, overlap, where=where, instead=instead
                )
            encoded = self.encoder.encode(
                [row["text"] for row in some], truncation=False, spans=True
            )
            for i, row in enumerate(encoded, first):
                self.require_tokens(i, len(row["input_ids"]))
                pieces += count_windows(len(row["input_ids"]), room, overlap)
                self.caps.require_pieces(
                    pieces, len(rows), where=f"windows up to {format_cell(i)}", instead=instead
                )
                cut = []
                for window in windows(self.known(row), 0, room, overlap):
                    cut.append(window)
                    yield None
                yield {"windows": cut}

    def pieces(self, features: Features) -> Sequence[Features]:
        pieces: Sequence[Features] = features["windows"]
        return pieces

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        logits = pick(outputs, "logits", (*mask.shape, len(self.config["labels"])))
        return [{"logits": row[real]} for row, real in zip(logits, mask, strict=True)]

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        # (tokens of all windows, labels)
        return {"logits": np.concatenate([output["logits"] for output in outputs])}

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        strategy, ignored = params["aggregation_strategy"], frozenset(params["ignore_labels"])
        for i, (row, encoded, output) in enumerate(
            zip(rows, features, outputs, strict=True), first
        ):
            require_finite([output["logits"]], i)
            pieces = self.pieces(encoded)
            # Outputs of all windows lie behind each other: split again where each ends.
            cuts = np.cumsum([self.cost(piece) for piece in pieces])[:-1]
            found: list[dict[str, Any]] = []
            for piece, logits in zip(pieces, np.split(output["logits"], cuts), strict=True):
                entities = self._aggregated(
                    self._tokens(row["text"], piece, softmax(logits)), strategy
                )
                found += [
                    e for e in entities if e.get("entity", e.get("entity_group")) not in ignored
                ]
                yield None
            yield {"entities": found if len(pieces) == 1 else _without_overlap(found)}

    def _tokens(self, text: str, piece: Features, scores: np.ndarray) -> list[_Token]:
        """Tokens of a piece that are from the text, so no special ones."""
        marks, unknown = self.encoder.marks_subwords, self.encoder.config["unk_token_id"]
        tokens = []
        for index, (start, end) in enumerate(piece["offsets"]):
            if piece["sequence_ids"][index] < 0:
                continue
            # An unknown token stands for any text, so its own text is the word.
            token_id, surface = piece["input_ids"][index], text[start:end]
            word = surface if token_id == unknown else self.encoder.token(token_id)
            # A vocabulary with marks ("##ing") writes such a token longer than the text has it.
            # Without marks a token goes on with a word if there is no space before it.
            goes_on = (
                len(word) != len(surface)
                if marks
                else start > 0 and " " not in text[start - 1 : start + 1]
            )
            tokens.append(
                {
                    "word": word,
                    "scores": scores[index],
                    "start": start,
                    "end": end,
                    "index": index,
                    "is_subword": goes_on and token_id != unknown,
                }
            )
        return tokens

    def _aggregated(self, tokens: Sequence[_Token], strategy: str) -> list[dict[str, Any]]:
        if strategy == "none":
            return [self._entity(token, index=token["index"]) for token in tokens]
        whole = (
            tokens
            if strategy == "simple"
            else [self._word(word, strategy) for word in _words(tokens)]
        )
        return [self._group(group) for group in _groups([self._entity(word) for word in whole])]

    def _entity(self, token: _Token, **index: int) -> dict[str, Any]:
        best = int(token["scores"].argmax())  # scores: (labels,)
        return {
            "entity": self.config["labels"][best],
            "score": float(token["scores"][best]),
            **index,
            "word": token["word"],
            "start": token["start"],
            "end": token["end"],
        }

    def _word(self, tokens: Sequence[_Token], strategy: str) -> _Token:
        """Tokens of one word as one, with the scores that the strategy gives it."""
        # (labels,) of the word. "max" takes those of the token with the largest score, not the
        # largest score of each label: they still add up to 1.
        scores = {
            "first": lambda: tokens[0]["scores"],
            "max": lambda: max((token["scores"] for token in tokens), key=np.max),
            "average": lambda: np.mean([token["scores"] for token in tokens], axis=0),
        }[strategy]()
        word = self.encoder.join([token["word"] for token in tokens])
        return {
            "word": word,
            "scores": scores,
            "start": tokens[0]["start"],
            "end": tokens[-1]["end"],
        }

    def _group(self, entities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            # "B-PER" and "I-PER" are of the group "PER"; a label without a dash is its own group.
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": float(np.mean([entity["score"] for entity in entities])),
            "word": self.encoder.join([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }


def _words(tokens: Sequence[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token["is_subword"]:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _groups(entities: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours with the same tag; a "B-" opens a new group."""
    groups: list[list[dict[str, Any]]] = []
    for entity in entities:
        label = entity["entity"]
        if groups and not label.startswith("B-") and _tag(label) == _tag(groups[-1][-1]["entity"]):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _without_overlap(entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities found in several windows the longest, then the most certain."""
    kept: list[dict[str, Any]] = []
    # By start, so that an entity overlaps at most the last one that was kept.
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        elif _weight(entity) > _weight(kept[-1]):
            kept[-1] = entity
    return kept


def _weight(entity: Mapping[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
