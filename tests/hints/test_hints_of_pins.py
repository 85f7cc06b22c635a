"""Hints about what a rehearsal used, followed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from hints.hint_rows import follows

import mlflow_safeflavor
from mlflow_safeflavor.errors import EnvironmentMismatchError

pytest_plugins = "own_python"

NET = """
    import torch
    from pathlib import Path
    import acme_order

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            words = Path({place}).with_name("acme_words.txt").read_text().split()
            return {{name: self.layer(x)[:, i] for i, name in enumerate(words)}}
"""


def net(user_code, place, folder="src"):
    module, file = user_code("used_net", NET.format(place=place), folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module.Net().eval(), file


@follows(
    "environment/used",
    "Loading runs code that no installed distribution has, so no pin could bring it to another "
    "machine",
    "…; or build a distribution of it, and install that",
)
@follows(
    "environment/used",
    "Loading reads files that no installed distribution has, so no pin could bring them to "
    "another machine",
    "put them into a package of yours, read them from there (`Path(__file__).with_name(…)`), and "
    "pass its folder with code_paths=[…]; or install a distribution that has them",
)
@pytest.mark.slow
def test_a_log_of_a_model_with_a_loose_module_and_loose_data(
    own_site, user_code, tracking, tmp_path
):
    own_site.install("acme-order", "1.2", {"acme_order/__init__.py": "import acme_loose"})
    loose = own_site.write("acme_loose.py")
    own_site.write("acme_words.txt", "y z")
    options: dict[str, Any] = {
        "task": "raw",
        "input_example": {"x": np.ones((2, 2), "float32")},
        "graph": "no",
    }
    model, file = net(user_code, "acme_order.__file__).parent.with_name('any'")
    with pytest.raises(EnvironmentMismatchError) as refused:
        mlflow_safeflavor.log_model(model, "net", code_paths=[file], **options)
    assert refused.value.where == "acme_loose (for acme_order)"
    assert not [
        model
        for model in mlflow.search_logged_models(output_format="list")
        if model.status == "READY"
    ]
    [way] = re.findall(r"code_paths=\[(.*?)\]", str(refused.value.hint))
    assert way == repr(os.fspath(loose))
    with pytest.raises(EnvironmentMismatchError) as refused:
        mlflow_safeflavor.log_model(model, "net", code_paths=[file, os.fspath(loose)], **options)
    assert refused.value.where == "acme_words.txt (for used_net)"
    package = tmp_path / "src" / "acme_own"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "acme_words.txt").write_text("y z")
    model, file = net(user_code, "__import__('acme_own').__file__")
    info = mlflow_safeflavor.log_model(
        model,
        "net",
        code_paths=[file, os.fspath(loose), os.fspath(package)],
        **options,
    )
    written = Path(mlflow.artifacts.download_artifacts(info.model_uri)) / "requirements.txt"
    assert "acme-order==1.2" in written.read_text().splitlines()
