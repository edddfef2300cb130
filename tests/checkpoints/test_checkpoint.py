"""Reading: directories, shards, single files and state dicts give the same tensors; code in a pickle never runs."""

import json
import os
import pickle
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_files import load, make_world, refusal, save, succeed, toy
from deltafl.algebra.tensors import Spec
from deltafl.checkpoints.checkpoint import Checkpoint, entries_of, open_tensors
from deltafl.checkpoints.layout import read_layout
from deltafl.errors import DeltaflError


def same(a, b) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in b)


def state_dict(path: Path, held: object, *, zipped: bool = True) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return path


FORMS = {
    "directory": lambda root, held: save(root / "x", held),
    "shards": lambda root, held: save(root / "x", held, shards=3),
    "one file": lambda root, held: save(root / "x", held) / "model.safetensors",
    "odd file name": lambda root, held: (save(root / "x", held) / "model.safetensors").rename(
        root / "x/w.safetensors"
    ),
    "folder with an odd file name": lambda root, held: (
        (save(root / "x", held) / "model.safetensors").rename(root / "x/w.safetensors").parent
    ),
    "pt": lambda root, held: state_dict(root / "x.pt", held),
    "legacy pt": lambda root, held: state_dict(root / "x.pt", held, zipped=False),
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
def test_every_form_merges_to_the_same_bits(tmp_path: Path, form: str) -> None:
    world = make_world(tmp_path)
    succeed(*world.args)
    base, other = (
        FORMS[form](tmp_path / name, held)
        for name, held in (("of the base", world.base), ("of a model", world.models[0]))
    )
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
    with pytest.raises(DeltaflError, match=f'"{names[2]}".*another file of the checkpoint'):
        open_tensors(tmp_path / "x")


class Evil:
    """What a hostile checkpoint holds: an object whose unpickling runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, kind: str) -> None:
    world, mark = make_world(tmp_path), tmp_path.parent / f"{tmp_path.name}-ran"
    file = world.root / "evil.bin"
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps({"w": Evil(mark)}, protocol=2))
    else:
        torch.save(
            {**world.models[0], "hook": Evil(mark)},
            file,
            _use_new_zipfile_serialization=kind == "zip",
        )
    for place in ("--models", "--base"):
        problem = refusal(world.root, *world.args, place, file)
        assert problem.startswith(
            f'"{file}": holds more than tensors, and reading it would run code ('
        )
        assert ".safetensors" in problem
    assert not mark.exists()
    torch.load(file, weights_only=False) if kind != "bare pickle" else pickle.loads(
        file.read_bytes()
    )
    assert mark.exists()  # the trap works: only the refusal kept it shut
    mark.unlink()


DAMAGE = {
    "truncated zip": lambda raw, old: raw[:-100],
    "truncated legacy": lambda raw, old: old[:-5],
    "truncated early": lambda raw, old: old[:60],
    "empty": lambda raw, old: b"",
    "text": lambda raw, old: b"hello world\n" * 10,
    "git lfs pointer": lambda raw, old: b"version https://git-lfs.github.com/spec/v1\n",
    "noise": lambda raw, old: bytes(range(256)) * 4,
    "bad header": lambda raw, old: raw.replace(b"embed.weight", b"\xff" * 12),
    "zip of something else": lambda raw, old: b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("damage", list(DAMAGE.values()), ids=list(DAMAGE))
def test_a_damaged_state_dict_is_an_error(tmp_path: Path, damage) -> None:
    world = make_world(tmp_path)
    raw = state_dict(tmp_path / "a.pt", world.models[0]).read_bytes()
    old = state_dict(tmp_path / "b.pt", world.models[0], zipped=False).read_bytes()
    file = world.root / "damaged.bin"
    file.write_bytes(damage(raw, old))
    problem = refusal(world.root, *world.args, "--models", file)
    assert problem == f'"{file}": truncated, corrupt or not a torch state dict; download it again'


@pytest.mark.parametrize(
    "held", [[1, 2], {"a": 1}, torch.ones(3), {"a": torch.ones(2), "b": "text"}]
)
def test_a_file_that_is_no_state_dict_is_an_error(tmp_path: Path, held: object) -> None:
    world = make_world(tmp_path)
    file = state_dict(world.root / "x.pt", held)
    problem = refusal(world.root, *world.args, "--models", file)
    assert problem == f'"{file}": is not a state dict (a mapping from names to tensors)'


# The lazy mappings


def test_blocks_are_the_tensors_parts(tmp_path: Path) -> None:
    held = toy(dtype=torch.bfloat16)
    with closing(Checkpoint(read_layout(save(tmp_path / "x", held)))) as checkpoint:
        name = "layer.0.weight"
        flat = held[name].reshape(-1)
        for start, stop in ((0, 1), (5, 7), (60_000, 80_000), (len(flat) - 1, len(flat)), (3, 3)):
            assert torch.equal(checkpoint.block(name, start, stop), flat[start:stop])
        assert checkpoint.spec(name) == Spec(tuple(held[name].shape), torch.bfloat16)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", toy())
    with closing(Checkpoint(read_layout(folder))) as checkpoint:
        os.truncate(folder / "model.safetensors", 1000)
        with pytest.raises(
            DeltaflError, match=r"ended while tensor .* was read; was it changed meanwhile\?"
        ):
            dict(checkpoint)


def test_a_file_that_vanished_leaves_no_other_open(tmp_path: Path) -> None:
    layout = read_layout(save(tmp_path / "x", toy(), shards=2))
    layout.files[1].unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Checkpoint(layout)
    assert len(os.listdir("/proc/self/fd")) == before


def test_entries_of_a_dict_say_what_entries_of_a_file_say(tmp_path: Path) -> None:
    held = toy() | {"half": torch.ones(2, dtype=torch.float16), "flag": torch.tensor(True)}
    save_file(held, tmp_path / "x.safetensors")
    with closing(Checkpoint(read_layout(tmp_path / "x.safetensors"))) as checkpoint:
        in_file, in_memory = entries_of(checkpoint), entries_of(held)
        assert set(in_file) == set(in_memory)
        for name in held:
            there, here = in_file[name], in_memory[name]
            assert (there.dtype, there.shape) == (here.dtype, here.shape)


def test_a_state_dict_with_a_dtype_that_no_merge_knows_is_refused(tmp_path: Path) -> None:
    file = state_dict(tmp_path / "x.pt", {"w": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(DeltaflError, match=r'"w" has dtype torch\.complex128'):
        open_tensors(file)


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": []}, {"data_offsets": [0, 1e999]}, {"shape": [1e999]}],
    ids=["dtype", "offset", "shape"],
)
def test_a_header_of_wrong_kinds_is_one_clear_line(
    tmp_path: Path, wrong: dict[str, object]
) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | wrong
    raw = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    with pytest.raises(DeltaflError, match=r"truncated, corrupt or not a safetensors file"):
        read_layout(tmp_path / "x.safetensors")
