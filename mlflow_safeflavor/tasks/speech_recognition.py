"""Sounds → what was said, as transformers' automatic-speech-recognition pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.tasks.ctc_speech import CtcSpeech
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.speech import SpeechTask
from mlflow_safeflavor.tasks.whisper_speech import WhisperSpeech

if TYPE_CHECKING:
    import torch

__all__ = ["SpeechRecognition"]

# How models write down speech, by the name that is recorded.
_WAYS: Mapping[str, type[SpeechTask]] = {"ctc": CtcSpeech, "whisper": WhisperSpeech}


class SpeechRecognition(SpeechTask):
    """One name for all models that write down speech; ``of`` tells their ways apart."""

    task_options = frozenset().union(*(way.task_options for way in _WAYS.values()))

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return any(way.serves(class_name) for way in _WAYS.values())

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        # By the nearest base of transformers: a class of the user's may have any name.
        for base in type(model).__mro__:
            for name, way in _WAYS.items():
                if way.serves(base.__name__):
                    return {**way.describe(model, options), "way": name}
        raise StructureError(
            "The model cannot do this task",
            where=f"task {cls.name!r}, {type(model).__name__}",
            wanted="…ForCTC or WhisperForConditionalGeneration of transformers",
        )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> type[SpeechTask]:
        way = _WAYS.get(str(config.get("way")))
        if way is None:
            raise IntegrityError(
                "The task is described by something else",
                where="task_config, way",
                wanted=" | ".join(_WAYS),
                found=repr(config.get("way")),
                hint=FETCH_AGAIN,
            )
        return way

    @classmethod
    def declared(cls, config: Mapping[str, Any]) -> tuple[Param, ...]:
        return cls.of(config).params

    @classmethod
    def golden(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return cls.of(config).golden(config)
