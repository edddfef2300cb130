"""Sections that several pages share, each from the plain dict of a result."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltafl.report.bars import task_bars
from deltafl.report.grids import heat_map
from deltafl.report.lines import lambda_curves
from deltafl.report.page import Cell, Code, Column, Facts, Figure, Item, Section, Table

SINGLE, BASE = "single-task models", "base (unmerged)"
Result = Mapping[str, Any]
Row = Mapping[str, Any]


def percent(share: float | None) -> str:
    """93.4% for 0.934; an en dash for None."""
    return "–" if share is None else f"{100 * share:.1f}%"


def ratio(values: Sequence[float]) -> float:
    """Largest over smallest; 1 where there is nothing to compare."""
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def rules_of(result: Result) -> list[Row]:
    """The rows of merged models: without the single-task models and the base."""
    return [row for row in result["rows"] if row["rule"] not in (SINGLE, BASE)]


def row_of(result: Result, name: str) -> Row | None:
    """The row called `name`, if there is one."""
    return next((row for row in result["rows"] if row["rule"] == name), None)


def picked(result: Result) -> Row | None:
    """The merged row that validation puts first, which is the one to use."""
    scored = [row for row in rules_of(result) if row.get("val") is not None]
    return max(scored, key=lambda row: row["val"], default=None)


def headline(result: Result) -> Facts:
    """Mean test accuracy of the single-task models, the base and the merged model that validation chose."""
    named = [("mean accuracy of the separate models, one per task", row_of(result, SINGLE))]
    named.append(("mean accuracy of the base, before merging", row_of(result, BASE)))
    best = picked(result)
    if best is not None:
        named.insert(0, (f"mean test accuracy of one merged model ({best['rule']})", best))
    return Facts([(what, percent(row["mean"])) for what, row in named if row is not None])


def results_table(result: Result) -> Table:
    """Every rule with its chosen setting, accuracy per task, mean and normalised mean, references first."""
    tasks = list(result["tasks"])
    rows = [row for name in (SINGLE, BASE) if (row := row_of(result, name)) is not None]
    reference = range(len(rows))
    rows += rules_of(result)
    columns = [Column(name, "percent", best="max") for name in ("mean", "normalised", *tasks)]
    columns = [Column("model"), *columns, Column("setting")]
    cells: list[list[Cell]] = [
        [
            _label(row),
            row["mean"],
            row["normalized"],
            *(row["test"].get(task) for task in tasks),
            _setting(row),
        ]
        for row in rows
    ]
    caption = (
        "Accuracy on the test images, in percent; the best merged model of each column is bold. "
        "“Normalised” divides each task's accuracy by that of its own model before averaging."
    )
    if published := result.get("reference"):
        for row, line in zip(rows, cells, strict=True):
            line.insert(2, published.get(row["rule"]))
        columns.insert(2, Column("published", "percent"))
        others: list[list[Cell]] = [
            [name, None, value, *[None] * (len(tasks) + 2)]
            for name, value in only_published(result).items()
        ]
        cells[len(reference) : len(reference)] = others
        reference = range(len(reference) + len(others))
        caption += " “Published” is the mean that others report; it was not run here."
    return Table(columns, cells, caption, reference=tuple(reference))


def only_published(result: Result) -> dict[str, float]:
    """The published means of what is no row here."""
    ours = {row["rule"] for row in result["rows"]}
    return {
        name: value for name, value in (result.get("reference") or {}).items() if name not in ours
    }


def search_figures(result: Result) -> list[Item]:
    """The curves of the search, where there are any."""
    curves = {name: curve for name, curve in result.get("curves", {}).items() if curve}
    if not curves:
        return []
    base = row_of(result, BASE)
    caption = (
        "How much of every delta to add: too little and the merged model stays the base, too much and the deltas "
        "drown each other. The rings mark what was chosen. Rules with one curve merge to the same model here."
    )
    baseline = None if base is None else base.get("val")
    return [lambda_curves(curves, result.get("chosen", {}), baseline, caption=caption)]


def bars_figure(result: Result) -> Figure:
    """Accuracy per task of every distinct row, the references in grey."""
    rows = [row for row in result["rows"] if not row.get("same_as")]
    reference = [row["rule"] for row in rows if row["rule"] in (SINGLE, BASE)]
    caption = "The same numbers as bars. Grey is what to compare with: a separate model per task, and the base."
    ordered = sorted(rows, key=lambda row: row["rule"] not in reference)
    return task_bars(
        {row["rule"]: row["test"] for row in ordered}, reference=reference, caption=caption
    )


def cosine_figure(cosine: Result) -> Figure:
    """The heat map of the deltas' cosines, with what it means."""
    caption = (
        "Cosine between every two deltas: 1 is the same direction, 0 unrelated, below 0 opposed. "
        "Colour is relative to the strongest pair."
    )
    return heat_map(cosine["names"], cosine["matrix"], caption=caption)


def training_table(training: Sequence[Row]) -> Table:
    """What is known of each model's training; a fact that no model records has no column."""
    known = {
        "lr": Column("learning rate", "significant", 3),
        "num_steps": Column("steps", "number", 0),
        "num_examples": Column("examples", "number", 0),
        "norm": Column("length of the delta", "significant", 3),
    }
    keys = [key for key in known if any(row.get(key) is not None for row in training)]
    rows = [
        [row.get("task") or row.get("model"), *(row.get(key) for key in keys)] for row in training
    ]
    return Table(
        [Column("model"), *(known[key] for key in keys)], rows, "How each model was fine-tuned."
    )


def differences(training: Sequence[Row]) -> str:
    """One sentence on how far the trainings are apart, with the ratios that are at least 1.05; "" for none."""
    words = {
        "num_steps": "steps",
        "lr": "learning rate",
        "num_examples": "examples",
        "norm": "length of the delta",
    }
    found = []
    for key, word in words.items():
        apart = ratio([float(row[key]) for row in training if row.get(key) is not None])
        if apart >= 1.05:
            found.append(f"{word} {apart:.2g}-fold")
    return (
        f"Between the largest and the smallest, they differ in {_listed(found)}." if found else ""
    )


def origin(result: Result) -> Section:
    """How to get the page again: command, seed, time and versions."""
    facts = [f"seed {result['seed']}"] if result.get("seed") is not None else []
    if result.get("seconds") is not None:
        facts.append(f"{result['seconds']:.0f} seconds")
    facts += [f"{name} {version}" for name, version in result.get("versions", {}).items()]
    items = [Code(result["command"])] if result.get("command") else []
    return Section(
        "How to get these numbers again", f"{_listed(facts)}.".capitalize() if facts else "", items
    )


def _label(row: Row) -> str:
    return f"{row['rule']} (= {row['same_as']})" if row.get("same_as") else row["rule"]


def _setting(row: Row) -> str | None:
    names = {"rho": "ρ", "scaling_coef": "λ"}
    values = {**row.get("params", {}), "scaling_coef": row.get("scaling_coef")}
    if row["rule"] in (SINGLE, BASE):
        return None
    return ", ".join(
        f"{names.get(k, k)} {v:.3g}" if isinstance(v, int | float) else f"{names.get(k, k)} {v}"
        for k, v in values.items()
        if v is not None
    )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
