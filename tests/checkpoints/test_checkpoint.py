"""Reading: directories, shards, single files and state dicts give the same tensors; code in a pickle never runs."""

import json
import os
import pickle
from contextlib import closing
from pathlib import Path

import pytest
import torch

from checkpoint_files import fails, load, patch_header, refusal, save, succeed, toy
from deltafl.checkpoints.checkpoint import Checkpoint, entries_of, open_tensors
from deltafl.checkpoints.layout import read_layout


def same(a, b) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in b)


def state_dict(path: Path, held: object, *, zipped: bool = True) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return path


FORMS = {
    "directory": lambda root, held: save(root / "x", held),
    "shards": lambda root, held: save(root / "x", held, shards=3),
    "odd file name": lambda root, held: (save(root / "x", held) / "model.safetensors").rename(
        root / "x/w.safetensors"
    ),
    "folder with an odd file name": lambda root, held: FORMS["odd file name"](root, held).parent,
    "pt": lambda root, held: state_dict(root / "x.pt", held),
    "bin in a directory": lambda root, held: state_dict(root / "x/pytorch_model.bin", held).parent,
    "training checkpoint": lambda root, held: state_dict(
        root / "x.ckpt", {"epoch": 3, "state_dict": held}
    ),
    "legacy training checkpoint": lambda root, held: state_dict(
        root / "x.pth", {"model": held, "lr": 0.1}, zipped=False
    ),
    "parameters": lambda root, held: state_dict(
        root / "x.pt",
        {n: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in held.items()},
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_merges_to_the_same_bits(world, tmp_path, form: str) -> None:
    succeed(*world.args)
    base = FORMS[form](tmp_path / "of the base", world.base)
    other = FORMS[form](tmp_path / "of a model", world.models[0])
    assert same(open_tensors(other), world.models[0])
    succeed("merge", "--base", base, "--models", other, world.root / "m1", "--out", tmp_path / "x")
    assert same(load(tmp_path / "x"), load(world.out))


@pytest.mark.parametrize("twice", [False, True])
def test_shards_of_a_state_dict_are_read_together(tmp_path: Path, twice: bool) -> None:
    held = toy()
    names = list(held)
    for i, part in enumerate((names[:3], names[2 if twice else 3 :]), 1):
        state_dict(tmp_path / f"x/pytorch_model-{i}.bin", {n: held[n] for n in part})
    weight_map = {n: f"pytorch_model-{1 + (n in names[3:])}.bin" for n in names}
    (tmp_path / "x/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if not twice:
        assert same(open_tensors(tmp_path / "x"), held)
        return
    fails(f'"{names[2]}".*another file of the checkpoint', open_tensors, tmp_path / "x")


class Evil:
    """What a hostile checkpoint holds: an object whose unpickling runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(world, tmp_path, kind: str) -> None:
    mark, file = tmp_path.parent / f"{tmp_path.name}-ran", world.root / "evil.bin"
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps({"w": Evil(mark)}, protocol=2))
    else:
        state_dict(file, {**world.models[0], "hook": Evil(mark)}, zipped=kind == "zip")
    for place in ("--models", "--base"):
        problem = refusal(world.root, *world.args, place, file)
        assert problem.startswith(f'"{file}": ')
        assert "holds more than tensors, so that reading it could run code" in problem
        assert ".safetensors" in problem
    assert not mark.exists()
    if kind == "bare pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.exists()  # the trap works: only the refusal kept it shut
    mark.unlink()


DAMAGE = {
    "truncated zip": lambda raw, old: raw[:-100],
    "truncated legacy": lambda raw, old: old[:-5],
    "truncated early": lambda raw, old: old[:60],
    "empty": lambda raw, old: b"",
    "text": lambda raw, old: b"hello world\n" * 10,
    "noise": lambda raw, old: bytes(range(256)) * 4,
    "bad header": lambda raw, old: raw.replace(b"embed.weight", b"\xff" * 12),
    "zip of something else": lambda raw, old: b"PK\x03\x04" + b"\0" * 100,
}


OTHERS = {
    "is not a state dict (a mapping from names to tensors)": [1, 2],
    "is not a state dict (a mapping from names to": torch.ones(3),
    "is not a state dict (a mapping from names": {"a": torch.ones(2), "b": "text"},
    '"w" has dtype torch.complex128': {"w": torch.zeros(2, dtype=torch.complex128)},
}


@pytest.mark.parametrize("kind", [*DAMAGE, *OTHERS])
def test_a_file_that_is_damaged_or_no_state_dict_is_an_error(world, tmp_path, kind: str) -> None:
    raw, old = (
        state_dict(tmp_path / f"{zipped}.pt", world.models[0], zipped=zipped).read_bytes()
        for zipped in (True, False)
    )
    told, file = "truncated, corrupt, or holds more than tensors", tmp_path / "x"
    if kind in DAMAGE:
        file.write_bytes(DAMAGE[kind](raw, old))
    else:
        told, file = kind, state_dict(file, OTHERS[kind])
    problem = refusal(world.root, *world.args, "--models", file)
    assert problem.startswith(f'"{file}": ')
    assert told in problem


# The lazy mappings


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", toy())
    with closing(Checkpoint(read_layout(folder))) as checkpoint:
        os.truncate(folder / "model.safetensors", 1000)
        said = r"ended while tensor .* was read; was it changed meanwhile\?"
        fails(said, dict, checkpoint)


def test_entries_of_a_dict_say_what_entries_of_a_file_say(tmp_path: Path) -> None:
    held = toy() | {"half": torch.ones(2, dtype=torch.float16), "flag": torch.tensor(True)}

    def told(tensors) -> dict[str, tuple]:
        return {n: (entry.dtype, entry.shape) for n, entry in entries_of(tensors).items()}

    with closing(Checkpoint(read_layout(save(tmp_path / "x", held)))) as checkpoint:
        assert told(checkpoint) == told(held)


@pytest.mark.parametrize("wrong", [{"dtype": []}, {"data_offsets": [0, 1e999]}, {"shape": [1e999]}])
def test_a_header_of_wrong_kinds_is_one_clear_line(tmp_path: Path, wrong: dict) -> None:
    file = save(tmp_path / "x", {"w": torch.ones(1)}) / "model.safetensors"
    patch_header(file, lambda header: header["w"].update(wrong))
    fails(r"truncated, corrupt or not a safetensors file", read_layout, file)
