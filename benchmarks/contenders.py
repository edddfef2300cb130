"""What is compared: the I/O floor, every rule of deltafl, and what mergekit has."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltafl.rules.rule import load_rules

HERE = Path(__file__).parent
SCALING_COEF = 0.3
NUMBERS = ["1000", "2000", "3000", "4000"]
"""Of examples, and of steps, of each model."""

MERGEKIT = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": SCALING_COEF},
    "ties": {"weight": SCALING_COEF, "density": 0.2},
    "dare_linear": {"weight": SCALING_COEF, "density": 0.5},
    "dare_ties": {"weight": SCALING_COEF, "density": 0.5},
}
MERGEKIT_FLAGS = [
    "--lazy-unpickle",
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--quiet",
    "--no-cuda",
]


@dataclass(frozen=True)
class Contender:
    """`command` makes the command line that writes the folder (the floor: the file) it is given."""

    group: str
    name: str
    command: Callable[[Path], list[str]]
    slow: bool = False


@dataclass(frozen=True)
class World:
    """The models of one run, and where scratch files go."""

    base: Path
    tuned: list[Path]
    work: Path

    @property
    def files(self) -> list[Path]:
        return [folder / "model.safetensors" for folder in (self.base, *self.tuned)]


def floor(world: World, *, sync: bool) -> Contender:
    flag = ["--fsync"] if sync else []
    files = [str(f) for f in world.files]
    command = [sys.executable, "-S", str(HERE / "floor.py"), *flag]
    return Contender(
        "floor", "with fsync" if sync else "without fsync", lambda out: [*command, str(out), *files]
    )


def deltafl(world: World, rule: str, *extra: str, scaling_coef: float = SCALING_COEF) -> Contender:
    command = [str(Path(sys.executable).with_name("deltafl")), "merge", "--base", str(world.base)]
    command += [
        "--models",
        *map(str, world.tuned),
        "--method",
        rule,
        "--scaling-coef",
        str(scaling_coef),
    ]
    command += ["--num-examples", *NUMBERS, "--num-steps", *NUMBERS]
    for key, value in load_rules()[rule].typical().items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    command += extra
    name = " ".join([rule, *extra])
    return Contender("deltafl", name, lambda out: [*command, "--out", str(out)])


def after_imports(world: World) -> Contender:
    command = [sys.executable, str(HERE / "driver.py")]
    models = [str(world.base), *map(str, world.tuned)]
    return Contender(
        "deltafl", "task_arithmetic, after imports", lambda out: [*command, str(out), *models]
    )


def mergekit(world: World, method: str, *, scaling_coef: float = SCALING_COEF) -> Contender:
    """mergekit in its own environment; JSON is YAML."""
    per_model = dict(MERGEKIT[method])
    shared: dict[str, object] = {"normalize": method == "linear"}
    if method != "linear":
        per_model["weight"] = scaling_coef
    config: dict[str, object] = {
        "models": [{"model": str(m), "parameters": per_model} for m in world.tuned],
        "merge_method": method,
        "parameters": shared,
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(world.base)
    file = world.work / f"{method}-{scaling_coef}.yaml"
    file.write_text(json.dumps(config))
    command = [str(world.work / "mergekit" / "bin" / "mergekit-yaml"), str(file)]
    return Contender(
        "mergekit", method, lambda out: [*command, str(out), *MERGEKIT_FLAGS], slow=True
    )


def contenders(world: World, *, peer: bool) -> list[Contender]:
    """All, in the order of the table."""
    found = [floor(world, sync=False), floor(world, sync=True)]
    found += [deltafl(world, rule) for rule in load_rules()]
    found += [
        after_imports(world),
        *(deltafl(world, "task_arithmetic", flag) for flag in ("--hash", "--exact")),
    ]
    return [*found, *(mergekit(world, method) for method in MERGEKIT)] if peer else found
