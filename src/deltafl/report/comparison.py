"""The page of a comparison: suites of federated runs, and studies of merges."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from deltafl.report.figures import Figure, chart
from deltafl.report.page import Page
from deltafl.report.search import BASE, REFERENCES, task_map
from deltafl.report.tables import Column, Record, Table, columns_of, read_data, score_format

_TEXTS = read_data("questions")
_REFERENCES = (*REFERENCES, "base", "fine-tuned", "fine-tuned on D")


def comparison_page(result: Record) -> Page:
    """All suites and studies of a command: for each its question, tables and figures."""
    told = {**result["suites"], **result["studies"]}
    parts = {name: _part(name, one, result["metric"]) for name, one in told.items()}
    return Page("comparison", {"result": result, "parts": parts, "texts": _TEXTS})


def _part(name: str, told: Record, metric: str) -> dict[str, object]:
    """What failed or was left out, the tables, the figures."""
    labels, rows = told.get("labels", ()), told["rows"]
    kind = "suite" if labels else name
    columns = {key: Column(key) for key in labels} | columns_of("comparison", metric)
    columns |= columns_of(kind, metric)
    columns |= {
        name: Column(name, score_format(own) if own == metric else ".1%", best=True)
        for name, own in told.get("scores", {}).items()
    }
    caption = _TEXTS[kind]["caption"].format(**told)
    if any(row.get("best_round") == 0 for row in rows):
        caption += " Best round 0: no round was better than the model before training."
    correlation = (
        "Pearson's r of a merge's gain and the logarithm of its largest over smallest value."
    )
    relations, file = columns_of("relations"), f"{name}/relations"
    tables = [
        Table(rows, columns, caption, _REFERENCES, f"{name}/table"),
        Table(told.get("relations", []), relations, correlation, file=file),
    ]
    return {
        "notes": told["notes"],
        "tables": [table for table in tables if table.rows],
        "charts": list(_charts(name, kind, told, metric)),
    }


def _charts(name: str, kind: str, told: Record, metric: str) -> Iterator[Figure]:
    """Those that there are numbers for."""
    drawn = {**told, **_by_points(name, told)}
    for key, look in _TEXTS[kind].get("charts", {}).items():
        said: dict[str, Any] = {"caption": "Mean over seeds.", "file": f"{name}/{key}", **look}
        for what in ("title", "show"):
            said[what] = said[what].format(metric=metric, score=score_format(metric))
        if lines := drawn[key]:
            yield chart(lines, **said)
    if name in ("negation", "analogy"):
        points, score = pd.DataFrame(told["points"]), "target" if name == "negation" else "test"
        means = points.pivot_table(score, "task", "way", sort=False)
        scores = {way: means[way].to_dict() for way in points["way"].unique()}
        yield task_map(scores, metric, "For each task, mean over seeds.", f"{name}/by_task")


def _by_points(name: str, told: Record) -> Record:
    """The lines of charts that a record does not hold: gains against how far the trainings of a
    merge are apart, scores by number of models, where all tasks are the end of near and far.
    """
    if name == "training-heterogeneity":
        keys = ("steps", "norm")
        return {f"gain_by_{k}": _lines(told["points"], "rule", f"{k}_ratio", "gain") for k in keys}
    if name != "data-heterogeneity":
        return {}
    points = [
        {**row, "line": f"{row['rule']}, {subset}"}
        for row in told["rows"]
        if row["rule"] in (BASE, "task_arithmetic")
        for subset in (("near", "far") if row["subset"] == "all" else (row["subset"],))
    ]
    return {"by_size": _lines(points, "line", "size", "mean")}


def _lines(points: Sequence[Record], line: str, x: str, y: str) -> dict[str, list[list[float]]]:
    groups = pd.DataFrame(points).dropna(subset=y).groupby(line, sort=False)
    return {str(name): own[[x, y]].to_numpy().tolist() for name, own in groups}
