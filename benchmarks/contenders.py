"""What is compared: the I/O floor, every rule of deltafl, and what mergekit has."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltafl.rules.building import load_rules

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
    """The models of one run, where scratch files go, and which deltafl is measured."""

    base: Path
    tuned: list[Path]
    work: Path
    program: str

    @property
    def files(self) -> list[Path]:
        return [folder / "model.safetensors" for folder in (self.base, *self.tuned)]


def floor(world: World, *flags: str) -> Contender:
    files = [str(f) for f in world.files]
    command = [sys.executable, "-S", str(HERE / "floor.py"), *flags]
    name = "with fsync" if flags else "without fsync"
    return Contender("floor", name, lambda out: [*command, str(out), *files])


def deltafl(world: World, rule: str, *extra: str, scaling_coef: float = SCALING_COEF) -> Contender:
    typical = load_rules()[rule].typical().items()
    command = [
        *(world.program, "merge", "--base", str(world.base), "--models", *map(str, world.tuned)),
        *("--method", rule, "--scaling-coef", str(scaling_coef)),
        *("--num-examples", *NUMBERS, "--num-steps", *NUMBERS),
        *(x for key, value in typical for x in (f"--{key.replace('_', '-')}", str(value))),
        *extra,
    ]
    return Contender("deltafl", " ".join([rule, *extra]), lambda out: [*command, "--out", str(out)])


def after_imports(world: World) -> Contender:
    models = [str(world.base), *map(str, world.tuned)]
    command = [sys.executable, str(HERE / "driver.py")]
    name = "task_arithmetic, after imports"
    return Contender("deltafl", name, lambda out: [*command, str(out), *models])


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
    found = [
        floor(world),
        floor(world, "--fsync"),
        *(deltafl(world, rule) for rule in load_rules()),
    ]
    found += [
        after_imports(world),
        *(deltafl(world, "task_arithmetic", x) for x in ("--hash", "--exact")),
    ]
    return [*found, *(mergekit(world, method) for method in MERGEKIT)] if peer else found
