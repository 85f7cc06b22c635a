"""Speech by connectionist temporal classification: the best token of each frame of a sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.ctc_decoder import CtcDecoder
from mlflow_safeflavor.tasks.listening import convolutions_of
from mlflow_safeflavor.tasks.outputs import pick, require_finite
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.sound_windows import CHUNK_LENGTH, STRIDE_LENGTH
from mlflow_safeflavor.tasks.speech import SPAN, SpeechTask

if TYPE_CHECKING:
    import torch

__all__ = ["CtcSpeech"]

_TIMES = ("none", "char", "word")


class CtcSpeech(SpeechTask):
    """Text of a sound, frame by frame: Wav2Vec2, HuBERT, WavLM and their relatives."""

    params = (
        CHUNK_LENGTH,
        STRIDE_LENGTH,
        Param(
            "return_timestamps",
            "string",
            default="none",
            wanted=" | ".join(_TIMES),
            allows=lambda value: value in _TIMES,
            none_is="none",
        ),
    )
    # The times of characters tell where frames were, which a text alone may hide.
    golden_params = MappingProxyType({"return_timestamps": "char", "chunk_length_s": 0.0})

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("ForCTC")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        config = getattr(model, "config", None)
        heard = cls.describe_listening(model)
        return {
            **heard,
            # Frames of an adapter behind the transformer are not counted by the convolutions.
            "pads": heard["pads"] and not getattr(config, "add_adapter", False),
            "convolutions": convolutions_of(config),
            "align": int(getattr(config, "inputs_to_logits_ratio", 1)),
        }

    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        logits = pick(outputs, "logits", (len(part), None, None))  # (rows, frames, vocabulary)
        # The best token of each frame and its logit, and not all logits: those of a vocabulary of
        # 3,500 characters take 40 MB a minute.
        ids, best = logits.argmax(axis=-1), logits.max(axis=-1)
        kept = [self._frames(row, logits.shape[1]) for row in part]
        return [{"ids": ids[i, frames], "best": best[i, frames]} for i, frames in enumerate(kept)]

    def _frames(self, row: Features, frames: int) -> slice:
        """Frames of a window that are neither padding nor its neighbours'."""
        if self.config["pads"]:
            frames = len(row["input_values"])
            for kernel, stride in self.config["convolutions"]:
                frames = (frames - kernel) // stride + 1
        if SPAN not in row:
            return slice(frames)
        samples, left, right = map(int, row[SPAN])
        # In the order of transformers' pipeline, for the same rounding.
        total = round(samples * (1 / self.config["align"]))
        left, right = (round(side / samples * total) for side in (left, right))
        return slice(left, min(frames, total - right))

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}

    def comparable(
        self, recorded: RowOutput, found: RowOutput
    ) -> tuple[RowOutput, RowOutput] | None:
        # Of two tokens that are as good another CPU may choose the other one: then their logits are
        # near, and nothing follows from them. Wrong weights show in the logits.
        if np.array_equal(recorded.get("ids", np.zeros(0)), found["ids"]):
            return None
        return {"best": recorded["best"]}, {"best": found["best"]}

    def written(
        self,
        i: int,
        features: Features,
        output: RowOutput,
        decoder: Any,
        params: Mapping[str, Any],
    ) -> tuple[str, list[dict[str, Any]] | None]:
        require_finite([output["best"]], i)
        if not isinstance(decoder, CtcDecoder):
            raise StructureError(
                "The tokenizer does not decode frames",
                where=type(decoder).__name__,
                wanted="transformers' Wav2Vec2CTCTokenizer, as the model was trained with",
            )
        characters = decoder.characters(output["ids"].tolist())
        text, kind = decoder.text(characters), params["return_timestamps"]
        if kind == "none":
            return text, None
        said = characters if kind == "char" else decoder.words(characters)
        align = self.config["align"]
        return text, [
            {"text": one.text, "timestamp": [n * align / self.rate for n in (one.start, one.end)]}
            for one in said
        ]
