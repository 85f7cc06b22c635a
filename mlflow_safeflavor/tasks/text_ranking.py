"""A query and passages → the passages by relevance, as sentence-transformers' CrossEncoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, answer_of, require_schema
from mlflow_safeflavor.tasks.classification import (
    FUNCTION,
    TOP_K,
    labels_of,
    read_logits,
    scores_of,
)
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_clean, require_texts
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value
from mlflow_safeflavor.tasks.outputs import require_finite
from mlflow_safeflavor.tasks.params import Param, param_schema
from mlflow_safeflavor.tasks.text import GOLDEN_PAIRS, GOLDEN_TEXTS, TextTask, groups
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION

if TYPE_CHECKING:
    import torch

__all__ = ["ACTIVATIONS", "ACTIVATION_KEYS", "TextRanking"]

# Of a model's config, where sentence-transformers names an activation: since version 4, and before.
ACTIVATION_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")
# Class in ``torch.nn`` → value of ``FUNCTION``.
ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none"}

_ALL = replace(
    TOP_K, default=-1, wanted="a whole number of at least 1, or -1 for all passages of a query"
)
_RETURN = Param("return_passages", "boolean", default=False, wanted="true or false")
_RANKED = Object(
    [
        Property("index", DataType.long),
        Property("score", DataType.double),
        Property("passage", DataType.string, required=False),
    ]
)


class TextRanking(TextTask):
    """Passages by their relevance to a query, each pair read by a cross-encoder.

    A model ranks lists or scores pairs, as ``input_columns`` says when it is saved: ``{"query": …,
    "passages": …}``, the default, whose cells of passages are lists of texts, or ``{"query": …,
    "passage": …}``.

    Option, fixed at save through ``model_config``: ``label``, name or index of the label whose
    score tells relevance, for models of several labels.

    Scores are those of ``CrossEncoder.predict``: of a single label "sigmoid", or what the model's
    config names; of one of several "softmax". ``function_to_apply="none"`` gives raw logits.

    Answers: of lists ``ranking``, a list of dicts, best first: ``index`` in the cell, ``score``,
    and with ``return_passages`` the ``passage``. With ``top_k`` the best ones alone. Of pairs
    ``score``.
    """

    name = "text-ranking"
    fields = ("query", "passages", "passage")
    required = ("query",)
    params = (_ALL, _RETURN, FUNCTION, MAX_LENGTH, TRUNCATION)
    task_options = frozenset({"label"})

    @classmethod
    def serves(cls, class_name: str) -> bool:
        # Whether a classifier was made to rank, its class does not tell.
        return False

    @classmethod
    def columns_for(
        cls, input_columns: Mapping[str, str | None] | None
    ) -> Mapping[str, str | None]:
        usual = {"query": "query", "passages": "passages"}
        columns = super().columns_for(usual if input_columns is None else input_columns)
        if len(columns) != 2:
            raise InputError(
                "A model ranks lists of passages, or scores pairs",
                where="input_columns",
                wanted='{"query": column, "passages": column} or {"query": column, "passage": '
                "column}",
                found=repr(dict(columns)),
            )
        return columns

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        labels = labels_of(model)
        return {
            **describe_text_model(model),
            "labels": labels,
            "label": _relevant(labels, options.get("label")),
            "function_to_apply": _function_of(model, labels),
        }

    def __init__(
        self, config: Mapping[str, Any], columns: Mapping[str, str | None], encoder: Any = None
    ) -> None:
        super().__init__(config, columns, encoder)
        self._lists = "passages" in self.columns
        if not self._lists:  # one passage has nothing to be ranked with
            self.asked = tuple(param for param in self.asked if param.name not in _OF_LISTS)

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        query, passages = (str(column) for column in self.columns.values())
        if self._lists:
            inputs = require_schema({query: DataType.string, passages: Array(DataType.string)})
            outputs = answer_of({"ranking": Array(_RANKED)})
        else:
            inputs = Schema([ColSpec(DataType.string, name) for name in (query, passages)])
            outputs = Schema([ColSpec(DataType.double, "score")])
        return ModelSignature(inputs=inputs, outputs=outputs, params=param_schema(self.asked))

    @property
    def folds(self) -> bool:
        return not self._lists

    def rows(self, data: Any) -> list[Row]:
        if not self._lists:
            return super().rows(data)
        query, passages = self.columns.values()
        # A dict of one query and its passages, which anywhere else would be a column of that name.
        if isinstance(data, Mapping) and isinstance(data.get(query), str):
            data = [dict(data)]
        rows = super().rows(data)
        return [
            {**row, "passages": _passages(row.get("passages"), format_cell(i, passages))}
            for i, row in enumerate(rows)
        ]

    def require_clean(self, rows: Sequence[Row], params: Mapping[str, Any] | None) -> None:
        # Passage by passage: a cell of them may be longer than a text, as a table is.
        super().require_clean(
            [{name: row[name] for name in row if name != "passages"} for row in rows], params
        )
        for i, row in enumerate(rows):
            for j, passage in enumerate(row.get("passages", ())):
                where = f"{format_cell(i, self.columns['passages'])}, passage {j}"
                require_clean(passage, where, self.caps)

    def golden_rows(self) -> list[Row]:
        pairs = list(zip(GOLDEN_PAIRS, GOLDEN_TEXTS, strict=True))
        if not self._lists:
            return [{"query": query, "passage": passage} for query, passage in pairs]
        # Of different numbers of passages.
        return [
            {"query": query, "passages": [*GOLDEN_TEXTS[i:]]} for i, (query, _) in enumerate(pairs)
        ]

    # A row → one piece for each passage.

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_texts(rows, {name: self.columns[name] for name in self.columns if name in _TEXTS})
        limit, cut = params["max_length"] or self.limit, params["truncation"]
        pieces = sum(len(_passages_of(row)) for row in rows)
        where, instead = "passages of all rows", "send fewer passages at once"
        self.caps.require_pieces(pieces, len(rows), where=where, instead=instead)
        for i, row in enumerate(rows):
            passages = [{"passage": passage} for passage in _passages_of(row)]
            for part in ({"query": row["query"]}, *passages):
                self.require_short(i, [part], limit, cut=cut)
            # Once for all passages, which ``pair`` puts behind it.
            (query,) = self.encoder.encode([row["query"]], truncation=False, special=False)
            pairs = []
            for _, some in groups(passages):
                texts = [part["passage"] for part in some]
                for passage in self.encoder.encode(texts, truncation=False, special=False):
                    pair = self.encoder.pair(query, passage, max_length=limit if cut else None)
                    self.require_fitting(i, len(pair["input_ids"]), limit)
                    pairs.append(self.known(pair))
                yield None
            yield {"pairs": pairs}

    def pieces(self, features: Features) -> Sequence[Features]:
        pieces: Sequence[Features] = features["pairs"]
        return pieces

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        return read_logits(outputs, len(mask), self.config["labels"])

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        """Logits of shape (passages, labels)."""
        return {"logits": np.stack([output["logits"] for output in outputs])}

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, (row, output) in enumerate(zip(rows, outputs, strict=True), first):
            require_finite([output["logits"]], i)
            scores = scores_of(self.config, output["logits"], params)[:, self.config["label"]]
            yield self._ranking(row, scores, params) if self._lists else {"score": scores[0].item()}

    def _ranking(
        self, row: Row, scores: np.ndarray, params: Mapping[str, Any]
    ) -> dict[str, list[dict[str, Any]]]:
        order = np.argsort(-scores, kind="stable")  # of equal scores the first passage wins
        kept = order if params["top_k"] == -1 else order[: params["top_k"]]
        return {
            "ranking": [
                {
                    "index": int(i),
                    "score": scores[i].item(),
                    **({"passage": row["passages"][i]} if params["return_passages"] else {}),
                }
                for i in kept
            ]
        }


# Params that say something of a list, and fields whose cells are single texts.
_OF_LISTS = (_ALL.name, _RETURN.name)
_TEXTS = ("query", "passage")


def _passages_of(row: Row) -> Sequence[str]:
    passages: Sequence[str] = row["passages"] if "passages" in row else [row["passage"]]
    return passages


def _passages(value: Any, where: str) -> list[str]:
    """A cell as a plain list of texts."""
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    if (
        isinstance(listed, (list, tuple))
        and listed
        and all(isinstance(passage, str) for passage in listed)
    ):
        return [*listed]
    raise InputError(
        "A value is not a list of passages",
        where=where,
        wanted="a list of texts, one at least",
        found=format_value(value),
        hint='pass all passages of a query in one cell, {"query": text, "passages": [text, …]}, '
        "and drop queries that have none",
    )


def _relevant(labels: Sequence[str], asked: Any) -> int:
    """Index of the label whose score ranks."""
    if asked is None and len(labels) == 1:
        return 0
    index = labels.index(asked) if asked in labels else asked
    if type(index) is int and 0 <= index < len(labels):
        return index
    raise InputError(
        "The label that tells how relevant a passage is cannot be told",
        where="model_config, 'label'",
        wanted=f"one of {labels}, or its index",
        found=repr(asked),
        hint=f"say it where the model is saved: model_config={{'label': {labels[-1]!r}}}",
    )


def _function_of(model: torch.nn.Module, labels: Sequence[str]) -> str:
    """Function from logits to scores, as sentence-transformers chooses it."""
    new, old = (getattr(model.config, key, None) for key in ACTIVATION_KEYS)
    said = (new.get("activation_fn") if isinstance(new, Mapping) else None) or old
    if not said:
        return "softmax" if len(labels) > 1 else "sigmoid"
    function = ACTIVATIONS.get(str(said).rpartition(".")[2])
    if function is None:
        raise StructureError(
            "The model's scores are made by a function that is not known here",
            where=f"{type(model).__name__}.config",
            wanted=" | ".join(f"torch.nn.{name}" for name in ACTIVATIONS),
            found=said,
        )
    return function
