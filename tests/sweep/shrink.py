"""Small configs for each architecture in transformers' auto tables, by the names of their fields.

Nothing here knows a single architecture's code. A field's name says whether it is a width, a number
of heads, of layers, of experts, of tokens; several rules are tried, and the first whose module can
be built small and run is taken.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCABULARY = 160
FIRST_SPECIAL = 120  # ids of image, audio, … tokens start here; ordinary ids stay below
WIDTH, HEADS, HEAD_DIM, LAYERS, EXPERTS, IMAGE, POSITIONS = 64, 4, 16, 2, 4, 32, 128
MOST_PARAMETERS = 20_000_000


# Encoders of texts or images alone, which tasks serve and no ``MODEL_*_MAPPING`` lists; by the type
# of the whole model.
_PARTS = {
    "align": "AlignTextModel AlignVisionModel",
    "altclip": "AltCLIPTextModel AltCLIPVisionModel",
    "blip": "BlipTextModel BlipVisionModel",
    "blip-2": "Blip2TextModelWithProjection Blip2VisionModel Blip2VisionModelWithProjection",
    "chinese_clip": "ChineseCLIPTextModel ChineseCLIPVisionModel",
    "clap": "ClapTextModel ClapTextModelWithProjection",
    "clip": "CLIPTextModelWithProjection CLIPVisionModelWithProjection",
    "clipseg": "CLIPSegTextModel CLIPSegVisionModel",
    "flava": "FlavaImageModel FlavaTextModel",
    "git": "GitVisionModel",
    "groupvit": "GroupViTTextModel GroupViTVisionModel",
    "longt5": "LongT5EncoderModel",
    "metaclip_2": "MetaClip2TextModel MetaClip2TextModelWithProjection MetaClip2VisionModel "
    "MetaClip2VisionModelWithProjection",
    "owlv2": "Owlv2TextModel Owlv2VisionModel",
    "owlvit": "OwlViTTextModel OwlViTVisionModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
    "xclip": "XCLIPTextModel XCLIPVisionModel",
}


def architectures() -> dict[str, str]:
    """Class name → model type, for ``_PARTS`` and each class in ``MODEL_*_MAPPING``, sorted."""
    found = {name: model_type for model_type, names in _PARTS.items() for name in names.split()}
    for table, content in vars(modeling_auto).items():
        if table.startswith("MODEL_") and table.endswith("_NAMES"):
            for model_type, names in content.items():
                for name in [names] if isinstance(names, str) else names:
                    found.setdefault(name, model_type)
    return dict(sorted(found.items()))


def configs(class_name: str, model_type: str) -> Iterator[tuple[str, Any]]:
    """Name of the rule and shrunk config, one after the other.

    Whoever asks takes the first that works.
    """
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    wanted = getattr(getattr(transformers, class_name), "config_class", None)
    if wanted is not None and not issubclass(config_class, wanted):
        config_class = wanted  # a class for a part of the model: CLIPTextModel is listed under clip
    for rule in (_fixed, _fixed_wide_heads, _divided, _short):
        try:
            yield rule.__name__.strip("_"), _shrunk(config_class, class_name, rule)
        except TimeoutError:
            raise
        except Exception as error:  # each config has its own way to refuse
            yield f"{rule.__name__.strip('_')}: {type(error).__name__}: {error}", None


def _shrunk(config_class: type, class_name: str, rule: Any) -> Any:
    parts = _COMPOSED.get(config_class.__name__)
    if parts is not None:
        return parts(rule)
    default = config_class()
    plain = copy.deepcopy(default.to_dict())
    plain = _walk(plain, rule, _SpecialIds())
    plain = {key: value for key, value in plain.items() if key not in _DERIVED}
    _join_parts(plain)
    config: Any = config_class.from_dict(plain)  # type: ignore[attr-defined]  # a config of transformers
    if "CausalLM" in class_name or "LMHead" in class_name or class_name.endswith("ForDecoder"):
        _as_decoder(config)
    return config


_DERIVED = frozenset(
    (
        "transformers_version",
        "architectures",
        "_name_or_path",
        "stage_names",
        "torch_dtype",
        "dtype",
    )
)


def _join_parts(plain: dict[str, Any]) -> None:
    """Let RT-DETR and its like take as many channels as their backbone and encoder give."""
    backbone = plain.get("backbone_config") or {}
    sizes = backbone.get("stage_out_channels") or backbone.get("hidden_sizes")
    for key, given in (
        ("encoder_in_channels", sizes),
        ("decoder_in_channels", [plain.get("encoder_hidden_dim")] * 9),
    ):
        if given and isinstance(plain.get(key), list):
            plain[key] = given[-len(plain[key]) :]


def _as_decoder(config: Any) -> None:
    """BERT and its like are causal only when they are told to be."""
    if getattr(config, "is_decoder", None) is False and not getattr(
        config, "is_encoder_decoder", False
    ):
        config.is_decoder = True


class _SpecialIds:
    """Distinct ids for special tokens, inside the small vocabulary."""

    def __init__(self) -> None:
        self.given: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        if token < 100:
            return token
        return self.given.setdefault(token, FIRST_SPECIAL + len(self.given))


def _any(*parts: str) -> re.Pattern[str]:
    return re.compile("|".join(parts))


_TOKEN = _any(
    r"token_(id|index|ids|indices)$",
    r"(^|_)(start|end|begin)_id$",
    r"^(pad|bos|eos|sep|cls|mask)_token",
)
_VOCABULARY = _any(r"vocab_size", r"^n_vocab$", r"^n_?words$", r"codebook_size")
_LAYERS = _any(
    *(
        r"(^|_)n(um)?_(\w+_)?(layers?|blocks?|stacks)$",
        r"_layers$",
        r"^layers$",
        r"^n_layers?$",
        r"^depth$",
        r"_depth$",
    )
)
_NOT_LAYERS = _any(
    *(
        "feature_layer",
        "mlp_only",
        "feat_extract",
        "skip",
        "fpn",
        "down",
        "upsampl",
        "layers_block",
        "conv_layers",
    ),
    *("fusion", "keep", "index", "swap", "global_attn", "drop", "adapter"),
)
_HEADS = _any(
    r"(^|_)n(um)?_(\w+_)?(attention_)?heads?(_\w+)?$",
    r"attention_heads$",
    r"^n_head$",
    r"^heads$",
    r"_heads$",
)
_KV = _any("key_value", "kv_heads?", "num_kv", "query_groups", "multi_query_group")
_HEAD_DIM = _any(
    *(
        r"head_dim$",
        r"d_head$",
        r"^d_kv$",
        r"head_size$",
        r"_head_dim_?\w*$",
        r"^attention_head_dim$",
    ),
    *(r"^qk_nope", r"^qk_rope", r"^v_head", r"^attention_key_dim$"),
)
_EXPERTS = _any(
    r"(^|_)n(um)?_(\w+_)?experts$",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "expert_num",
)
_TOPK = _any(
    *(
        "experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k$",
        "top_k_experts",
        "num_selected_experts",
    ),
    *("experts_top_?k", "moe_top_k"),
)
_GROUPS = _any(r"^n_group$", r"^topk_group$", r"^num_expert_group")
_WIDTH = _any(
    *(
        r"hidden_size",
        r"hidden_dim",
        r"(^|_)d_model$",
        r"^n_embd$",
        r"^dim$",
        r"embed_dim",
        r"embedding_size",
    ),
    *(
        r"(^|_)d_embed$",
        r"_dim$",
        r"_size_per_head",
        r"intermediate_size",
        r"ffn_dim",
        r"ffn_size",
        r"^d_ff$",
    ),
    *(
        r"_ff_dim",
        r"^n_inner$",
        r"^d_inner$",
        r"mlp_dim",
        r"inner_dim",
        r"feed_forward",
        r"channels$",
        r"_width$",
    ),
    *(
        r"^width$",
        r"lora_rank",
        r"latent_size",
        r"bottleneck",
        r"_rank$",
        r"proj_size",
        r"projection_size",
    ),
    *(r"output_size", r"feature_size", r"^q_lora", r"^kv_lora", r"(^|_)filters$", r"hid_dim"),
)
_NOT_WIDTH = _any(
    *(
        "num_channels",
        "in_channels",
        "input_channels",
        "out_channels$",
        "^channels$",
        "audio_channels",
        "kernel_dim",
    ),
    *(
        "conv_dim_",
        "max_2d",
        "scale",
        "head_dim",
        "rotary",
        "_mel",
        "num_freq",
        "input_dim",
        "^input_size",
        "temporal",
    ),
    *("patch_dim", "num_dim", "batch"),
)
_POSITIONS = _any(
    *(
        "max_position",
        "n_positions",
        r"max_\w*positions",
        "^n_ctx$",
        "max_seq_len",
        "max_sequence_length",
    ),
    *("max_source", "max_target", "block_size"),
)
_IMAGE = re.compile(r"(^|_)(image|img|input_image|crop)_(size|resolution|dim)$|^image_size")
_PATCH = re.compile(r"patch_size$")
_SECTIONS = re.compile(r"mrope_section|axes_dim|rope_section|sections?$")


def _walk(value: dict[str, Any], rule: Any, ids: _SpecialIds) -> dict[str, Any]:
    """The same dict with each field shrunk by its name.

    Lists of one entry a layer are cut to fit.
    """
    whole = _number_of_layers(value)
    kept = _kept_layers(value, whole) if whole else []
    small: dict[str, Any] = {}
    for key, item in value.items():
        if key == "per_layer_config":  # speaks of layers that are no longer there
            continue
        if (
            key in ("out_features", "out_indices")
            and item
            and len(value.get("stage_names") or ()) == whole + 1
        ):
            # every layer is a stage: take the last ones
            stages = range(len(kept) - len(item) + 1, len(kept) + 1)
            small[key] = (
                [f"stage{index}" for index in stages] if key == "out_features" else list(stages)
            )
        elif isinstance(item, dict) and item.get("model_type") == "timm_backbone":
            small[key] = _backbone(item)
        elif isinstance(item, dict) and item.get("model_type") == "hgnet_v2":
            small[key] = {**item, **_HGNET}
        elif isinstance(item, dict) and key not in ("id2label", "label2id"):
            small[key] = _walk(item, rule, ids)
        elif isinstance(item, list) and _is_layerwise(key, item, whole):
            small[key] = [rule(key, item[i]) if type(item[i]) is int else item[i] for i in kept]
        elif isinstance(item, list) and item and all(type(entry) is int for entry in item):
            small[key] = _shrink_list(key, item, rule, ids)
        elif isinstance(item, list) and item and all(isinstance(entry, dict) for entry in item):
            small[key] = [_walk(entry, rule, ids) for entry in item]
        elif item is None and key in _MISSING.get(rule.__name__, {}):
            small[key] = _MISSING[rule.__name__][key]
        elif type(item) is int:
            small[key] = (
                len(kept)
                if item == whole and kept and _is_layers(key)
                else _shrink(key, item, rule, ids)
            )
        else:
            small[key] = item
    return small


_FIRST_AID = {"vocab_size": VOCABULARY, "rope_theta": 10000.0}
_MISSING: dict[str, dict[str, Any]] = {
    "_fixed": _FIRST_AID,
    "_fixed_wide_heads": _FIRST_AID
    | {
        "head_dim": HEAD_DIM,
        "num_key_value_heads": HEADS // 2,
        "pad_token_id": 0,
        "mask_token_id": 3,
    },
    "_divided": _FIRST_AID,
}
"""What some configs leave open, to be read from a checkpoint's."""


def _is_layers(key: str) -> bool:
    return bool(_LAYERS.search(key)) and not _NOT_LAYERS.search(key)


def _is_layerwise(key: str, item: list[Any], layers: int) -> bool:
    return len(item) == layers > LAYERS and not (len(item) < 8 and _is_stages(key))


def _is_stages(key: str) -> bool:
    return bool(
        _WIDTH.search(key) or _HEADS.search(key) or key in ("depths", "strides", "sr_ratios")
    )


def _number_of_layers(value: dict[str, Any]) -> int:
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"):
        if type(value.get(key)) is int:
            return int(value[key])
    return 0


def _kept_layers(value: dict[str, Any], whole: int) -> list[int]:
    """Layers to keep so that each kind of layer is among them."""
    kinds = next(
        (
            value[key]
            for key in ("layer_types", "layers_block_type", "block_types")
            if value.get(key)
        ),
        None,
    )
    first: dict[Any, int] = {}
    if isinstance(kinds, list) and len(kinds) == whole:
        for index, kind in enumerate(kinds):
            first.setdefault(str(kind), index)
    kept = sorted(first.values())
    spare = [index for index in range(whole) if index not in kept]
    least = max(LAYERS, len(value.get("out_indices") or ()))
    return sorted([*kept, *spare[: max(0, least - len(kept))]])


def _shrink(key: str, item: int, rule: Any, ids: _SpecialIds) -> int:
    if _TOKEN.search(key):
        return ids(item)
    if _VOCABULARY.search(key):
        return min(item, 128 if "codebook" in key else VOCABULARY)  # some want a power of two
    if _is_layers(key):
        return min(item, LAYERS)
    return int(rule(key, item))


def _shrink_list(key: str, item: list[int], rule: Any, ids: _SpecialIds) -> list[int]:
    if _TOKEN.search(key):
        return [ids(entry) for entry in item]
    if key in ("depths", "layer_depths", "num_blocks", "layers", "stage_depths"):
        return [min(entry, 1) for entry in item]
    if _SECTIONS.search(key):
        return _sections(item, rule)
    if rule in (_fixed, _fixed_wide_heads) and _is_stages(key):
        # One entry a stage: their ratios are part of the design.
        rule = _stage_of(min(item))
    return [int(rule(key, entry)) for entry in item]


def _stage_of(least: int) -> Any:
    by = max(1, least // 16)
    return lambda key, entry: (
        entry if _HEADS.search(key) else max(1, entry // by) if _WIDTH.search(key) else entry
    )


def _sections(item: list[int], rule: Any) -> list[int]:
    """Rotary sections cover half of a head, in every rule."""
    if rule is _short:
        return item
    half = HEAD_DIM // 2 if rule is not _divided else sum(item) // 8
    small = [max(1, entry * half // sum(item)) for entry in item]
    small[-1] += half - sum(small)
    return small


# --- rules: name of a field and its value → smaller value


def _fixed(key: str, item: int) -> int:
    """One width everywhere, so that parts of a model fit each other."""
    return _numbers(key, item, kv=HEADS)


def _fixed_wide_heads(key: str, item: int) -> int:
    """The same with grouped key and value heads."""
    return _numbers(key, item, kv=HEADS // 2)


def _numbers(key: str, item: int, kv: int) -> int:
    if _KV.search(key):
        return min(item, kv)
    if _HEAD_DIM.search(key):
        return min(item, HEAD_DIM)
    if _HEADS.search(key):
        return min(item, HEADS)
    if _WIDTH.search(key) and not _NOT_WIDTH.search(key):
        return min(item, WIDTH)
    return _counts(key, item)


def _counts(key: str, item: int) -> int:
    if _EXPERTS.search(key):
        return min(item, EXPERTS)
    if _TOPK.search(key):
        return min(item, 2)
    if _GROUPS.search(key):
        return 1
    if _POSITIONS.search(key):
        return min(item, POSITIONS)
    if _IMAGE.search(key):
        return min(item, IMAGE)
    if _PATCH.search(key):
        return item if item <= 4 else 8
    return {"window_size": min(item, 4), "num_queries": min(item, 8)}.get(key, item)


def _divided(key: str, item: int) -> int:
    """Every width and head size an eighth, numbers of heads as they are.

    Ratios between fields stay.
    """
    if _KV.search(key) or _HEADS.search(key):
        return item
    if (_HEAD_DIM.search(key) or _WIDTH.search(key)) and not re.search(
        r"num_channels|in_channels", key
    ):
        return item // 8 if item >= 64 and item % 8 == 0 else item
    return (
        item
        if _IMAGE.search(key) or _PATCH.search(key) or key == "window_size"
        else _counts(key, item)
    )


def _short(key: str, item: int) -> int:
    """Only fewer layers, tokens and experts."""
    return (
        min(item, EXPERTS) if _EXPERTS.search(key) else min(item, 2) if _TOPK.search(key) else item
    )


# --- composed models, whose default config is empty, and those whose widths follow from each other


def _backbone(item: dict[str, Any]) -> dict[str, Any]:
    """A small ResNet in the place of a timm model: timm is not a dependency."""
    small = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]
    )
    plain = small.to_dict()
    return plain | {
        "out_features": [f"stage{i}" for i in item.get("out_indices") or [4]],
        "out_indices": None,
    }


# One width, since each of its lists is of another length.
_HGNET = {
    "stem_channels": [3, 16, 16],
    **{f"stage_{name}_channels": [16] * 4 for name in ("in", "mid", "out")},
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [2] * 4,
    "hidden_sizes": [16] * 4,
}


def _part(config_class: type, rule: Any, **changes: Any) -> Any:
    config = _shrunk(config_class, "", rule)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


_DECODER = {"is_decoder": True, "add_cross_attention": True}


def _encoder_decoder(rule: Any) -> Any:
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        _part(transformers.BertConfig, rule), _part(transformers.BertConfig, rule, **_DECODER),
        decoder_start_token_id=1, pad_token_id=0,
    )  # fmt: skip


def _vision_encoder_decoder(rule: Any) -> Any:
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        _part(transformers.ViTConfig, rule), _part(transformers.BertConfig, rule, **_DECODER),
        decoder_start_token_id=1, pad_token_id=0,
    )  # fmt: skip


def _speech_encoder_decoder(rule: Any) -> Any:
    return transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        _part(transformers.Wav2Vec2Config, rule), _part(transformers.BertConfig, rule, **_DECODER),
        decoder_start_token_id=1, pad_token_id=0,
    )  # fmt: skip


def _dual_encoder(rule: Any) -> Any:
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        _part(transformers.ViTConfig, rule),
        _part(transformers.BertConfig, rule),
        projection_dim=WIDTH,
    )


# Widths of EfficientNet follow from one factor, the last one from that of its end.
_EFFICIENT = {"width_coefficient": 0.1, "depth_coefficient": 0.1}


def _efficient(name: str, last: int) -> Any:
    return lambda rule: getattr(transformers, name)(image_size=IMAGE, hidden_dim=last, **_EFFICIENT)


def _align(rule: Any) -> Any:
    return transformers.AlignConfig(
        text_config=_part(transformers.AlignTextConfig, rule).to_dict(),
        vision_config=_efficient("AlignVisionConfig", 32)(rule).to_dict(),
        projection_dim=32,
    )


def _swin_2(rule: Any) -> Any:
    return transformers.Swinv2Config(
        image_size=IMAGE, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )


_COMPOSED = {
    "AlignConfig": _align,
    "AlignVisionConfig": _efficient("AlignVisionConfig", 32),
    "EfficientNetConfig": _efficient("EfficientNetConfig", 128),
    "Swinv2Config": _swin_2,
    "EncoderDecoderConfig": _encoder_decoder,
    "SpeechEncoderDecoderConfig": _speech_encoder_decoder,
    "VisionEncoderDecoderConfig": _vision_encoder_decoder,
    "VisionTextDualEncoderConfig": _dual_encoder,
}
