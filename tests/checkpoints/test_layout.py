"""Where tensors lie: directories, single files, the hub's cache, and identities."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_files import python, refusal, save, succeed, toy, tuned
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.errors import DeltaflError


def test_one_file_goes_before_an_index_and_safetensors_before_pickles(tmp_path: Path) -> None:
    """As in transformers."""
    folder = save(tmp_path / "x", toy(), shards=2)
    save_file(toy(5), folder / "model.safetensors")
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    assert [f.name for f in read_layout(folder).files] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            ["adapter_model"],
            'adapter_config.json": missing, or not what peft writes; save it again',
        ),
        (["a", "b"], 'the folder holds "a.safetensors", "b.safetensors"'),
        ([], "the folder holds no weights"),
    ],
)
def test_a_folder_that_is_no_model_is_an_error(world, files: list[str], line: str) -> None:
    folder = world.root / "other"
    folder.mkdir()
    for name in files:
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    assert line in refusal(world.root, *world.args, "--models", folder)


# The hub


def cached(home: Path, name: str, folder: Path, revision: str = "a" * 40) -> None:
    """Put a model folder into a hub cache as huggingface_hub lays it out."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    folder.rename(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")


def deltafl(home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads HF_HOME once."""
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | environment
    return python("from deltafl.cli import main; main()", *arguments, env=environment, cwd=home)


def assert_absent(done: subprocess.CompletedProcess[str], ref: str) -> None:
    said = f'error: "{ref}": no such file or folder, and not to be had from the'
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(said)


def test_hub_ids_are_found_in_the_hubs_cache_and_recorded_with_their_revision(world, tmp_path):
    succeed(*world.args)
    home = tmp_path / "home"
    cached(home, "owner/base", world.root / "base")
    cached(home, "owner/tuned", world.root / "m0", "b" * 40)
    args = ["merge", "--base", "owner/base", "--models", "owner/tuned", world.root / "m1"]
    args += ["--out", tmp_path / "hub"]
    done = deltafl(home, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "hub/model.safetensors").read_bytes() == world.file("out").read_bytes()
    assert (tmp_path / "hub/config.json").is_file()
    assert not (tmp_path / "hub/config.json").is_symlink()
    record = json.loads((tmp_path / "hub/deltafl.json").read_text())
    assert (record["base"]["ref"], record["base"]["revision"]) == ("owner/base", "a" * 40)
    assert [m["revision"] for m in record["models"]] == ["b" * 40, None]
    pinned = deltafl(home, *args[:4], f"owner/tuned@{'b' * 40}", "--dry-run")
    assert (pinned.returncode, pinned.stderr) == (0, "")
    absent = f"owner/tuned@{'c' * 40}"
    assert_absent(deltafl(home, *args[:4], absent, "--out", tmp_path / "absent"), absent)


def test_a_hub_that_does_not_answer_is_one_clear_line(world, tmp_path) -> None:
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    absent = "nobody/nothing-here"
    assert_absent(deltafl(tmp_path, *world.args, "--base", absent, **hub), absent)
    assert not world.out.exists()


@pytest.mark.parametrize("ref", ["no-such-folder", "./a/b", "/none/at/all", "~/models/x", "a/b/c"])
def test_a_path_is_never_asked_of_the_hub(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(DeltaflError) as error:
        read_layout(ref)
    assert str(error.value) == f'"{ref}": no such file or folder (a hub id has the form owner/name)'


# Identity


def test_the_fingerprint_sees_values_and_not_files(tmp_path: Path) -> None:
    base = toy()
    one = read_layout(save(tmp_path / "one", base))
    many = read_layout(save(tmp_path / "many", base, shards=3))
    other = read_layout(save(tmp_path / "other", tuned(base, 0)))
    renamed = read_layout(save(tmp_path / "renamed", {f"x.{n}": t for n, t in base.items()}))
    assert one.header_hash == many.header_hash == other.header_hash != renamed.header_hash
    assert fingerprint(one) == fingerprint(many) != fingerprint(other)
