"""Made-up inputs for any model, from the names of ``forward``'s arguments and config fields."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]

BATCH, LENGTH, CHOICES = 2, 12, 2


def find_inputs(module: torch.nn.Module, most: int = 60) -> tuple[Arrays | None, str]:
    """The first made-up inputs that ``forward`` takes and answers with tensors.

    Else None, and why not.

    The richest come first: text with images or sound, then text alone.
    """
    problem, tried = "", 0
    for arrays in candidates(module):
        for _ in range(3):  # a model may say how many image tokens it wants
            tried += 1
            try:
                with torch.inference_mode():
                    outputs = module(**tensors(arrays, torch.float32))
                if any(True for _ in output_tensors(outputs)):
                    return arrays, ""
                problem = problem or "forward gives no tensors"
                break
            except TimeoutError:
                raise
            except Exception as error:  # every model has its own way to refuse
                problem = problem or f"{type(error).__name__}: {error}".splitlines()[0][:200]
                again = _with_tokens(module, arrays, str(error))
                if again is None:
                    break
                arrays = again
        if tried >= most:
            break
    return None, problem or "no main input that is known here"


def tensors(arrays: Arrays, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As the raw task makes them: floating point in the serving dtype."""
    made = {name: torch.tensor(value) for name, value in arrays.items()}
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in made.items()
    }


def output_tensors(
    value: Any, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model's outputs with its path.

    Nested tuples and dicts, caches, plain objects.
    """
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if (
        value is None
        or isinstance(value, (str, int, float, bool, torch.nn.Module, type))
        or id(value) in seen
    ):
        return
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        parts = vars(value).items()
    for key, item in parts:
        yield from output_tensors(item, f"{path}.{key}", seen)


# --- what to try ----------------------------------------------------------------------------------


def candidates(module: torch.nn.Module) -> Iterator[Arrays]:
    """Inputs to try, richest first."""
    parameters = inspect.signature(module.forward).parameters
    names = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    required = {name for name in names if parameters[name].default is inspect.Parameter.empty}
    make = _Maker(module)
    choices = {name: made for name in names if (made := make.choices(name))}
    main = getattr(module, "main_input_name", "input_ids")
    text = {"input_ids", "attention_mask", "decoder_input_ids"}
    grids = {"image_grid_thw", "grid_thw", "mm_token_type_ids"}
    if "input_ids" not in names:
        # it would be as long as the sound, or the number of patches
        choices.pop("attention_mask", None)
    rich, plain = set(choices), set(choices) - grids
    seen: list[list[str]] = []
    poorer = ({main} | required | text, {main} | required, required, text)
    for wanted in (plain, rich, plain - {"attention_mask"}, *poorer):
        chosen = [name for name in names if name in wanted and name in choices]
        if chosen and chosen not in seen:
            seen.append(chosen)
            for combination in itertools.islice(
                itertools.product(*(choices[name] for name in chosen)), 8
            ):
                yield dict(zip(chosen, combination, strict=True))


def fields(config: Any, *names: str) -> Iterator[Any]:
    """Values of the fields of these names, in a config and its parts, outer first."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            yield value
    for part in (
        list(vars(config).values()) if config is not None and hasattr(config, "__dict__") else ()
    ):
        if hasattr(part, "to_json_string"):
            yield from fields(part, *names)


def _integer(config: Any, default: int, *names: str) -> int:
    for value in fields(config, *names):
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if type(value) is int and value > 0:
            return value
    return default


class _Maker:
    """Arrays for one model, the same ones every time."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.config = getattr(module, "config", None)
        self.name = type(module).__name__
        self.random = np.random.default_rng(0)
        self.size = _integer(self.config, 32, "image_size", "img_size", "input_image_size")
        self.channels = _integer(self.config, 3, "num_channels", "in_channels")
        self.patch = _integer(self.config, 8, "patch_size")
        self.mels = _integer(
            self.config, 80, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels"
        )

    def choices(self, name: str) -> Sequence[np.ndarray]:
        """Arrays to try for an argument; none for an argument that is left out."""
        make = getattr(self, f"_{name}", None)
        return make() if make is not None else ()

    def _floats(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, dtype=np.float32) * np.float32(0.5)

    def _ids(self, *shape: int) -> np.ndarray:
        most = min(_integer(self.config, 100, "vocab_size"), 100)
        return self.random.integers(min(10, most - 1), most, shape)

    def _text_shape(self) -> tuple[int, ...]:
        return (BATCH, CHOICES, LENGTH) if "MultipleChoice" in self.name else (BATCH, LENGTH)

    def _input_ids(self) -> Sequence[np.ndarray]:
        ids = self._ids(*self._text_shape())
        eos = _integer(self.config, 2, "eos_token_id")
        # some read their sentence from the end token
        if "Classification" in self.name and eos < 160:
            ids[..., -1] = eos
        codebooks = _integer(
            self.config, 4, "num_codebooks", "n_codes_total", "audio_num_codebooks"
        )
        return ids, self._ids(BATCH, codebooks, LENGTH), self._ids(BATCH, LENGTH, codebooks)

    def _attention_mask(self) -> Sequence[np.ndarray]:
        return (np.ones(self._text_shape(), np.int64),)

    def _decoder_input_ids(self) -> Sequence[np.ndarray]:
        return (self._ids(BATCH, LENGTH),)

    def _bbox(self) -> Sequence[np.ndarray]:
        return (np.sort(self.random.integers(0, 60, (BATCH, LENGTH, 4)), axis=-1),)

    def _pixel_values(self) -> Sequence[np.ndarray]:
        size, channels, patch = self.size, self.channels, self.patch
        frames = _integer(self.config, 2, "num_frames", "temporal_patch_size", "frames_per_clip")
        flat = channels * patch * patch
        return (
            self._floats(BATCH, channels, size, size),
            self._floats(BATCH, frames, channels, size, size),
            self._floats(32, flat * _integer(self.config, 1, "temporal_patch_size")),
            self._floats(BATCH, 1, channels, size, size),
            self._floats(BATCH, 16, flat),
            self._floats(BATCH, channels, 224, 224),
            self._floats(BATCH, 1, 2, channels, size, size),
        )

    def _pixel_values_videos(self) -> Sequence[np.ndarray]:
        frames = _integer(self.config, 2, "num_frames", "frames_per_clip")
        return (
            (self._floats(BATCH, frames, self.channels, self.size, self.size),)
            if "Video" in self.name
            else ()
        )

    _pixel_values_video = _pixel_values_videos

    def _image_grid_thw(self) -> Sequence[np.ndarray]:
        return (np.array([[1, 4, 4]] * BATCH),)

    _grid_thw = _image_grid_thw

    def _mm_token_type_ids(self) -> Sequence[np.ndarray]:
        return (np.zeros((BATCH, LENGTH), np.int64),)

    def _hidden_states(self) -> Sequence[np.ndarray]:
        flat = self.channels * self.patch**2 * _integer(self.config, 1, "temporal_patch_size")
        width = _integer(self.config, 64, "hidden_size", "d_model")
        return (
            self._floats(32, flat),
            self._floats(BATCH, LENGTH, width),
            self._floats(BATCH, width, LENGTH),
        )

    def _input_values(self) -> Sequence[np.ndarray]:
        length = _integer(self.config, 0, "max_length") or 128
        return (
            self._floats(BATCH, 4000),
            self._floats(BATCH, 1, 4000),
            self._floats(BATCH, length, self.mels),
            self._floats(BATCH, 64, self.mels),
            self._floats(BATCH, 2, 4000),
            self._ids(BATCH, LENGTH),
        )

    def _input_features(self) -> Sequence[np.ndarray]:
        frames = 2 * _integer(self.config, 32, "max_source_positions")
        width = _integer(self.config, 64, "hidden_size")
        return (
            self._floats(BATCH, self.mels, frames),
            self._floats(BATCH, frames, self.mels),
            self._floats(BATCH, 1, 1024, 64),
            self._floats(BATCH, 1, self.size, self.mels),
            self._floats(BATCH, 64, 2 * self.mels),
            self._floats(BATCH, 64, width),
        )

    def _audio_values(self) -> Sequence[np.ndarray]:
        return (
            self._floats(BATCH, 1, 4000),
            self._floats(BATCH, 4000),
            self._floats(BATCH, 128, 128),
        )

    def _speech(self) -> Sequence[np.ndarray]:
        return (self._floats(BATCH, 4000),)

    def _spectrogram(self) -> Sequence[np.ndarray]:
        mels = _integer(self.config, 80, "model_in_dim", "num_mel_bins", "upsample_initial_channel")
        return (self._floats(BATCH, 20, mels),)

    def _audio_codes(self) -> Sequence[np.ndarray]:
        books = _integer(self.config, 4, "num_quantizers", "n_codebooks", "num_codebooks")
        return self._ids(BATCH, books, LENGTH) % 16, self._ids(1, BATCH, books, LENGTH) % 16

    def _visual_feats(self) -> Sequence[np.ndarray]:
        return (self._floats(BATCH, 5, _integer(self.config, 64, "visual_feat_dim")),)

    def _visual_pos(self) -> Sequence[np.ndarray]:
        return (np.abs(self._floats(BATCH, 5, 4)) % 1,)

    def _task_inputs(self) -> Sequence[np.ndarray]:
        return (self._ids(BATCH, _integer(self.config, 77, "task_seq_len")),)

    def _qformer_input_ids(self) -> Sequence[np.ndarray]:
        return (self._ids(BATCH, LENGTH),)

    def _entity_ids(self) -> Sequence[np.ndarray]:
        return (self._ids(BATCH, 2) % 20,) if "Entity" in self.name else ()

    def _entity_position_ids(self) -> Sequence[np.ndarray]:
        return (self.random.integers(0, LENGTH, (BATCH, 2, 6)),) if "Entity" in self.name else ()

    def _entity_attention_mask(self) -> Sequence[np.ndarray]:
        return (np.ones((BATCH, 2), np.int64),) if "Entity" in self.name else ()

    def _query_embeds(self) -> Sequence[np.ndarray]:
        return (self._floats(BATCH, 4, _integer(self.config, 64, "hidden_size")),)

    def _inputs(self) -> Sequence[np.ndarray]:
        return (
            self._ids(BATCH, _integer(self.config, LENGTH, "max_position_embeddings")),
            self._floats(BATCH, LENGTH, _integer(self.config, 64, "d_model")),
            self._floats(BATCH, 3, self.size, self.size),
            self._floats(BATCH, 2, 27, *[_integer(self.config, 16, "train_size")] * 2),
        )

    def _prompt_pixel_values(self) -> Sequence[np.ndarray]:
        return (self._floats(BATCH, self.channels, self.size, self.size),)

    _prompt_masks = _prompt_pixel_values


# --- image and audio tokens -----------------------------------------------------------------------

_COUNTS = re.compile(
    r"tokens?:?\s*(?:torch\.Size\(\[)?(\d+)[^\d]*features?:?\s*(?:torch\.Size\(\[)?(\d+)", re.I
)


def _with_tokens(module: torch.nn.Module, arrays: Arrays, message: str) -> Arrays | None:
    """The same text with as many image tokens as the model says it has image features."""
    found = _COUNTS.search(message)
    if found is None or np.ndim(arrays.get("input_ids")) != 2 or int(found[1]) == int(found[2]):
        return None
    what = (
        "audio"
        if "audio" in message.lower()
        else "video"
        if "video" in message.lower()
        else "image"
    )
    token = next(
        (
            t
            for t in fields(module.config, f"{what}_token_id", f"{what}_token_index")
            if type(t) is int
        ),
        None,
    )
    count, rows = int(found[2]), len(arrays["input_ids"])
    if token is None or count % rows or count > 4096:
        return None
    ids = arrays["input_ids"]
    block = np.full((rows, count // rows), token, ids.dtype)
    ids = np.concatenate([ids[:, :2], block, ids[:, 2:]], axis=1)
    beside = {
        "attention_mask": np.ones_like(ids),
        "mm_token_type_ids": (ids == token).astype(np.int64),
    }
    return (
        arrays
        | {"input_ids": ids}
        | {name: value for name, value in beside.items() if name in arrays}
    )
