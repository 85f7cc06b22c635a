"""The files that MLflow installs from, and what the user may write into them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import yaml
from requirement_files import lines_of, write_files

from mlflow_safeflavor.environment import requirements
from mlflow_safeflavor.environment.record import record
from mlflow_safeflavor.errors import EnvironmentMismatchError

# requirements.txt


@pytest.mark.parametrize(
    ("version", "folder"),
    [
        ("2.13.0+cpu", "cpu"),
        ("2.13.0+cu128", "cu128"),
        ("2.13.0+rocm6.4", "rocm6.4"),
        ("2.13.0+xpu", "xpu"),
        ("2.14.0.dev20260101+cpu", "nightly/cpu"),
    ],
)
def test_auto_keeps_the_label_and_names_the_pages_that_have_it(version, folder):
    assert lines_of({"numpy": "2.4.6", "torch": version, "torchvision": version}) == [
        f"--find-links https://download.pytorch.org/whl/{folder}/torch/",
        f"--find-links https://download.pytorch.org/whl/{folder}/torchvision/",
        "numpy==2.4.6",
        f"torch=={version}",
        f"torchvision=={version}",
    ]


@pytest.mark.parametrize(
    "name", ["pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-xpu"]
)
def test_auto_finds_the_triton_that_pytorch_builds_where_torch_is(name):
    assert lines_of({name: "3.5.1", "torch": "2.13.0+rocm6.4", "triton": "3.5.1"})[:-3] == [
        "--find-links https://download.pytorch.org/whl/rocm6.4/torch/",
        f"--find-links https://download.pytorch.org/whl/rocm6.4/{name}/",
    ]


def test_auto_names_no_page_without_a_label_on_torch():
    assert lines_of({"torch": "2.13.0", "other": "1.0+local"}) == [
        "other==1.0+local",
        "torch==2.13.0",
    ]


def test_auto_refuses_a_label_that_nobody_publishes():
    with pytest.raises(
        EnvironmentMismatchError, match=r"(?s)where: torch==2\.6\.0a0\+git12.*torch_index=None"
    ):
        lines_of({"pytorch-triton": "3.5.1", "torch": "2.6.0a0+git12"})


def test_none_strips_the_label_of_torch_alone():
    assert lines_of({"torch": "2.13.0+cpu", "other": "1.0+local"}, None) == [
        "other==1.0+local",
        "torch==2.13.0",
    ]


@pytest.mark.parametrize(
    "url", ["https://wheels.example/cpu", "https://me:${TOKEN}@wheels.example/simple"]
)
def test_a_url_is_an_extra_index(url):
    assert lines_of({"torch": "2.13.0+cpu"}, url) == [
        f"--extra-index-url {url}",
        "torch==2.13.0+cpu",
    ]


def test_a_folder_is_searched_for_wheels(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "my wheels").mkdir()
    monkeypatch.chdir(tmp_path)
    option = [f"--find-links {tmp_path / 'wheels'}", "torch==2.13.0+cpu"]
    assert lines_of({"torch": "2.13.0+cpu"}, "wheels") == option
    assert lines_of({"torch": "2.13.0+cpu"}, tmp_path / "wheels") == option
    assert lines_of({}, "file:///srv/wheels") == ["--find-links file:///srv/wheels"]
    assert lines_of({}, "my wheels") == [f"--find-links {tmp_path.as_uri()}/my%20wheels"]


@pytest.mark.parametrize(
    "torch_index", ["", "cpu", "/no/such/folder", "ftp://x/y", "https://x/a b", 5]
)
def test_any_other_torch_index_is_refused(torch_index):
    with pytest.raises(
        EnvironmentMismatchError,
        match=r'(?s)torch_index names no source.*wanted: "auto", None, an http',
    ):
        lines_of({"torch": "2.13.0+cpu"}, torch_index)


def test_a_password_never_reaches_the_artifact():
    with pytest.raises(EnvironmentMismatchError, match="holds a password") as caught:
        lines_of({}, "https://me:secret@wheels.example/simple")
    assert "secret" not in str(caught.value)


def test_default_requirements_are_the_installed_roots_alone(flavor_site):
    assert requirements.default_requirements(path=flavor_site.path) == [
        "--find-links https://download.pytorch.org/whl/cpu/torch/",
        "mlflow==3.17.2",
        "torch==2.13.0+cpu",
    ]


# The files MLflow reads


def test_the_three_files_hold_the_closure(flavor_site, tmp_path):
    recorded, lines, conda, python_env = write_files(flavor_site, tmp_path / "model")
    pins = ["mlflow==3.17.2", "mlflow-skinny==3.17.2", "sympy==1.14.0", "torch==2.13.0+cpu"]
    assert lines == ["--find-links https://download.pytorch.org/whl/cpu/torch/", *pins]
    assert lines == requirements.requirement_lines(recorded.distributions)
    python = ".".join(map(str, sys.version_info[:3]))
    assert conda["dependencies"][0] == f"python={python}"
    assert conda["dependencies"][-1] == {"pip": lines}
    assert (conda["name"], conda["channels"]) == ("mlflow-env", ["conda-forge"])
    assert python_env == {
        "python": python,
        "build_dependencies": [],
        "dependencies": ["-r requirements.txt"],
    }


def test_mlflow_reads_the_files_back(flavor_site, tmp_path):
    from mlflow.utils.environment import _PythonEnv

    _, lines, _, python_env = write_files(flavor_site, tmp_path / "model")
    assert _PythonEnv.from_yaml(tmp_path / "model" / "python_env.yaml").to_dict() == python_env
    from_conda = _PythonEnv.from_conda_yaml(tmp_path / "model" / "conda.yaml")
    assert (from_conda.python, from_conda.dependencies) == (python_env["python"], lines)


def test_extra_requirements_that_are_installed_are_pinned_with_their_closure(flavor_site, tmp_path):
    flavor_site.install("mine", "0.5", ['helper; extra == "x"'])
    flavor_site.install("helper", "7")
    recorded, lines, *_ = write_files(
        flavor_site, tmp_path / "m", extra_pip_requirements=["Mine[x]>=0.4"]
    )
    assert {"mine==0.5", "helper==7"} < set(lines)
    assert recorded.distributions["helper"] == "7"


def test_extra_requirements_that_contradict_what_is_installed_are_refused(flavor_site, tmp_path):
    with pytest.raises(
        EnvironmentMismatchError,
        match=r"(?s)wanted: this model requires sympy==1\.0\n  found: sympy 1\.14\.0",
    ):
        write_files(flavor_site, tmp_path / "m", extra_pip_requirements=["sympy==1.0"])
    assert list((tmp_path / "m").iterdir()) == []


def test_other_extra_requirements_stay_as_written(flavor_site, tmp_path, caplog):
    extra = [
        "--no-binary sympy",
        "https://files.example/tool-1.0-py3-none-any.whl",
        "absent>=2",
        "sympy<1; python_version < '3'",
    ]
    _, lines, conda, _ = write_files(flavor_site, tmp_path / "m", extra_pip_requirements=extra)
    assert lines[-4:] == extra
    assert "sympy==1.14.0" in lines, "a requirement for another machine replaces no pin"
    assert conda["dependencies"][-1] == {"pip": lines}
    assert [r.getMessage() for r in caplog.records] == [
        "absent>=2 is not installed here, so it stays as written and is not pinned any further"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "mine @ git+https://git.example/mine@c0ffee",
        "git+https://git.example/other.git@c0ffee#egg=Mine",
        "git+https://git.example/team/mine.git@c0ffee",
        "-e git+https://git.example/mine@c0ffee#egg=mine",
        "https://files.example/mine-0.5%2Blocal-py3-none-any.whl",
        "mine==0.5 --hash=sha256:00",
    ],
)
def test_an_editable_install_may_be_pinned_by_the_user(flavor_site, tmp_path, line):
    flavor_site.install(
        "mine", "0.5", ["helper"], direct_url={"url": "file:///m", "dir_info": {"editable": True}}
    )
    flavor_site.install("helper", "7")
    recorded, lines, *_ = write_files(flavor_site, tmp_path / "m", extra_pip_requirements=[line])
    assert [text for text in lines if "mine" in text.lower()] == [line]
    assert "helper==7" in lines
    assert recorded.distributions["mine"] == "0.5"


def test_pip_requirements_replace_every_line(flavor_site, tmp_path, caplog):
    flavor_site.install(
        "mine", "0.5", direct_url={"url": "file:///m", "dir_info": {"editable": True}}
    )
    given = ["mlflow", "torch>=2", "mine==0.4", "--pre"]
    recorded, lines, conda, _ = write_files(flavor_site, tmp_path / "m", pip_requirements=given)
    assert lines == given
    assert conda["dependencies"][-1] == {"pip": given}
    assert recorded.distributions["mine"] == "0.5", "recorded is what is installed"
    assert recorded.distributions["torch"] == "2.13.0+cpu"
    assert "this model requires mine==0.4, found mine 0.5" in caplog.text


def test_mlflow_is_added_to_pip_requirements_without_it(flavor_site, tmp_path):
    assert write_files(flavor_site, tmp_path / "a", pip_requirements=["torch"])[1] == [
        "mlflow==3.17.2",
        "torch",
    ]
    for given in (
        ["mlflow-skinny==3"],
        ["git+https://git.example/mlflow.git@main"],
        ["mlflow==3 --hash=sha256:00"],
    ):
        assert write_files(flavor_site, tmp_path / "b", pip_requirements=given)[1] == given


def test_pip_requirements_may_be_a_file_with_references_and_hashes(flavor_site, tmp_path):
    (tmp_path / "base.txt").write_text("torch==2.13.0 \\\n    --hash=sha256:00\n")
    (tmp_path / "limits.txt").write_text("numpy<3\n")
    (tmp_path / "user.txt").write_text(
        "# mine\nmlflow==3.17.2  # why\n-r base.txt\n-c limits.txt\n"
    )
    for given in (tmp_path / "user.txt", str(tmp_path / "user.txt")):
        _, lines, *_ = write_files(flavor_site, tmp_path / "m", pip_requirements=given)
        assert [" ".join(line.split()) for line in lines] == [
            "mlflow==3.17.2",
            "torch==2.13.0 --hash=sha256:00",
            "-c constraints.txt",
        ]
        assert (tmp_path / "m" / "constraints.txt").read_text() == "numpy<3\n"


@pytest.mark.parametrize("given", ["no-such-file.txt", [1], 5])
@pytest.mark.parametrize("argument", ["pip_requirements", "extra_pip_requirements"])
def test_requirements_that_cannot_be_read_are_refused(flavor_site, tmp_path, argument, given):
    with pytest.raises(
        EnvironmentMismatchError,
        match=f"{argument} cannot be read(?s:.*)path of a requirements file",
    ):
        write_files(flavor_site, tmp_path / "m", **{argument: given})


def test_a_conda_env_is_used_as_it_is(flavor_site, tmp_path):
    given = {
        "name": "mine",
        "channels": ["defaults"],
        "dependencies": ["python=3.11", "openblas", {"pip": ["mlflow==3.17.2", "torch==2.13.0"]}],
    }
    (tmp_path / "env.yaml").write_text(yaml.safe_dump(given))
    for conda_env in (given, tmp_path / "env.yaml", str(tmp_path / "env.yaml")):
        recorded, lines, conda, _ = write_files(flavor_site, tmp_path / "m", conda_env=conda_env)
        assert conda == given
        assert lines == ["mlflow==3.17.2", "torch==2.13.0"]
        assert recorded.distributions["sympy"] == "1.14.0"


def test_a_conda_env_without_a_pip_section_gets_mlflow(flavor_site, tmp_path):
    given = {"name": "mine", "dependencies": ["python=3.11"]}
    _, lines, conda, _ = write_files(flavor_site, tmp_path / "m", conda_env=given)
    assert lines == ["mlflow==3.17.2"]
    assert conda == {"name": "mine", "dependencies": ["python=3.11", {"pip": ["mlflow==3.17.2"]}]}
    assert given["dependencies"] == ["python=3.11"], "the argument is not changed"


@pytest.mark.parametrize("conda_env", [{}, {"dependencies": "x"}, [], 5])
def test_a_conda_env_of_another_shape_is_refused(flavor_site, tmp_path, conda_env):
    with pytest.raises(
        EnvironmentMismatchError, match=r"(?s)describes no conda environment.*list of dependencies"
    ):
        write_files(flavor_site, tmp_path / "m", conda_env=conda_env)


def test_a_conda_env_file_that_cannot_be_read_is_named(flavor_site, tmp_path):
    (tmp_path / "env.yaml").write_text("a: [")
    for name in ("env.yaml", "absent.yaml"):
        with pytest.raises(EnvironmentMismatchError, match=f"(?s)conda_env cannot be read.*{name}"):
            write_files(flavor_site, tmp_path / "m", conda_env=tmp_path / name)


@pytest.mark.parametrize(
    "names",
    [
        ("conda_env", "pip_requirements"),
        ("conda_env", "extra_pip_requirements"),
        ("pip_requirements", "extra_pip_requirements"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(flavor_site, tmp_path, names):
    values = {
        "conda_env": {"dependencies": []},
        "pip_requirements": ["torch"],
        "extra_pip_requirements": ["torch"],
    }
    with pytest.raises(
        EnvironmentMismatchError, match=f"Only one of(?s:.*)where: {', '.join(names)}\n"
    ):
        write_files(flavor_site, tmp_path / "m", **{name: values[name] for name in names})


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch to be installed")
def test_mlflow_finds_no_mismatch_in_the_real_pins(monkeypatch):
    from mlflow.utils import requirements_utils

    found = []
    monkeypatch.setattr(
        requirements_utils._logger, "warning", lambda *message: found.append(message)
    )
    lines = requirements.requirement_lines(
        record(requirements.DEFAULT_ROOTS, torch_build={}).distributions
    )
    requirements_utils.warn_dependency_requirement_mismatches(lines)
    assert found == []
    requirements_utils.warn_dependency_requirement_mismatches(["numpy==0.1"])
    assert len(found) == 1, "the check listens to the right logger"
