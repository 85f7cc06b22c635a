"""What an artifact may say without anybody's agreement."""

from __future__ import annotations

import pytest

from mlflow_safeflavor.artifact.trust import find_steering, portable

FOUND = {
    "code": {"auto_map": {"AutoModel": "evil.B"}},
    "pipelines": {"custom_pipelines": {"task": {"impl": "evil.B"}}},
    "deep": {"a": [{"b": [[{"auto_map": {"AutoModel": "evil.B"}}]]}]},
    "kernel": {"text_config": {"_attn_implementation": "somebody/kernel@main:f"}},
    "kernels of parts": {"attn_implementation": {"text_config": "somebody/kernel"}},
    "repository": {"backbone": "owner/name"},
    "scheme": {"architecture": "hf-hub:name"},
    "path": {"_name_or_path": "somewhere"},
    "weights": {"use_pretrained_backbone": True},
    "file": {"class_info_file": "passwd"},
    "files": {"fast_tokenizer_files": ["tokenizer.json"]},
    "folder": {"index_path": "/etc"},
    "checkpoint": {"model_args": {"checkpoint_path": "x.pth"}},
    "language": {"target_lang": "eng"},
}
HARMLESS = {
    "nothing": {
        "auto_map": None,
        "custom_pipelines": {},
        "_name_or_path": "",
        "index_path": None,
        "backbone": None,
    },
    "flags": {"use_pretrained_backbone": False, "pretrained": False, "use_mem_eff_path": True},
    "numbers": {"drop_path": 0.1, "conv_kernel_file": 3},
    "a name of timm": {"backbone": "swin_tiny_patch4_window7_224", "use_timm_backbone": True},
    "labels": {"id2label": {"0": "a/b", "auto_map": "x"}, "label2id": {"B-private_url": "5"}},
    "implementations": {"_attn_implementation": "sdpa", "attn_implementation": {"": "eager"}},
    "a template": {"chat_template": "{% for m in messages %}/x{% endfor %}"},
}


@pytest.mark.parametrize("name", FOUND)
def test_what_steers_a_library_is_found_at_any_depth(name):
    assert len(list(find_steering(FOUND[name]))) == 1
    assert len(list(find_steering([{"of": FOUND[name]}]))) == 1


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_is_not(name):
    assert list(find_steering(HARMLESS[name])) == []


def test_where_code_runs_anyhow_only_other_code_is_found():
    assert [name for name in FOUND if list(find_steering(FOUND[name], trusted=True))] == [
        *("code", "pipelines", "deep", "kernel", "kernels of parts"),
    ]


def test_a_portable_config_says_nothing_of_where_it_came_from():
    part = {
        "_name_or_path": "x",
        "auto_map": {"a": "b"},
        "use_pretrained_backbone": True,
        "hidden_size": 3,
    }
    kept = {"use_pretrained_backbone": False, "hidden_size": 3}
    assert portable({"parts": [part], **part}) == {"parts": [kept], **kept}
