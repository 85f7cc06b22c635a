"""Images → one embedding each, or one for each token, as transformers' pipeline of that name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.mlflow_compat import Array, answer_of
from mlflow_safeflavor.module.pooling import POOLINGS, pool
from mlflow_safeflavor.tasks.feature_extraction import NORMALIZE
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.image import ImageTask, require_sight
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.outputs import normalized, pick, require_finite
from mlflow_safeflavor.tasks.params import Param

if TYPE_CHECKING:
    import torch

__all__ = ["ImageFeatureExtraction"]

_POOL = Param("pool", "boolean", default=True, wanted="true or false")
# Outputs that are one vector an image: of a projection to the space of texts, and of a pooler.
_VECTORS = ("image_embeds", "pooler_output")
# Poolings for which it does not matter where a token is; a map has no first place.
_ANYWHERE = ("mean", "max", "mean_sqrt_len")


class ImageFeatureExtraction(ImageTask):
    """One vector an image, or with ``pool=False`` one for each token of the last hidden state.

    Option, fixed at save through ``model_config``: ``pooling``, "model" or names in
    ``embedding.POOLINGS``, or a list of these, side by side. "model", the default, is what the
    model itself makes of an image: ``image_embeds``, else ``pooler_output``, else the mean.

    ``pool=False`` gives what transformers' pipeline gives by default. The places of a map (of a
    convolutional model) are its tokens, line by line.

    Answers: ``embedding``, a list of floats; of such lists with ``pool=False``.
    """

    name = "image-feature-extraction"
    params = (_POOL, NORMALIZE)
    forward_params = frozenset({_POOL.name})
    task_options = frozenset({"pooling"})
    answer = None  # follows from the saved default of ``pool``: see ``signature``

    @classmethod
    def serves(cls, class_name: str) -> bool:
        # Bare models of images and of texts have like names: ``infer_task`` tells them.
        return class_name.endswith("VisionModelWithProjection")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        takes = require_sight(model)
        if takes is not None and "input_ids" in takes:
            raise StructureError(
                "The model reads a text beside each image",
                where=f"{type(model).__name__}.forward",
                wanted="a model that takes an image alone",
                hint="save the part that sees, for example model.vision_model or "
                "CLIPVisionModelWithProjection",
            )
        given = options.get("pooling", "model")
        kinds = [given] if isinstance(given, str) else given
        if not (
            isinstance(kinds, list) and kinds and all(k in ("model", *POOLINGS) for k in kinds)
        ):
            raise InputError(
                "An option of image-feature-extraction is not allowed",
                where="model_config, 'pooling'",
                wanted=f"of model | {' | '.join(POOLINGS)}",
                found=repr(given),
            )
        return {"arguments": takes, "pooling": kinds}

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        signature = super().signature(example, result)
        vector = Array(DataType.double)
        pooled = self.check_params(None)[_POOL.name]
        signature.outputs = answer_of({"embedding": vector if pooled else Array(vector)})
        return signature

    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        rows = len(part)
        if not params[_POOL.name]:
            return [{"embedding": tokens} for tokens in _tokens(outputs, rows)]
        found = [self._pooled(kind, outputs, rows) for kind in self.config["pooling"]]
        return [{"embedding": np.concatenate(vectors)} for vectors in zip(*found, strict=True)]

    def _pooled(
        self, kind: str, outputs: Mapping[str, np.ndarray], rows: int
    ) -> Sequence[np.ndarray]:
        """A vector for each row, shape (size,)."""
        own = next((name for name in _VECTORS if name in outputs), None)
        if kind == "model" and own is not None:
            return [*outputs[own].reshape(rows, -1)]  # a map of one place, of some
        kind = "mean" if kind == "model" else kind
        return [
            pool(tokens, np.ones(len(tokens), bool), [kind])
            for tokens in _tokens(outputs, rows, maps=kind in _ANYWHERE)
        ]

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, output in enumerate(outputs, first):
            found = output["embedding"]
            require_finite([found], i)
            if params[NORMALIZE.name]:
                vectors = found.reshape(-1, found.shape[-1])
                found = np.stack([normalized(v) for v in vectors]).reshape(found.shape)
            yield {"embedding": found.tolist()}


def _tokens(outputs: Mapping[str, np.ndarray], rows: int, *, maps: bool = True) -> np.ndarray:
    """The last hidden state, shape (rows, tokens, size)."""
    hidden = outputs.get("last_hidden_state")
    if maps and hidden is not None and hidden.ndim == 4:
        return np.moveaxis(hidden.reshape(*hidden.shape[:2], -1), 1, 2)  # (rows, places, channels)
    return pick(outputs, "last_hidden_state", (rows, None, None))
