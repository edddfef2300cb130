"""The page of a comparison: suites of federated runs, and studies of merges."""

from collections.abc import Iterator, Mapping, Sequence

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
    caption = _TEXTS[name].get("caption", _TEXTS["suite"]["caption"]).format(**told)
    rows = told["rows"]
    if any(row.get("best_round") == 0 for row in rows):
        caption += " Best round 0: no round was better than the model before training."
    correlation = (
        "Pearson's r of a merge's gain and the logarithm of its largest over smallest value."
    )
    tables = [
        Table(rows, _columns(name, told, metric), caption, _REFERENCES, f"{name}/table"),
        Table(
            told.get("relations", []),
            columns_of("relations"),
            correlation,
            file=f"{name}/relations",
        ),
    ]
    return {
        "notes": told["notes"],
        "tables": [table for table in tables if table.rows],
        "charts": list(_charts(name, told, metric)),
    }


def _columns(name: str, told: Record, metric: str) -> dict[str, Column]:
    """The columns of every table; one has those that its rows have."""
    score, labels = score_format(metric), told.get("labels")
    means = {"negation": f"target test {metric}", "analogy": f"test {metric} on D"}
    if labels:
        means[name] = f"test {metric}"
    columns = {key: Column(key) for key in labels or ()} | columns_of("comparison", metric)
    if name in means:
        columns |= {"mean": Column(means[name], score), "spread": Column("±", score)}
    if labels or name in ("scaling-coef", "analogy"):
        columns["mean"] = columns["mean"]._replace(best=True)
    if name == "training-heterogeneity":
        columns["runs"] = Column("merges", "d")
    return columns


def _charts(name: str, told: Record, metric: str) -> Iterator[Figure]:
    """Those that there are numbers for."""
    score, kept = score_format(metric), f"Validation {metric}"
    for key, x_label in (("round", "round"), ("bytes", "MB sent by clients")):
        if lines := told.get(f"by_{key}"):
            yield _lines(f"{name}/by_{key}", lines, kept, x_label, score)
    if name == "training-heterogeneity":
        for key, word in (("steps", "steps"), ("norm", "lengths of the deltas")):
            yield _gains(f"{name}/gain_by_{key}", told, key, word)
    if "curves" in told:
        title = f"Normalised {metric} on validation"
        yield _lines(f"{name}/by_lambda", told["curves"], title, "scaling coefficient λ", ".1%")
    if name == "data-heterogeneity":
        lines = _by_size(told["rows"])
        yield _lines(f"{name}/by_size", lines, "Normalised test score", "models merged", ".1%")
    if name in ("negation", "analogy"):
        points = pd.DataFrame(told["points"])
        means = points.pivot_table(
            "target" if name == "negation" else "test", "task", "way", sort=False
        )
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


def _lines(file: str, lines: Mapping[str, list], title: str, x_label: str, show: str) -> Figure:
    return chart(lines, title, x_label, show=show, caption="Mean over seeds.", file=file)
