"""Sounds: read at the rate of a model, and padded together where the model ignores padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.arguments import arguments_of
from mlflow_safeflavor.tasks.features import Features
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.sounds import read_sound, record_sound, to_wav
from mlflow_safeflavor.tasks.processed import ProcessedTask

if TYPE_CHECKING:
    import torch

__all__ = ["ListeningTask", "convolutions_of"]

# Samples, or numbers of a spectrogram, that count as a token for ``max_batch_tokens``: the step of
# Wav2Vec2 and its relatives.
_NUMBERS = 320
_GOLDEN_SECONDS = (0.1, 0.25, 0.15)

# Types of models for which padding under a mask was seen to change nothing, with feature maps
# normalised step by step ("layer"). In others, and in these with "group", the first layer
# normalises over the whole length, padding included, or convolutions see the padding.
_PADDABLE = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")


class ListeningTask(ProcessedTask):
    """A sound in a single column: a file (bytes, base64, ``pathlib.Path``) or samples.

    See ``read_sound``.
    """

    field = "audio"
    fields = ("audio",)
    required = ("audio",)
    hears = True

    @classmethod
    def describe_listening(cls, model: torch.nn.Module) -> dict[str, Any]:
        """Facts of a model for ``ListeningTask``; JSON only.

        Returns:
            ``arguments`` of its forward; ``min_samples`` that it needs for one output; and
            ``pads``, whether rows of different lengths may share a batch.
        """
        config = getattr(model, "config", None)
        by_step = getattr(config, "feat_extract_norm", None) == "layer"
        return {
            "arguments": arguments_of(model),
            "min_samples": _receptive_field(convolutions_of(config)),
            "pads": by_step and getattr(config, "model_type", None) in _PADDABLE,
        }

    @property
    def rate(self) -> int:
        """Samples a second that the model was trained with."""
        return int(self.processor.sampling_rate)

    def golden_rows(self) -> list[Row]:
        """Noise that swells and fades."""
        random = np.random.default_rng(0)
        waves = [
            np.hanning(n) * random.normal(0, 6000, n)
            for n in (int(s * self.rate) for s in _GOLDEN_SECONDS)
        ]
        return [
            {"audio": to_wav(wave.clip(-32768, 32767).astype(np.int16), self.rate)}
            for wave in waves
        ]

    def read(self, value: Any, where: str) -> np.ndarray:
        samples = read_sound(value, self.rate, where, self.caps)
        if len(samples) < self.config["min_samples"]:
            raise InputError(
                "A sound is too short for the model",
                where=where,
                wanted=f"at least {self.config['min_samples']} samples at {self.rate} Hz",
                found=f"{len(samples)}",
            )
        return samples

    def record(self, value: Any, where: str) -> str:
        return record_sound(value, self.rate, where, self.caps)

    def cost(self, features: Features) -> int:
        numbers: int = max(array.size for array in features.values())
        return max(1, numbers // _NUMBERS)

    def groups(self, batch: Sequence[Features]) -> list[list[int]]:
        return [list(range(len(batch)))] if self.config["pads"] else super().groups(batch)

    def collate(self, batch: Sequence[Features]) -> dict[str, np.ndarray]:
        if len({len(features["input_values"]) for features in batch if self.config["pads"]}) < 2:
            return super().collate(batch)
        # A mask even where the processor makes none: without one, padding counts as sound.
        # Both of shape (rows, samples of the longest).
        sounds = [features["input_values"] for features in batch]
        values = np.zeros((len(batch), max(map(len, sounds))), sounds[0].dtype)
        mask = np.zeros(values.shape, np.int64)
        for line, real, sound in zip(values, mask, sounds, strict=True):
            line[: len(sound)], real[: len(sound)] = sound, 1
        return {"input_values": values, "attention_mask": mask}


def convolutions_of(config: Any) -> list[tuple[int, int]]:
    """Kernel and stride of each convolution at the front of a model; none of most models."""
    return [
        (int(kernel), int(stride))
        for kernel, stride in zip(
            getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True
        )
    ]


def _receptive_field(convolutions: Sequence[tuple[int, int]]) -> int:
    """Fewest samples that give one output of the convolutions; 1 without any."""
    # Fewer end in a RuntimeError of the kernel, inside a batch that others share.
    samples = 1
    for kernel, stride in reversed(convolutions):
        samples = (samples - 1) * stride + kernel
    return samples
