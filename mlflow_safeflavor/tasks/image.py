"""Base of the tasks that see images: how a cell is read, recorded and weighed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.arguments import arguments_of, named_arguments
from mlflow_safeflavor.tasks.features import Features
from mlflow_safeflavor.tasks.inputs.images import read_image, record_image
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.processed import ProcessedTask

if TYPE_CHECKING:
    import torch

__all__ = ["IMAGE_TOKENS", "ImageTask", "require_sight"]

# Tokens that an image counts for ``max_batch_tokens``: 2 images a forward by default. On a CPU, a
# small ViT and a ResNet-50 were no faster with 4, 8 or 16; a GPU may want more.
IMAGE_TOKENS = 256
_GOLDEN_SIZES = ((48, 64), (40, 40), (90, 32))


class ImageTask(ProcessedTask):
    """Answers to an image: a file (bytes, base64, ``pathlib.Path``), a PIL image or an array.

    See ``read_image``.
    """

    field = "image"
    fields: ClassVar[tuple[str, ...]] = ("image",)
    required = ("image",)

    def golden_rows(self) -> list[Row]:
        """Squares of random colours: small as files, with edges that show how they are scaled."""
        random = np.random.default_rng(0)
        colours = [random.integers(0, 256, (h // 8, w // 8, 3), np.uint8) for h, w in _GOLDEN_SIZES]
        # uint8 of shape (height, width, 3)
        return [{"image": colour.repeat(8, axis=0).repeat(8, axis=1)} for colour in colours]

    def read(self, value: Any, where: str) -> Any:
        return read_image(value, where, self.caps)

    def record(self, value: Any, where: str) -> str:
        return record_image(value, where, self.caps)

    def cost(self, features: Features) -> int:
        return IMAGE_TOKENS


def require_sight(model: torch.nn.Module) -> list[str] | None:
    """Arguments of the model's forward, None for any; ``StructureError`` if it takes no image."""
    takes = arguments_of(model)
    if takes is not None and "pixel_values" not in takes:
        raise StructureError(
            "The model does not see images",
            where=f"{type(model).__name__}.forward",
            wanted="an argument pixel_values",
            found=", ".join(named_arguments(model)),
        )
    return takes
