"""Cells → sounds: one channel of float32 samples at the rate a model was trained with."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.files import content_of, is_file_like

__all__ = ["read_sound", "record_sound", "to_wav"]

_WANTED = (
    "the bytes of a WAV file, also in base64 or as pathlib.Path; samples from -1 to 1 at {rate} "
    "Hz, one dimension; or {{'array': samples, 'sampling_rate': rate}}"
)
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_RATES = range(1_000, 768_001)
_MOST_CHUNKS = 1000


def read_sound(value: Any, rate: int, where: str, caps: Caps) -> np.ndarray:
    """The sound in a cell.

    Args:
        value: A WAV file (see ``files.content_of``) with whole or floating point samples, whose
            channels are averaged; or floating point samples at ``rate``; or a dict of ``array`` (or
            ``raw``) and ``sampling_rate``, as datasets and pipelines have it.
        rate: Samples a second that the model was trained with; what has another rate is resampled.
        where: Row and column, for messages.
        caps: With the most seconds.

    Returns:
        Samples, float32 of shape (samples,), at least one.

    Raises:
        InputError: It is none of these, damaged, empty or too long.
    """
    if is_file_like(value):
        samples, found_rate = _from_wav(content_of(value, where), where, caps)
    elif isinstance(value, Mapping) and "sampling_rate" in value:
        samples = _floats(value.get("array", value.get("raw")), rate, where)
        found_rate = _rate(value["sampling_rate"], where)
    else:
        samples, found_rate = _floats(value, rate, where), rate
    if not len(samples):
        raise InputError(
            "A sound is empty", where=where, wanted="more than 0 seconds", found="no samples"
        )
    _require_short(len(samples), found_rate, where, caps)
    if found_rate == rate:
        return samples
    old, new = found_rate // math.gcd(found_rate, rate), rate // math.gcd(found_rate, rate)
    if old * new > _MOST_PHASES:
        raise InputError(
            "A sound has an odd sampling rate",
            where=where,
            wanted=f"{rate} Hz",
            found=f"{found_rate} Hz",
        )
    return _resampled(samples, old, new)


def record_sound(value: Any, rate: int, where: str, caps: Caps) -> str:
    """A cell as base64 text from which ``read_sound`` reads the same samples.

    The file itself, else a WAV file.
    """
    content = (
        content_of(value, where)
        if is_file_like(value)
        else to_wav(read_sound(value, rate, where, caps), rate)
    )
    return base64.b64encode(content).decode()


def to_wav(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file of one channel: float32 samples as they are, int16 samples as PCM."""
    size = samples.itemsize
    kind = _FLOAT if samples.dtype.kind == "f" else _PCM
    data = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    head = struct.pack(
        "<4sI4s4sIHHIIHH",
        b"RIFF",
        36 + len(data),
        b"WAVE",
        b"fmt ",
        16,
        kind,
        1,
        rate,
        rate * size,
        size,
        8 * size,
    )
    return head + struct.pack("<4sI", b"data", len(data)) + data


def _rate(value: Any, where: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or int(value) not in _RATES
    ):
        raise InputError(
            "Not a sampling rate",
            where=where,
            wanted=f"a whole number from {_RATES[0]} to {_RATES[-1]}",
            found=repr(value),
        )
    return int(value)


def _floats(value: Any, rate: int, where: str) -> np.ndarray:
    wanted = _WANTED.format(rate=rate)
    try:
        array: np.ndarray = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(
            "A value is not a sound", where=where, wanted=wanted, found=error
        ) from None
    # A list of whole numbers is what JSON makes of silence; an array of them is PCM, and 32767 is
    # not 1.
    numbers = array.dtype.kind == "f" or (
        array.dtype.kind in "iu" and isinstance(value, (list, tuple))
    )
    if array.ndim != 1 or not (numbers or array.size == 0):
        found = (
            f"{array.dtype} array of shape {array.shape}"
            if array.dtype.kind in "iufb"
            else type(value).__name__
        )
        hint = "divide whole numbers by their range, 32768 for int16; average channels"
        raise InputError(
            "A value is not a sound", where=where, wanted=wanted, found=found, hint=hint
        )
    with np.errstate(over="ignore"):
        samples: np.ndarray = array.astype(np.float32)
    if not np.isfinite(samples).all():
        raise InputError(
            "A sound holds something that is no number",
            where=where,
            wanted=wanted,
            found="NaN or inf",
        )
    return samples


# WAV. Not the standard library's module: what it reads depends on the release of Python.


def _require_short(samples: int, rate: int, where: str, caps: Caps) -> None:
    caps.require(
        "max_seconds", samples / rate, "A sound is too long", where=where, instead="cut it first"
    )


def _from_wav(content: bytes, where: str, caps: Caps) -> tuple[np.ndarray, int]:
    """Samples of shape (samples,) and their rate; see ``_decoded``."""
    try:
        if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
            raise ValueError(f"it begins with {content[:12]!r}")
        chunks = dict(_chunks(content))
        kind, channels, rate, _, align, bits = struct.unpack("<HHIIHH", chunks[b"fmt "][:16])
        if kind == _EXTENSIBLE:
            (kind,) = struct.unpack("<H", chunks[b"fmt "][24:26])
        if not channels or align != channels * bits // 8 or len(chunks[b"data"]) % align:
            raise ValueError(f"{len(chunks[b'data'])} bytes of {channels} channels of {bits} bits")
        _require_short(len(chunks[b"data"]) // align, _rate(rate, where), where, caps)
        samples: np.ndarray = _decoded(chunks[b"data"], kind, bits).reshape(-1, channels)
    except (ValueError, KeyError, struct.error) as error:
        raise InputError(
            "A file is not a WAV file that can be read",
            where=where,
            wanted="a whole WAV file, PCM of 8, 16, 24 or 32 bits or floating point of 32 or 64 "
            "bits",
            found=f"no chunk {error}" if isinstance(error, KeyError) else error,
            hint="convert it, for example with ffmpeg -i FILE -c:a pcm_s16le sound.wav",
        ) from None
    mono: np.ndarray = (
        samples[:, 0]
        if channels == 1
        else samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    )
    return _floats(mono, rate, where), rate


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 12
    for _ in range(_MOST_CHUNKS):
        if start + 8 > len(content):
            return
        name, size = struct.unpack("<4sI", content[start : start + 8])
        chunk = content[start + 8 : start + 8 + size]
        if len(chunk) < size:
            raise ValueError(f"{len(chunk)} of {size} bytes of {name!r}")
        yield name, chunk
        start += 8 + size + size % 2


def _decoded(data: bytes, kind: int, bits: int) -> np.ndarray:
    """Samples from -1 to 1 as float32, by the scale of ffmpeg: the lowest whole number is -1."""
    if kind == _FLOAT and bits in (32, 64):
        samples: np.ndarray = np.frombuffer(data, f"<f{bits // 8}")
    elif kind != _PCM or bits not in (8, 16, 24, 32):
        raise ValueError(f"format {kind} of {bits} bits")
    elif bits == 8:  # the only unsigned one
        samples = (np.frombuffer(data, np.uint8) - np.float32(128)) / np.float32(128)
    elif bits == 24:  # as the upper bytes of 32 bits
        padded: np.ndarray = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = padded.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    else:
        samples = np.frombuffer(data, f"<i{bits // 8}").astype(np.float32) / np.float32(
            2 ** (bits - 1)
        )
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
        return samples.astype(np.float32, copy=False)


# Rates.

_WIDTH, _ROLLOFF = 6, 0.99
# Samples that are laid out in windows at a time, each in as many as it is in: 4 MB.
_WINDOWED = 1_000_000
# Old times new rate without their common divisors: the size of the filter.
#
# From 11,025 to 16,000 Hz it is 282,240.
_MOST_PHASES = 300_000


def _resampled(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """Windowed sinc interpolation, the filter of torchaudio and so of transformers' pipelines.

    Args:
        samples: Shape (samples,).
        old: Their rate, divided by what it has in common with ``new``.
        new: The wanted rate, likewise.
    """
    cutoff = min(old, new) * _ROLLOFF
    width = math.ceil(_WIDTH * old / cutoff)
    times = np.arange(-width, width + old)[:, None] / old - np.arange(new) / new
    times = (times * cutoff).clip(-_WIDTH, _WIDTH)
    # One column for each phase of the new rate.
    kernels = (np.sinc(times) * np.cos(times * math.pi / _WIDTH / 2) ** 2 * (cutoff / old)).astype(
        np.float32
    )
    padded = np.pad(samples, (width, width + old))
    steps = np.lib.stride_tricks.sliding_window_view(padded, len(kernels))[::old]
    phases: np.ndarray = np.empty((len(steps), new), np.float32)
    together = max(1, _WINDOWED // len(kernels))
    for start in range(0, len(steps), together):
        part = slice(start, start + together)
        np.matmul(np.ascontiguousarray(steps[part]), kernels, out=phases[part])
    return phases.reshape(-1)[: math.ceil(new * len(samples) / old)]
