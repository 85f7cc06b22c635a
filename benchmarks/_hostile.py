"""What honest and hostile callers ask of the model of each task, and these models."""

from __future__ import annotations

import base64
import io
import json
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import minilm_folder, tokenizer
from PIL import Image

__all__ = ["ALLOWED", "GOOD", "REFUSED", "Request", "save"]

_WORDS = "the quick brown fox jumps over 3 lazy dogs "
_LONG = _WORDS * 2300  # 100 kB


@dataclass(frozen=True)
class Request:
    """Rows and params, or a raw body, which only a server can be sent; and the right status.

    A status of 0 is any but 200: MLflow refuses these by itself, before a model is asked.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    status: int = 400
    raw: bytes | None = None

    @property
    def body(self) -> bytes:
        """As JSON; half a surrogate pair stays one."""
        return (
            self.raw or json.dumps({"dataframe_records": self.rows, "params": self.params}).encode()
        )


def _texts(*texts: str, status: int = 400, **params: Any) -> Request:
    return Request([{"text": text} for text in texts], params, status)


def _image(side: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _sound(seconds: int) -> str:
    """Silence, as a WAV file of 16,000 samples a second."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, 16_000, 0, "NONE", ""))
        written.writeframes(bytes(2 * 16_000 * seconds))
    return base64.b64encode(file.getvalue()).decode()


def _one(status: int = 400, params: dict[str, Any] | None = None, **row: Any) -> Request:
    """One row."""
    return Request([row], params or {}, status)


_LABELS = [f"label {i}" for i in range(200)]
_EVERY = {
    "no column": Request([{}]),
    "a number for a text": Request([{"text": 1.5}]),
    "cut JSON": Request(raw=b'{"dataframe_records": [{"text": "a', status=0),
    "100,000 lists in each other": Request(
        raw=b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", status=0
    ),
}
_NOTHING_SEEN = base64.b64encode(b"GIF89a").decode()
_IMAGES = {
    **_EVERY,
    "36 megapixels": _one(image=_image(6000)),
    "no image": _one(image=_NOTHING_SEEN),
}
_SMALL, _LARGE = _image(64), _image(5000)
_TEXTS = {
    **_EVERY,
    "a text of 9 MB": _texts("x" * 9_000_000),
    "more rows than the cap": _texts(*["a"] * 100_001),
    "half a surrogate pair": _texts("\ud800"),
}
GOOD: dict[str, Request] = {
    "fill-mask": _texts("the [MASK] sat on the mat", status=200),
    "zero-shot-classification": _texts(_WORDS, candidate_labels=["cat", "dog"], status=200),
    "token-classification": _texts(_WORDS, aggregation_strategy="simple", status=200),
    "question-answering": Request([{"question": "who jumps?", "context": _WORDS}], {}, 200),
    "image-classification": _one(200, image=_SMALL),
    "image-feature-extraction": _one(200, image=_SMALL),
    "object-detection": _one(200, image=_SMALL),
    "zero-shot-image-classification": _one(200, {"candidate_labels": ["a", "b"]}, image=_SMALL),
    "text-ranking": _one(200, query="who jumps?", passages=[_WORDS] * 3),
    "automatic-speech-recognition": _one(200, audio=_sound(1)),
    "llm/v1/embeddings": _one(200, input=_WORDS),
    "llm/v1/completions": _one(200, prompt=_WORDS, max_tokens=4),
    "llm/v1/chat": _one(200, messages=[{"role": "user", "content": _WORDS}], max_tokens=4),
}


def _written(**asked: Any) -> dict[str, Request]:
    """Of what writes, beside what it is asked."""
    return {
        "64 texts of 500 tokens": _one(**asked, max_tokens=500, n=64, temperature=1.0),
        "10,000 texts to stop at": _one(**asked, stop=["x"] * 10_000),
        "half a surrogate pair to stop at": _one(**asked, stop=["\ud800"]),
        "a stream": _one(**asked, stream=True),
    }


REFUSED: dict[str, dict[str, Request]] = {
    "fill-mask": {
        **_TEXTS,
        "60 gaps, all tokens": _texts("[MASK] " * 60, top_k=1_000_000),
        "200 rows of 60 gaps": _texts(*["[MASK] " * 60] * 200, top_k=200),
        "10,000 targets": _texts("[MASK]", targets=["cat"] * 10_000),
        "half a surrogate pair in targets": _texts("[MASK]", targets=["\ud800"]),
    },
    "zero-shot-classification": {
        **_TEXTS,
        "200 rows, 200 labels": _texts(*["a cat"] * 200, candidate_labels=_LABELS),
        "a template of 10,000 "
        "gaps": _texts("a", candidate_labels=_LABELS, hypothesis_template="{}" * 10_000),
        "half a surrogate pair in labels": _texts("a", candidate_labels=["\ud800"]),
        "100 kB, and not to be cut": _texts(_LONG, candidate_labels=["cat"], truncation=False),
    },
    "token-classification": {
        **_TEXTS,
        "100 kB, windows that share nearly "
        "all": _texts(_LONG, stride=509, aggregation_strategy="simple"),
        "100 kB, and not to be cut": _texts(_LONG, truncation=False),
        "10,000 labels to ignore": _texts("a", ignore_labels=["O"] * 10_000),
    },
    "question-answering": {
        **_EVERY,
        "a text of 9 MB": Request([{"question": "who?", "context": "x" * 9_000_000}]),
        "half a surrogate pair": Request([{"question": "who?", "context": "\ud800"}]),
        "100 kB, windows that share nearly "
        "all": Request([{"question": "who?", "context": _LONG}], {"doc_stride": 378}),
        "a question of 100 kB": Request([{"question": _LONG, "context": "who?"}]),
        "all spans": Request([{"question": "who?", "context": _LONG}],
            {"top_k": 10**6, "max_answer_len": 384}),
    },
    "image-classification": _IMAGES,
    "image-feature-extraction": _IMAGES,
    "object-detection": {
        **_IMAGES,
        "a threshold of 2": _one(image=_SMALL, params={"threshold": 2.0}),
    },
    "zero-shot-image-classification": {
        **_IMAGES,
        "200 rows, 200 labels": Request([{"image": _SMALL}] * 200, {"candidate_labels": _LABELS}),
        "a template of 10,000 gaps": _one(
            image=_SMALL,
            params={"candidate_labels": _LABELS, "hypothesis_template": "{}" * 10_000},
        ),
        "a label of 100 kB": _one(image=_SMALL, params={"candidate_labels": [_LONG]}),
        "half a surrogate pair in labels": _one(
            image=_SMALL, params={"candidate_labels": ["\ud800"]}
        ),
    },
    "text-ranking": {
        **_EVERY,
        "5,000 passages": _one(query="who?", passages=["a"] * 5000),
        "a passage of 9 MB": _one(query="who?", passages=["x" * 9_000_000]),
        "no list of passages": Request([{"query": "who?", "passages": "a"}], status=0),
        "half a surrogate pair": _one(query="who?", passages=["a", "\ud800"]),
        "100 kB, and not to be cut": _one(
            query="who?", passages=[_LONG], params={"truncation": False}
        ),
    },
    "automatic-speech-recognition": {
        **_EVERY,
        "61 seconds": _one(audio=_sound(61)),
        "no sound": _one(audio=_NOTHING_SEEN),
        "windows that share nearly all": _one(
            audio=_sound(59), params={"chunk_length_s": 0.22, "stride_length_s": [0.1, 0.1]}
        ),
    },
    "llm/v1/embeddings": {
        **_EVERY,
        "a text of 9 MB": _one(input="x" * 9_000_000),
        "more texts than the cap of rows": Request([{"input": "a"}] * 100_001),
        "half a surrogate pair": _one(input="\ud800"),
        "a prompt of 300 kB": _one(input="a", params={"prompt": "x" * 300_000}),
        "more dimensions than there are": _one(input="a", params={"dimensions": 10**6}),
    },
    "llm/v1/completions": {**_EVERY, **_written(prompt="a"), "9 MB": _one(prompt="x" * 9_000_000)},
    "llm/v1/chat": {
        **_EVERY,
        **_written(messages=[{"role": "user", "content": "a"}]),
        "9 MB": _one(messages=[{"role": "user", "content": "x" * 9_000_000}]),
        "100 kB, and not to be cut": _one(messages=[{"role": "user", "content": _LONG}]),
        "half a surrogate pair": _one(messages=[{"role": "user", "content": "\ud800"}]),
    },
}  # fmt: skip
ALLOWED: dict[str, dict[str, Request]] = {
    "fill-mask": {"60 gaps, 130 tokens": _texts("[MASK] " * 60, top_k=130, status=200)},
    "zero-shot-classification": {
        "100 kB, 200 labels": _texts(_LONG, candidate_labels=_LABELS, max_length=32, status=200),
    },
    "token-classification": {
        "100 kB in windows": _texts(_LONG, stride=64, aggregation_strategy="simple", status=200),
    },
    "question-answering": {
        "100 kB": Request([{"question": "who?", "context": _LONG}], {"top_k": 100}, 200)
    },
    "image-classification": {"25 megapixels": _one(200, image=_LARGE)},
    "image-feature-extraction": {"25 megapixels": _one(200, {"pool": False}, image=_LARGE)},
    "object-detection": {"25 megapixels": _one(200, {"threshold": 0.0}, image=_LARGE)},
    "zero-shot-image-classification": {
        "25 megapixels, 200 labels": _one(200, {"candidate_labels": _LABELS}, image=_LARGE)
    },
    "text-ranking": {"20 passages of 100 kB": _one(200, query="who?", passages=[_LONG] * 20)},
    "automatic-speech-recognition": {
        "59 seconds": _one(200, audio=_sound(59)),
        "59 windows": _one(
            200, {"chunk_length_s": 1.0, "stride_length_s": [0.0]}, audio=_sound(59)
        ),
    },
    "llm/v1/embeddings": {"8 texts of 100 kB": Request([{"input": _LONG}] * 8, {}, 200)},
    "llm/v1/completions": {
        "16 texts of 32 tokens": _one(200, prompt=_WORDS, max_tokens=32, n=16, temperature=1.0)
    },
    "llm/v1/chat": {
        "20 messages": _one(200, messages=[{"role": "user", "content": _WORDS}] * 20, max_tokens=32)
    },
}


_MINILM = {
    "fill-mask": "BertForMaskedLM",
    "zero-shot-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "text-ranking": "BertForSequenceClassification",
    "llm/v1/embeddings": "BertModel",
}
_CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


def save(task: str, folder: Path, **shape: int) -> Path:
    """MiniLM's encoder with a seeded head for the task; for others a small seeded model.

    Args:
        task: One of ``GOOD``.
        folder: The model goes into a folder of it.
        shape: ``hidden_size``, ``num_hidden_layers``, … of a smaller one.
    """
    import torch

    import mlflow_safeflavor

    torch.manual_seed(0)
    path = folder / task.replace("/", "-")
    made = _encoder(task, shape) if task in _MINILM else _other(task, shape)
    mlflow_safeflavor.save_model(path=path, task=task, rehearse=False, graph="no", **made)
    return path


def _encoder(task: str, shape: dict[str, int]) -> dict[str, Any]:
    import torch
    import transformers

    cls = getattr(transformers, _MINILM[task])
    labels = {"num_labels": 1} if task == "text-ranking" else {}
    if shape:
        model = cls(transformers.BertConfig(**shape, **labels))
    else:
        model = cls.from_pretrained(minilm_folder(), dtype=torch.float32, **labels)
    if task.startswith("zero"):
        model.config.id2label = {0: "no", 1: "entailment"}
        model.config.label2id = {"no": 0, "entailment": 1}
    return {"model": model.eval(), "tokenizer": tokenizer()}


def _other(task: str, shape: dict[str, int]) -> dict[str, Any]:
    import transformers

    usual = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3}
    shape = {"intermediate_size": 768, **usual, **shape}
    if task.startswith("llm"):
        config = transformers.LlamaConfig(vocab_size=30_522, max_position_embeddings=512, **shape)
        writes = tokenizer()
        writes.chat_template = _CHAT
        return {"model": transformers.LlamaForCausalLM(config).eval(), "tokenizer": writes}
    if task == "automatic-speech-recognition":
        return _listener(shape)
    sees = {**shape, "image_size": 64, "patch_size": 16}
    size = {"height": 64, "width": 64}
    made: dict[str, Any] = {"processor": transformers.ViTImageProcessor(size=size)}
    if task == "object-detection":
        seen = transformers.YolosConfig(**{**sees, "image_size": [64, 64]})
        made = {"processor": transformers.YolosImageProcessor(size=size)}
        model: Any = transformers.YolosForObjectDetection(seen)
    elif task == "zero-shot-image-classification":
        reads = {**shape, "vocab_size": 30_522, "eos_token_id": 102}
        clip = transformers.CLIPConfig(text_config=reads, vision_config=sees)
        made["tokenizer"] = tokenizer()
        model = transformers.CLIPModel(clip)
    else:
        bare = task == "image-feature-extraction"
        cls = transformers.ViTModel if bare else transformers.ViTForImageClassification
        model = cls(transformers.ViTConfig(**sees))
    return {**made, "model": model.eval()}


def _listener(shape: dict[str, int]) -> dict[str, Any]:
    import tempfile

    import transformers

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        writes = transformers.Wav2Vec2CTCTokenizer(str(vocabulary))
    # The convolutions of Wav2Vec2, narrower: 320 samples a step.
    config = transformers.Wav2Vec2Config(
        **shape, conv_dim=(32,) * 7, vocab_size=len(letters), pad_token_id=0,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    hears = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    return {"model": model, "tokenizer": writes, "processor": hears}
