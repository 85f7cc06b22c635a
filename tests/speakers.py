"""Tiny models that write down speech, with their tokenizers and extractors."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
}
_WAVES = {
    **_TRANSFORMER,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
_STEPWISE = {**_WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
_BERT = {
    **_TRANSFORMER,
    "feature_projection_input_dim": 160,
    "conv_depthwise_kernel_size": 3,
    "output_hidden_size": 32,
}
_plain = Wav2Vec2FeatureExtractor()
_masked = Wav2Vec2FeatureExtractor(return_attention_mask=True)
# Name → class, config, extractor, whether rows of different lengths share a forward.
CTC: dict[str, tuple[str, dict[str, Any], Any, bool]] = {
    "Wav2Vec2, whole length": ("Wav2Vec2ForCTC", _WAVES, _plain, False),
    "Wav2Vec2, step by step": ("Wav2Vec2ForCTC", _STEPWISE, _masked, True),
    "Wav2Vec2, with adapter": (
        "Wav2Vec2ForCTC",
        {**_STEPWISE, "add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 32},
        _masked,
        False,
    ),
    "Hubert": ("HubertForCTC", _STEPWISE, _masked, True),
    "WavLM": ("WavLMForCTC", _STEPWISE, _masked, True),
    "UniSpeechSat": ("UniSpeechSatForCTC", _STEPWISE, _masked, True),
    "SEW": ("SEWForCTC", {**_WAVES, "squeeze_factor": 2}, _plain, False),
    "Wav2Vec2Bert": ("Wav2Vec2BertForCTC", _BERT, SeamlessM4TFeatureExtractor(), False),
}


def ctc_tokenizer(**settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
        return Wav2Vec2CTCTokenizer(str(path), **settings)


def ctc_model(name: str = "Wav2Vec2, step by step", **settings: Any) -> Any:
    kind, config, *_ = CTC[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    known = {"vocab_size": len(LETTERS), "pad_token_id": 0}
    model = cls(cls.config_class(**{**config, **known, **settings}))
    with torch.no_grad():  # far from each other, so that no rounding chooses another letter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        model.lm_head.weight.normal_(0, 0.7)
    return model.eval()


def ctc_pipeline(name: str = "Wav2Vec2, step by step", **settings: Any) -> Any:
    return transformers.pipeline(
        "automatic-speech-recognition",
        model=ctc_model(name),
        tokenizer=ctc_tokenizer(),
        feature_extractor=CTC[name][2],
        **settings,
    )


# Whisper.

LANGUAGES = {"en": "<|en|>", "de": "<|de|>"}
_BEGINNINGS = ("<|startoftranscript|>", *LANGUAGES.values(), "<|translate|>", "<|transcribe|>")
_OTHERS = ("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
# A second of sound is heard at once: 100 frames, 50 positions of 0.02 s.
SECONDS = 1


def whisper_tokenizer() -> Any:
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "vocab.json": json.dumps({letter: i for i, letter in enumerate(letters)}),
            "merges.txt": "#version: 0.2\n",
        }
        for name, content in files.items():
            (Path(folder) / name).write_text(content)
        made = transformers.WhisperTokenizerFast(*(str(Path(folder) / name) for name in files))
    made.add_special_tokens({"additional_special_tokens": [*_BEGINNINGS, *_OTHERS]})
    made.add_tokens([transformers.AddedToken(f"<|{i * 0.02:.2f}|>") for i in range(51)])
    made.set_prefix_tokens()  # again, now that its tokens are known
    return made


def whisper_extractor() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=SECONDS)


def whisper_model(tokenizer: Any = None, *, multilingual: bool = True, **settings: Any) -> Any:
    tokenizer = tokenizer or whisper_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*_BEGINNINGS, *_OTHERS)}
    end = tokenizer.eos_token_id
    special = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    sizes = {
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
        **{"num_mel_bins": 20, "max_source_positions": 50, "max_target_positions": 40},
    }
    torch.manual_seed(0)
    config = transformers.WhisperConfig(vocab_size=len(tokenizer), **sizes, **special)
    model = transformers.WhisperForConditionalGeneration(config)
    with torch.no_grad():  # far from each other, so that no rounding chooses another token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    known = {
        "is_multilingual": multilingual,
        "lang_to_id": {token: ids[token] for token in LANGUAGES.values()},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
    }
    model.generation_config = transformers.GenerationConfig(
        **special,
        max_length=40,
        suppress_tokens=[ids["<|startoflm|>"], ids["<|startofprev|>"]],
        begin_suppress_tokens=[end],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_initial_timestamp_index=10,
        **(known if multilingual else {"is_multilingual": False}),
        **settings,
    )
    return model.eval()


def whisper_pipeline(**settings: Any) -> Any:
    tokenizer = whisper_tokenizer()
    return transformers.pipeline(
        "automatic-speech-recognition",
        model=whisper_model(tokenizer),
        tokenizer=tokenizer,
        feature_extractor=whisper_extractor(),
        **settings,
    )
