"""The closure of pins, and what is said about differences from it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import sys
from importlib.util import find_spec

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlflow_safeflavor.environment import differences
from mlflow_safeflavor.environment.differences import (
    Difference,
    find_differences,
    format_differences,
    require_same,
)
from mlflow_safeflavor.environment.record import record
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import EnvironmentMismatchError, IntegrityError

REAL_ROOTS = ("torch", "transformers", "tokenizers", "safetensors", "mlflow")
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch to be installed")


def make_environment(**changes):
    facts = record([], torch_build={}, path=[]).to_json()
    return Environment.from_json(facts | changes)


# The closure


def test_closure_follows_requirements_and_leaves_out_what_nobody_requires(site):
    site.install("a", "1.5", ["b>=1"])
    site.install("b", "2.0", ["C.c"])
    site.install("c_C", "3.0")
    site.install("stranger")
    assert site.closure("a") == {"a": "1.5", "b": "2.0", "c-c": "3.0"}


def test_closure_is_sorted_and_keeps_the_local_label(site):
    site.install("zlib", "1.0", ["torch"])
    site.install("torch", "2.13.0+cpu")
    assert list(site.closure("zlib").items()) == [("torch", "2.13.0+cpu"), ("zlib", "1.0")]


def test_extras_are_followed_only_where_asked_for_and_travel_along_edges(site):
    site.install("a", requires=['b[Fast_er]; extra == "x"', 'd; extra == "y"'])
    site.install("b", requires=['c; extra == "fast-er"', 'd; extra == "slow"'])
    site.install("c")
    site.install("d")
    assert set(site.closure("a")) == {"a"}
    assert set(site.closure("a[x]")) == {"a", "b", "c"}


def test_an_extra_that_comes_second_is_still_followed(site):
    site.install("a", requires=["b", "z"])
    site.install("b", requires=['c; extra == "x"'])
    site.install("c")
    site.install("z", requires=["b[x]"])
    assert set(site.closure("a")) == {"a", "b", "c", "z"}
    assert set(site.closure("b", "z")) == {"b", "c", "z"}


def test_markers_decide_for_this_machine(site):
    here, elsewhere = f'sys_platform == "{sys.platform}"', 'sys_platform == "plan9"'
    site.install("a", requires=[f"b; {here}", f"c; {elsewhere}", 'd; python_version < "3"'])
    site.install("b")
    site.install("c")
    assert set(site.closure("a", f"c; {elsewhere}")) == {"a", "b"}


def test_what_is_installed_is_read_anew_each_time(site):
    info = site.install("a", "1.0", ["b"])
    site.install("b")
    assert site.closure("a") == {"a": "1.0", "b": "1.0"}
    # all but the first is description
    (info / "METADATA").write_text("Name: a\nVersion: 2.0\n\nRequires-Dist: b\n")
    assert site.closure("a") == {"a": "2.0"}


def test_cycles_end(site):
    site.install("a", requires=["b[x]"])
    site.install("b", requires=["a", 'b[y]; extra == "x"', 'c; extra == "y"'])
    site.install("c", requires=["a"])
    assert set(site.closure("a")) == {"a", "b", "c"}


def test_a_missing_root_is_refused(site):
    with pytest.raises(
        EnvironmentMismatchError,
        match=r"(?s)not installed.*where: torch.*hint: pip install 'torch>=2'",
    ):
        site.record("torch>=2")


def test_a_missing_dependency_is_left_out_with_a_warning(site, caplog):
    site.install("a", requires=["gone>=3", 'optional; extra == "x"'])
    assert set(site.closure("a")) == {"a"}
    assert [r.getMessage() for r in caplog.records] == [
        "Not installed and so not pinned, although something requires it: a requires gone>=3"
    ]


def test_versions_that_contradict_each_other_are_refused(site):
    site.install("a", requires=["b>=2"])
    site.install("b", "1.9")
    with pytest.raises(
        EnvironmentMismatchError,
        match=r"(?s)wanted: a requires b>=2\n  found: b 1\.9\n.*pip_requirements",
    ):
        site.record("a")


def test_a_contradiction_is_only_logged_where_the_user_writes_the_pins(site, caplog):
    site.install("b", "1.9")
    assert site.closure("b>=2", strict=False) == {"b": "1.9"}
    assert "this model requires b>=2, found b 1.9" in caplog.text


def test_an_installed_prerelease_answers_an_open_requirement(site):
    site.install("a", requires=["b>=0.60"])
    site.install("b", "0.66b2")
    assert site.closure("a")["b"] == "0.66b2"


def test_the_loader_itself_is_never_pinned_and_followed_only_as_a_root(site):
    site.install(
        "mlflow-safeflavor",
        requires=["b"],
        direct_url={"url": "file:///x", "dir_info": {"editable": True}},
    )
    site.install("a", requires=["mlflow_safeflavor"])
    site.install("b")
    assert set(site.closure("a")) == {"a"}
    assert set(site.closure("mlflow-safeflavor")) == {"b"}


def test_the_first_folder_of_the_path_wins(site, tmp_path):
    site.install("a", "1.0")
    second = type(site)(tmp_path / "second")
    second.install("a", "2.0")
    site.path += second.path
    recorded = site.record("a")
    assert recorded.distributions["a"] == "1.0"
    assert find_differences(recorded, path=site.path) == []


# What cannot be pinned


@pytest.mark.parametrize(
    ("direct_url", "source"),
    [
        (
            {"url": "file:///src/a", "dir_info": {"editable": True}},
            "editable install of the folder file:///src/a",
        ),
        ({"url": "file:///src/a", "dir_info": {}}, "install of the folder file:///src/a"),
        (
            {"url": "https://git.example/a.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            "VCS install of git+https://git.example/a.git@c0ffee",
        ),
        (
            {"url": "file:///w/a-1.0-py3-none-any.whl", "archive_info": {}},
            "install of the archive file:///w/a-1.0",
        ),
        (["nonsense"], "direct_url.json cannot be read"),
    ],
)
def test_what_is_no_release_is_refused_by_name_with_the_hint(site, direct_url, source):
    site.install("root", requires=["a"])
    site.install("a", direct_url=direct_url)
    with pytest.raises(EnvironmentMismatchError) as caught:
        site.record("root")
    assert caught.value.where == "a"
    assert f"a 1.0: {source}" in str(caught.value.found) or source in str(caught.value.found)
    for way in (
        "pip install a==1.0 --find-links FOLDER",
        "extra_pip_requirements=['a @ git+",
        "pip_requirements",
    ):
        assert way in str(caught.value.hint)


def test_every_install_that_is_no_release_is_named(site):
    for name in ("a", "b"):
        site.install(
            name, direct_url={"url": f"file:///src/{name}", "dir_info": {"editable": True}}
        )
    site.install("unrelated", direct_url={"url": "file:///src/u", "dir_info": {}})
    with pytest.raises(EnvironmentMismatchError, match=r"where: a, b\n"):
        site.record("a", "b")
    assert set(site.closure("a", "b", editable_ok=["A", "b"])) == {"a", "b"}
    assert set(site.closure("a", "b", strict=False)) == {"a", "b"}


def test_an_egg_info_beside_its_setup_py_is_an_editable_install(site, tmp_path):
    source = tmp_path / "source"
    (source / "old.egg-info").mkdir(parents=True)
    (source / "old.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: old\nVersion: 1.0\n"
    )
    site.path = [str(source)]
    assert site.closure("old") == {"old": "1.0"}
    (source / "setup.py").touch()
    with pytest.raises(EnvironmentMismatchError, match=r"editable install of the folder .*source"):
        site.record("old")


def test_conda_packages_are_releases_although_they_name_a_build_folder(site):
    site.install(
        "a", direct_url={"url": "file:///croot/a_1/work", "dir_info": {}}, installer="conda\n"
    )
    assert site.closure("a") == {"a": "1.0"}


# environment.json


def test_an_environment_survives_json(site):
    site.install("torch", "2.13.0+cpu")
    recorded = record(["torch"], torch_build={"threads": 2, "cuda": None}, path=site.path)
    text = json.dumps(recorded.to_json())
    assert Environment.from_json(json.loads(text)) == recorded
    assert json.loads(text)["distributions"] == {"torch": "2.13.0+cpu"}
    assert json.loads(text)["torch_build"] == {"cuda": None, "threads": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"python": 3}, r"environment\.json, python\n  wanted: a version as a string\n  found: 3"),
        (
            {"libc": None},
            r"environment\.json, libc\n  wanted: a name and a version as a string\n  found: "
            r"nothing",
        ),
        ({"distributions": ["a"]}, r"environment\.json, distributions\n  wanted: an object"),
        (
            {"distributions": {"a": 1.0}},
            r"distributions, a\n  wanted: a version as a string\n  found: 1\.0",
        ),
        ({"torch_build": "x"}, r"environment\.json, torch_build"),
    ],
)
def test_malformed_json_is_refused(change, message):
    with pytest.raises(IntegrityError, match=message):
        make_environment(**change)


@pytest.mark.parametrize("value", [None, [], "x", {}])
def test_json_of_another_shape_is_refused(value):
    with pytest.raises(IntegrityError, match=r"environment\.json, python"):
        Environment.from_json(value)


# Differences


def test_nothing_differs_where_it_was_recorded(site):
    site.install("torch", "2.13.0+cpu", ["sympy"])
    site.install("sympy", "1.14.0")
    recorded = site.record("torch")
    assert find_differences(recorded, torch_build={"cuda": "12"}, path=site.path) == []
    assert format_differences([]) == ""


@pytest.mark.parametrize(
    ("change", "kind", "wanted"),
    [
        ({"python": "2.7.18"}, "python", "2.7.18"),
        ({"python": f"{sys.version_info[0]}.{sys.version_info[1]}.99"}, "python-patch", None),
        ({"implementation": "PyPy"}, "implementation", "PyPy"),
        ({"system": "Plan9"}, "system", "Plan9"),
        ({"machine": "s390x"}, "machine", "s390x"),
        ({"libc": "musl 1.2"}, "libc", "musl"),
    ],
)
def test_every_fact_of_the_platform_is_compared(change, kind, wanted):
    (name,) = change
    (difference,) = find_differences(make_environment(**change), path=[])
    assert (difference.kind, difference.name) == (kind, name)
    assert difference.wanted == (wanted or change[name])
    assert difference.found not in ("", difference.wanted)


def test_another_version_of_the_same_c_library_is_no_difference(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    assert find_differences(make_environment(libc="glibc 2.36"), path=[]) == []


@pytest.mark.parametrize(
    ("wanted", "found", "kind"),
    [
        ("2.13.0+cpu", "2.13.0", "torch-build"),
        ("2.13.0+cpu", "2.13.0+cu128", "torch-build"),
        ("2.13.0", "2.13.1", "distribution"),
    ],
)
def test_another_build_of_torch_is_told_from_another_release(site, wanted, found, kind):
    site.install("torch", found)
    recorded = make_environment(distributions={"torch": wanted})
    assert find_differences(recorded, path=site.path) == [Difference(kind, "torch", wanted, found)]


def test_every_pin_is_compared_and_missing_ones_are_found(site):
    site.install("same", "1.0")
    site.install("other", "1.0+b")
    recorded = make_environment(distributions={"same": "1.0", "other": "1.0+a", "gone": "3"})
    assert find_differences(recorded, path=site.path) == [
        Difference("missing", "gone", "3", "not installed"),
        Difference("distribution", "other", "1.0+a", "1.0+b"),
    ]


def test_versions_are_compared_as_versions_and_by_the_metadata(site):
    site.install("spelled", "1.0b1")
    site.install("lying", "2.0").rename(site.folder / "lying-1.0.dist-info")
    recorded = make_environment(distributions={"spelled": "1.0-beta.1", "lying": "2.0"})
    assert find_differences(recorded, path=site.path) == []


def test_a_folder_without_metadata_is_no_installation(site):
    (site.install("a", "1.0") / "METADATA").unlink()
    (difference,) = find_differences(make_environment(distributions={"a": "1.0"}), path=site.path)
    assert (difference.kind, difference.found) == ("missing", "not installed")
    with pytest.raises(EnvironmentMismatchError, match="not installed"):
        site.record("a")


def test_distributions_in_other_formats_are_found(site):
    (site.folder / "egg.egg-info").mkdir()
    (site.folder / "egg.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 1.0\nName: egg\nVersion: 4.2\n"
    )
    assert find_differences(make_environment(distributions={"egg": "4.2"}), path=site.path) == []


def test_facts_of_the_torch_build_are_compared_where_both_sides_know_them():
    recorded = make_environment(
        torch_build={"cuda": None, "cpu_capability": "AVX512", "threads": 2, "old": 1}
    )
    now = {"cuda": "12.8", "cpu_capability": "AVX2", "threads": 2, "new": 1}
    assert find_differences(recorded, torch_build=now, path=[]) == [
        Difference("hardware", "torch cpu_capability", "AVX512", "AVX2"),
        Difference("torch-build", "torch cuda", "None", "12.8"),
    ]


DIFFERENCES = [
    Difference("python", "python", "3.11.7", "3.12.1"),
    Difference("torch-build", "torch", "2.13.0+cpu", "2.13.0"),
]


def test_differences_are_told_in_aligned_columns_with_one_hint():
    heading, *rows, hint = format_differences(DIFFERENCES).splitlines()
    assert heading == "This is not the environment that the model was saved in (2 differences)"
    assert rows == [
        "  python  wanted 3.11.7      found 3.12.1",
        "  torch   wanted 2.13.0+cpu  found 2.13.0",
    ]
    assert hint.startswith("  hint: install requirements.txt of the model")
    assert str(DIFFERENCES[1]) == "torch: wanted 2.13.0+cpu, found 2.13.0"


@pytest.fixture
def differing(site):
    site.install("numpy", "1.0")
    return make_environment(distributions={"numpy": "2.4.6"})


def test_policy_error_raises_the_table(differing, site):
    with pytest.raises(EnvironmentMismatchError) as caught:
        require_same(differing, policy="error", path=site.path)
    text = str(caught.value)
    assert (
        "(1 difference)\n  numpy  wanted 2.4.6  found 1.0\n  hint: install requirements.txt" in text
    )
    assert 'environment="warn"' in text


def test_policy_warn_logs_the_table_and_returns_it(differing, site, caplog):
    differences = require_same(differing, policy="warn", path=site.path)
    assert differences == [Difference("distribution", "numpy", "2.4.6", "1.0")]
    (logged,) = caplog.records
    assert (logged.levelno, logged.name) == (logging.WARNING, "mlflow.safeflavor")
    assert logged.getMessage() == format_differences(differences)


def test_policy_ignore_does_not_look(differing, site, caplog, monkeypatch):
    monkeypatch.setattr(differences, "find_differences", lambda *_, **__: pytest.fail("it looked"))
    assert require_same(differing, policy="ignore", path=site.path) == []
    assert caplog.records == []


@pytest.mark.parametrize("policy", ["warn", "error"])
def test_no_difference_is_no_message(site, caplog, policy):
    site.install("numpy", "1.0")
    same = make_environment(distributions={"numpy": "1.0"})
    assert require_same(same, policy=policy, path=site.path) == []
    assert caplog.records == []


def test_an_unknown_policy_names_the_allowed_ones(differing):
    with pytest.raises(
        EnvironmentMismatchError,
        match=r"(?s)Unknown policy.*'ignore', 'warn', 'error'.*found: 'strict'",
    ):
        require_same(differing, policy="strict")


# The real environment


@pytest.fixture(scope="module")
def real():
    return record(REAL_ROOTS, torch_build={})


@needs_torch
def test_the_real_closure_is_closed(real):
    for name in real.distributions:
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in real.distributions, (
                    f"{name} requires {requirement}"
                )
    for name in REAL_ROOTS:
        assert real.distributions[name] == importlib.metadata.version(name)
    assert "mlflow-safeflavor" not in real.distributions


@needs_torch
def test_the_real_environment_is_like_itself(real):
    assert find_differences(real) == []
    changed = dataclasses.replace(real, distributions={**real.distributions, "torch": "0.1"})
    assert [d.name for d in find_differences(changed)] == ["torch"]
