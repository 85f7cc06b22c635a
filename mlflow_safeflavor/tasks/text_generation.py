"""Prompts, or chats → a decoder's continuation, as transformers' text-generation pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from mlflow.types import DataType, Schema

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, require_schema
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.generation import GenerationTask
from mlflow_safeflavor.tasks.generation_config import describe_generation
from mlflow_safeflavor.tasks.generation_params import GENERATION_PARAMS
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_clean, require_texts
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value
from mlflow_safeflavor.tasks.params import Param

if TYPE_CHECKING:
    import torch

__all__ = ["TextGeneration"]

_FULL_TEXT = Param("return_full_text", "boolean", default=True, wanted="true or false")
_MESSAGE = Object([Property("role", DataType.string), Property("content", DataType.string)])

_GOLDEN_CHATS = (
    "Hello!",
    "Where does a model answer the same way as here? Name three places. 東京, Zürich 😀?",
)


class TextGeneration(GenerationTask):
    """A decoder's continuation of a text, or the next turn of a chat.

    A model reads one or the other, as ``input_columns`` says when it is saved: ``{"text": …}``, the
    default, or ``{"messages": …}`` for a model whose tokenizer has a chat template. A cell of
    ``messages`` is a list of dicts with ``role`` and ``content``. Where the last one is the
    assistant's, it is continued.

    Options, fixed at save through ``model_config``: ``generation``, changes of the model's
    generation config, and ``prompt_template``, a text around each ``{prompt}``.

    Params: ``return_full_text`` puts the prompt in front (default True; False for chats and with a
    template, whose prompt is what the template made). A prompt beside which ``max_new_tokens`` do
    not fit into the model's positions is cut at its beginning, so that its end is continued;
    without ``truncation``, and by default for chats, it is refused.
    """

    name = "text-generation"
    fields: ClassVar[tuple[str, ...]] = ("text", "messages")
    params: ClassVar[tuple[Param, ...]] = (_FULL_TEXT, *GENERATION_PARAMS)
    reads = ("encoder", "tokenizer")
    task_options = frozenset({"generation", "prompt_template"})
    encoder_decoder = False

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith(("ForCausalLM", "LMHeadModel")) and not class_name.endswith(
            "WithLMHeadModel"
        )

    @classmethod
    def columns_for(
        cls, input_columns: Mapping[str, str | None] | None
    ) -> Mapping[str, str | None]:
        if input_columns is not None and "messages" in input_columns:
            if list(input_columns) == ["messages"] and input_columns["messages"]:
                return dict(input_columns)
            raise InputError(
                "A model reads texts or chats, not both",
                where="input_columns",
                wanted='{"text": column} or {"messages": column}',
                found=repr(dict(input_columns)),
            )
        return super().columns_for(input_columns)

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        config = describe_generation(cls, model, options)
        # As in mlflow.transformers: what the template puts in front belongs to no answer.
        cut = _FULL_TEXT in cls.params and "prompt_template" in options
        full = {_FULL_TEXT.name: False} if cut else {}
        return {**config, "params": {**config["params"], **full}}

    def __init__(
        self,
        config: Mapping[str, Any],
        columns: Mapping[str, str | None],
        encoder: Any = None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(config, columns, encoder)
        self.tokenizer = tokenizer
        self._chat = "messages" in self.columns
        if self._chat:
            if any(config["prompt_template"]):
                raise InputError(
                    "A chat has the template of its tokenizer",
                    where="prompt_template",
                    wanted="none beside messages",
                    hint="leave it out, or change tokenizer.chat_template",
                )
            # A chat without its beginning, where the template puts who speaks, is another one.
            off = {"return_full_text", "truncation"} - config["params"].keys()
            self.asked = tuple(
                replace(param, default=False) if param.name in off else param
                for param in self.asked
            )

    @property
    def folds(self) -> bool:
        return not self._chat  # a chat is a list

    def inputs(self) -> Schema:
        if not self._chat:
            return super().inputs()
        return require_schema({str(self.columns["messages"]): Array(_MESSAGE)})

    def rows(self, data: Any) -> list[Row]:
        if not self._chat:
            return super().rows(data)
        column = str(self.columns["messages"])
        # A dict with one chat, which anywhere else would be a dict of as many rows as the chat has
        # messages.
        if isinstance(data, Mapping) and list(data) == [column] and _is_chat(data[column]):
            data = [dict(data)]
        rows = super().rows(data)
        return [
            {"messages": _messages(i, column, row.get("messages"))} for i, row in enumerate(rows)
        ]

    def golden_rows(self) -> list[Row]:
        if not self._chat:
            return super().golden_rows()
        return [{"messages": [{"role": "user", "content": text}]} for text in _GOLDEN_CHATS]

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        if not self._chat:
            require_texts(rows, self.columns)
        self.require_little(rows, params)
        limit = self.prompt_limit(params)
        special = not self._chat  # the template has put them in: a second BOS changes the answer
        for i, row in enumerate(rows):
            prompt = self._prompt(i, row)
            self.require_short(i, [{"prompt": prompt}], limit, cut=params["truncation"])
            (encoded,) = self.encoder.encode([prompt], truncation=False, special=special)
            ids = encoded["input_ids"] or self._beginning()
            # Cut at its beginning, since a decoder goes on behind the end.
            if limit and len(ids) > limit and params["truncation"]:
                ids = self._end_of(prompt, limit, special=special)
            self.require_fitting(i, len(ids), limit)
            yield self.featured(ids, params)

    def _beginning(self) -> list[int]:
        """Tokens of an empty prompt, as in transformers: the BOS token, if there is one."""
        first = self.config["generation"].get("bos_token_id")
        return [] if first is None else [first]

    def _end_of(self, prompt: str, limit: int, *, special: bool) -> list[int]:
        """The last tokens of a prompt, and its special ones."""
        # Not the encoder's truncation, whose side belongs to the tokenizer: the end is continued.
        (row,) = self.encoder.encode([prompt], truncation=False, special=special, spans=True)
        added = [i for i, text in enumerate(row["sequence_ids"]) if text == -1]
        own = [i for i, text in enumerate(row["sequence_ids"]) if text != -1]
        kept = sorted(added + own[len(own) - max(0, limit - len(added)) :])
        return [row["input_ids"][i] for i in kept]

    def _prompt(self, i: int, row: Row) -> str:
        (field,) = self.columns
        if self._chat:
            return self._rendered(i, row[field])
        return self.prompt(row[field])

    def _rendered(self, i: int, messages: Sequence[Mapping[str, str]]) -> str:
        tokenizer = self.tokenizer() if self.tokenizer else None
        if tokenizer is None or tokenizer.chat_template is None:
            raise StructureError(
                "The tokenizer has no chat template",
                where=f"input_columns, {self.columns}",
                hint='set tokenizer.chat_template, or save the model with input_columns={"text": '
                "…}",
            )
        # Imported late: only chats need jinja2.
        from mlflow_safeflavor.tasks.inputs.chat_template import render

        try:
            rendered: str = render(tokenizer, messages)
        except Exception as error:  # templates refuse what they do not know, each in its own way
            raise InputError(
                "The chat template refuses a chat",
                where=format_cell(i, self.columns["messages"]),
                found=f"{type(error).__name__}: {error}",
            ) from error
        # A template may put any text of its own around the messages, and repeat them.
        require_clean(rendered, format_cell(i, self.columns["messages"]), self.caps)
        return rendered

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
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True), first):
            if answer is not None and params["return_full_text"]:
                prompt = self._prompt(i, row)
                answer = {**answer, "generated_text": prompt + answer["generated_text"]}
                if "generated_texts" in answer:
                    answer["generated_texts"] = [
                        prompt + text for text in answer["generated_texts"]
                    ]
            yield answer

    def streamed(
        self,
        row: Row,
        params: Mapping[str, Any],
        tokens: Iterable[int],
        output: Callable[[], RowOutput],
    ) -> Iterator[Any]:
        if params["return_full_text"]:
            yield self._prompt(0, row)
        yield from super().streamed(row, params, tokens, output)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple, np.ndarray))
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )


def _messages(i: int, column: str, value: Any) -> list[dict[str, str]]:
    """A cell as a plain list of messages."""
    if not _is_chat(value):
        raise _no_chat(i, column, value)
    for message in value:
        texts = isinstance(message, Mapping) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise _no_chat(i, column, message)
    return [dict(message) for message in value]


def _no_chat(i: int, column: str, value: Any) -> InputError:
    return InputError(
        "A value is not a chat",
        where=format_cell(i, column),
        wanted='a list of messages, each {"role": text, "content": text}',
        found=format_value(value),
    )
