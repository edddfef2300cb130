"""Writing: the directory loads in transformers, is complete or absent, and says when the disk is full."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from checkpoint_files import (
    load,
    make_world,
    mean_step,
    python,
    refusal,
    reloaded,
    save,
    succeed,
    toy,
)
from deltafl.checkpoints.checkpoint import entries_of
from deltafl.checkpoints.layout import SIZES
from deltafl.checkpoints.writing import plan_shards
from tiny_models import tiny_llama

COPIED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "preprocessor_config.json", "merges.txt", "spiece.model",
    "chat_template.jinja", "added_tokens.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer files, and two fine-tunes."""
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "m0", "m1")):
        tiny_llama(root / name, seed).save(root / name)
    for name in {*COPIED, "README.md", "training.json"} - {"config.json"}:
        (root / "base" / name).write_text(json.dumps({"of": name}))
    return root


def merge_llamas(root: Path, out: Path, *more: object) -> None:
    models = root / "m0", root / "m1"
    succeed("merge", "--base", root / "base", "--models", *models, "--out", out, *more)


@pytest.mark.parametrize("size", ["5GB", "4KB", "1B"])
def test_a_merged_directory_loads_with_the_right_weights_and_the_files_of_the_base(
    llamas: Path, tmp_path: Path, size: str
) -> None:
    out = tmp_path / "out"
    merge_llamas(llamas, out, "--scaling-coef", 0.4, "--max-shard-size", size)
    held = reloaded(out, "AutoModelForCausalLM").state_dict()
    wanted = mean_step(load(llamas / "base"), tuple(load(llamas / m) for m in ("m0", "m1")), 0.4)
    assert set(held) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(held[name].double().numpy(), values, rtol=1e-6, atol=1e-7)
    names = {p.name for p in out.iterdir() if "safetensors" not in p.name}
    assert names == COPIED | {"README.md", "deltafl.json"}
    for name in COPIED:
        assert (out / name).read_bytes() == (llamas / "base" / name).read_bytes()


def test_shards_hold_at_most_the_given_size_and_the_index_is_right(llamas, tmp_path):
    merge_llamas(llamas, tmp_path / "out", "--max-shard-size", "4KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 2
    assert {f.name for f in shards} == set(index["weight_map"].values())
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = {n: file.get_tensor(n).nbytes for n in file.keys()}  # noqa: SIM118
        assert {n for n, f in index["weight_map"].items() if f == shard.name} == set(sizes)
        assert sum(sizes.values()) <= 4000 or len(sizes) == 1
        total += sum(sizes.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtype_changes_weights_and_config(llamas: Path, tmp_path: Path, dtype: str) -> None:
    merge_llamas(llamas, tmp_path / "out", "--dtype", dtype, "--server-lr", 0)
    wanted, base = getattr(torch, dtype), load(llamas / "base")
    for name, values in load(tmp_path / "out").items():
        assert values.dtype == wanted
        assert torch.equal(values, base[name].to(wanted))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert reloaded(tmp_path / "out", "AutoModelForCausalLM").dtype == wanted


def test_dtype_is_set_in_every_part_of_a_configuration(tmp_path: Path) -> None:
    """The index of the base's shards does not survive beside one file."""
    world, base, folder = make_world(tmp_path), toy(), tmp_path / "b"
    part = {"torch_dtype": "float32", "size": 3}
    save(folder, base, shards=3, config={**part, "vision_config": part, "list": [1]})
    succeed(*world.args, "--base", folder, "--dtype", "bfloat16")
    told, part = (
        json.loads((world.out / "config.json").read_text()),
        {**part, "torch_dtype": "bfloat16"},
    )
    assert told == {**part, "vision_config": part, "list": [1]}
    names = sorted(p.name for p in world.out.iterdir())
    assert names == ["README.md", "config.json", "deltafl.json", "model.safetensors"]


# Interrupted and full


def big_world(root: Path, megabytes: int) -> list[str]:
    """A base of zeros in a sparse file, and a fine-tune that is another: much to write, little to read."""
    rows = megabytes * 2**20 // 4096 // 4
    header = {
        f"layer.{i}": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [start, start + rows * 4096]}
        for i, start in enumerate(range(0, 4 * rows * 4096, rows * 4096))
    }  # fmt: skip
    raw = json.dumps(header).encode()
    for name in ("base", "m"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
        file = root / name / "model.safetensors"
        file.write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(file, 8 + len(raw) + 4 * rows * 4096)
    return f"merge --base {root}/base --models {root}/m --out {root}/out --quiet".split()


FORKED = """
import os, sys
from deltafl.cli import main
import deltafl.algebra.aggregate, deltafl.merge.run, deltafl.checkpoints.writing, torch
for line in sys.stdin:
    child = os.fork()
    if not child:
        main(line.split())
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""
"""Imports everything, then forks one `deltafl` for each line of input, so that a kill meets work and not imports."""


@pytest.fixture(scope="module")
def forking() -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", FORKED], text=True, **pipes) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def kill_after(server: subprocess.Popen[str], args: list[str], out: Path, delay: float) -> None:
    """Start `deltafl`, wait until it has begun to write `out`, wait on, and kill it."""
    assert server.stdin
    assert server.stdout
    before = set(out.parent.glob(f".{out.name}.*.tmp"))
    print(*args, file=server.stdin, flush=True)
    child = int(server.stdout.readline())
    patience = time.monotonic() + 30
    while not set(out.parent.glob(f".{out.name}.*.tmp")) - before:
        assert time.monotonic() < patience
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)  # its parent has not waited for it yet: the id is still its own
    assert server.stdout.readline() == "ended\n"


def test_a_kill_at_any_moment_leaves_the_output_absent_or_complete(tmp_path, forking):
    args, out = big_world(tmp_path, 200), tmp_path / "out"
    cut_short = 0
    for delay in (0.0, 0.03, 0.1, 0.2, 0.4):
        kill_after(forking, args, out, delay)
        if whole(out, 200):
            break
        left = [p for p in tmp_path.iterdir() if p.name.startswith(".out.")]
        assert len(left) == 1  # of this run: what the one before had left is gone
        cut_short += 1
    assert cut_short
    succeed(*args, "--overwrite")
    assert whole(out, 200)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m", "out"]


def test_a_kill_during_an_overwrite_never_costs_the_old_output(tmp_path, forking):
    args, out = [*big_world(tmp_path, 20), "--overwrite"], tmp_path / "out"
    succeed(*args)
    for delay in (0.0, 0.03, 0.06):
        kill_after(forking, args, out, delay)
        assert whole(out, 20) or any(
            p.name.endswith(".old.tmp") and whole(p, 20) for p in tmp_path.iterdir()
        )
    succeed(*args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m", "out"]


def whole(out: Path, megabytes: int) -> bool:
    """False: absent. True: complete. Anything between fails the test."""
    if not out.exists():
        return False
    names = sorted(p.name for p in out.iterdir())
    assert names == ["README.md", "config.json", "deltafl.json", "model.safetensors"]
    assert (out / "model.safetensors").stat().st_size >= megabytes * 2**20
    json.loads((out / "deltafl.json").read_text())
    return True


def test_a_limit_on_file_sizes_is_one_clear_line(tmp_path: Path) -> None:
    import resource

    args, limit = big_world(tmp_path, 20), (2**20, 2**20)
    before = sorted(p.name for p in tmp_path.iterdir())
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    done = python("from deltafl.cli import main; main()", *args, **limited)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f'error: "{tmp_path}": cannot hold the ')
    assert done.stderr.endswith(
        "(File too large); free some space, choose another --out, or lower --max-shard-size\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


FAILURES = {
    errno.ENOSPC: "No space left on device); free some space",
    errno.EIO: "cannot read or write: ",
}


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("code", FAILURES)
def test_a_disk_that_fills_or_fails_at_any_step_leaves_nothing(world, call, code, monkeypatch):

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    assert FAILURES[code] in refusal(world.root, *world.args)


def test_every_tensor_is_aligned_to_its_size() -> None:
    held = {"flag": torch.ones(3, dtype=torch.bool), **toy(dtype=torch.bfloat16)}
    held["wide"] = torch.ones(5).double()
    for shard in plan_shards(entries_of(held), None, 10**9):
        assert all(entry.start % SIZES[entry.dtype] == 0 for entry in shard.entries.values())
