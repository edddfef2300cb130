"""Race over the scores that an exhaustive `deltafl search` kept, in many orders; see README.md beside this."""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from torch import Tensor

from deltafl.merge.race import looks, orders, race


@dataclass(frozen=True)
class Table:
    """Scores of C candidates, (C, N_t) for each task, with the worth of a unit of a task's score."""

    labels: Sequence[str]
    scores: Mapping[str, Tensor]
    scale: Sequence[float]

    @property
    def values(self) -> Tensor:
        """Each candidate's score on the full data, float64 (C,)."""
        rows = [
            a * s.double().mean(1) for a, s in zip(self.scale, self.scores.values(), strict=True)
        ]
        return torch.stack(rows).mean(0)

    @property
    def sizes(self) -> list[int]:
        return [s.shape[1] for s in self.scores.values()]

    @property
    def per_example(self) -> float:
        """What one example of each task is worth."""
        return sum(a / n for a, n in zip(self.scale, self.sizes, strict=True)) / len(self.sizes)


def read(folder: Path) -> Table:
    """The table of an exhaustive search's output."""
    single = json.loads((folder / "result.json").read_text())["single_val"]
    with safe_open(folder / "scores.safetensors", "pt") as file:
        labels = json.loads(file.metadata()["candidates"])
        scores = {task: file.get_tensor(task) for task in single}
    return Table(labels, scores, [1 / single[task] for task in scores])


@dataclass(frozen=True)
class Outcome:
    """One race: examples evaluated, examples of the winner's way to the best (0: it is the best), survivors."""

    examples: int
    examples_short: float
    winner: str
    kept: int


def run(table: Table, confidence: float, seed: int) -> Outcome:
    """Race the table's candidates in the order of `seed`."""
    plan, drawn = looks(table.sizes), orders(table.sizes, seed)
    stacks = [s[:, order] for s, order in zip(table.scores.values(), drawn, strict=True)]
    evaluated = 0

    def judge(alive: Sequence[int], look: int) -> list[Tensor]:
        nonlocal evaluated
        evaluated += len(alive) * (sum(plan[look]) - (sum(plan[look - 1]) if look else 0))
        return [s[list(alive), :count] for s, count in zip(stacks, plan[look], strict=True)]

    found = race(judge, len(table.labels), plan, table.scale, confidence)
    values = table.values
    kept = [candidate for candidate, dropped_at in enumerate(found) if dropped_at is None]
    winner = max(kept, key=lambda c: float(values[c]))
    short = float(values.max() - values[winner]) / table.per_example
    return Outcome(evaluated, short, table.labels[winner], len(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="output of `deltafl search` with strategy: exhaustive"
    )
    parser.add_argument("--orders", type=int, default=20, help="random subset orders to race in")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    args = parser.parse_args()
    table = read(args.folder)
    best = table.labels[int(table.values.argmax())]
    whole = len(table.labels) * sum(table.sizes)
    print(
        f"{len(table.labels)} candidates, {len(table.sizes)} tasks of {table.sizes} examples; exhaustive: {whole:,}"
    )
    started = time.perf_counter()
    found = [run(table, args.confidence, seed) for seed in range(args.orders)]
    seconds = (time.perf_counter() - started) / len(found)
    ratios = sorted(whole / o.examples for o in found)
    same, near = (sum(o.examples_short <= bound for o in found) for bound in (1e-9, 1 + 1e-9))
    print(
        f"best of all: {best}, {float(table.values.max()):.4f}; one example of each task is {table.per_example:.4f}"
    )
    print(f"times fewer examples: median {median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    print(
        f"candidates that saw everything: {min(o.kept for o in found)} to {max(o.kept for o in found)}"
    )
    print(
        f"winner as good as the best: {same} of {len(found)}; within one example per task: {near} of {len(found)}"
    )
    print(f"the race's own arithmetic: {seconds:.2f} s")
    if args.check and (median(ratios) < 5 or near < math.ceil(0.95 * len(found))):
        raise SystemExit(
            "missed: at least 5 times fewer examples, and within one example per task in 19 of 20 orders"
        )


if __name__ == "__main__":
    main()
