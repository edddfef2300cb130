"""Small checkpoints on disk, the command line in this process, and what an error must look like."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltafl.algebra.tensors import BLOCK
from deltafl.cli import main
from deltafl.errors import DeltaflError

CONFIG = {"model_type": "toy", "dtype": "float32"}


def toy(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model of four float tensors, one of them longer than a block, an empty one, and an integer one."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (9, 8),
        "layer.0.weight": (13, BLOCK // 10),
        "layer.0.bias": (8,),
        "norm.weight": (),
    }
    held = {n: (scale * torch.randn(s, generator=draw)).to(dtype) for n, s in shapes.items()}
    return held | {"none.weight": torch.empty(0, 3, dtype=dtype), "steps": torch.tensor([seed])}


def tuned(base: Mapping[str, Tensor], seed: int, scale: float = 0.01) -> dict[str, Tensor]:
    """A fine-tune of a base: every float tensor moved a little, integers replaced by the seed."""
    draw = torch.Generator().manual_seed(1000 + seed)

    def move(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.full_like(t, seed)
        noise = torch.randn(t.shape, generator=draw, dtype=torch.float64)
        return (t.double() + scale * noise).to(t.dtype)

    return {name: move(tensor) for name, tensor in base.items()}


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = CONFIG,
    training: object = None,
) -> Path:
    """A Hugging Face directory, written by safetensors itself; shards are dealt in turns."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if training is not None:
        (folder / "training.json").write_text(json.dumps(training))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, read by safetensors itself."""
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= load_file(file)
    return held


@dataclass(frozen=True)
class World:
    """A base and two fine-tunes of it, in memory and on disk."""

    root: Path
    base: dict[str, Tensor]
    models: tuple[dict[str, Tensor], ...]

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def args(self) -> list[str]:
        """`merge --base B --models M1 M2 --out DIR`."""
        names = [str(self.root / f"m{i}") for i in range(len(self.models))]
        base = str(self.root / "base")
        return ["merge", "--base", base, "--models", *names, "--out", str(self.out)]

    def file(self, name: str) -> Path:
        """The weights of "base", "m0" or "m1"."""
        return self.root / name / "model.safetensors"


def make_world(root: Path, n: int = 2, dtype: torch.dtype = torch.float32) -> World:
    base = toy(dtype=dtype)
    models = tuple(tuned(base, i) for i in range(n))
    save(root / "base", base)
    for i, model in enumerate(models):
        save(root / f"m{i}", model)
    return World(root, base, models)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def cli(*arguments: object) -> Outcome:
    """Run `deltafl ...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as leave:
            code = leave.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Outcome:
    """Run a command that must end well."""
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds what this one finds; `env` adds to the environment."""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env = os.environ | paths | options.pop("env", {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


def reloaded(folder: Path, kind: str = "AutoModel"):
    """from_pretrained, with nothing missing, unexpected or of another shape."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def files_in(root: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes; folders end in a slash."""
    return {
        str(p.relative_to(root)) + "/" * p.is_dir(): b"" if p.is_dir() else p.read_bytes()
        for p in sorted(root.rglob("*"))
    }


def problems_of(outcome: Outcome) -> list[str]:
    """The problems that a refusal lists: one `error:` line, or a numbered list under it. Nothing else is said."""
    assert outcome.code == 2, (outcome.code, outcome.out, outcome.err)
    lines = outcome.err.rstrip("\n").split("\n")
    assert lines[0].startswith("error: "), outcome.err
    if len(lines) == 1:
        return [lines[0].removeprefix("error: ")]
    assert lines[0] == f"error: {len(lines) - 1} problems:"
    for i, line in enumerate(lines[1:], 1):
        assert line.startswith(f"  {i}. ")
    return [line.split(". ", 1)[1] for line in lines[1:]]


def refused(root: Path, *arguments: object) -> list[str]:
    """Run a command that must be refused, and check that every file below `root` is as before; its problems."""
    before = files_in(root)
    outcome = cli(*arguments)
    assert files_in(root) == before
    assert not outcome.out
    return problems_of(outcome)


def refusal(root: Path, *arguments: object) -> str:
    """The one problem of a refused command."""
    (problem,) = refused(root, *arguments)
    return problem


def fails(told: str, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """The call raises a DeltaflError that tells this, each problem in one line."""
    with pytest.raises(DeltaflError, match=told) as caught:
        call(*arguments, **named)
    assert not any("\n" in problem for problem in caught.value.problems)


def mean_step(
    base: Mapping[str, Tensor], models: tuple[dict[str, Tensor], ...], scale: float
) -> dict[str, np.ndarray]:
    """theta0 + scale * sum_i (theta_i - theta0) in float64 by numpy: the independent reference for task arithmetic."""
    start = {n: t.double().numpy() for n, t in base.items() if t.is_floating_point()}
    return {n: t + scale * sum(m[n].double().numpy() - t for m in models) for n, t in start.items()}


def patch_header(file: Path, change) -> None:
    """Rewrite a safetensors file's header by `change(header)`, leaving its data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
