"""Report of a load: its checks, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LoadReport"]


@dataclass(frozen=True)
class LoadReport:
    """Written by the load story when all is done; ``LoadedModel.report``.

    Attributes:
        files: Files compared with the manifest.
        hashed_bytes: Bytes whose SHA-256 was compared, now or when this host last did; 0 unless
            ``verify="full"``.
        weights: What they are mapped from: "memory", "copy" (private, on this host) or "file" (the
            artifact's, looked at before each forward).
        tensors: Parameters, buffers and plain attributes compared with the inventory.
        alias_groups: Distinct data they look at.
        weight_bytes: Bytes of that data.
        tolerated: Edits of the artifact that change no answer, and junk in it, in words.
        environment: Differences from the recorded environment, in words.
        device: Where the model is.
        engine: What answers: "onnx", "openvino" or "module".
        golden_rows: Recorded rows answered again, now or when this host last did; 0 if
            ``verify="off"``.
        answered_now: How many of them by this load: the first alone where another process of this
            host has answered all.
        max_difference: Largest absolute difference of a raw output from its recording.
        bit_identical: Whether all raw outputs equal their recording bit for bit.
        seconds: Step → wall time in seconds.
    """

    files: int = 0
    hashed_bytes: int = 0
    weights: str = ""
    tensors: int = 0
    alias_groups: int = 0
    weight_bytes: int = 0
    tolerated: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    device: str = "cpu"
    engine: str = "module"
    golden_rows: int = 0
    answered_now: int = 0
    max_difference: float = 0.0
    bit_identical: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        exact = "bit-identical" if self.bit_identical else f"within {self.max_difference:.1e}"
        known = self.answered_now < self.golden_rows
        told = f" ({self.answered_now} now, all by another process here)" if known else ""
        replayed = f"{self.golden_rows} golden rows {exact}{told}"
        return (
            f"{self.tensors} tensors ({self.weight_bytes / 1e6:.1f} MB) as saved, mapped from "
            f"{self.weights}, "
            f"{self.files} files ({self.hashed_bytes / 1e6:.1f} MB hashed), "
            f"{replayed if self.golden_rows else 'no golden rows replayed'}, "
            f"{f'{len(self.tolerated)} edits tolerated, ' if self.tolerated else ''}"
            f"{len(self.environment)} differences of environment, on {self.device}, "
            f"{self.engine}, {sum(self.seconds.values()):.2f} s"
        )
