"""Image processors and feature extractors, as JSON, with the same numbers on every host.

Where torchvision is installed, transformers takes another implementation of an image processor than
elsewhere, which gives other numbers. Here it is always the one that uses Pillow.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_safeflavor.artifact.json_files import read_json, write_json
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.trust import require_harmless
from mlflow_safeflavor.errors import IntegrityError, SafeFlavorError, StructureError
from mlflow_safeflavor.module.bounds import within
from mlflow_safeflavor.module.guarded import guarded
from mlflow_safeflavor.tasks.inputs.processor_bounds import find_excess, require_moderate

__all__ = ["apply", "hears", "load_processor", "requirements_of", "write_processor"]

_CONFIG = "preprocessor_config.json"
_TYPES = ("image_processor_type", "feature_extractor_type")
# Keys of the config about the machine it was loaded on, or about code outside transformers.
_NOT_PORTABLE = ("auto_map", "name_or_path", "processor_class", "_processor_class", "_auto_class")

# Of the range of the numbers, between torchvision's and Pillow's scaling: five steps of 255.
_BACKEND_TOLERANCE = 0.02


def hears(processor: Any) -> bool:
    """Whether it takes sounds; otherwise it takes images."""
    return hasattr(processor, "sampling_rate")


def apply(processor: Any, value: Any, kind: str = "np") -> dict[str, np.ndarray]:
    """Apply a processor to one image or sound: argument → array, without a dimension for rows.

    Args:
        processor: Image processor or feature extractor.
        value: A PIL image in RGB, or float32 samples of shape (samples,) at the processor's own
            rate.
        kind: Kind of its arrays: "np", or "pt", the only one of some processors. Those of
            classifiers give the same numbers in both.

    Raises:
        Exception: Of any kind, as the processor pleases.
    """
    if hears(processor):
        made = processor(value, sampling_rate=processor.sampling_rate, return_tensors=kind)
    else:
        size: Any = getattr(processor, "size", None)
        if hasattr(size, "get"):
            require_moderate(size, *value.size)
        # Given, since transformers would take a height of 1 or 3 for the channels.
        made = processor(
            images=np.array(value), input_data_format="channels_last", return_tensors=kind
        )
    return {name: np.asarray(values)[0] for name, values in made.items()}


def write_processor(processor: Any, folder: str | Path) -> None:
    """Write a processor of transformers as JSON, and prove that it gives the same numbers again.

    Args:
        processor: An image processor or feature extractor; not changed.
        folder: Made if missing.

    Raises:
        StructureError: It is something else, cannot be written as JSON, needs more than one image
            or sound, or what was written gives other numbers.
    """
    folder, name = Path(folder), type(processor).__name__
    base = _transformers_class(processor)
    try:
        config = json.loads(processor.to_json_string())
        config = {
            key: value for key, value in config.items() if key not in (*_NOT_PORTABLE, *_TYPES)
        }
        config[_TYPES[hears(processor)]] = base.__name__.removesuffix("Fast").removesuffix("Pil")
        write_json(folder / _CONFIG, config)
        again = load_processor(folder)
    except (TypeError, ValueError, SafeFlavorError) as error:
        raise StructureError(
            "The processor cannot be written as JSON", where=name, found=error
        ) from error
    # Two scales, so that neither cutting nor enlarging is left out.
    for size in (1, 7):
        probe = _sound(size, processor.sampling_rate) if hears(processor) else _image(size)
        try:
            wanted = apply(processor, probe, "pt")
        except Exception as error:  # some want texts, boxes or several images beside it
            raise StructureError(
                "The processor does not take a single image or sound", where=name, found=error
            ) from error
        _require_same(
            wanted, apply(again, probe, "pt"), name, exact=not _is_torchvision(type(processor))
        )


def load_processor(folder: str | Path, read: Callable[[Path], Any] = read_json) -> Any:
    """Read a processor that ``write_processor`` wrote; runs no code but transformers' own.

    Args:
        folder: Where it was written.
        read: Reads its file.

    Raises:
        IntegrityError: Its file is missing or damaged, or names something else than a class of
            transformers.
        StructureError: The installed transformers cannot build it.
    """
    path = Path(folder) / _CONFIG
    config = read(path)
    name = (
        next((config[key] for key in _TYPES if key in config), None)
        if isinstance(config, dict)
        else None
    )
    if not isinstance(name, str):
        raise IntegrityError(
            "The processor is described by something else", where=path, hint=FETCH_AGAIN
        )
    require_harmless(config, path)
    cls = _class_of(name)
    if cls is None:
        raise IntegrityError(
            "The processor is none of transformers' own",
            where=path,
            wanted="an image processor that uses Pillow, or a feature extractor for sounds",
            found=name,
            hint=FETCH_AGAIN,
        )
    # Before it is built: some make their filters, of the size of n_fft, in the constructor.
    for key, number, most in find_excess(config, _default(cls)):
        raise IntegrityError(
            "The processor makes far too much of one image or sound",
            where=f"{path}, {key}",
            wanted=f"at most {most:,.15g}",
            found=f"{number:,.15g}",
            hint=FETCH_AGAIN,
        )

    def make() -> Any:
        with guarded(folder):
            return cls.from_dict(copy.deepcopy(config))

    try:
        return within(0, make, what="Building the processor", where=str(path))
    except SafeFlavorError:
        raise
    except Exception as error:  # each class has its own ways to fail
        raise StructureError(
            "The processor cannot be built again", where=path, found=error
        ) from error


def _default(cls: type[Any]) -> dict[str, Any]:
    """The config of a processor made without arguments; empty where that fails."""
    try:
        return dict(json.loads(cls().to_json_string()))
    except Exception:  # each class has its own ways to want something
        return {}


def requirements_of(processor: Any) -> list[str]:
    """Distributions that a processor needs beside transformers, which depends on none of them."""
    if not hears(processor):
        return ["pillow"]
    # Files need soundfile. Some extractors compute with torchaudio where it is installed, and with
    # numpy where it is not.
    module = sys.modules[_transformers_class(processor).__module__]
    speaks = getattr(module, "is_speech_available", None)
    return ["soundfile", *(["torchaudio"] if speaks is not None and speaks() else [])]


# Classes.


def _class_of(name: str) -> type[Any] | None:
    """The class of that name that uses Pillow, also beside torchvision; None without one."""
    import transformers

    # transformers 5 marks the one that uses Pillow; 4 marks the other one ("Fast").
    for candidate in (f"{name}Pil", name) if name.isidentifier() else ():
        cls = getattr(transformers, candidate, None)
        if isinstance(cls, type) and _is_processor(cls) and not _is_torchvision(cls):
            return cls
    return None


def _is_processor(cls: type[Any]) -> bool:
    from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
    from transformers.image_processing_base import ImageProcessingMixin

    ours = cls.__module__.partition(".")[0] == "transformers"
    return ours and issubclass(cls, (ImageProcessingMixin, SequenceFeatureExtractor))


def _is_torchvision(cls: type[Any]) -> bool:
    return any(
        base.__name__ in ("TorchvisionBackend", "BaseImageProcessorFast") for base in cls.__mro__
    )


def _transformers_class(processor: Any) -> type[Any]:
    """The class of transformers of a processor, or the first one that its class derives from."""
    for cls in type(processor).__mro__:
        if _is_processor(cls):
            return cls
    raise StructureError(
        "This is no processor that can be saved",
        where="processor",
        wanted="an image processor or feature extractor of transformers",
        found=type(processor).__name__,
        hint="of a processor of several parts pass one: processor.image_processor or "
        "processor.feature_extractor",
    )


# Proof.


def _image(size: int) -> Any:
    """Squares of random colours, which keep their range at any scale, under noise."""
    from PIL import Image

    random = np.random.default_rng(0)
    squares = random.integers(0, 256, (3, 4, 3)).repeat(20 * size, axis=0).repeat(20 * size, axis=1)
    return Image.fromarray(
        (squares + random.normal(0, 10, squares.shape)).clip(0, 255).astype(np.uint8)
    )


def _sound(size: int, rate: int) -> np.ndarray:
    samples: np.ndarray = (
        np.random.default_rng(0).normal(0, 0.1, size * rate // 5).astype(np.float32)
    )
    return samples


def _require_same(
    wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], name: str, *, exact: bool
) -> None:
    for key in sorted(wanted.keys() | found.keys()):
        old, new = wanted.get(key), found.get(key)
        if old is not None and new is not None and old.shape == new.shape:
            difference = np.abs(old.astype(np.float64) - new).max()
            allowed = 0.0 if exact else _BACKEND_TOLERANCE * (old.max() - old.min())
            if difference <= allowed:
                continue
            words = f"a difference of {difference:.3g}, allowed {allowed:.3g}"
        else:
            words = " and ".join(
                "nothing" if value is None else f"shape {list(value.shape)}" for value in (old, new)
            )
        raise StructureError(
            "The processor, read again, gives other numbers than the one being saved",
            where=f"{name}, {key}",
            wanted="the same numbers" if exact else "nearly the same numbers as with torchvision",
            found=words,
            hint="pass one of transformers' own classes; AutoImageProcessor.from_pretrained(…, "
            "use_fast=False) or "
            'backend="pil" gives the one that uses Pillow',
        )
