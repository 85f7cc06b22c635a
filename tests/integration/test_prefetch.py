"""Checkpoints for build stages: whole, pinned, checked, and there at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from artifacts import flip
from click.testing import CliRunner
from fake_hub import listing, running_hub
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mlflow_safeflavor import from_pretrained
from mlflow_safeflavor.checkpoints.prefetch import MANIFEST, prefetch
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.errors import InputError, IntegrityError, StructureError, WeightsError

NAME = "some/model"


@pytest.fixture
def checkpoint(tmp_path, tiny_bert, tiny_tokenizer):
    """A checkpoint folder as people publish it.

    Weights, tokenizer, and things that nobody should take.
    """
    folder = tmp_path / "published"
    tiny_bert().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("# A model\n")
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')\n")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    (folder / "model.fp16.safetensors").write_bytes(b"a variant")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub asks, with an empty cache."""
    with running_hub() as running:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


TAKEN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def same_weights(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# From a hub.


def test_weights_config_and_tokenizer_of_a_commit(hub, checkpoint, tmp_path):
    commit = hub.publish(NAME, checkpoint)
    done = prefetch(NAME, tmp_path / "out", revision=commit)
    assert done.fresh
    assert (done.source, done.revision) == (NAME, commit)
    assert names(tmp_path / "out") == {*TAKEN, MANIFEST}
    assert set(done.files) == TAKEN
    assert same_weights(tmp_path / "out", checkpoint)
    loaded: Any = from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 30
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["revision"] == commit
    rows = {row["name"]: row for row in listing(checkpoint)}
    assert manifest["files"]["model.safetensors"] == {
        key: rows["model.safetensors"][key] for key in ("sha256", "size")
    }
    assert not {"modeling_evil.py", "training_args.bin", "model.fp16.safetensors"} & set(
        hub.downloads
    )


def test_a_second_run_checks_and_downloads_nothing(hub, checkpoint, tmp_path):
    commit = hub.publish(NAME, checkpoint)
    prefetch(NAME, tmp_path / "out", revision=commit)
    hub.requests.clear()
    done = prefetch(NAME, tmp_path / "out", revision=commit)
    assert not done.fresh
    assert set(done.files) == TAKEN
    assert hub.requests == []


def test_a_damaged_folder_is_not_taken_for_done(hub, checkpoint, tmp_path):
    commit = hub.publish(NAME, checkpoint)
    prefetch(NAME, tmp_path / "out", revision=commit)
    flip(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "evil.py").touch()
    with pytest.raises(IntegrityError, match=r"not the ones that were prefetched") as caught:
        prefetch(NAME, tmp_path / "out", revision=commit)
    for said in ("model.safetensors was changed", "tokenizer.json is missing", "evil.py was added"):
        assert said in str(caught.value)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123"])
def test_a_revision_that_moves_is_refused_before_anything_is_asked(
    hub, checkpoint, tmp_path, revision
):
    hub.publish(NAME, checkpoint)
    with pytest.raises(StructureError, match=r"pinned revision(?s:.*)--resolve"):
        prefetch(NAME, tmp_path / "out", revision=revision)
    assert hub.requests == []
    assert not (tmp_path / "out").exists()


def test_a_branch_is_resolved_on_request_and_the_commit_recorded(hub, checkpoint, tmp_path):
    commit = hub.publish(NAME, checkpoint)
    done = prefetch(NAME, tmp_path / "out", revision="main", resolve=True)
    assert done.revision == commit
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["asked"], manifest["revision"]) == ("main", commit)
    assert not prefetch(NAME, tmp_path / "out", revision="main", resolve=True).fresh
    assert not prefetch(NAME, tmp_path / "out", revision=commit).fresh


def test_a_branch_that_has_moved_is_another_checkpoint(hub, checkpoint, tmp_path):
    first = hub.publish(NAME, checkpoint)
    prefetch(NAME, tmp_path / "out", revision="main", resolve=True)
    newer = shutil.copytree(checkpoint, tmp_path / "newer")
    (newer / "README.md").write_text("# A newer model\n")
    second = hub.publish(NAME, newer)
    with pytest.raises(IntegrityError, match="another checkpoint") as caught:
        prefetch(NAME, tmp_path / "out", revision="main", resolve=True)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_a_revision_that_is_not_there(hub, checkpoint, tmp_path):
    hub.publish(NAME, checkpoint)
    with pytest.raises(StructureError, match=r"cannot be read(?s:.*)RevisionNotFound"):
        prefetch(NAME, tmp_path / "out", revision="0" * 40)
    assert not (tmp_path / "out").exists()


def test_a_repository_that_is_not_there(hub, tmp_path):
    with pytest.raises(StructureError, match=r"cannot be read(?s:.*)nobody/nothing"):
        prefetch("nobody/nothing", tmp_path / "out", revision="0" * 40)


def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(hub, checkpoint, tmp_path):
    commit = hub.publish(NAME, checkpoint)
    size = (checkpoint / "model.safetensors").stat().st_size
    hub.cut_after = size // 2
    with pytest.raises(StructureError, match="cannot be read"):
        prefetch(NAME, tmp_path / "out", revision=commit)
    assert names(tmp_path) == {"published", "hub-cache"}, "neither the folder nor a staging folder"
    assert [
        path for path in (tmp_path / "hub-cache").rglob("model.safetensors") if path.is_file()
    ] == []
    hub.cut_after, hub.down = None, False
    assert prefetch(NAME, tmp_path / "out", revision=commit).fresh
    assert same_weights(tmp_path / "out", checkpoint)


def test_bytes_that_the_hub_does_not_list_are_refused(hub, checkpoint, tmp_path):
    kept = checkpoint / "listing.json.kept"
    rows = listing(checkpoint)
    flip(checkpoint / "model.safetensors")
    commit = hub.publish(NAME, checkpoint)
    kept.write_text(json.dumps(rows))
    with pytest.raises(
        IntegrityError, match=r"not the one that the hub lists(?s:.*)model\.safetensors"
    ):
        prefetch(NAME, tmp_path / "out", revision=commit)
    assert not (tmp_path / "out").exists()


def test_a_small_file_with_other_bytes_is_refused_too(hub, checkpoint, tmp_path):
    rows = listing(checkpoint)
    flip(checkpoint / "README.md")
    commit = hub.publish(NAME, checkpoint)
    (checkpoint / "listing.json.kept").write_text(json.dumps(rows))
    with pytest.raises(IntegrityError, match=r"README\.md"):
        prefetch(NAME, tmp_path / "out", revision=commit)


PROCESS = """
import sys
from mlflow_safeflavor.cli import main
main(["prefetch", sys.argv[1], "--revision", sys.argv[2], "-o", sys.argv[3]])
"""


@pytest.mark.slow
def test_as_a_command_with_nothing_but_the_variables_that_users_set(checkpoint, tmp_path):
    with running_hub() as hub:
        commit = hub.publish(NAME, checkpoint)
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "COLUMNS": "300",
        }
        command = [sys.executable, "-c", PROCESS, NAME, commit, str(tmp_path / "out")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{len(TAKEN)} files of {NAME} at {commit}" in done.stdout
    assert names(tmp_path / "out") == {*TAKEN, MANIFEST}


# From a folder.


def test_a_local_folder(checkpoint, tmp_path):
    done = prefetch(checkpoint, tmp_path / "out")
    assert (done.source, done.revision, done.fresh) == (None, None, True)
    assert names(tmp_path / "out") == {*TAKEN, MANIFEST}
    assert not prefetch(checkpoint, tmp_path / "out").fresh


def test_a_local_folder_that_has_changed_since(checkpoint, tmp_path):
    prefetch(checkpoint, tmp_path / "out")
    (checkpoint / "README.md").write_text("# Another\n")
    with pytest.raises(IntegrityError, match="another checkpoint"):
        prefetch(checkpoint, tmp_path / "out")


def test_a_local_folder_has_no_revision(checkpoint, tmp_path):
    with pytest.raises(InputError, match="no revision"):
        prefetch(checkpoint, tmp_path / "out", revision="0" * 40)


def test_what_cannot_be_loaded_is_not_left_behind(checkpoint, tmp_path):
    state = load_file(checkpoint / "model.safetensors")
    state.pop("bert.encoder.layer.0.attention.self.query.weight")
    from safetensors.torch import save_file

    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"attention\.self\.query\.weight"):
        prefetch(checkpoint, tmp_path / "out")
    assert names(tmp_path) == {"published"}


def test_a_target_with_something_else_in_it(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(IntegrityError, match="target path exists already"):
        prefetch(checkpoint, tmp_path / "out")
    assert names(tmp_path / "out") == {"mine.txt"}


@pytest.fixture
def pickled(checkpoint):
    """The same checkpoint with pickled weights only, tied and strided as torch keeps them."""
    state = load_file(checkpoint / "model.safetensors")
    torch.save(state, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


def test_pickled_weights_are_refused_unless_asked_for(pickled, tmp_path):
    with pytest.raises(StructureError, match=r"no safetensors(?s:.*)--convert"):
        prefetch(pickled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_become_safetensors(pickled, tmp_path):
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    assert prefetch(pickled, tmp_path / "out", convert=True).fresh
    assert names(tmp_path / "out") == {*TAKEN, MANIFEST}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    assert not prefetch(pickled, tmp_path / "out", convert=True).fresh


# As a command.


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *arguments: CliRunner().invoke(main, ["prefetch", *map(str, arguments)])


def test_the_command_says_what_it_did(run, checkpoint, tmp_path):
    done = run(
        checkpoint, "-o", tmp_path / "out", "--model-class", "BertModel", "--drop", "classifier.*"
    )
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out'}: {len(TAKEN)} files" in done.output
    again = run(checkpoint, "-o", tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert "already there" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([NAME, "--revision", "main"], "pinned revision"),
        (["/no/such folder"], "no such checkpoint"),
    ],
    ids=["a branch", "no folder"],
)
def test_errors_are_said_without_a_traceback(run, tmp_path, arguments, said):
    done = run(*arguments, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_an_unknown_model_class(run, checkpoint, tmp_path):
    done = run(checkpoint, "-o", tmp_path / "out", "--model-class", "NoModel")
    assert done.exit_code == 2
    assert "NoModel" in done.stderr
    assert not (tmp_path / "out").exists()
