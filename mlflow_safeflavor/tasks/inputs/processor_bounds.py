"""Bounds on the arrays that a processor makes of one image or sound, by its config's numbers.

A processor scales every image to its own size, and pads every sound to its own length, so that a
few digits decide over gigabytes: of an image of one pixel, or of no request at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["find_excess", "require_moderate"]

# Of an edge in pixels, a window in samples, and of all numbers that are not named below.
_NUMBER = 8192
# Of one image or tile; the largest default is Donut's, 2^22.
_PIXELS = 2**24
# Pixels of all tiles or patches of an image.
_TILES = 2**26
_BINS = 1024
# Of one sound, filled up; Whisper has 480,000.
_SAMPLES = 2**23
# Values of a spectrogram.
_FRAMES = 2**26

_LARGER = {
    **dict.fromkeys(
        ("sampling_rate", "sample_rate", "fmax", "fmin", "frequency_max", "max_frequency"), 2**20
    ),
    **dict.fromkeys(("n_samples", "nb_max_samples"), _SAMPLES),
    **dict.fromkeys(("max_pixels", "min_pixels"), _PIXELS),
}
_SMALLER = dict.fromkeys(("feature_size", "num_mel_bins", "num_mel_filters", "n_mels"), _BINS)
_SECONDS = ("chunk_length", "max_length_s", "max_audio_clip_s", "default_audio_length")
_WINDOWS = ("n_fft", "fft_window_size", "fft_length", "filter_length", "win_length", "frame_length")
_TILE_COUNTS = ("max_patches", "max_num_patches", "max_image_tiles", "max_slice_nums", "num_crops")


def find_excess(
    config: Mapping[str, Any], default: Mapping[str, Any]
) -> Iterator[tuple[str, float, float]]:
    """Numbers that make too much of one image or sound: name, number, bound.

    Args:
        config: Of the processor.
        default: The class's own config; four times its numbers are never too much.
    """
    usual = dict(_numbers(default))
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        most: float = _SMALLER.get(name, _LARGER.get(name, _NUMBER))
        # Qwen2-VL and its relatives count pixels there, not an edge.
        if name.endswith("_edge") and usual.get(key, 0) > _NUMBER:
            most = _PIXELS
        most = max(most, 4 * abs(usual.get(key, 0)))
        if abs(value) > most:
            yield key, value, most
    yield from _find_products(config, usual)


def _find_products(
    config: Mapping[str, Any], usual: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    counts = {
        key.partition(".")[0]
        for key, value in usual.items()
        if key.endswith("_edge") and value > _NUMBER
    }
    areas = [(key, area) for key, area in _areas(config) if key not in counts]
    for key, area in areas:
        if area > _PIXELS:
            yield f"{key}, in pixels", area, _PIXELS
    patch = (
        _area(config.get("patch_size"))
        if any(key.startswith("patch_size") for key in usual)
        else None
    )
    tile = max((area for key, area in areas if not key.startswith("patch_size")), default=1)
    for name in _TILE_COUNTS:
        count = _number(config.get(name))
        if (pixels := count * (patch or tile)) > _TILES:
            yield f"{name} times pixels", pixels, _TILES
    # An image is scaled by 1 / crop_pct before it is cropped.
    if 0 <= (part := _number(config.get("crop_pct"), 1)) < 0.05:
        yield "1 / crop_pct", 1 / part if part else float("inf"), 20
    rate = _number(config.get("sampling_rate"), 1)
    samples = [_number(config.get(name)) * rate for name in _SECONDS]
    for name, count in zip(_SECONDS, samples, strict=True):
        if count > _SAMPLES:
            yield f"{name} times sampling_rate", count, _SAMPLES
    window = max(_number(config.get(name)) for name in _WINDOWS)
    hop = max(1, _number(config.get("hop_length"), window))
    filled = max(
        [*samples, _number(config.get("n_samples")), _number(config.get("nb_max_samples"))]
    )
    # A spectrogram has a window of samples for each hop: a hop of 1 multiplies a sound by a window.
    if window > 64 * hop or filled / hop * window > _FRAMES:
        yield "windows, each a hop after the other", filled / hop * window, _FRAMES


def require_moderate(size: Mapping[str, Any], width: int, height: int) -> None:
    """Raise ``ValueError`` for an image so narrow that scaling its short side makes it huge."""
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    if (
        short
        and not long
        and short * short * max(width, height) / max(1, min(width, height)) > _PIXELS
    ):
        raise ValueError(
            f"{width} x {height} pixels, scaled until the short side is {short}, are more than "
            f"{_PIXELS:,}"
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _areas(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Areas in pixels: of a dict of height and width, a pair, or one number of such a name."""
    for key, value in config.items():
        pairs = (
            value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        )
        for pair in pairs:
            if (area := _area(pair)) is not None and (
                "size" in key or "resol" in key or "pinpoints" in key
            ):
                yield key, area


def _area(value: Any) -> float | None:
    if isinstance(value, Mapping):
        if {"height", "width"} <= value.keys():
            return _number(value["height"]) * _number(value["width"])
        edges = [
            _number(value[name]) for name in ("shortest_edge", "longest_edge") if name in value
        ]
        return min(edges) ** 2 if edges else None
    if isinstance(value, list):
        return _number(value[0]) * _number(value[1]) if len(value) == 2 else None
    return (
        _number(value) ** 2
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else None
    )


def _number(value: Any, otherwise: float = 0) -> float:
    return (
        abs(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise
    )
