"""Cells → sounds: one channel of float32 samples at the rate a model was trained with."""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.files import content_of, is_file_like

__all__ = ["read_sound", "record_sound", "to_wav"]

_WANTED = (
    "the bytes of a WAV, FLAC, OGG or MP3 file, also in base64 or as pathlib.Path; samples from -1 "
    "to 1 at {rate} Hz, one dimension; or {{'array': samples, 'sampling_rate': rate}}"
)
_RATES = range(1_000, 768_001)
# Of libsndfile's formats; the others are rare, and each is one more parser for strangers' bytes.
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_BEGINNINGS = (b"RIFF", b"fLaC", b"OggS", b"ID3")
# How a frame of MP3 begins: 11 bits of 1, a version, layer 3, with a checksum or without.
_MP3 = (b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2")
_MOST_CHANNELS = 16
# Samples of each channel that are decoded at a time: at most 4 MB.
_BLOCK = 1 << 16
# WAV: codes of PCM and of floating point.
_PCM, _FLOAT = 1, 3


def read_sound(value: Any, rate: int, where: str, caps: Caps) -> np.ndarray:
    """The sound in a cell.

    Args:
        value: A WAV, FLAC, OGG or MP3 file (see ``files.content_of``), whose channels are averaged;
            or floating point samples at ``rate``; or a dict of ``array`` (or
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
        samples, found_rate = _from_file(content_of(value, where), rate, where, caps)
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
    _require_rate(found_rate, rate, where)
    common = math.gcd(found_rate, rate)
    return _resampled(samples, found_rate // common, rate // common)


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
    # Not by libsndfile, which writes the time into files of floating point numbers.
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


def _require_rate(found: int, rate: int, where: str) -> None:
    """Refuse a rate that has too little in common with ``rate`` to be resampled."""
    if found * rate // math.gcd(found, rate) ** 2 > _MOST_PHASES and found != rate:
        raise InputError(
            "A sound has an odd sampling rate",
            where=where,
            wanted=f"{rate} Hz",
            found=f"{found} Hz",
        )


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


def _require_short(samples: int, rate: int, where: str, caps: Caps) -> None:
    caps.require(
        "max_seconds", samples / rate, "A sound is too long", where=where, instead="cut it first"
    )


def _from_file(content: bytes, rate: int, where: str, caps: Caps) -> tuple[np.ndarray, int]:
    """Samples of a file, shape (samples,), its channels averaged, and their rate."""
    # A file of some kB may hold hours of silence: seconds, rate and channels of its header are
    # checked before a sample is decoded, and soundfile reads no further than the header says.
    soundfile = _soundfile()
    try:
        # Before libsndfile sees it, which has a parser for each of many more formats.
        if not content.startswith(_BEGINNINGS) and content[:2] not in _MP3:
            raise ValueError(f"it begins with {content[:12]!r}")
        if content[:4] == b"RIFF" and int.from_bytes(content[4:8], "little") + 8 > len(content):
            raise ValueError("it is cut off")  # libsndfile would read what is there
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.format not in _FORMATS or file.channels > _MOST_CHANNELS:
                raise ValueError(f"{file.format} of {file.channels} channels")
            _require_rate(_rate(file.samplerate, where), rate, where)
            _require_short(file.frames, file.samplerate, where, caps)
            mono = np.concatenate(list(_blocks(file)) or [np.zeros(0, np.float32)])
            return _floats(mono, rate, where), file.samplerate
    except (ValueError, RuntimeError) as error:  # soundfile's own are RuntimeErrors
        raise InputError(
            "A file is not a sound that can be read",
            where=where,
            wanted=f"a whole WAV, FLAC, OGG or MP3 file of at most {_MOST_CHANNELS} channels",
            found=getattr(error, "error_string", error),  # libsndfile's, without an address
            hint="convert it, for example with ffmpeg -i FILE -c:a pcm_s16le sound.wav",
        ) from None


def _blocks(file: Any) -> Iterator[np.ndarray]:
    """Samples of a file, block by block, as one channel; never more than its header says."""
    done = 0
    # Not ``SoundFile.blocks``: of a file that ends early it gives memory that it never wrote.
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        done += len(block)
        yield block[:, 0] if file.channels == 1 else _mean(block)
    if done < file.frames:
        raise ValueError(f"{done} of {file.frames} samples")


def _mean(block: np.ndarray) -> np.ndarray:
    mean: np.ndarray = block.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its library
        raise StructureError(
            "Sounds in files need soundfile",
            found=error,
            hint="pip install 'mlflow-safeflavor[sound]'",
        ) from None
    return soundfile


# Rates.

_WIDTH, _ROLLOFF = 6, 0.99
# Samples in windows at a time, 4 MB: a sample is in as many windows as overlap there.
_WINDOWED = 1_000_000
# Old times new rate without their common divisors, the size of the filter: from 11,025 to 16,000 Hz
# it is 282,240.
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
    # (taps, phases): the output's phases repeat after ``new`` samples, ``old`` of the input.
    times = np.arange(-width, width + old)[:, None] / old - np.arange(new) / new
    times = (times * cutoff).clip(-_WIDTH, _WIDTH)
    # One column for each phase of the new rate.
    kernels = (np.sinc(times) * np.cos(times * math.pi / _WIDTH / 2) ** 2 * (cutoff / old)).astype(
        np.float32
    )
    padded = np.pad(samples, (width, width + old))
    # (steps, taps), a view: windows overlap, as one array they would be several times the sound.
    steps = np.lib.stride_tricks.sliding_window_view(padded, len(kernels))[::old]
    phases: np.ndarray = np.empty((len(steps), new), np.float32)
    together = max(1, _WINDOWED // len(kernels))
    for start in range(0, len(steps), together):
        part = slice(start, start + together)
        np.matmul(np.ascontiguousarray(steps[part]), kernels, out=phases[part])
    return phases.reshape(-1)[: math.ceil(new * len(samples) / old)]  # (steps · phases,), cut
