"""The page of a comparison: suites of federated runs, and studies of merges."""

from collections.abc import Iterator, Sequence

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
    if name == "data-heterogeneity":
        told = {**told, "by_size": _by_size(told["rows"])}
    for key, (title, x_label, how) in _TEXTS[kind].get("charts", {}).items():
        if lines := told[key]:
            show = score_format(metric) if how == "score" else how
            look = {"show": show, "caption": "Mean over seeds.", "file": f"{name}/{key}"}
            yield chart(lines, title.format(metric=metric), x_label, **look)
    if name == "training-heterogeneity":
        for key, word in (("steps", "steps"), ("norm", "lengths of the deltas")):
            yield _gains(f"{name}/gain_by_{key}", told, key, word)
    if name in ("negation", "analogy"):
        points, score = pd.DataFrame(told["points"]), "target" if name == "negation" else "test"
        means = points.pivot_table(score, "task", "way", sort=False)
        scores = {way: means[way].to_dict() for way in points["way"].unique()}
        yield task_map(scores, metric, "For each task, mean over seeds.", f"{name}/by_task")


def _gains(file: str, told: Record, key: str, word: str) -> Figure:
    """Gain of every merge against how far its trainings are apart."""
    rules = pd.DataFrame(told["points"]).dropna(subset="gain").groupby("rule", sort=False)
    return chart(
        {str(rule): own[[f"{key}_ratio", "gain"]].to_numpy().tolist() for rule, own in rules},
        "Gain over task arithmetic",
        f"{word}: largest over smallest",
        show="+.2%",
        joined=False,
        level=("no gain", 0),
        caption=f"Against how far the {word} are apart, one mark for each merge.",
        file=file,
    )


def _by_size(rows: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """Score by number of models; all tasks together are the end of near and far."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for subset in ("near", "far") if row["subset"] == "all" else (row["subset"],):
            if row["rule"] in (BASE, "task_arithmetic"):
                point = row["size"], row["mean"]
                lines.setdefault(f"{row['rule']}, {subset}", []).append(point)
    return lines
