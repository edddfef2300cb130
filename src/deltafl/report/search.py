"""The page of `deltafl search`, and the same told to a newcomer as `deltafl quickstart`."""

from collections.abc import Sequence

import pandas as pd

from deltafl.report.figures import Figure, chart, heat_map
from deltafl.report.inspection import cosine_map, differences, training_table
from deltafl.report.page import Page
from deltafl.report.tables import Column, Record, Table, columns_of, score_format

SINGLE, BASE = REFERENCES = "single-task models", "base (unmerged)"


def search_page(result: Record, *, story: bool = False) -> Page:
    """What a search tried, and the table tested once; `story` tells it to a newcomer."""
    rows = {row["rule"]: row for row in result["rows"]}
    merged = [
        row for rule, row in rows.items() if rule not in REFERENCES and row["val"] is not None
    ]
    scores = {rule: row["test"] for rule, row in rows.items()}
    caption = "The same in short; the stronger a cell, the better in its column."
    values = {
        "result": result,
        "story": story,
        "winner": max(merged, key=lambda row: row["val"], default=None),
        "single": rows.get(SINGLE),
        "base": rows.get(BASE),
        "differences": differences(result["training"]),
        "training": training_table(result["training"]),
        "cosine": cosine_map(result["cosine"]),
        "lambdas": {x for curve in result["curves"].values() for x, _ in curve},
        "curves": _curves(result, rows.get(BASE)),
        "results": results_table(result),
        "scores": task_map(scores, result["metric"], caption),
    }
    return Page("search", values)


def results_table(result: Record) -> Table:
    """Every rule with its setting, score per task, mean and normalised mean; references first."""
    metric, published = result["metric"], result.get("reference") or {}
    rows = [
        {**row, "published": published.get(row["rule"]), "setting": _setting(row)}
        | {f"test {task}": score for task, score in row["test"].items()}
        | {f"also {task}": score for task, score in row.get("also", {}).items()}
        for row in result["rows"]
    ]
    others = published.keys() - {row["rule"] for row in rows}
    unseen = [{"rule": n, "published": mean} for n, mean in published.items() if n in others]
    tasks, show = result["tasks"], score_format(metric)
    columns = columns_of("search", metric)
    columns |= {f"test {task}": Column(task, show, best=True) for task in tasks}
    also = [*result["rows"][0].get("also", {})]
    columns |= {
        f"also {name}": Column(name, show if name.endswith(f", {metric}") else ".1%", best=True)
        for name in also
    }
    columns |= {"val": Column("validation", _judged(result)[1]), "setting": Column("setting")}
    caption = f"Test {metric}; the best merged model of each column is bold."
    if any(row["normalized"] is not None for row in rows):
        caption += (
            " “Normalised” divides each task's score by that of its own model before averaging;"
            " a log-likelihood is the share of what that model gained over the base."
        )
    if also:
        caption += f" By {', '.join(also)} nothing was chosen; of single models the best counts."
    if published:
        caption += " “Published” is the mean that others report; it was not run here."
    return Table([*unseen, *rows], columns, caption, (*REFERENCES, *others), "table")


def task_map(scores: Record, metric: str, caption: str, file: str = "") -> Figure:
    """Test scores of models (down) on tasks, in each column from the worst to the best."""
    frame, look = pd.DataFrame(scores).T, {"caption": caption, "file": file}
    return heat_map(frame, f"Test {metric}", show=score_format(metric), neutral=frame.min(), **look)


def _judged(result: Record) -> tuple[str, str]:
    """What candidates were compared by on validation data, and how that is written."""
    if result["criterion"] == "normalized":
        return f"Normalised {result['metric']}", ".1%"
    return result["metric"].capitalize(), score_format(result["metric"])


def _setting(row: Record) -> str | None:
    values = {key.replace("rho", "ρ"): value for key, value in row["params"].items()}
    texts = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in (values | {"λ": row["scaling_coef"]}).items()
        if value is not None
    ]
    return ", ".join(texts) or None


def _curves(result: Record, base: Record | None) -> Figure:
    """Score against λ; rules whose curves are equal share one line."""
    groups: dict[tuple[Sequence[float], ...], list[str]] = {}
    for rule, curve in result["curves"].items():
        groups.setdefault(tuple(sorted(map(tuple, curve))), []).append(rule)
    title, show = _judged(result)
    caption = (
        "How much of every delta to add: too little and the merged model stays the base, too much "
        "and the deltas drown each other. The rings mark what was chosen; rules with one curve "
        "merge to the same model here."
    )
    return chart(
        {" = ".join(rules): curve for curve, rules in groups.items()},
        f"{title} on validation",
        "scaling coefficient λ",
        show=show,
        rings={" = ".join(rules): result["chosen"].get(rules[0]) for rules in groups.values()},
        level=None if base is None else (BASE, base["val"]),
        caption=caption,
    )
