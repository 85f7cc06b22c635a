"""Prompts and chats → texts, with requests and answers of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from mlflow.models import ModelSignature
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, request_schema, schema_of
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.generation_params import GENERATION_PARAMS, KEEP_LOGITS
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.llm_params import OPENAI_PARAMS
from mlflow_safeflavor.tasks.llm_requests import fields_of, flat_texts, without_fields
from mlflow_safeflavor.tasks.params import param_schema
from mlflow_safeflavor.tasks.text_generation import TextGeneration

__all__ = ["LlmChat", "LlmCompletions"]

# Params that OpenAI calls by another name, or does not have beside its own.
_RENAMED = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}
_REPLACED = {*_RENAMED, "do_sample", "temperature", "max_length"}
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class _LlmGeneration(TextGeneration):
    """Texts of a decoder under OpenAI's names.

    Params are OpenAI's, beside those of ``TextGeneration`` that they leave room for. A
    ``temperature`` of 0 decodes greedily, or with the model's beams, and any other one samples;
    where a request says none, the model's generation config does. They may stand in ``params`` or
    in the request itself, which counts first.

    All rows of a request make one answer: ``id``, ``object``, ``created``, ``model``, ``choices``
    (``n`` for each row, in order) and ``usage``. Tokens are those that the model read and wrote.
    """

    params = (
        *OPENAI_PARAMS,
        *(param for param in GENERATION_PARAMS if param.name not in _REPLACED),
    )
    golden_params = MappingProxyType(
        {
            **{"max_tokens": 4, "temperature": 0.0, "num_beams": 1, "n": 1, "truncation": True},
            KEEP_LOGITS.name: True,
        }
    )
    one_answer = True
    passing = frozenset({"id", "created"})
    length = "max_tokens"
    # ``object`` of an answer, and of a chunk of a stream.
    kinds: ClassVar[tuple[str, str]]

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False  # ``TextGeneration`` is the task of these models by default

    @classmethod
    def columns_for(
        cls, input_columns: Mapping[str, str | None] | None
    ) -> Mapping[str, str | None]:
        own = dict(zip(cls.required, cls.asks, strict=True))
        if input_columns is not None and dict(input_columns) != own:
            raise InputError(
                "The fields of a request are OpenAI's",
                where="input_columns",
                wanted=f"{own}, which may be left out",
                found=repr(dict(input_columns)),
            )
        return own

    # Field of OpenAI's request for each of ``required``.
    asks: ClassVar[tuple[str, ...]]

    @classmethod
    def as_asked(cls, defaults: Mapping[str, Any]) -> dict[str, Any]:
        kept = {
            _RENAMED.get(name, name): value
            for name, value in defaults.items()
            if name in _RENAMED or name not in _REPLACED
        }
        drawn = defaults.get("do_sample", False)
        return {**kept, "temperature": defaults.get("temperature", 1.0) if drawn else 0.0}

    @classmethod
    def metadata(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"task": cls.name, **super().metadata(config)}  # as MLflow's own flavors

    @property
    def folds(self) -> bool:
        return False  # a list of texts is one request

    # Requests.

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        kinds = {param.name: DataType[param.kind] for param in self.asked if not param.many}
        inputs = request_schema(self.request_columns(), kinds, either=("stop",))
        # A param of MLflow's is a list or a text, and ``stop`` is either: it is a column alone.
        columns = {column.name for column in inputs.inputs}
        params = [param for param in self.asked if param.name != "stop" or "stop" not in columns]
        usage = [Property(name, DataType.long) for name in _USAGE]
        outputs = schema_of(
            {
                **{"id": DataType.string, "object": DataType.string, "created": DataType.long},
                "model": DataType.string,
                "choices": Array(Object([*self.choice_properties(), *_CHOICE])),
                "usage": Object(usage),
            }
        )
        return ModelSignature(inputs=inputs, outputs=outputs, params=param_schema(params))

    @abstractmethod
    def request_columns(self) -> dict[str, Any]:
        """Field of OpenAI's request → MLflow's type, without params."""

    @abstractmethod
    def choice_properties(self) -> list[Property]:
        """Properties of a choice that are not in all of OpenAI's answers."""

    def rows(self, data: Any) -> list[Row]:
        return super().rows(without_fields(data, self._names))

    @property
    def _names(self) -> set[str]:
        return {param.name for param in self.asked}

    def asked_in(self, data: Any, params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        fields = fields_of(data, self._names)
        # MLflow fills params in with their defaults, so that what the request says counts first.
        return {**params, **fields} if isinstance(params, Mapping) else params or fields

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        if isinstance(params, Mapping):
            # OpenAI's null is a field that was not sent.
            params = {name: value for name, value in params.items() if value is not None}
            if isinstance(params.get("stop"), str):
                params = {**params, "stop": [params["stop"]]}
        return super().check_params(params)

    def settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        drawn = asked["temperature"] > 0
        beams = 1 if drawn else asked["num_beams"]
        if not drawn and asked["n"] > beams:
            raise InputError(
                "Without sampling there is one most likely text",
                where="params, 'n'",
                wanted=f"{beams}, or a temperature above 0",
                found=asked["n"],
            )
        return {
            **asked,
            "max_new_tokens": asked["max_completion_tokens"] or asked["max_tokens"],
            "do_sample": drawn,
            "temperature": asked["temperature"] if drawn else 1.0,
            "num_beams": beams,
            "num_return_sequences": asked["n"],
            "return_full_text": False,
        }

    # Answers.

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
            yield answer and {
                "texts": answer.get("generated_texts", [answer["generated_text"]]),
                "finish_reasons": answer.get("finish_reasons", [answer["finish_reason"]]),
                "prompt_tokens": len(row["input_ids"]),
                "completion_tokens": sum(map(len, self.written(output))),
                "model": params["model"],
            }

    def result(self, answers: Sequence[Mapping[str, Any]], data: Any) -> Any:
        texts = [
            pair
            for answer in answers
            for pair in zip(answer["texts"], answer["finish_reasons"], strict=True)
        ]
        read, wrote = (sum(answer[name] for answer in answers) for name in _USAGE[:2])
        return {
            **self._head(answers[0]["model"], self.kinds[0]),
            "choices": [self.choice(i, *pair) for i, pair in enumerate(texts)],
            "usage": dict(zip(_USAGE, (read, wrote, read + wrote), strict=True)),
        }

    def _head(self, model: str, kind: str) -> dict[str, Any]:
        made = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}"
        return {"id": made, "object": kind, "created": int(time.time()), "model": model}

    @abstractmethod
    def choice(self, i: int, text: str, reason: str) -> dict[str, Any]:
        """A text of an answer."""

    # Streams.

    def check_streamed(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        asked = {name: value for name, value in (params or {}).items() if name != "stream"}
        return self.check_params(asked)

    def streamed(
        self,
        row: Row,
        params: Mapping[str, Any],
        tokens: Iterable[int],
        output: Callable[[], RowOutput],
    ) -> Iterator[Any]:
        head = self._head(params["model"], self.kinds[1])
        begun: set[int] = set()
        for i, text, reason in self.deltas(params, tokens, output):
            # The first delta of each text says whose it is; the last one why it ended.
            if text or i not in begun:
                yield {**head, "choices": [self.delta(i, text, None, first=i not in begun)]}
            begun.add(i)
            if reason is not None:
                yield {**head, "choices": [self.delta(i, "", reason, first=False)]}

    @abstractmethod
    def delta(self, i: int, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        """A choice of a chunk: what is added to text ``i``."""


_CHOICE = [Property("index", DataType.long), Property("finish_reason", DataType.string)]


class LlmCompletions(_LlmGeneration):
    """``{"prompt": text or list of texts}`` → OpenAI's completion, as MLflow has it.

    The prompt is no part of the answer. Options are those of ``TextGeneration``.
    """

    name = "llm/v1/completions"
    fields = ("text",)
    asks = ("prompt",)
    kinds = ("text_completion", "text_completion")

    def request_columns(self) -> dict[str, Any]:
        return {"prompt": DataType.string}

    def choice_properties(self) -> list[Property]:
        return [Property("text", DataType.string)]

    def rows(self, data: Any) -> list[Row]:
        return super().rows(flat_texts(without_fields(data, self._names), "prompt"))

    def choice(self, i: int, text: str, reason: str) -> dict[str, Any]:
        return {"index": i, "text": text, "finish_reason": reason}

    def delta(self, i: int, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        return {"index": i, "text": text, "finish_reason": reason}


class LlmChat(_LlmGeneration):
    """``{"messages": a chat}`` → OpenAI's chat completion, as MLflow has it.

    The prompt is what the tokenizer's chat template makes of the messages, of which the last one
    may be the assistant's, to be continued. Option: ``generation``, as of ``TextGeneration``.
    """

    name = "llm/v1/chat"
    fields = ("messages",)
    required = ("messages",)
    asks = ("messages",)
    task_options = frozenset({"generation"})
    kinds = ("chat.completion", "chat.completion.chunk")

    def request_columns(self) -> dict[str, Any]:
        message = [
            Property("role", DataType.string),
            Property("content", DataType.string),
            Property("name", DataType.string, False),
        ]
        return {"messages": Array(Object(message))}

    def choice_properties(self) -> list[Property]:
        message = [Property("role", DataType.string), Property("content", DataType.string)]
        return [Property("message", Object(message))]

    def choice(self, i: int, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": i, "message": message, "finish_reason": reason}

    def delta(self, i: int, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        said = {"content": text} if reason is None else {}
        role = {"role": "assistant"} if first else {}
        return {"index": i, "delta": {**role, **said}, "finish_reason": reason}
