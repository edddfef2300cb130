"""Compare federated rounds with a bare PyTorch loop and with Flower's simulation engine; see README.md beside this."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for this process and all that it starts

import argparse
import json
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median

import torch
from measure import machine, run
from mlp import Mlp, Setting, bare_round, make_data, make_head, shards, shuffled
from ours_run import NAMES, recipe_of

from deltafl.datasets.task import Split
from deltafl.federated import LocalTraining, ServerState, run_round
from deltafl.federated.client import moving
from deltafl.federated.controls import Controls
from deltafl.federated.rounds import World
from deltafl.federated.stacked import StackedTraining
from deltafl.federated.state import StateWriter
from deltafl.models import load_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.training import batch_ids

HERE = Path(__file__).parent
WORK = HERE / "work"
PEER = ("flwr[simulation]", "torch==2.13.0")
LARGE = 6000
"""Width of the network of about five million parameters."""


def install_peer() -> None:
    """Flower in an environment of its own, unless it is there."""
    folder = WORK / "flower"
    if not (folder / "bin" / "flwr").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PEER], check=True)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contender in every turn; each turn starts with another; two turns beforehand do not count."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, repeats):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            took = seconds(contenders[name])
            if turn >= 0:
                times[name].append(took)
    return times


class Rounds:
    """Rounds by deltafl that all start from the same state."""

    def __init__(self, setting: Setting, engine: str = "sequential", width: int = 32) -> None:
        recipe = recipe_of(setting, engine=engine)
        model = FlatModel(load_encoder("mlp:Mlp", {"width": width}))
        head = LinearHead(*make_head(), NAMES)
        params = {n: t.clone() for n, t in moving(model, head).items()}
        client = (StackedTraining if engine == "vmap" else LocalTraining)(model, head, recipe)
        split = Split(*make_data(setting.clients * setting.examples))
        controls = Controls(WORK / "controls")
        self.state = ServerState(0, params)
        self.world = World(recipe, split, tuple(shards(setting)), client, None, frozenset(params), controls)

    def __call__(self) -> ServerState:
        return run_round(self.state, self.world)[0]


class Bare:
    """The same round without deltafl."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.net, self.head = setting, Mlp(), make_head()
        self.images, self.labels = make_data(setting.clients * setting.examples)
        self.server = {n: t.clone() for n, t in self.net.state_dict().items()}

    def __call__(self) -> dict[str, torch.Tensor]:
        return self.on([shuffled(rows, self.setting) for rows in shards(self.setting)])

    def on(self, batches: Sequence) -> dict[str, torch.Tensor]:
        return bare_round(self.net, self.server, self.head, self.images, self.labels, batches, self.setting)


def check_same(ours: Rounds, stacked: Rounds, bare: Bare, setting: Setting) -> None:
    """All three compute the same model when they are given the same batches."""
    size, seed = setting.batch, ours.world.recipe.seed
    batches = [
        iter([rows[batch_ids(len(rows), size, seed, s, f"round 1 client {k}")] for s in range(setting.steps)])
        for k, rows in enumerate(shards(setting))
    ]
    expected = bare.on(batches)
    for rounds in (ours, stacked):
        for name, value in rounds().params.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def measure_rounds(setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Part (a) and (c)."""
    contenders = {"bare loop": Bare(setting), "deltafl": Rounds(setting), "deltafl, vmap": Rounds(setting, "vmap")}
    check_same(contenders["deltafl"], contenders["deltafl, vmap"], contenders["bare loop"], setting)
    return in_turns(contenders, repeats)


def measure_state(setting: Setting, repeats: int, block: int) -> dict[str, dict[str, list[float]]]:
    """Part (e): seconds of a round, in blocks of `block`, with and without writing the state after each.

    The wait for the last file, once in a run, does not count; the file of one block is never written during the next.
    """
    results = {}
    for width, own in ((32, setting), (LARGE, Setting(steps=5))):
        rounds = Rounds(own, width=width)

        def plain(rounds: Rounds = rounds) -> float:
            state = rounds.state
            started = time.perf_counter()
            for _ in range(block):
                state, _ = run_round(state, rounds.world)
            return (time.perf_counter() - started) / block

        def written(rounds: Rounds = rounds) -> float:
            writer = StateWriter(WORK / "state.safetensors", {}, rounds.world.controls)
            state = rounds.state
            started = time.perf_counter()
            for _ in range(block):
                state, _ = run_round(state, rounds.world)
                writer.offer(state)
            took = (time.perf_counter() - started) / block
            writer.finish()
            return took

        plain()
        times: dict[str, list[float]] = {"off": [], "on": []}
        for turn in range(repeats):
            for name in ("off", "on") if turn % 2 else ("on", "off"):
                times[name].append(plain() if name == "off" else written())
        results[f"{sum(t.numel() for t in rounds.state.params.values()):,} parameters"] = times
    (WORK / "state.safetensors").unlink(missing_ok=True)
    return results


def measure_runs(setting: Setting, repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Part (b): name -> (wall seconds of whole processes, steady seconds of a round), in turns."""
    os.environ |= {"FEDERATED_SETTING": json.dumps(asdict(setting)), "PYTHONPATH": str(HERE)}
    flower = [str(WORK / "flower" / "bin" / "python"), "flower_run.py", str(os.cpu_count())]
    own = [sys.executable, "ours_run.py", str(WORK / "run")]
    commands = {"Flower": flower, "deltafl": [*own, "sequential"], "deltafl, vmap": [*own, "vmap"]}
    results: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(WORK / "run", ignore_errors=True)
            sample = run(command)
            rounds = json.loads(next(x for x in reversed(sample.output.splitlines()) if x.startswith('{"rounds"')))
            steady = median(rounds["rounds"][1:])
            results[name][0].append(sample.wall)
            results[name][1].append(steady)
            print(f"{turn + 1} {name}: {sample.wall:.1f} s, {steady:.3f} s a round", file=sys.stderr, flush=True)
    shutil.rmtree(WORK / "run", ignore_errors=True)
    return results


def ratios(times: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """over / under in each turn."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and, in brackets, the quartiles."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="turns of single rounds")
    parser.add_argument("--state-repeats", type=int, default=8, help="turns with and without the state file; 0: none")
    parser.add_argument("--state-block", type=int, default=5, help="rounds of such a turn")
    parser.add_argument("--flower-repeats", type=int, default=3, help="whole runs; 0: without Flower")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def main() -> int:
    options, setting = parse(), Setting()
    torch.set_num_threads(1)
    WORK.mkdir(exist_ok=True)
    os.chdir(HERE)
    checks: list[tuple[str, float, float]] = []
    lines = [
        f"`{' '.join(['python benchmarks/federated.py', *sys.argv[1:]])}`, {date.today()}, {machine()}, one thread."
    ]

    times = measure_rounds(setting, options.repeats)
    lines += ["", "| one round | seconds | times the bare loop |", "|---|--:|--:|"]
    for name in times:
        lines.append(f"| {name} | {spread(times[name], 4)} | {spread(ratios(times, name, 'bare loop'))} |")
    lines += ["", f"vmap against sequential: {spread(ratios(times, 'deltafl', 'deltafl, vmap'), 2)} times faster."]
    checks.append(("round / bare loop", median(ratios(times, "deltafl", "bare loop")), 1.05))

    if options.state_repeats:
        lines += ["", "| state file | off, seconds a round | on | more time, % |", "|---|--:|--:|--:|"]
        for name, own in measure_state(setting, options.state_repeats, options.state_block).items():
            more = [100 * (r - 1) for r in ratios(own, "on", "off")]
            lines.append(f"| {name} | {spread(own['off'])} | {spread(own['on'])} | {spread(more, 1)} |")
            checks.append((f"% more time with the state file, {name}", median(more), 2.0))

    if options.flower_repeats:
        install_peer()
        runs = measure_runs(setting, options.flower_repeats)
        lines += [
            "",
            f"| {setting.rounds} rounds, whole process | wall seconds | steady seconds a round |",
            "|---|--:|--:|",
        ]
        lines += [f"| {name} | {spread(wall, 2)} | {spread(steady)} |" for name, (wall, steady) in runs.items()]
        for i, (what, target) in enumerate((("wall time of 13 rounds", 4.0), ("steady round", 3.5))):
            factor = median(runs["Flower"][i]) / median(runs["deltafl"][i])
            lines.append(
                ("\n" if i == 0 else "") + f"- {what}: Flower takes {factor:.2f} times as long; target {target}."
            )
            checks.append((f"{what}, deltafl / Flower", 1 / factor, 1 / target))

    missed = [f"- {what}: {value:.3f}, target {limit:.3f}" for what, value, limit in checks if value > limit]
    lines += ["", "Targets missed:\n\n" + "\n".join(missed) if missed else "All targets are reached."]
    print("\n".join(lines))
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
