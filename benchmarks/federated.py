"""Compare federated rounds with a bare PyTorch loop and with Flower's simulation engine; see README.md beside this."""

import os

# Before torch is imported, for this process and all that it starts.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median

import torch
from measure import in_turns, machine, ratios, run, spread
from mlp import Mlp, Setting, bare_round, make_data, make_head, shards, shuffled
from ours_run import recipe_of, save_frozen_head, task_of

from deltafl.federated.rounds import Workers, run_round
from deltafl.federated.run import StateFile
from deltafl.federated.server import ServerState
from deltafl.federated.setup import begin
from deltafl.models import load_net
from deltafl.training.loop import Best
from deltafl.training.step import batches

HERE = Path(__file__).parent
WORK = HERE / "work"
PEER = ("flwr[simulation]", "torch==2.13.0")
CORES = os.cpu_count() or 1
LARGE = 6000
"""Width of the network of about five million parameters."""


def install_peer() -> None:
    """Flower in an environment of its own, unless it is there."""
    folder = WORK / "flower"
    if not (folder / "bin" / "flwr").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PEER], check=True)


class Rounds:
    """Rounds by deltafl that all start from the same state; `stack` ends the workers."""

    def __init__(
        self, setting: Setting, stack: ExitStack, *, width: int = 32, workers: int = 1
    ) -> None:
        head = save_frozen_head(WORK / "head")
        recipe = recipe_of(setting, head=head, out=str(WORK / "run"))
        net = load_net("mlp:Mlp", {"width": width})
        rows = tuple(shards(setting))
        self.federation = begin(net, task_of(setting), recipe, rows, begun=False)
        self.state = self.federation.initial_state()
        self.workers = stack.enter_context(Workers(self.federation, self.state, workers))

    def __call__(self, state: ServerState | None = None) -> ServerState:
        return run_round(state or self.state, self.federation, self.workers)[0]


class Bare:
    """The same round without deltafl."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.net, self.head = setting, Mlp(), make_head()
        self.images, self.labels = make_data(setting.clients * setting.examples)
        self.server = {n: t.clone() for n, t in self.net.state_dict().items()}

    def __call__(self) -> dict[str, torch.Tensor]:
        return self.on([shuffled(rows, self.setting) for rows in shards(self.setting)])

    def on(self, batches: Sequence) -> dict[str, torch.Tensor]:
        return bare_round(
            self.net, self.server, self.head, self.images, self.labels, batches, self.setting
        )


def check_same(ours: Sequence[Rounds], bare: Bare, setting: Setting) -> None:
    """All compute the same model as the bare loop when that is given the same batches."""
    size, seed = setting.batch, ours[0].federation.recipe.seed
    expected = bare.on(
        [
            batches(rows, size, seed, setting.steps, f"round 1 client {k}")
            for k, rows in enumerate(shards(setting))
        ]
    )
    for rounds in ours:
        for name, value in rounds().params.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def measure_rounds(setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Part (a), and a round whose clients train in a process for each core."""
    with ExitStack() as stack:
        bare = Bare(setting)
        ours = {
            "deltafl": Rounds(setting, stack),
            f"deltafl, {CORES} workers": Rounds(setting, stack, workers=CORES),
        }
        check_same(list(ours.values()), bare, setting)
        return in_turns({"bare loop": bare, **ours}, repeats)


def measure_state(setting: Setting, repeats: int, block: int) -> dict[str, dict[str, list[float]]]:
    """Part (c): seconds of a round, in blocks of `block`, with and without keeping the state.

    Every block writes one state at least, as a run does after its first round."""
    results = {}
    for width, own, workers in (
        (32, setting, 1),
        (LARGE, Setting(steps=5), 1),
        (LARGE, Setting(steps=5), CORES),
    ):
        stack = ExitStack()
        rounds = Rounds(own, stack, width=width, workers=workers)

        def plain(rounds: Rounds = rounds) -> float:
            state = rounds.state
            started = time.perf_counter()
            for _ in range(block):
                state = rounds(state)
            return (time.perf_counter() - started) / block

        def written(rounds: Rounds = rounds) -> float:
            kept, best = StateFile(WORK / "state.pt", {}), Best(tensors=rounds.state.params)
            state = rounds.state
            started = time.perf_counter()
            for _ in range(block):
                state = rounds(state)
                if kept.is_due():
                    kept.write(state, best)
            return (time.perf_counter() - started) / block

        plain()
        times: dict[str, list[float]] = {"off": [], "on": []}
        for turn in range(repeats):
            for name in ("off", "on") if turn % 2 else ("on", "off"):
                times[name].append(plain() if name == "off" else written())
        stack.close()
        count = sum(t.numel() for t in rounds.state.params.values())
        results[f"{count:,} parameters, workers: {workers}"] = times
    (WORK / "state.pt").unlink(missing_ok=True)
    return results


def measure_runs(setting: Setting, repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Part (b): name -> (wall seconds of whole processes, steady seconds of a round), in turns."""
    os.environ |= {"FEDERATED_SETTING": json.dumps(asdict(setting)), "PYTHONPATH": str(HERE)}
    flower = [str(WORK / "flower" / "bin" / "python"), "flower_run.py", str(CORES)]
    own = [sys.executable, "ours_run.py", str(WORK / "run")]
    commands = {
        "Flower": flower,
        f"deltafl, {CORES} workers": [*own, str(CORES)],
        "deltafl, one process": [*own, "1"],
    }
    results: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(WORK / "run", ignore_errors=True)
            sample = run(command)
            rounds = json.loads(
                next(x for x in reversed(sample.output.splitlines()) if x.startswith('{"rounds"'))
            )
            steady = median(rounds["rounds"][1:])
            results[name][0].append(sample.wall)
            results[name][1].append(steady)
            print(
                f"{turn + 1} {name}: {sample.wall:.1f} s, {steady:.3f} s a round",
                file=sys.stderr,
                flush=True,
            )
    shutil.rmtree(WORK / "run", ignore_errors=True)
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="turns of single rounds")
    parser.add_argument(
        "--state-repeats",
        type=int,
        default=8,
        help="turns with and without the state file; 0: none",
    )
    parser.add_argument("--state-block", type=int, default=10, help="rounds of such a turn")
    parser.add_argument(
        "--flower-repeats", type=int, default=3, help="whole runs; 0: without Flower"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def main() -> int:
    options, setting = parse(), Setting()
    torch.set_num_threads(1)
    WORK.mkdir(exist_ok=True)
    os.chdir(HERE)
    checks: list[tuple[str, float, float]] = []
    command = " ".join(["python benchmarks/federated.py", *sys.argv[1:]])
    lines = [f"`{command}`, {date.today()}, {machine()}, one thread a process."]

    times = measure_rounds(setting, options.repeats)
    lines += ["", "| one round | seconds | times the bare loop |", "|---|--:|--:|"]
    for name in times:
        lines.append(
            f"| {name} | {spread(times[name], 4)} | {spread(ratios(times, name, 'bare loop'))} |"
        )
    checks.append(("round / bare loop", median(ratios(times, "deltafl", "bare loop")), 1.05))

    if options.state_repeats:
        lines += [
            "",
            "| state file | off, seconds a round | on | more time, % |",
            "|---|--:|--:|--:|",
        ]
        for name, own in measure_state(setting, options.state_repeats, options.state_block).items():
            more = [100 * (r - 1) for r in ratios(own, "on", "off")]
            lines.append(
                f"| {name} | {spread(own['off'])} | {spread(own['on'])} | {spread(more, 1)} |"
            )
            checks.append((f"% more time with the state file, {name}", median(more), 2.0))

    if options.flower_repeats:
        install_peer()
        runs = measure_runs(setting, options.flower_repeats)
        lines += [
            "",
            f"| {setting.rounds} rounds, whole process | wall seconds | steady seconds a round |",
            "|---|--:|--:|",
        ]
        lines += [
            f"| {name} | {spread(wall, 2)} | {spread(steady)} |"
            for name, (wall, steady) in runs.items()
        ]
        ours = f"deltafl, {CORES} workers"
        for i, (what, target) in enumerate(
            (("wall time of 13 rounds", 4.0), ("steady round", 3.5))
        ):
            factor = median(runs["Flower"][i]) / median(runs[ours][i])
            lines.append(
                ("\n" if i == 0 else "")
                + f"- {what}: Flower takes {factor:.2f} times as long as {ours}; target {target}."
            )
            checks.append((f"{what}, deltafl / Flower", 1 / factor, 1 / target))

    missed = [
        f"- {what}: {value:.3f}, target {limit:.3f}"
        for what, value, limit in checks
        if value > limit
    ]
    lines += [
        "",
        "Targets missed:\n\n" + "\n".join(missed) if missed else "All targets are reached.",
    ]
    print("\n".join(lines))
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
