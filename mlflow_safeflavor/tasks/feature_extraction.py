"""Texts → one embedding each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.mlflow_compat import Array, answer_of
from mlflow_safeflavor.module.pooling import POOLINGS, pool
from mlflow_safeflavor.tasks.cells import from_json, to_json
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_texts
from mlflow_safeflavor.tasks.outputs import normalized, pick, require_finite
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.quantization import PRECISIONS, SCALED, quantized
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION

if TYPE_CHECKING:
    import torch

__all__ = ["NORMALIZE", "FeatureExtraction"]

# Classes whose names end in "Model" as well, and that have a head or a decoder.
_HEADS = re.compile(r"(LMHead|DoubleHeads|PreTrained|EncoderDecoder|MT)Model$")
# Characters of a prompt that each row of a table may have, beyond ``max_characters`` in all.
_PROMPTED = 1000
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_USUAL = {
    "pooling": "mean",
    "normalize": False,
    "prompts": {},
    "include_prompt": True,
    "similarity": None,
    "calibration": [],
}
# Params that change what the calibration texts' ranges are about.
_CALIBRATED = ("truncate_dim", "normalize_embeddings")

_TRUNCATE_DIM = Param(
    "truncate_dim",
    "long",
    default=0,
    wanted="how many numbers of an embedding to keep, or 0 for all",
    allows=lambda value: value >= 0,
    none_is=0,
)
NORMALIZE = Param("normalize_embeddings", "boolean", default=False, wanted="true or false")
_PROMPT = Param("prompt", "string", default="", wanted="a text to put in front", none_is="")
_PRECISION = Param("precision", "string", "float32", wanted="", none_is="float32")
# Most prompts that golden rows have.
_PROMPTS_RECORDED = 4
# Texts that calibrate in one forward.
_AT_ONCE = 32


class FeatureExtraction(TextTask):
    """One vector a text, pooled from the last hidden state, as ``SentenceTransformer.encode``.

    Options, fixed at save through ``model_config``, or by what a model of sentence-transformers
    says: ``pooling``, a name in ``embedding.POOLINGS``, by default "mean" over real tokens, or a
    list of them, side by side; ``normalize``, whether to scale to length 1 (default False);
    ``prompts``, name → text to put in front; ``include_prompt``, whether the prompt's tokens are
    pooled, too (default True); ``similarity``, what embeddings are compared with, only noted;
    ``calibration``, texts whose embeddings tell the range of each number, for ``precision``. Not
    the texts are stored, but the ranges.

    Params: ``prompt``, and ``prompt_name`` for models with prompts; ``truncate_dim``, and
    ``normalize_embeddings``, to scale to length 1 after that; ``precision``, see ``quantization``.

    Answers: ``embedding``, a list of floats, by default as many as the model's hidden size; of
    whole numbers where ``precision`` says so.
    """

    name = "feature-extraction"
    params: ClassVar[tuple[Param, ...]] = (
        _PROMPT,
        _TRUNCATE_DIM,
        NORMALIZE,
        _PRECISION,
        MAX_LENGTH,
        TRUNCATION,
    )
    task_options = frozenset(
        ("pooling", "normalize", "prompts", "include_prompt", "similarity", "calibration")
    )
    answer = answer_of({"embedding": Array(DataType.double)})

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("Model") and not _HEADS.search(class_name)

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        from mlflow_safeflavor.module.embedding import Embedder

        tokens = model.transformer if isinstance(model, Embedder) else model
        # Not by the config alone: an encoder that was taken out of such a model keeps it.
        both = any(name.rpartition(".")[2] == "decoder" for name, _ in tokens.named_modules())
        if both and getattr(getattr(tokens, "config", None), "is_encoder_decoder", False):
            raise StructureError(
                "The last hidden state of an encoder-decoder model is its decoder's, not that of "
                "the text",
                where=type(tokens).__name__,
                wanted="an encoder",
                hint="save the encoder alone, for example T5EncoderModel or model.get_encoder()",
            )
        cls.require_known(options)
        chosen = {**_USUAL, **options}
        if isinstance(chosen["pooling"], str):
            chosen["pooling"] = [chosen["pooling"]]
        if isinstance(model, Embedder):
            _require_option(
                "pooling", "pooling" not in options, "none: the model has layers for that", chosen
            )
            chosen["pooling"] = []
        else:
            _require_option(
                "pooling", _is_pooling(chosen["pooling"]), f"of {' | '.join(POOLINGS)}", chosen
            )
        for name, (allows, wanted) in _ALLOWED.items():
            _require_option(name, allows(chosen[name]), wanted, chosen)
        text = describe_text_model(tokens)
        if "weightedmean" in chosen["pooling"] or isinstance(model, Embedder):
            text["padding_side"] = "right"  # positions are counted from the left
        lists = {name: list(chosen[name]) for name in ("pooling", "calibration")}
        return {**text, **chosen, **lists, "prompts": dict(chosen["prompts"]), "ranges": None}

    @classmethod
    def declared(cls, config: Mapping[str, Any]) -> tuple[Param, ...]:
        # Texts before the ranges are measured, and these afterwards.
        ranges = config.get("calibration") or config.get("ranges")
        known = tuple(name for name in PRECISIONS if ranges or name not in SCALED)
        wanted = " | ".join(known) + (
            "" if ranges else f"; {' and '.join(SCALED)} for models saved with calibration texts"
        )
        precision = replace(_PRECISION, wanted=wanted, allows=known.__contains__)
        params = tuple(precision if param is _PRECISION else param for param in cls.params)
        names = tuple(config.get("prompts") or ())
        if not names:
            return params
        wanted = f"{' | '.join(names)}, or an empty text for no prompt"
        named = Param(
            "prompt_name", "string", "", wanted, allows=("", *names).__contains__, none_is=""
        )
        return (named, *params)

    def golden_rows(self) -> list[Row]:
        """Texts as any, and the first with each prompt, whose tokens are so recorded."""
        rows = super().golden_rows()
        prompts = [*(self.config.get("prompts") or {}).values()][:_PROMPTS_RECORDED]
        return [*rows, *({"text": prompt + rows[0]["text"]} for prompt in prompts)]

    @classmethod
    def metadata(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        similarity = config.get("similarity")
        return {"similarity": similarity} if similarity in _SIMILARITIES else {}

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        signature = super().signature(example, result)
        if self.check_params(None)["precision"] != "float32":
            signature.outputs = answer_of({"embedding": Array(DataType.long)})
        return signature

    def measured(self, engine: Engine, example: Any) -> dict[str, Any]:
        """The ranges of the calibration texts' embeddings, in place of the texts."""
        if not (texts := self.config["calibration"]):
            return {}
        task, rows = self.uncapped, [{"text": text} for text in texts]
        params = {**task.check_params(None), "precision": "float32"}
        # By length, for little padding: lowest and highest numbers have no order.
        features = sorted(task.encoded(rows, params), key=task.cost)
        ends: list[np.ndarray] = []
        for start in range(0, len(features), _AT_ONCE):
            batch = features[start : start + _AT_ONCE]
            outputs = task.forward(engine, batch, params)
            answers = task.decoded(rows[: len(batch)], batch, outputs, params)
            ends += [np.array(answer["embedding"], np.float32) for answer in answers]
            # (size,) each, so that no more than a batch is held beside them.
            ends = [np.min(ends, axis=0), np.max(ends, axis=0)]
        return {"calibration": [], "ranges": to_json(np.stack(ends), "ranges")}

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        if checked["precision"] in SCALED:
            for param in self.asked:
                if param.name in _CALIBRATED and checked[param.name] != param.default:
                    raise InputError(
                        "The ranges of a model saved with calibration texts are those of other "
                        "embeddings",
                        where=f"params, {param.name!r} beside precision {checked['precision']!r}",
                        wanted=repr(param.default),
                        found=repr(checked[param.name]),
                        hint=f"save the model with params={{{param.name!r}: "
                        f"{checked[param.name]!r}}}, or ask for float32, binary or ubinary",
                    )
        return checked

    @property
    def pad_id(self) -> int | None:
        # Under a mask any token may pad; without one none may.
        if "attention_mask" not in self.config["input_names"]:
            return None
        said = (self.config["pad_token_id"], self.encoder.config["pad_token_id"])
        return next((pad_id for pad_id in said if pad_id is not None), 0)

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_texts(rows, self.columns)
        prompt = params.get("prompt") or self.config["prompts"].get(params.get("prompt_name"), "")
        self.caps.require(
            "max_characters",
            len(prompt) * len(rows),
            "A prompt before each text is too long",
            where="params, 'prompt', for each row",
            instead="shorten it, or send fewer rows at once",
            allowed=_PROMPTED * len(rows),
        )
        skipped = 0 if self.config["include_prompt"] else self._length_of(prompt)
        for row in super().encode([{**row, "text": prompt + row["text"]} for row in rows], params):
            if row is None or self.config["include_prompt"]:
                yield row
            else:
                yield {**row, "pooling_mask": [int(i >= skipped) for i in range(self.cost(row))]}

    def _length_of(self, prompt: str) -> int:
        """Tokens at the beginning that are the prompt's, special ones in front of it included."""
        if not prompt:
            return 0
        # Alone, as sentence-transformers counts them: with the text its last token may be another.
        (row,) = self.encoder.encode([prompt], max_length=self.limit, spans=True)
        return len(row["input_ids"]) - int(row["sequence_ids"][-1] < 0)

    def collate(self, batch: Sequence[Features]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As any text; the mask tells what is pooled."""
        inputs, mask = super().collate(batch)
        if not self.config["include_prompt"]:
            mask = self._filled([row["pooling_mask"] for row in batch], 0).astype(bool)
        return inputs if self.config["pooling"] else {
            **inputs,
            "pooling_mask": mask.astype(np.int64),
        }, mask

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        if self.config["pooling"]:
            hidden = pick(outputs, "last_hidden_state", (*mask.shape, None))  # (rows, tokens, size)
            pooled = [
                pool(row, real, self.config["pooling"])
                for row, real in zip(hidden, mask, strict=True)
            ]
        else:
            pooled = [*pick(outputs, "sentence_embedding", (len(mask), None))]
        return [
            {"embedding": normalized(row) if self.config["normalize"] else row} for row in pooled
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
        precision = params["precision"]
        ranges = from_json(self.config["ranges"]) if precision in SCALED else None
        for i, output in enumerate(outputs, first):
            vector = output["embedding"]
            require_finite([vector], i)
            # Cut, then scaled: the first numbers of a vector of length 1 are shorter.
            vector = vector[: params["truncate_dim"] or None]
            if params["normalize_embeddings"]:
                vector = normalized(vector)
            yield {"embedding": quantized(vector, precision, ranges).tolist()}


def _is_pooling(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(kind in POOLINGS for kind in value)


def _is_calibration(value: object) -> bool:
    listed = isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
    return listed and len(value) != 1  # type: ignore[arg-type]  # mypy does not see that it is one


def _are_prompts(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for text in (*value, *value.values())
    )


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


# Options of a task beside ``pooling``: what may be chosen, and that in words.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "normalize": (_is_bool, "True | False"),
    "include_prompt": (_is_bool, "True | False"),
    "prompts": (_are_prompts, "texts"),
    "similarity": ((None, *_SIMILARITIES).__contains__, " | ".join(_SIMILARITIES)),
    "calibration": (_is_calibration, "two texts or more"),
}


def _require_option(name: str, right: bool, wanted: str, chosen: Mapping[str, Any]) -> None:
    if not right:
        raise InputError(
            "An option of feature-extraction is not allowed",
            where=f"model_config, {name!r}",
            wanted=wanted,
            found=repr(chosen[name]),
        )
