"""The targets, as ratios of medians of one run, and the table."""

from collections.abc import Mapping, Sequence
from statistics import median

from measure import Sample, spread

COORDINATE = ("median", "trimmed_mean", "fedgma")
FLOOR = "without fsync"
MEGABYTE = 1e6
Results = Mapping[tuple[str, str, str], Sequence[Sample]]
"""(group, name, "warm" or "cold") -> runs."""


def wall(results: Results, group: str, name: str, cache: str) -> float:
    return median(s.wall for s in results[group, name, cache])


def rules(results: Results) -> list[str]:
    """The names of deltafl's whole-process runs."""
    return [
        name
        for group, name, cache in results
        if group == "deltafl" and cache == "warm" and "," not in name
    ]


def peak(results: Results, name: str) -> float:
    return max(s.anonymous for s in results["deltafl", name, "warm"]) / MEGABYTE


def misses(
    results: Results,
    doubled: Mapping[str, float],
    differing: Mapping[tuple[str, float], float],
) -> list[str]:
    """A line for each target that is not reached. Parts that were not run are not judged."""
    checks: list[tuple[str, float, float]] = []

    floor, plain = ("floor", FLOOR), ("deltafl", "task_arithmetic")
    ratios = [
        (plain, floor, "cold", 1.3),
        (plain, floor, "warm", 6.0),
        (("deltafl", "task_arithmetic, after imports"), floor, "warm", 2.5),
    ]
    for cache in ("warm", "cold"):
        ratios += [(("deltafl", rule), plain, cache, 2.0) for rule in COORDINATE]
        ratios.append((("deltafl", "ties"), plain, cache, 4.0))
    for own, over, cache, limit in ratios:
        if (*own, cache) in results and (*over, cache) in results:
            value = wall(results, *own, cache) / wall(results, *over, cache)
            checks.append((f"{own[1]} / {over[1]}, {cache}", value, limit))
    for name in rules(results):
        checks.append((f"anonymous MB of {name}", peak(results, name), 600.0))
        if name in doubled:
            checks.append(
                (
                    f"{name}: anonymous peak at twice the size / once",
                    doubled[name] / peak(results, name),
                    1.1,
                )
            )
    for (who, coef), share in differing.items():
        if who != "mergekit":
            checks.append(
                (f"differing elements, {who} at {coef}", share, 1e-6 if "--exact" in who else 5e-4)
            )
    return [
        f"{what}: {value:.3g}, limit {limit:g}" for what, value, limit in checks if value > limit
    ]


def table(results: Results, doubled: Mapping[str, float]) -> str:
    """Markdown: one row for each contender."""
    lines = [
        "| | warm, s | x floor | cold, s | x floor | CPU, s | anonymous MB | at twice the size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, name in dict.fromkeys((g, n) for g, n, _ in results):
        cells = []
        for cache in ("warm", "cold"):
            runs = results.get((group, name, cache))
            if not runs:
                cells += ["", ""]
                continue
            over = wall(results, "floor", FLOOR, cache)
            cells += [
                spread([s.wall for s in runs], 1),
                f"{median(s.wall for s in runs) / over:.2f}",
            ]
        runs = results[group, name, "warm"]
        cells.append(f"{median(s.cpu for s in runs):.1f}")
        cells.append(f"{max(s.anonymous for s in runs) / MEGABYTE:.0f}")
        cells.append(f"{doubled[name]:.0f}" if group == "deltafl" and name in doubled else "")
        lines.append(f"| {group}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differing_table(differing: Mapping[tuple[str, float], float]) -> str:
    """Markdown: share of elements that differ from the correctly rounded result."""
    coefs = sorted({coef for _, coef in differing})
    head = " | ".join(f"lambda {coef:g}" for coef in coefs)
    lines = [f"| task_arithmetic | {head} |", "|---" * (len(coefs) + 1) + "|"]
    for who in dict.fromkeys(who for who, _ in differing):
        lines.append(f"| {who} | {' | '.join(f'{differing[who, coef]:.2g}' for coef in coefs)} |")
    return "\n".join(lines)
