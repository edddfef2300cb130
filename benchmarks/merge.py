"""Compare deltafl merge with the plain I/O floor and with mergekit; see README.md beside this file."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from datetime import date
from pathlib import Path

from contenders import Contender, World, contenders, deltafl, mergekit
from measure import Sample, machine, make_cold, make_warm, run
from rounding import share_differing
from targets import differing_table, misses, rules, table

from models import make_models

WORK = Path(__file__).parent / "work"
PEER = ("mergekit==0.1.5", "torch==2.13.0")
COEFS = (0.25, 0.3, 0.35)


def install_peer() -> None:
    """mergekit in an environment of its own, unless it is there."""
    folder = WORK / "mergekit"
    if not (folder / "bin" / "mergekit-yaml").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PEER], check=True)


def remove(path: Path) -> None:
    """Delete an output, so that nothing of it is written back during the next run."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def measure(contender: Contender, world: World, cache: str) -> Sample:
    """One run with a warm or a cold page cache; its output is deleted."""
    out = world.work / "output"
    remove(out)
    os.sync()
    (make_warm if cache == "warm" else make_cold)(world.files)
    try:
        sample = run(contender.command(out))
    finally:
        remove(out)
    if contender.name.endswith("after imports"):
        sample = replace(sample, wall=json.loads(sample.output.splitlines()[-1])["seconds"])
    return sample


def measure_all(
    world: World, options: argparse.Namespace
) -> dict[tuple[str, str, str], list[Sample]]:
    """All contenders in turns, round by round; slow ones in the first rounds only.

    Each round begins with another one: what ran before, and the memory that it gave back, changes how long one takes.
    """
    results: dict[tuple[str, str, str], list[Sample]] = {}
    for cache in options.cache:
        for turn in range(options.repeats):
            everyone = [
                (f"{c.group} {c.name}", c)
                for c in contenders(world, peer=options.mergekit_repeats > 0)
            ]
            wanted = [(label, c) for label, c in everyone if re.search(options.only, label)]
            first = turn % len(wanted)
            for label, contender in wanted[first:] + wanted[:first]:
                if contender.slow and turn >= options.mergekit_repeats:
                    continue
                sample = measure(contender, world, cache)
                results.setdefault((contender.group, contender.name, cache), []).append(sample)
                told = (
                    f"{sample.wall:.2f} s, CPU {sample.cpu:.2f} s, {sample.anonymous / 1e6:.0f} MB"
                )
                print(f"{cache} {turn + 1} {label}: {told}", file=sys.stderr, flush=True)
    return results


def measure_doubled(names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Peak anonymous MB of every rule on models of twice the size, which are deleted afterwards."""
    world = World(*make_models(WORK, 2 * options.scale), WORK, options.deltafl)
    try:
        peaks = {}
        for name in names:
            sample = measure(deltafl(world, *name.split()), world, "warm")
            peaks[name] = sample.anonymous / 1e6
            print(
                f"doubled {name}: {sample.wall:.2f} s, {peaks[name]:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
        return peaks
    finally:
        for folder in (world.base, *world.tuned):
            shutil.rmtree(folder)


def measure_rounding(world: World, *, peer: bool) -> dict[tuple[str, float], float]:
    """(who, lambda) -> share of elements that differ from the correctly rounded result."""
    out = world.work / "output"
    shares = {}
    for coef in COEFS:
        runs = [deltafl(world, "task_arithmetic", scaling_coef=coef)]
        runs.append(deltafl(world, "task_arithmetic", "--exact", scaling_coef=coef))
        if peer:
            runs.append(mergekit(world, "task_arithmetic", scaling_coef=coef))
        for contender in runs:
            remove(out)
            run(contender.command(out))
            who = (
                "mergekit"
                if contender.group == "mergekit"
                else contender.name.replace("task_arithmetic", "deltafl")
            )
            shares[who, coef] = share_differing(out, world.base, world.tuned, coef)
            print(f"differing {who} {coef}: {shares[who, coef]:.2g}", file=sys.stderr, flush=True)
    remove(out)
    return shares


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="times half a billion parameters")
    parser.add_argument("--repeats", type=int, default=5)
    program = str(Path(sys.executable).with_name("deltafl"))
    parser.add_argument("--deltafl", default=program, help="the program, as of another commit")
    parser.add_argument("--mergekit-repeats", type=int, default=1, help="0: without mergekit")
    parser.add_argument("--cache", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--only", default="", help="a pattern that finds the contenders wanted")
    parser.add_argument(
        "--no-doubled", action="store_true", help="skip the memory check at twice the size"
    )
    parser.add_argument(
        "--no-rounding", action="store_true", help="skip the comparison with float64"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def main() -> int:
    options = parse()
    WORK.mkdir(exist_ok=True)
    if options.mergekit_repeats:
        install_peer()
    world = World(*make_models(WORK, options.scale), WORK, options.deltafl)
    results = measure_all(world, options)
    doubled = {} if options.no_doubled else measure_doubled(rules(results), options)
    differing = (
        {} if options.no_rounding else measure_rounding(world, peer=options.mergekit_repeats > 0)
    )
    missed = misses(results, doubled, differing)
    tables = [table(results, doubled)] if ("floor", "without fsync", "warm") in results else []
    asked = " ".join(["python benchmarks/merge.py", *sys.argv[1:]])
    print(f"`{asked}`, {date.today()}, {machine()}; {options.repeats} rounds.", *tables, sep="\n\n")
    if differing:
        print(f"\n{differing_table(differing)}")
    print("\nTargets missed:", *missed, sep="\n- ") if missed else print(
        "\nAll targets are reached."
    )
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
