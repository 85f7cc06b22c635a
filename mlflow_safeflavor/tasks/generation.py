"""Base of the tasks that write text: token by token, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.decoding import generation_for
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.generation_params import (
    GENERATION_PARAMS,
    KEEP_LOGITS,
    require_least,
    require_one_way,
)
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.near_ties import up_to_first_difference
from mlflow_safeflavor.tasks.outputs import require_finite
from mlflow_safeflavor.tasks.params import Param, check_params, param_schema
from mlflow_safeflavor.tasks.stop_texts import Stop
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.written import deltas_of, written_text

__all__ = ["GenerationTask"]

# Settings that look at the prompt's tokens, padding included.
# Batches of generation are so many times larger than those of other tasks.
_ROWS_AT_ONCE = 4
_READ_PROMPTS = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")


class GenerationTask(TextTask):
    """Texts, token by token, by the model's own generation config where a request says nothing.

    Answers: ``generated_text``, and ``finish_reason``: "stop" where the model ended the text or a
    text of ``stop`` was met, "length" where ``max_new_tokens`` were used up. The text ends before
    the text of ``stop``, whose tokens may lie anywhere. A character of which the last token that
    there was room for is only a part is dropped. With more ``num_return_sequences`` than one also
    ``generated_texts`` and ``finish_reasons``, lists of all: the best beams, best first, or draws.

    Greedy decoding and beams give the same whatever is beside a row, up to rounding. With
    ``do_sample`` and a ``seed``, rows run one by one, so that each text depends on its own row and
    the seed alone; the first of several texts is the one that is drawn alone.
    """

    params: ClassVar[tuple[Param, ...]] = GENERATION_PARAMS
    forward_params = frozenset(param.name for param in GENERATION_PARAMS) - {
        "max_length",
        "truncation",
    } | {KEEP_LOGITS.name}
    # Few tokens: the second one already shows whether the KV cache works.
    golden_params = MappingProxyType(
        {
            "max_new_tokens": 4,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "truncation": True,
            KEEP_LOGITS.name: True,
        }
    )
    answer = Schema(
        [ColSpec(DataType.string, "generated_text"), ColSpec(DataType.string, "finish_reason")]
    )
    # Whether the prompt goes to an encoder, and not before the new tokens.
    encoder_decoder: ClassVar[bool]
    streams = True
    # Name of the param that says how many tokens are written.
    length: ClassVar[str] = "max_new_tokens"

    # What is recorded.

    @classmethod
    def as_asked(cls, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults by the names of ``GENERATION_PARAMS``, as the task's own params call them."""
        return dict(defaults)

    @classmethod
    def metadata(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # As mlflow.transformers has it.
        around = [text.replace("{", "{{").replace("}", "}}") for text in config["prompt_template"]]
        return {"prompt_template": "{prompt}".join(around)} if any(around) else {}

    # Params.

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        return ModelSignature(
            inputs=self.inputs(), outputs=self.answer, params=param_schema(self.asked)
        )

    def inputs(self) -> Schema:
        """The inputs part of the signature."""
        return Schema([ColSpec(DataType.string, column) for column in self.columns.values()])

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = self.settings(check_params((*self.asked, KEEP_LOGITS), params))
        require_one_way(checked)
        positions = self.config["max_length"]
        # A prompt has at least one token beside the special ones.
        room = (
            positions
            if self.encoder_decoder
            else (positions or 0) - self.encoder.special_tokens(pair=False) - 1
        )
        if positions and checked["max_new_tokens"] > room:
            raise InputError(
                "A param has a value that is not allowed",
                where=f"params, {self.length!r}",
                wanted=f"1 to {room}, which is what the model's {positions} positions have room "
                "for",
                found=checked["max_new_tokens"],
            )
        require_least(checked, self.config["params"].get("min_new_tokens", 0))
        return checked

    def settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What ``forward`` and ``decode`` read, from params as the task declares them."""
        return asked

    # Prompts → features.

    def prompt(self, text: str) -> str:
        """A text within the prompt template."""
        before, after = self.config["prompt_template"]
        return f"{before}{text}{after}"

    def prompt_limit(self, params: Mapping[str, Any]) -> int | None:
        """Most tokens of a prompt that leave positions for all new tokens; None without a limit."""
        positions = None if self.encoder_decoder else self.config["max_length"]
        room = positions and positions - params["max_new_tokens"]
        return min((length for length in (self.limit, room) if length), default=None)

    def require_little(self, rows: Sequence[Row], params: Mapping[str, Any]) -> None:
        """Raise ``InputError`` for a request for more new tokens than a cap allows."""
        texts = max(params["num_beams"], params["num_return_sequences"])
        self.caps.require_written(
            params["max_new_tokens"] * texts * len(rows),
            len(rows),
            where="params, 'max_new_tokens' and 'num_beams'",
            instead="lower them, or send fewer rows at once",
        )

    def featured(self, ids: Sequence[int], params: Mapping[str, Any]) -> Features:
        """Features of a prompt's tokens."""
        return {
            "input_ids": list(ids),
            # In tokens of the KV cache, when the text is complete.
            "cost": (len(ids) + params["max_new_tokens"]) * params["num_beams"],
            "draws": params["num_return_sequences"] if params["do_sample"] else 1,
        }

    def pieces(self, features: Features) -> Sequence[Features]:
        """Each text that is drawn is a piece; all of one search are the same one."""
        return [{**features, "draw": draw} for draw in range(features["draws"])]

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        if len(outputs) == 1:
            return outputs[0]
        return {_nth(i): output["ids"] for i, output in enumerate(outputs)}

    def cost(self, features: Features) -> int:
        cost: int = features["cost"]
        return cost

    def batch_budget(self, max_batch_tokens: int) -> int:
        # Nearly all forwards are of one token a row, and read all weights: more rows cost little.
        return _ROWS_AT_ONCE * max_batch_tokens

    # Features → tokens.

    @property
    def pad_id(self) -> int:
        # The model's own where there is one, as some find padding by it; under a mask any will do.
        said: int | None = self.config["pad_token_id"]
        return self._filler if said is None else said

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text."""
        ends = self.config["generation"].get("eos_token_id")
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @property
    def _filler(self) -> int:
        """Token behind a text that ended before those beside it."""
        # The end once more, so that no token of the text follows an end.
        return next(iter(self.ends), self.config["pad_token_id"] or 0)

    def collate(self, batch: Sequence[Features]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        ids = [row["input_ids"] for row in batch]
        mask = self._filled([[1] * len(row) for row in ids], 0)
        inputs = {"input_ids": self._filled(ids, self.pad_id)}  # (rows, longest)
        if "attention_mask" in self.config["input_names"]:
            inputs["attention_mask"] = mask
        return inputs, mask.astype(bool)

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        outputs: dict[int, RowOutput] = {}
        for part in self._parts(batch, params):
            inputs, mask = self.collate([batch[i] for i in part])
            start, stop = self._start(mask), params["stop"]
            generation = generation_for(
                self.config["generation"],
                params,
                draws=[batch[i].get("draw", 0) for i in part],
                start=start,
                filler=self._filler,
                stopping=[Stop(self.encoder.decode, stop, start)] if stop else [],
            )
            found = engine.generate(inputs, generation)
            outputs.update(zip(part, self.read(found, mask), strict=True))
        return [outputs[i] for i in range(len(batch))]

    def _parts(self, batch: Sequence[Features], params: Mapping[str, Any]) -> list[list[int]]:
        """Rows that may run together."""
        # Draws do not depend on other rows, but scores do by rounding, and one other token changes
        # all that follow.
        drawn = params["do_sample"] and params["seed"] >= 0
        if drawn or not self.config["pads"]:
            return [[i] for i in range(len(batch))]
        if not self._counts_padding(params):
            return [list(range(len(batch)))]
        # Rows of one length have no padding for such settings to count.
        lengths = [len(row["input_ids"]) for row in batch]
        order = sorted(range(len(batch)), key=lengths.__getitem__)
        return [list(part) for _, part in groupby(order, key=lengths.__getitem__)]

    def _counts_padding(self, params: Mapping[str, Any]) -> bool:
        """Whether a setting would look at padding as if it were a part of the text."""
        kept = self.config["generation"]
        found = [kept.get(name) for name in _READ_PROMPTS]
        if not self.encoder_decoder:  # whose decoder begins without any
            found += [kept.get("min_length"), params["no_repeat_ngram_size"]]
            found += [params["repetition_penalty"] != 1]
        return any(found)

    def _start(self, mask: np.ndarray) -> int:
        """Index of the first new token in a sequence: behind the start token, or the prompt."""
        return 1 if self.encoder_decoder else mask.shape[1]

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        written = outputs["sequences"][:, self._start(mask) :]
        # (rows, texts, steps)
        texts = written.reshape(len(mask), -1, written.shape[1])
        rows: list[RowOutput] = [
            {_nth(i): self._until_end(ids) for i, ids in enumerate(row)} for row in texts
        ]
        if "logits" not in outputs:
            return rows
        said = zip(rows, outputs["logits"], strict=True)
        # (steps, vocabulary) of each row, up to its own end
        return [{**row, "logits": logits[: len(row["ids"])]} for row, logits in said]

    def _until_end(self, ids: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(np.isin(ids, self.ends))
        return ids[: ends[0] + 1] if len(ends) else ids

    def comparable(
        self, recorded: RowOutput, found: RowOutput
    ) -> tuple[RowOutput, RowOutput] | None:
        return up_to_first_difference(recorded, found)

    # Tokens → texts.

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, output in enumerate(outputs, first):
            # Masked tokens may be minus infinity; a largest one that is not finite is broken.
            require_finite([output["logits"].max(axis=-1)] if "logits" in output else [], i)
            texts, reasons = zip(*self.texts(output, params), strict=True)
            answer = {"generated_text": texts[0], "finish_reason": reasons[0]}
            if len(texts) > 1:
                answer |= {"generated_texts": list(texts), "finish_reasons": list(reasons)}
            yield answer

    def texts(self, output: RowOutput, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Each text of a row, and its ``finish_reason``."""
        forces = self.config["generation"].get("forced_eos_token_id") is not None
        forced = params["max_new_tokens"] if forces else None
        return [
            written_text(self.encoder, ids.tolist(), self.ends, params["stop"], forced)
            for ids in self.written(output)
        ]

    def written(self, output: RowOutput) -> list[np.ndarray]:
        """The new tokens of each text of a row."""
        return [ids for name, ids in output.items() if name != "logits"]

    # Tokens → texts, one token at a time.

    def check_streamed(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = self.check_params(params)
        if checked["num_return_sequences"] > 1:
            raise InputError(
                "A stream is of one text",
                where="params, 'num_return_sequences'",
                wanted="1",
                found=checked["num_return_sequences"],
            )
        return checked

    def streamed(
        self,
        row: Row,
        params: Mapping[str, Any],
        tokens: Iterable[int],
        output: Callable[[], RowOutput],
    ) -> Iterator[Any]:
        return (text for _, text, _ in self.deltas(params, tokens, output) if text)

    def deltas(
        self, params: Mapping[str, Any], tokens: Iterable[int], output: Callable[[], RowOutput]
    ) -> Iterator[tuple[int, str, str | None]]:
        """See ``deltas_of``."""
        return deltas_of(self.encoder, params["stop"], tokens, lambda: self.texts(output(), params))


def _nth(i: int) -> str:
    """Name of the output with the tokens of a row's text ``i``."""
    return f"ids_{i}" if i else "ids"
