"""Cells → images: decoded once, upright, in RGB, and refused before they can hurt."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.files import content_of, is_file_like

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_RATIO", "read_image", "record_image"]

# Longer to shorter side: processors scale the shorter side to some hundred pixels, and the longer
# one with it.
MAX_RATIO = 50

# Other formats are rare, and for some (EPS) Pillow runs another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_WANTED = (
    "an image file as bytes or base64, a pathlib.Path, a PIL image, or a uint8 array of shape (H, "
    "W, 3) or (H, W)"
)


def read_image(value: Any, where: str, caps: Caps) -> Image:
    """The image in a cell, upright by its EXIF orientation, in RGB, as transformers' pipelines.

    Args:
        value: A file (see ``files.content_of``), a PIL image, or whole numbers from 0 to 255, shape
            (H, W, 3) or (H, W).
        where: Row and column, for messages.
        caps: With the most pixels; a file of a few kB can claim to hold any number.

    Raises:
        InputError: It is none of these, damaged, or too large.
    """
    pil, ops = _pillow()
    if isinstance(value, pil.Image):
        image = value
    elif is_file_like(value):
        image = _open(content_of(value, where), where)
    else:
        image = pil.fromarray(_pixels(value, where))
    # By the header, before a pixel is decoded: a file of some kB can hold a billion of them.
    _require_size(image, where, caps)
    try:
        # Upright first: what a processor gets is an array, without EXIF.
        return ops.exif_transpose(image).convert("RGB")  # type: ignore[no-any-return]
    except Exception as error:  # each decoder has its own ways to fail
        raise _unreadable(where, error) from None


def record_image(value: Any, where: str, caps: Caps) -> str:
    """A cell as base64 text of the file itself or a PNG; ``read_image`` gives the same pixels."""
    if is_file_like(value):
        content = content_of(value, where)
    else:
        file = io.BytesIO()
        read_image(value, where, caps).save(file, "PNG")  # which loses no pixel
        content = file.getvalue()
    return base64.b64encode(content).decode()


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise StructureError(
            "Images need Pillow", found=error, hint="pip install 'mlflow-safeflavor[image]'"
        ) from None
    return Image, ImageOps


def _open(content: bytes, where: str) -> Any:
    pil, _ = _pillow()
    try:
        return pil.open(io.BytesIO(content), formats=_FORMATS)  # reads the header only
    except Exception as error:  # each decoder has its own ways to fail
        # Pillow's message names the file object, with its address in memory.
        raise _unreadable(where, str(error).partition("<_io")[0] or error) from None


def _pixels(value: Any, where: str) -> np.ndarray:
    try:
        array: np.ndarray = np.asarray(value)
        # Arrays of other integers may be of 16 bits; the lists of JSON have no type.
        whole = array.dtype == np.uint8 or isinstance(value, (list, tuple))
        shaped = array.ndim in (2, 3) and array.size > 0 and array.shape[2:] in ((), (3,))
        fits = (
            array.dtype.kind in "iu"
            and whole
            and shaped
            and array.min() >= 0
            and array.max() <= 255
        )
        found = (
            f"{array.dtype} array of shape {array.shape}"
            if array.dtype.kind in "iufb"
            else type(value).__name__
        )
    except (ValueError, TypeError, OverflowError):
        fits, found = False, type(value).__name__
    if not fits:
        raise InputError("A value is not an image", where=where, wanted=_WANTED, found=found)
    return array.astype(np.uint8)  # (height, width, 3) or (height, width)


def _require_size(image: Image, where: str, caps: Caps) -> None:
    width, height = image.size
    caps.require(
        "max_pixels",
        width * height,
        "An image is too large",
        where=where,
        instead="scale or cut it first",
    )
    if not 0 < max(width, height) <= MAX_RATIO * min(width, height):
        raise InputError(
            "An image is empty, or too long and narrow",
            where=where,
            wanted=f"one side at most {MAX_RATIO} times the other",
            found=f"{width} × {height}",
            hint="scale or cut it first",
        )


def _unreadable(where: str, error: object) -> InputError:
    return InputError(
        "A file is not an image that can be read",
        where=where,
        wanted=f"a whole file of one of these formats: {', '.join(_FORMATS)}",
        found=error,
        hint=f"pass {_WANTED}; over HTTP, base64 without a data: prefix",
    )
