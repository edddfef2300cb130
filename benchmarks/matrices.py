"""Time rules of matrices, streamed, against their own decompositions; see README.md beside this file."""

import argparse
import sys
from datetime import date
from statistics import median

import torch
from measure import in_turns, machine, ratios, spread

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.rules.building import load_rules
from deltafl.rules.matrices import MatrixRule
from deltafl.rules.rule import Source

TARGET = 1.3
RULES = ("tsv_m", "iso_c", "iso_cts", "knots", "wudi")
SHAPES = {"attention": (384, 384), "up": (1536, 384), "down": (384, 1536), "norm": (384,)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns, of all in each")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    deltas = [
        {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in SHAPES.items()}
        for _ in range(options.models)
    ]
    updates = [Update(delta, Source(f"model {i}")) for i, delta in enumerate(deltas)]
    weights = [1 / options.models] * options.models
    matrices = [n for n, shape in SHAPES.items() if len(shape) == 2]
    stacks = [torch.stack([d[name] for d in deltas]).double() for name in matrices]
    command = " ".join(["python benchmarks/matrices.py", *sys.argv[1:]])
    print(f"`{command}`, {date.today()}, {machine()}, {options.threads} threads.\n")
    print(
        f"| {options.models} models, a ViT-S layer | s | over its own | over SVDs |\n|---|--:|--:|--:|"
    )
    missed = False
    for name in RULES:
        rule = load_rules()[name]()
        assert isinstance(rule, MatrixRule)
        times = in_turns(
            {
                "rule": lambda rule=rule: dict(Aggregate(rule, updates)),
                "own": lambda rule=rule: [rule.merged(stack, weights) for stack in stacks],
                "svd": lambda: [torch.linalg.svd(s, full_matrices=False) for s in stacks],
            },
            options.repeats,
        )
        own, svd = ratios(times, "rule", "own"), ratios(times, "rule", "svd")
        print(f"| {name} | {spread(times['rule'])} | {spread(own)} | {spread(svd)} |")
        missed |= median(own) > TARGET
    print(f"\nTarget: {TARGET} times its own; {'missed' if missed else 'reached'}.")
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
