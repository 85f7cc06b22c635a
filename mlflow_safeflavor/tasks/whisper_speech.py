"""Speech by Whisper: the text of half a minute of sound, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.module.generation import Generation
from mlflow_safeflavor.tasks.decoding import generation_for
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.generation_config import REPLACED, read_generation_config
from mlflow_safeflavor.tasks.generation_params import GENERATION_PARAMS, KEEP_LOGITS
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.near_ties import up_to_first_difference
from mlflow_safeflavor.tasks.outputs import require_finite
from mlflow_safeflavor.tasks.params import Param, check_params
from mlflow_safeflavor.tasks.sound_windows import CHUNK_LENGTH, STRIDE_LENGTH, Windows
from mlflow_safeflavor.tasks.speech import SPAN, SpeechTask

if TYPE_CHECKING:
    import torch

__all__ = ["WHISPER_PARAMS", "WhisperSpeech"]

# Tokens before those of the text: start, language, task and "no timestamps".
_START = 4
_TASKS = ("", "transcribe", "translate")

WHISPER_PARAMS = (
    Param(
        "language",
        "string",
        default="",
        wanted='the name or code of a language, or "" for what the model finds, or is made for',
        none_is="",
    ),
    Param(
        "task",
        "string",
        default="",
        wanted='transcribe, translate (to English), or "" for what the model is made for',
        allows=lambda value: value in _TASKS,
        none_is="",
    ),
    Param(
        "return_timestamps",
        "boolean",
        default=False,
        wanted="true for times of segments, or false: times of words are not supported",
        none_is=False,
    ),
)

# Settings of the generation config that are params of other tasks, and here stay as they are.
_KEPT = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}


class WhisperSpeech(SpeechTask):
    """Text of a sound, written by an encoder-decoder that hears a fixed length at once.

    A longer sound is cut into windows of that length, as transformers' pipeline does with
    ``chunk_length_s``; Whisper's own way, from one timestamp to the next, is not that of a batch.
    """

    params: ClassVar[tuple[Param, ...]] = (
        replace(CHUNK_LENGTH, wanted="seconds of a window, or 0 for what the model hears at once"),
        STRIDE_LENGTH,
        *WHISPER_PARAMS,
        Param(
            "max_new_tokens",
            "long",
            default=0,
            wanted="a whole number of at least 1, or 0 for as many as the model's config says",
            allows=lambda value: value >= 0,
            none_is=0,
        ),
        *(one for one in GENERATION_PARAMS if one.name == "num_beams"),
    )
    forward_params = frozenset(
        ("language", "task", "return_timestamps", "max_new_tokens", "num_beams", KEEP_LOGITS.name)
    )
    # Few tokens: the second one already shows whether the KV cache works.
    golden_params = MappingProxyType(
        {
            "chunk_length_s": 0.0,
            "return_timestamps": False,
            "max_new_tokens": 4,
            "num_beams": 1,
            KEEP_LOGITS.name: True,
        }
    )
    task_options = frozenset({"generation"})

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name == "WhisperForConditionalGeneration"

    # What is recorded.

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        said = read_generation_config(model, options.get("generation", {}))
        if said.get("do_sample"):
            raise StructureError(
                "The generation config asks for what this task does not do",
                where="generation_config, do_sample",
                wanted="greedy decoding or beams",
                found="True",
            )
        config: Any = model.config
        params = {param.name for param in cls.params}
        own = REPLACED - {"pad_token_id", *_KEPT}
        return {
            **cls.describe_listening(model),
            "align": 1,
            "generation": {n: v for n, v in said.items() if n not in own | params},
            "params": {n: v for n, v in said.items() if n in params},
            "positions": config.max_target_positions,
            # With the tokens before those of the text, whose number follows from the request.
            "max_length": said.get("max_length", config.max_target_positions),
            "heard_positions": config.max_source_positions,
            "languages": _names_of(said.get("lang_to_id", {})),
        }

    # Params.

    def windows(self, params: Mapping[str, Any]) -> Windows | None:
        most = float(getattr(self.processor, "chunk_length", 0))
        if not most:
            raise StructureError(
                "The processor does not belong to the model",
                where=type(self.processor).__name__,
                wanted="an extractor with a chunk_length, such as WhisperFeatureExtractor",
            )
        # Whisper's extractor cuts what is longer, without a word.
        if params["chunk_length_s"] > most:
            raise InputError(
                "A param has a value that is not allowed",
                where="params, 'chunk_length_s'",
                wanted=f"at most {most:g} seconds, which the model hears at once",
                found=f"{params['chunk_length_s']:g}",
            )
        return super().windows({**params, "chunk_length_s": params["chunk_length_s"] or most})

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = check_params((*self.asked, KEEP_LOGITS), params)
        self.windows(checked)
        room = self.config["positions"] - _START
        if checked["max_new_tokens"] > room:
            raise InputError(
                "A param has a value that is not allowed",
                where="params, 'max_new_tokens'",
                wanted=f"at most {room}, which is what the model's {room + _START} positions have "
                "room for",
                found=checked["max_new_tokens"],
            )
        if checked["task"] and "task_to_id" not in self.config["generation"]:
            raise InputError(
                "A param has a value that is not allowed",
                where="params, 'task'",
                wanted='"": the model knows one task alone',
                found=repr(checked["task"]),
            )
        return {**checked, "language": self._language(checked["language"])}

    def _language(self, said: str) -> str:
        """The token of a language, such as ``<|en|>``; empty for none."""
        languages: Mapping[str, str] = self.config["languages"]
        if not said:
            return ""
        token = languages.get(said.lower(), said)
        if token not in languages.values():
            known = ", ".join(sorted(name for name in languages if len(name) > 3))
            raise InputError(
                "A param has a value that is not allowed",
                where="params, 'language'",
                wanted=known or '"": the model knows one language alone',
                found=repr(said),
            )
        return token

    # Sounds → tokens.

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        written = 0
        a_window = params["max_new_tokens"] or self.config["max_length"]
        for features in super().encode(rows, params):
            if features is not None:
                written += len(self.pieces(features)) * a_window * params["num_beams"]
                self.caps.require_written(
                    written,
                    len(rows),
                    where="params, 'max_new_tokens' and 'num_beams'",
                    instead="lower them, or send fewer or shorter sounds at once",
                )
            yield features

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        inputs = self.collate(batch)
        said = {name: params[name] for name in ("language", "task") if params[name]}
        said["return_timestamps"] = params["return_timestamps"]
        plain = {**params, KEEP_LOGITS.name: False}
        written = engine.generate(inputs, self._generation(plain, said))
        rows = self.outputs_of(written, batch, params)
        if not params[KEEP_LOGITS.name]:
            return rows
        # Once more, up to the first end: behind a timestamp Whisper begins anew, and of all that is
        # written like that there are logits of the last part alone.
        said["force_unique_generate_call"] = True
        first = self._first(engine.generate(inputs, self._generation(params, said)))
        return [{**row, **more} for row, more in zip(rows, first, strict=True)]

    def _generation(self, params: Mapping[str, Any], said: Mapping[str, Any]) -> Generation:
        kept = self.config["generation"]
        plain = {
            **{name: kept.get(name, default) for name, default in _KEPT.items()},
            "do_sample": False,
            "num_return_sequences": 1,
            "max_new_tokens": params["max_new_tokens"] or self.config["max_length"],
        }
        # No draws: nothing is sampled.
        made = generation_for(
            kept, {**params, **plain}, draws=[], start=0, filler=self._filler, stopping=[]
        )
        # Of two lengths transformers takes one, with a warning.
        unused = "max_length" if params["max_new_tokens"] else "max_new_tokens"
        lengths = {"max_length": self.config["max_length"], **made.settings}
        settings = {name: value for name, value in lengths.items() if name != unused}
        return replace(made, settings=settings, arguments=said)

    @property
    def _filler(self) -> int:
        """Token behind a text that ended before those beside it."""
        filler: int = self.config["generation"].get("pad_token_id", self._ends[0])
        return filler

    @property
    def _ends(self) -> list[int]:
        """Tokens that end a text."""
        ends = self.config["generation"].get("eos_token_id", 0)
        return list(ends) if isinstance(ends, list) else [ends]

    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        # (rows, tokens); of each row those before its end.
        return [{"ids": line[: self._length(line)]} for line in outputs["sequences"]]

    def _first(self, found: Mapping[str, np.ndarray]) -> list[RowOutput]:
        """Tokens up to the first end, which is one of them, and their logits, for each row."""
        logits = found["logits"]  # (rows, steps, vocabulary)
        new = found["sequences"][:, -logits.shape[1] :]
        steps = [[*np.flatnonzero(np.isin(line, self._ends)), len(line)][0] + 1 for line in new]
        return [
            {"first": line[:n], "logits": row[:n]}
            for line, row, n in zip(new, logits, steps, strict=True)
        ]

    def _length(self, line: np.ndarray) -> int:
        real = np.flatnonzero(line != self._filler)
        return int(real[-1]) + 1 if len(real) else 0

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        joined = {n: np.concatenate([output[n] for output in outputs]) for n in outputs[0]}
        return {**joined, "lengths": np.array([len(output["ids"]) for output in outputs])}

    def comparable(
        self, recorded: RowOutput, found: RowOutput
    ) -> tuple[RowOutput, RowOutput] | None:
        if np.array_equal(recorded.get("ids", np.zeros(0)), found["ids"]):
            return None
        old, new = ({"ids": one["first"], "logits": one["logits"]} for one in (recorded, found))
        alike = {"logits": old["logits"]}, {"logits": new["logits"]}
        return up_to_first_difference(old, new) or alike

    # Tokens → texts.

    def written(
        self,
        i: int,
        features: Features,
        output: RowOutput,
        decoder: Any,
        params: Mapping[str, Any],
    ) -> tuple[str, list[dict[str, Any]] | None]:
        # Masked tokens may be minus infinity; a largest one that is not finite is broken.
        require_finite([output["logits"].max(axis=-1)] if "logits" in output else [], i)
        if not hasattr(decoder, "_decode_asr"):
            raise StructureError(
                "The tokenizer does not put windows together",
                where=type(decoder).__name__,
                wanted="transformers' own tokenizer of Whisper, as the model was trained with",
            )
        texts = np.split(output["ids"], output["lengths"].cumsum()[:-1])
        said = [
            {"tokens": ids[None], "stride": tuple(n / self.rate for n in piece[SPAN].tolist())}
            for ids, piece in zip(texts, self.pieces(features), strict=True)
        ]
        times = params["return_timestamps"]
        # Private, but what transformers' pipeline calls, since 4.27: overlaps are found by tokens.
        text, more = decoder._decode_asr(
            said,
            return_timestamps=times,
            return_language=None,
            time_precision=self.processor.chunk_length / self.config["heard_positions"],
        )
        if not times:
            return text, None
        return text, [
            {"text": one["text"], "timestamp": list(one["timestamp"])} for one in more["chunks"]
        ]


def _names_of(tokens: Mapping[str, int]) -> dict[str, str]:
    """Names and codes of the languages that a model knows → their tokens."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    codes = {token.strip("<|>"): token for token in tokens}
    names = {name: codes[code] for name, code in TO_LANGUAGE_CODE.items() if code in codes}
    return {**codes, **names}
