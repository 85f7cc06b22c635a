"""Tiny models that write down speech, with their tokenizers and extractors."""

import json
import tempfile
from pathlib import Path

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
CTC = {
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


def ctc_tokenizer(**settings):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
        return Wav2Vec2CTCTokenizer(str(path), **settings)


def ctc_model(name="Wav2Vec2, step by step", **settings):
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


def ctc_pipeline(name="Wav2Vec2, step by step", **settings):
    return transformers.pipeline(
        "automatic-speech-recognition",
        model=ctc_model(name),
        tokenizer=ctc_tokenizer(),
        feature_extractor=CTC[name][2],
        **settings,
    )
