"""Pins are what runs.

Distributions that a rehearsal imports or reads are pinned, or refused by name.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import sysconfig
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from architectures import seeded

import mlflow_safeflavor
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.environment.files import missing_lines
from mlflow_safeflavor.environment.installed import OWN_NAME
from mlflow_safeflavor.environment.owners import Owners
from mlflow_safeflavor.environment.used import Use, find_used, way_to_bring
from mlflow_safeflavor.errors import EnvironmentMismatchError
from mlflow_safeflavor.module import user_code
from mlflow_safeflavor.save import save
from mlflow_safeflavor.save.pinning import Pinning, needs_of

pytest_plugins = "own_python"

ROWS = [{"a": 1.0, "b": 2.0}, {"a": -3.0, "b": 0.5}]


# --- who owns a file -----------------------------------------------------------------------------


def test_a_file_belongs_to_the_distribution_that_lists_it(own_site):
    own_site.install(
        "acme-a",
        files={"acme/a.py": "", "acme/a/words, all.json": "", "../../../share/acme/a.txt": ""},
    )
    own_site.install("acme-b", files={"acme/b.py": "", "acme_b/__init__.py": ""})
    owners = Owners(own_site.path)
    assert owners.of(str(own_site.folder / "acme" / "a.py")) == "acme-a"
    assert owners.of(str(own_site.folder / "acme" / "b.py")) == "acme-b", (
        "a namespace has several owners"
    )
    assert owners.of(str(own_site.folder / "acme" / "a" / "words, all.json")) == "acme-a"
    assert owners.of(str(own_site.home / "share" / "acme" / "a.txt")) == "acme-a"
    assert owners.of(str(own_site.folder / "acme_b" / "_made_here.py")) == "acme-b", (
        "code that was made beside its own"
    )
    assert owners.of(str(own_site.folder / "acme_b" / "fetched.json")) is None, (
        "data that came later"
    )
    assert owners.of(str(own_site.folder / "acme" / "c.py")) is None, "beside code of two owners"


def test_links_to_a_folder_are_followed(own_site):
    own_site.install("acme-a")
    (own_site.home / "lib64").symlink_to("lib")
    other = str(own_site.folder).replace("/lib/", "/lib64/")
    assert Owners(own_site.path).of(f"{other}/acme_a/__init__.py") == "acme-a"
    assert Owners([other]).of(str(own_site.folder / "acme_a" / "__init__.py")) == "acme-a"


def test_without_a_list_the_top_level_name_counts(own_site):
    own_site.install("acme-old", record=False)
    assert Owners(own_site.path).of(str(own_site.folder / "acme_old" / "data.json")) == "acme-old"


def test_all_below_the_folder_of_an_editable_install_but_not_the_environment_in_it(
    own_site, tmp_path
):
    url = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    own_site.install(
        "acme-edit", files={"__editable__.acme_edit.pth": str(tmp_path / "src")}, direct_url=url
    )
    owners = Owners(own_site.path)
    assert owners.of(str(tmp_path / "src" / "acme_edit" / "data.json")) == "acme-edit"
    assert owners.of(str(own_site.folder / "stranger.json")) is None


# --- what was used -------------------------------------------------------------------------------


def test_imports_and_data_count_metadata_and_pythons_own_do_not(own_site):
    own_site.install("acme-code", "2.0")
    own_site.install("acme-data", "0.1", files={"acme_data/words.json": ""})
    own_site.install("acme-told")
    used = own_site.used(
        "acme_code/__pycache__/__init__.cpython-311.pyc",
        "acme_data/words.json",
        "acme_told-1.0.dist-info/METADATA",
        json.__file__,
        "nowhere.json",
    )
    assert used == {
        "acme-code": Use("2.0", "net", "module"),
        "acme-data": Use("0.1", "net", "module"),
    }


def test_code_that_no_distribution_has_is_refused_by_what_code_paths_would_name(own_site, tmp_path):
    own_site.write("acme_loose.py")
    with pytest.raises(EnvironmentMismatchError, match="acme_loose") as refused:
        own_site.used("acme_loose.py")
    assert f"code_paths=['{own_site.folder / 'acme_loose.py'}']" in str(refused.value.hint)
    own_site.write("acme_pack/__init__.py")
    own_site.write("acme_pack/inner/__init__.py")
    with pytest.raises(EnvironmentMismatchError) as refused:
        own_site.used("acme_pack/inner/__init__.py", "acme_pack/__init__.py")
    assert f"code_paths=['{own_site.folder / 'acme_pack'}']" in str(refused.value.hint)
    (tmp_path / "acme_elsewhere.py").write_text("")  # by way of a .pth file
    with pytest.raises(EnvironmentMismatchError, match="acme_elsewhere"):
        own_site.used(str(tmp_path / "acme_elsewhere.py"))


@pytest.mark.parametrize(
    "place", ["acme_code/fetched.bin", "nltk_data/words.txt", "../../../nltk_data/words.txt"]
)
def test_data_that_no_distribution_has_is_refused_by_name(own_site, place, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(own_site.home))
    own_site.install("acme-code")
    own_site.write(place)
    with pytest.raises(
        EnvironmentMismatchError, match="reads files that no installed distribution has"
    ) as refused:
        own_site.used("acme_code/__init__.py", place)
    assert f"{Path(place).name} (for net)" in str(refused.value.where)
    assert "Path(__file__)" in str(refused.value.hint)


def test_a_module_that_only_this_process_has_comes_along_by_name(own_site, tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "acme_only.py").write_text("")
    sys.path.insert(0, str(tmp_path / "only"))
    assert f"code_paths=['{tmp_path / 'only' / 'acme_only.py'}']" in str(
        way_to_bring("acme_only.part")
    )
    own_site.install("acme-user", "7.0")
    assert "install acme-user==7.0 into" in str(way_to_bring("acme_user"))
    assert way_to_bring("acme_nowhere") is None


# --- what becomes of the pins --------------------------------------------------------------------


@pytest.fixture
def pin(tmp_path):
    """``pin(used, **wanted)``.

    What ``Pinning`` makes of it, as (anything added?, lines of requirements.txt).
    """

    def run(used, engines=("module",), hashes=False, **wanted):
        layout = Layout(tmp_path / "stage")
        layout.data.mkdir(parents=True, exist_ok=True)
        none = dict.fromkeys(("pip_requirements", "extra_pip_requirements", "conda_env"))
        needs = needs_of(Source(task="raw", module=torch.nn.Linear(1, 1)), engines, None)
        pinning = Pinning(layout, needs, hashes=hashes, **{"torch_index": None, **none, **wanted})
        pinning.write()
        return pinning.finish(used), layout.requirements.read_text().splitlines()

    return run


def test_what_was_used_is_pinned_with_what_it_requires(own_site, pin, caplog):
    own_site.install("acme-a", "1.2", requires=["acme-b>=1"])
    own_site.install("acme-b", "1.5")
    with caplog.at_level(logging.INFO, "mlflow.safeflavor"):
        added, lines = pin(
            {
                "acme-a": Use("1.2", "used_net", "module"),
                "numpy": Use(np.__version__, "torch", "module"),
            }
        )
    assert added
    assert {"acme-a==1.2", "acme-b==1.5"} <= set(lines)
    assert "acme-a 1.2 (for used_net)" in caplog.text
    assert "numpy" not in caplog.text, "that was pinned already"


def test_hashes_are_looked_up_once_and_for_all_that_is_pinned(own_site, pin, monkeypatch):
    own_site.install("acme-a", "1.2")
    locked = []
    monkeypatch.setattr(
        "mlflow_safeflavor.save.pinning.lock_file",
        lambda layout, recorded: locked.append(
            (set(recorded.distributions), layout.requirements.read_text())
        ),
    )
    for used in ({"acme-a": Use("1.2", "net", "module")}, {}, None):
        assert pin(used, hashes=True)[0]
    assert [("acme-a" in names, "acme-a==1.2" in text) for names, text in locked] == [
        (True, True),
        (False, False),
        (False, False),
    ]


def test_nothing_is_written_again_for_what_is_pinned_already(pin):
    assert not pin({"numpy": Use(np.__version__, "torch", "module")})[0]


def test_what_the_graph_used_is_not_left_out_of_its_image(own_site, pin, tmp_path):
    own_site.install("acme-a")
    own_site.install("acme-b")
    uses = {"acme-a": Use("1.0", "net", "onnx"), "acme-b": Use("1.0", "net", "module")}
    pin({**uses, "regex": _use("regex", "onnx")}, engines=("onnx", "module"))
    only_module = json.loads((tmp_path / "stage" / "safeflavor" / "environment.json").read_text())[
        "only_module"
    ]
    assert {"acme-b", "transformers"} <= set(only_module)
    assert not {"acme-a", "regex"} & set(only_module), (
        "regex is one that else only transformers requires"
    )


def _use(name, engine):
    from importlib.metadata import version

    return Use(version(name), "net", engine)


def test_an_editable_install_is_refused_by_name_and_its_hint_works(own_site, pin, tmp_path):
    url = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    own_site.install("acme-edit", "0.3", direct_url=url)
    used = {"acme-edit": Use("0.3", "net", "module")}
    with pytest.raises(
        EnvironmentMismatchError, match=r"acme-edit 0\.3: editable install"
    ) as refused:
        pin(used)
    (line,) = re.findall(r"extra_pip_requirements=\['(.*?)'\]", str(refused.value.hint))
    assert line in pin(used, extra_pip_requirements=[line])[1]
    assert line in pin(used, pip_requirements=[line])[1]


def test_another_version_than_this_process_has_is_refused(own_site, pin):
    with pytest.raises(EnvironmentMismatchError, match="runs other versions") as refused:
        pin({"numpy": Use("1.0", "torch", "module")})
    assert f"pip install numpy=={np.__version__}" in str(refused.value.hint)


OWN_LINES = ["mlflow", "torch", "safetensors", "acme-a"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"pip_requirements": OWN_LINES},
        {
            "conda_env": {
                "dependencies": [
                    "python=3.11",
                    "pytorch>=2",
                    "acme-a=1",
                    {"pip": ["mlflow", "safetensors"]},
                ]
            }
        },
    ],
    ids=["pip_requirements", "conda_env"],
)
def test_lines_of_the_users_own_stay_and_what_they_lack_is_told(own_site, pin, caplog, wanted):
    for name, requires in (
        ("acme-a", ["acme-b"]),
        ("acme-b", []),
        ("acme-c", ["acme-d"]),
        ("acme-d", []),
    ):
        own_site.install(name, requires=requires)
    used = {f"acme-{letter}": Use("1.0", "net", "module") for letter in "abcd"}
    added, lines = pin(used | {"numpy": Use(np.__version__, "torch", "module")}, **wanted)
    assert not added
    assert not any(line.startswith("acme-c") for line in lines)
    told = caplog.records[-1].getMessage()
    assert told.endswith("To add: acme-c==1.0 (for net)"), (
        "neither what is brought along nor what is not missing"
    )
    caplog.clear()
    pin(used, pip_requirements=[*OWN_LINES, "acme-c==1.0"])
    assert "To add" not in caplog.text


def test_missing_lines_of_a_model_without_torch(tmp_path, pin):
    pin({}, pip_requirements=["mlflow"])
    used = {"torch": _use("torch", "module").version, "numpy": np.__version__}
    assert missing_lines(tmp_path / "stage", used) == [f"torch=={used['torch'].partition('+')[0]}"]


# --- for real ------------------------------------------------------------------------------------

NET = """
    import torch
    from acme_order import ORDER

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            return {name: self.layer(x)[:, i] for i, name in enumerate(ORDER)}
"""

HOOKS = """
    import torch

    def pre(rows, tokenizer):
        import acme_lazy
        return {"x": torch.tensor([[row["a"], row["b"]] for row in rows]) * acme_lazy.SCALE}

    def post(outputs, rows):
        import json
        from pathlib import Path
        import acme_lazy

        data = Path(acme_lazy.__file__).parent.parent / "acme_data"
        words = json.loads((data / "words.json").read_text())
        return [{words[0]: float(y)} for y in outputs["y"]]
"""

TOOL = """
    import sys
    from pathlib import Path

    class Watcher:
        def find_spec(self, name, path=None, target=None):
            if name == "used_net":
                import acme_tool.rules
                (Path(__file__).parent / "rules.txt").read_text()

    sys.meta_path.insert(0, Watcher())
"""


def install_what_the_code_uses(own_site):
    own_site.install(
        "acme-order",
        "1.2",
        {"acme_order/__init__.py": "ORDER = ['y', 'z']"},
        requires=["acme-base"],
    )
    own_site.install("acme-base", "2.1")
    own_site.install("acme-lazy", "3.0", {"acme_lazy/__init__.py": "SCALE = 2.0"})
    own_site.install("acme-data", "0.1", {"acme_data/words.json": '["score"]'})
    tool = {
        "acme_tool/__init__.py": dedent(TOOL),
        "acme_tool/rules.py": "",
        "acme_tool/rules.txt": "",
    }
    own_site.install("acme-tool", "9.0", tool)
    own_site.install("acme-start", "9.0")
    own_site.write("acme_tool.pth", "import acme_tool")
    own_site.write("sitecustomize.py", "import acme_start")
    hack = Path(sysconfig.get_path("purelib"), "distutils-precedence.pth")
    if hack.is_file():
        own_site.write(hack.name, hack.read_text())


@pytest.mark.slow
def test_a_save_pins_what_modules_hooks_and_data_need_and_no_tool(
    own_site, user_code, tmp_path, caplog, monkeypatch
):
    install_what_the_code_uses(own_site)
    used = {}
    monkeypatch.setattr(save, "find_used", lambda *opened: used.update(find_used(*opened)) or used)
    distutils = "import distutils.version" if sys.version_info < (3, 12) else ""
    net, net_file = user_code("used_net", dedent(NET) + distutils)
    hooks, hooks_file = user_code("used_hooks", HOOKS)
    path = tmp_path / "store" / "model"
    with caplog.at_level(logging.INFO, "mlflow.safeflavor"):
        mlflow_safeflavor.save_model(
            seeded(net.Net),
            path,
            task="custom",
            preprocess=hooks.pre,
            postprocess=hooks.post,
            input_example=ROWS,
            code_paths=[net_file, hooks_file],
            graph="no",
        )
    lines = (path / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    wanted = {"acme-order": "1.2", "acme-base": "2.1", "acme-lazy": "3.0", "acme-data": "0.1"}
    assert wanted.items() <= pins.items()
    assert (
        not {"acme-tool", "acme-start", "pytest", "ruff", "coverage", "pip", "mlflow-safeflavor"}
        & pins.keys()
    )
    assert "acme-order" in used
    assert "setuptools" not in used, "imported in place of Python's own distutils"
    assert "acme-data 0.1 (for used_hooks)" in caplog.text
    assert "acme-order 1.2 (for used_net)" in caplog.text
    recorded = json.loads((path / "safeflavor" / "environment.json").read_text())
    assert wanted.items() <= recorded["distributions"].items()
    conda = yaml.safe_load((path / "conda.yaml").read_text())
    assert conda["dependencies"][-1]["pip"] == lines
    # and with its manifest
    loaded = mlflow_safeflavor.load_model(str(path), trust={"code"}, environment="error")
    assert loaded.report.bit_identical
    size = yaml.safe_load((path / "MLmodel").read_text())["model_size_bytes"]
    files = (
        file
        for file in path.rglob("*")
        if file.is_file() and file.name not in ("MLmodel", "manifest.json")
    )
    assert size == sum(file.stat().st_size for file in files)


@pytest.mark.slow
def test_without_a_rehearsal_the_log_says_so(own_site, user_code, tmp_path, caplog):
    install_what_the_code_uses(own_site)
    net, file = user_code("used_net", NET)
    example = {"x": np.ones((2, 2), "float32")}
    with caplog.at_level(logging.INFO, "mlflow.safeflavor"):
        mlflow_safeflavor.save_model(
            seeded(net.Net),
            tmp_path / "m",
            task="raw",
            input_example=example,
            code_paths=[file],
            rehearse=False,
            graph="no",
        )
    assert "not rehearsed" in caplog.text
    assert "acme" not in (tmp_path / "m" / "requirements.txt").read_text()


def test_what_this_project_requires_is_not_pinned_for_a_hook_of_its_own_folder(monkeypatch):
    """Found in an editable install, as this file is."""
    module = torch.nn.Module()
    monkeypatch.setattr(user_code, "Owners", lambda: SimpleNamespace(of=lambda file: OWN_NAME))
    hook = {"postprocess": lambda outputs, rows: rows}
    assert user_code.distributions_of(module, hook, except_for=()) == []
    monkeypatch.setattr(user_code, "Owners", lambda: SimpleNamespace(of=lambda file: "another"))
    assert user_code.distributions_of(module, hook, except_for=()) == ["another"]
