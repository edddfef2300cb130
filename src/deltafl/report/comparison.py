"""The page of a comparison: suites of federated runs, and studies of merges."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from deltafl.report.figures import Figure, chart
from deltafl.report.page import Page
from deltafl.report.search import BASE, REFERENCES, task_map
from deltafl.report.tables import Column, Record, Table, score_format

_TEXTS = tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))
_REFERENCES = (*REFERENCES, "base", "fine-tuned", "fine-tuned on D")


def comparison_page(result: Record) -> Page:
    """All suites and studies of a command: for each its question, tables and figures."""
    metric = result["metric"]
    parts = {name: _suite(name, rows, metric) for name, rows in result["suites"].items()}
    parts |= {name: _study(name, study, metric) for name, study in result["studies"].items()}
    return Page("comparison", {"result": result, "parts": parts, "texts": _TEXTS})


def _suite(name: str, summaries: Sequence[Record], metric: str) -> dict[str, object]:
    """What failed, the table, the score by round and by bytes."""
    score = score_format(metric)
    columns = {key: Column(key) for key in summaries[0]["labels"]} | {
        "test": Column(f"test {metric}", score, best=True),
        "spread": Column("±", score),
        "runs": Column("runs", "d"),
        "val": Column("validation", score),
        "best_round": Column("best round", ".0f"),
        "megabytes_up": Column("MB up", ",.2f"),
    }
    caption = (
        "Test score once per run, at the round chosen on validation; ± is the standard deviation."
    )
    if any(s.get("best_round") == 0 for s in summaries):
        caption += " Best round 0: no round was better than the model before training."
    rows = [{**s, **s["labels"]} for s in summaries]
    able = [s for s in summaries if s["runs"]]
    by_round = {s["name"]: s["by_round"] for s in able}
    by_bytes = {s["name"]: [(x / 1e6, y) for x, y in s["by_bytes"]] for s in able}
    title = f"Validation {metric}"
    charts = [
        _lines(f"{name}/by_round", by_round, title, "round", score),
        _lines(f"{name}/by_bytes", by_bytes, title, "MB sent by clients", score),
    ]
    return {
        "notes": [f"{s['name']}: {s['failed']}" for s in summaries if s.get("failed")],
        "tables": [Table(rows, columns, caption, file=f"{name}/table")],
        "charts": charts if able else [],
    }


def _study(name: str, study: Record, metric: str) -> dict[str, object]:
    """What was left out, the tables, the figures."""
    caption = _TEXTS[name]["caption"].format(**study)
    columns = _columns(name, metric)
    relations = {
        "rule": Column("rule"),
        "steps": Column("with steps", ".2f"),
        "norm": Column("with norms", ".2f"),
        "points": Column("merges", "d"),
    }
    correlation = (
        "Pearson's r of a merge's gain and the logarithm of its largest over smallest value."
    )
    tables = [
        Table(study["rows"], columns, caption, _REFERENCES, f"{name}/table"),
        Table(study.get("relations", []), relations, correlation, file=f"{name}/relations"),
    ]
    return {
        "notes": study["notes"],
        "tables": [table for table in tables if table.rows],
        "charts": _charts(name, study, metric),
    }


def _columns(name: str, metric: str) -> dict[str, Column]:
    """The columns of every study; a table has those that its rows have."""
    score = score_format(metric)
    means = {"negation": f"target test {metric}", "analogy": f"test {metric} on D"}
    show = score if name in means else ".1%"
    return {
        "kind": Column("trainings"),
        "subset": Column("subset"),
        "size": Column("models", "d"),
        "cosine": Column("mean cosine", ".3f"),
        "rule": Column("rule"),
        "way": Column("model"),
        "mean": Column(
            means.get(name, "normalised test"),
            show,
            name in ("scaling-coef", "analogy"),
        ),
        "spread": Column("±", show),
        "control": Column(f"control test {metric}", score),
        "control_spread": Column("control ±", score),
        "gain": Column("gain, points", _points),
        "low": Column("95 % from", _points),
        "high": Column("to", _points),
        "accuracy": Column(f"test {metric}", score),
        "scaling_coef": Column("λ", ".2f"),
        "runs": Column("merges" if name == "training-heterogeneity" else "runs", "d"),
    }


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _charts(name: str, study: Record, metric: str) -> list[Figure]:
    if name == "training-heterogeneity":
        words = {"steps": "steps", "norm": "lengths of the deltas"}
        return [_gains(f"{name}/gain_by_{key}", study, key, word) for key, word in words.items()]
    if name == "scaling-coef":
        title = f"Normalised {metric} on validation"
        return [_lines(f"{name}/by_lambda", study["curves"], title, "scaling coefficient λ", ".1%")]
    if name == "data-heterogeneity":
        lines = _by_size(study["rows"])
        return [_lines(f"{name}/by_size", lines, "Normalised test score", "models merged", ".1%")]
    score = "target" if name == "negation" else "test"
    points = pd.DataFrame(study["points"])
    means = points.pivot_table(score, "task", "way", sort=False)
    scores = {str(way): means[way].to_dict() for way in points["way"].unique()}
    return [task_map(scores, metric, "For each task, mean over seeds.", f"{name}/by_task")]


def _gains(file: str, study: Record, key: str, word: str) -> Figure:
    """Gain of every merge against how far its trainings are apart."""
    points = pd.DataFrame(study["points"])
    rules = points[points["rule"] != "task_arithmetic"].groupby("rule", sort=False)
    return chart(
        {
            str(rule): pd.DataFrame(own)[[f"{key}_ratio", "gain"]].values.tolist()
            for rule, own in rules
        },
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
