"""A saved model to look at and copies of it to damage.

For test modules that say ``pytest_plugins = "saved_models"``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from artifacts import SAME_BATCHES, TEXTS

import mlflow_safeflavor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_made: dict[str, Path] = {}


@pytest.fixture
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A saved tiny classifier with an input example.

    Made once a process, so nobody may change it.
    """
    if "saved" not in _made:
        path = tmp_path_factory.mktemp("artifact") / "model"
        example = [{"text": text} for text in TEXTS]
        # Weights large enough that no change of them drowns in the tolerance of recorded answers.
        model = tiny_bert(initializer_range=0.5)
        given: dict[str, Any] = {
            "tokenizer": tiny_tokenizer,
            "input_example": example,
            "model_config": SAME_BATCHES,
        }
        mlflow_safeflavor.save_model(
            model, path, metadata={"a": 1}, rehearse=False, graph="no", **given
        )
        _made["saved"] = path
    return _made["saved"]


@pytest.fixture
def saved_with_graph(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The same model with its graph; made once a process."""
    if "graph" not in _made:
        path = tmp_path_factory.mktemp("artifact") / "graph"
        example = [{"text": text} for text in TEXTS]
        model = tiny_bert(initializer_range=0.5)
        mlflow_safeflavor.save_model(
            model,
            path,
            tokenizer=tiny_tokenizer,
            input_example=example,
            rehearse=False,
            graph="require",
        )
        _made["graph"] = path
    return _made["graph"]


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` that a test may damage.

    Hard links, so change files with ``rewrite`` alone.
    """
    return Path(shutil.copytree(saved, tmp_path / "copy", copy_function=os.link))
