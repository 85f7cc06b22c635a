"""Texts → embeddings, with requests and answers of OpenAI's API."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, schema_of
from mlflow_safeflavor.tasks.feature_extraction import FeatureExtraction
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.llm_params import MODEL_AND_USER
from mlflow_safeflavor.tasks.llm_requests import flat_texts
from mlflow_safeflavor.tasks.params import Param

__all__ = ["LlmEmbeddings"]

_ENCODINGS = ("float", "base64")
_OPENAI = (
    *MODEL_AND_USER,
    Param(
        "encoding_format",
        "string",
        default="float",
        wanted=" | ".join(_ENCODINGS),
        allows=_ENCODINGS.__contains__,
        none_is="float",
    ),
    Param(
        "dimensions",
        "long",
        default=0,
        wanted="how many numbers of an embedding to keep, or 0 for all",
        allows=lambda value: value >= 0,
        none_is=0,
    ),
)


class LlmEmbeddings(FeatureExtraction):
    """``{"input": text or list of texts}`` → OpenAI's list of embeddings, as MLflow has it.

    Options and params are those of ``FeatureExtraction``, and OpenAI's: ``model``, which the answer
    repeats; ``dimensions``, to cut embeddings off and scale them to length 1 again;
    ``encoding_format``, "float" or "base64" of little-endian float32; ``user``, not read.

    All rows of a request make one answer: ``object``, ``data`` (``object``, ``index``,
    ``embedding``), ``model``, ``usage`` (``prompt_tokens``, ``total_tokens``). Tokens are those
    that the model read: special ones and a prompt's count, what was cut off does not.
    """

    name = "llm/v1/embeddings"
    params = (*_OPENAI, *FeatureExtraction.params)
    one_answer = True

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False  # ``FeatureExtraction`` is the task of these models by default

    @classmethod
    def columns_for(
        cls, input_columns: Mapping[str, str | None] | None
    ) -> Mapping[str, str | None]:
        return super().columns_for({"text": "input"} if input_columns is None else input_columns)

    @classmethod
    def metadata(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"task": cls.name, **super().metadata(config)}  # as MLflow's own flavors

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        signature = super().signature(example, result)
        datum = [
            Property("object", DataType.string),
            Property("index", DataType.long),
            Property("embedding", Array(DataType.double)),
        ]
        usage = [Property(name, DataType.long) for name in ("prompt_tokens", "total_tokens")]
        signature.outputs = schema_of(
            {
                "object": DataType.string,
                "data": Array(Object(datum)),
                "model": DataType.string,
                "usage": Object(usage),
            }
        )
        return signature

    def rows(self, data: Any) -> list[Row]:
        """Rows of any shape, and each text of a list that takes the place of one."""
        return super().rows(flat_texts(data, str(self.columns["text"])))

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        # As OpenAI's models: cut, then of length 1 again.
        if size := checked["dimensions"]:
            checked |= {"truncate_dim": size, "normalize_embeddings": True}
        return checked

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        answers = super().decode(rows, features, outputs, params, first=first)
        for row, output, answer in zip(features, outputs, answers, strict=True):
            if answer is None:
                yield None
                continue
            if params["dimensions"] > len(output["embedding"]):
                raise InputError(
                    "A param has a value that is not allowed",
                    where="params, 'dimensions'",
                    wanted=f"at most {len(output['embedding'])}, which is all the model has",
                    found=params["dimensions"],
                )
            vector = answer["embedding"]
            if params["encoding_format"] == "base64":
                # float32, little-endian, as clients of OpenAI's API decode it.
                vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
            yield {"embedding": vector, "tokens": self.cost(row), "model": params["model"]}

    def result(self, answers: Sequence[Mapping[str, Any]], data: Any) -> Any:
        tokens = sum(answer["tokens"] for answer in answers)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": answer["embedding"]}
                for i, answer in enumerate(answers)
            ],
            "model": answers[0]["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
