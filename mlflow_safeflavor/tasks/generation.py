"""What all tasks that write text share: token by token, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.decoding import generation_for
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.generation_config import REPLACED, read_generation_config
from mlflow_safeflavor.tasks.generation_params import (
    GENERATION_PARAMS,
    KEEP_LOGITS,
    require_one_way,
)
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.outputs import require_finite
from mlflow_safeflavor.tasks.padding import ignores_padding
from mlflow_safeflavor.tasks.params import Param, check_params, param_schema
from mlflow_safeflavor.tasks.stop_texts import Stop, first_stop
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.text_model import describe_text_model

if TYPE_CHECKING:
    import torch

__all__ = ["GenerationTask"]

# Answers of other tasks (labels) that take about as long as a new token.
_WEIGHT = 32
# Tokens that a row may be answered with on average, of all beams, beyond ``max_answers`` in all.
_WRITTEN_A_ROW = 1024

# Settings that look at the prompt's tokens, padding included.
_COUNT_PADDING = (
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "min_length",
)


class GenerationTask(TextTask):
    """Texts, token by token, by the model's own generation config where a request says nothing.

    Answers: ``generated_text``, and ``finish_reason``: "stop" where the model ended the text or a
    text of ``stop`` was met, "length" where ``max_new_tokens`` were used up. The text ends before
    the text of ``stop``, whose tokens may lie anywhere. A character of which the last token that
    there was room for is only a part is dropped.

    Greedy decoding and beams give the same whatever is beside a row, up to rounding. With
    ``do_sample`` and a ``seed``, rows run one by one, so that each text depends on its own row and
    the seed alone.
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
            "truncation": True,
            KEEP_LOGITS.name: True,
        }
    )
    answer = Schema(
        [ColSpec(DataType.string, "generated_text"), ColSpec(DataType.string, "finish_reason")]
    )
    # Whether the prompt goes to an encoder, and not before the new tokens.
    encoder_decoder: ClassVar[bool]

    # What is recorded.

    @classmethod
    def describe_generation(
        cls, model: torch.nn.Module, changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Facts of a model that generates text; JSON only.

        Args:
            model: The module being saved.
            changes: Settings over those of the model's own generation config.

        Returns:
            The facts of ``describe_text_model``; ``generation``, settings of the generation config
            that are no params; its values of ``params``; and ``pads``, whether rows of different
            lengths may share a batch.

        Raises:
            InputError: The generation config has a value that its param does not allow, or
                ``changes`` a key that no generation config has.
            StructureError: The model cannot write, or not as its generation config says.
        """
        text = describe_text_model(model)
        if bool(getattr(model.config, "is_encoder_decoder", False)) is not cls.encoder_decoder:
            raise StructureError(
                "The model is not of the kind that its task writes with",
                where=f"task {cls.name!r}, {type(model).__name__}",
                wanted="an encoder-decoder model" if cls.encoder_decoder else "a decoder alone",
                hint='choose task="text-generation" for decoders, "text2text-generation" for '
                "encoder-decoders",
            )
        said = read_generation_config(model, changes)
        config = {
            **text,
            "input_names": [name for name in text["input_names"] if name != "token_type_ids"],
            # A decoder goes on behind its last token, which must not be padding.
            "padding_side": "right" if cls.encoder_decoder else "left",
            "generation": {name: value for name, value in said.items() if name not in REPLACED},
            "params": cls._defaults(said, text["max_length"]),
            "pads": True,
        }
        masked = "attention_mask" in text["input_names"]
        return {**config, "pads": masked and ignores_padding(cls, model, config)}

    @classmethod
    def _defaults(cls, said: Mapping[str, Any], positions: int | None) -> dict[str, Any]:
        """Defaults of params, from the generation config."""
        kinds = {
            param.name: float if param.kind == "double" else lambda value: value
            for param in cls.params
        }
        known = {
            name: kinds[name](value)
            for name, value in said.items()
            if name in kinds and name != "max_length"
        }
        if said.get("stop_strings"):
            stop = said["stop_strings"]
            known["stop"] = [stop] if isinstance(stop, str) else list(stop)
        if "max_new_tokens" not in known:
            # A decoder's max_length counts the prompt, too, so it bounds no number of new tokens;
            # an encoder-decoder's counts the start token.
            length = said.get("max_length") if cls.encoder_decoder else None
            known["max_new_tokens"] = length - 1 if length and length > 1 else 64
        if positions:
            # Half of a decoder's positions are left to the prompt.
            most = positions if cls.encoder_decoder else positions // 2
            known["max_new_tokens"] = max(1, min(known["max_new_tokens"], most))
        require_one_way(check_params(cls.params, known))
        return known

    # Params.

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        return ModelSignature(
            inputs=self.inputs(), outputs=self.answer, params=param_schema(self.asked)
        )

    def inputs(self) -> Schema:
        """The inputs part of the signature."""
        return Schema([ColSpec(DataType.string, column) for column in self.columns.values()])

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = check_params((*self.asked, KEEP_LOGITS), params)
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
                where="params, 'max_new_tokens'",
                wanted=f"1 to {room}, which is what the model's {positions} positions have room "
                "for",
                found=checked["max_new_tokens"],
            )
        return checked

    # Prompts → features.

    def prompt_limit(self, params: Mapping[str, Any]) -> int | None:
        """Most tokens of a prompt that leave positions for all new tokens; None without a limit."""
        positions = None if self.encoder_decoder else self.config["max_length"]
        room = positions and positions - params["max_new_tokens"]
        return min((length for length in (self.limit, room) if length), default=None)

    def require_little(self, rows: Sequence[Row], params: Mapping[str, Any]) -> None:
        """Raise ``InputError`` for a request for more new tokens than a cap allows."""
        a_row = params["max_new_tokens"] * params["num_beams"]
        self.caps.require(
            "max_answers",
            _WEIGHT * a_row * len(rows),
            f"A request asks for too much text; a token that is written counts as {_WEIGHT}",
            where="params, 'max_new_tokens' and 'num_beams'",
            instead="lower them, or send fewer rows at once",
            allowed=_WEIGHT * _WRITTEN_A_ROW * len(rows),
        )

    def featured(self, ids: Sequence[int], params: Mapping[str, Any]) -> Features:
        """Features of a prompt's tokens."""
        return {
            "input_ids": list(ids),
            # In tokens of the KV cache, when the text is complete.
            "cost": (len(ids) + params["max_new_tokens"]) * params["num_beams"],
        }

    def cost(self, features: Features) -> int:
        cost: int = features["cost"]
        return cost

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
                rows=len(part),
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
        kept = self.config["generation"]
        if params["repetition_penalty"] == 1 and not any(kept.get(name) for name in _COUNT_PADDING):
            return [list(range(len(batch)))]
        # Rows of one length have no padding for such settings to count.
        lengths = [len(row["input_ids"]) for row in batch]
        order = sorted(range(len(batch)), key=lengths.__getitem__)
        return [list(part) for _, part in groupby(order, key=lengths.__getitem__)]

    def _start(self, mask: np.ndarray) -> int:
        """Index of the first new token in a sequence: behind the start token, or the prompt."""
        return 1 if self.encoder_decoder else mask.shape[1]

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        written = outputs["sequences"][:, self._start(mask) :]  # (rows, steps)
        rows: list[RowOutput] = [{"ids": self._until_end(line)} for line in written]
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
        """Logits up to the first token that is not the same."""
        # If they are near each other there, it was a near tie, which another CPU may decide
        # otherwise; behind it, the model continues other texts. A wrong weight shows in all logits,
        # a broken KV cache in those of the second token.
        old, new = recorded.get("ids", np.zeros(0)), found["ids"]
        if np.array_equal(old, new):
            return None
        both = min(len(old), len(new))
        same = int((old[:both] == new[:both]).cumprod().sum()) + 1
        return {"logits": recorded["logits"][:same]}, {"logits": found["logits"][:same]}

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
        # An end that the config forces at the last position only means that the length is used up.
        forced, most = (
            self.config["generation"].get("forced_eos_token_id") is not None,
            params["max_new_tokens"],
        )
        for i, output in enumerate(outputs, first):
            # Masked tokens may be minus infinity; a largest one that is not finite is broken.
            require_finite([output["logits"].max(axis=-1)] if "logits" in output else [], i)
            ids = output["ids"].tolist()
            text = self.encoder.decode(ids)
            stop = first_stop(text, params["stop"])
            ended = stop is not None or bool(
                ids and ids[-1] in self.ends and not (forced and len(ids) == most)
            )
            # A byte-level token may be the first half of a character, which decodes to this one.
            text = text[:stop] if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")
            yield {"generated_text": text, "finish_reason": "stop" if ended else "length"}
