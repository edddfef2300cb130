"""Tables, figures and sections of the one-shot studies of `deltafl suite`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltafl.report.bars import draw_task_bars
from deltafl.report.lines import draw_lines
from deltafl.report.page import Column, Item, Section, Table
from deltafl.report.parts import BASE, SINGLE
from deltafl.report.scatter import draw_points
from deltafl.report.svg import WIDE, drawn, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Result = Mapping[str, Any]

QUESTIONS = {
    "training-heterogeneity": "Do rules that know of steps, norms or signs help where the models were trained with "
    "other learning rates and numbers of steps? Every gain is over task arithmetic on the same models.",
    "data-heterogeneity": "Does it matter how far the tasks are apart? Near and far are the subsets with the largest "
    "and the smallest mean cosine of their task vectors; beside them one data set whose classes are dealt to several "
    "models.",
    "scaling-coef": "How far along the merged delta should one go?",
    "negation": "Can a task be forgotten by subtracting its task vector, while another one is kept?",
    "analogy": "A is to B as C is to D: does C + (B - A) know what nobody trained it on?",
}

TEST = Column("normalised test %", "percent", 1, "max")
OF_MANY = Column("normalised test %", "percent", 1)
"""Where rows of different models share a table: the largest of all says nothing."""

SPREAD = Column("± %", "percent", 1)
RUNS = Column("runs", "number", 0)
MERGES = Column("merges", "number", 0)
GAINS = (
    Column("gain, points", "percent", 2),
    Column("95 % from", "percent", 2),
    Column("to", "percent", 2),
)
NORMALISED = "“Normalised” divides each task's accuracy by that of its own model before averaging; ± is the standard "
NORMALISED += "deviation over runs. λ = 0 is a candidate: a rule that validation puts below the base is the base."


@dataclass(frozen=True)
class Chart:
    """A drawing by its file name, with what a reader is told of it."""

    name: str
    draw: Callable[[int], "Drawing"]
    caption: str
    alt: str


def study_tables(name: str, result: Result) -> dict[str, Table]:
    """File name -> table."""
    return {"table": _TABLES[name](result)} | (
        {"relations": _relations(result)} if result.get("relations") else {}
    )  # fmt: skip


def study_charts(name: str, result: Result) -> list[Chart]:
    """The figures of a study."""
    return _CHARTS[name](result)


def study_figures(name: str, result: Result) -> dict[str, bytes]:
    """File name -> PNG."""
    return {chart.name: to_png(chart.draw, WIDE) for chart in study_charts(name, result)}


def study_section(name: str, result: Result) -> Section:
    """The question, the tables, the figures, and what was left out."""
    items: list[Item] = [*study_tables(name, result).values()]
    items += [drawn(chart.draw, chart.caption, chart.alt) for chart in study_charts(name, result)]
    text = "\n\n".join([QUESTIONS[name], *result["notes"]])
    return Section(name.capitalize().replace("-", " "), text, items)


def _gain(row: Result) -> list[Any]:
    return [row["gain"], row["low"], row["high"]]


def _training(result: Result) -> Table:
    rows = [
        [
            row["kind"],
            row["rule"],
            row["mean"],
            row["spread"],
            *_gain(row),
            row["accuracy"],
            row["runs"],
        ]
        for row in result["rows"]
    ]
    columns = [
        Column("models"),
        Column("rule"),
        OF_MANY,
        SPREAD,
        *GAINS,
        Column("test %", "percent", 1),
        MERGES,
    ]
    caption = (
        f"{NORMALISED.replace('over runs', 'over merges')} The interval is Student's over all merges, of the gain over "
        "task arithmetic on the same models; merges of one seed share models, so that it is a little too narrow."
    )
    return Table(columns, rows, caption, _references(result))


def _data(result: Result) -> Table:
    rows = [
        [
            r["subset"],
            r["size"],
            r["cosine"],
            r["rule"],
            r["mean"],
            r["spread"],
            *_gain(r),
            r["runs"],
        ]
        for r in result["rows"]
    ]
    columns = [
        Column("subset"),
        Column("models", "number", 0),
        Column("mean cosine", "number", 3),
        Column("rule"),
        OF_MANY,
        SPREAD,
        *GAINS,
        RUNS,
    ]
    return Table(columns, rows, NORMALISED, _references(result))


def _coefficients(result: Result) -> Table:
    rows = [
        [r["rule"], r["mean"], r["spread"], r["accuracy"], r["scaling_coef"], r["runs"]]
        for r in result["rows"]
    ]
    columns = [
        Column("rule"),
        TEST,
        SPREAD,
        Column("test %", "percent", 1),
        Column("λ", "number", 2),
        RUNS,
    ]
    return Table(columns, rows, NORMALISED, _references(result))


def _negation(result: Result) -> Table:
    rows = [
        [
            r["way"],
            r["mean"],
            r["spread"],
            r["control"],
            r["control_spread"],
            r["scaling_coef"],
            r["runs"],
        ]
        for r in result["rows"]
    ]
    columns = [
        Column("model"),
        Column("target test %", "percent", 1),
        SPREAD,
        Column("control test %", "percent", 1),
        SPREAD,
        Column("λ", "number", 2),
        RUNS,
    ]
    caption = (
        f"Mean over targets; the control task is {result['control']}. λ is chosen on validation data: least "
        "accuracy on the target with at least 95 % of the base's on the control task."
    )
    return Table(columns, rows, caption, (0, 1))


def _analogy(result: Result) -> Table:
    rows = [
        [r["way"], r["mean"], r["spread"], r["scaling_coef"], r["runs"]] for r in result["rows"]
    ]
    columns = [
        Column("model"),
        Column("test % on D", "percent", 1, "max"),
        SPREAD,
        Column("λ", "number", 2),
        RUNS,
    ]
    caption = "Mean over both domains and both halves of the classes. λ is chosen on validation data of D."
    return Table(columns, rows, caption, (0, len(rows) - 1))


def _relations(result: Result) -> Table:
    rows = [[r["rule"], r.get("steps"), r.get("norm"), r["points"]] for r in result["relations"]]
    columns = [
        Column("rule"),
        Column("with steps", "number", 2),
        Column("with norms", "number", 2),
        Column("merges", "number", 0),
    ]
    caption = "Pearson's r between the gain of a merge and the logarithm of its largest over its smallest value."
    return Table(columns, rows, caption)


def _references(result: Result) -> tuple[int, ...]:
    return tuple(i for i, row in enumerate(result["rows"]) if row["rule"] in (SINGLE, BASE))


def _training_charts(result: Result) -> list[Chart]:
    charts = []
    for key, word in (("steps_ratio", "steps"), ("norm_ratio", "norms of the deltas")):
        points: dict[str, list[tuple[float, float]]] = {}
        for p in result["points"]:
            if p["rule"] != "task_arithmetic":
                points.setdefault(p["rule"], []).append((p[key], p["gain"]))
        label = f"{word}: largest over smallest"
        charts.append(
            Chart(
                f"gain_by_{key.removesuffix('_ratio')}.png",
                lambda width, points=points, label=label: draw_points(
                    points, width, "Gain, points", label
                ),
                f"Gain over task arithmetic against how far the {word} are apart, one mark for each merge.",
                f"Gain of {len(points)} rules against the ratio of {word}, over {len(result['points'])} points.",
            )
        )
    return charts


def _data_charts(result: Result) -> list[Chart]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row["rule"] in (BASE, "task_arithmetic"):
            for subset in ("near", "far") if row["subset"] == "all" else (row["subset"],):
                name = "base" if row["rule"] == BASE else "task arithmetic"
                lines.setdefault(f"{name}, {subset}", []).append((row["size"], row["mean"]))
    return [_lines("by_size.png", lines, "Normalised test accuracy, %", "models merged")]


def _coefficient_charts(result: Result) -> list[Chart]:
    return [
        _lines(
            "by_lambda.png",
            result["curves"],
            "Normalised accuracy on validation, %",
            "scaling coefficient λ",
        )
    ]


def _lines(
    name: str, lines: Mapping[str, Sequence[Sequence[float]]], title: str, x_label: str
) -> Chart:
    ends = ", ".join(
        f"{label} {100 * max(y for _, y in points):.1f}%" for label, points in lines.items()
    )
    return Chart(
        name,
        lambda width: draw_lines(lines, width, title, x_label),
        "Mean over seeds.",
        f"{title} against {x_label}. Highest: {ends}.",
    )


def _bars(score: str) -> Callable[[Result], list[Chart]]:
    def charts(result: Result) -> list[Chart]:
        held: dict[str, dict[str, list[float]]] = {}
        for p in result["points"]:
            held.setdefault(p["way"], {}).setdefault(p["task"], []).append(p[score])
        bars = {way: {task: sum(v) / len(v) for task, v in by.items()} for way, by in held.items()}
        return [
            Chart(
                "by_task.png",
                lambda width: draw_task_bars(
                    bars, width, ("base", "fine-tuned", "fine-tuned on D")
                ),
                "Test accuracy for each task, mean over seeds.",
                f"Test accuracy of {len(bars)} models on {len(next(iter(bars.values())))} tasks.",
            )
        ]

    return charts


_TABLES: Mapping[str, Callable[[Result], Table]] = {
    "training-heterogeneity": _training,
    "data-heterogeneity": _data,
    "scaling-coef": _coefficients,
    "negation": _negation,
    "analogy": _analogy,
}
_CHARTS: Mapping[str, Callable[[Result], list[Chart]]] = {
    "training-heterogeneity": _training_charts,
    "data-heterogeneity": _data_charts,
    "scaling-coef": _coefficient_charts,
    "negation": _bars("target"),
    "analogy": _bars("test"),
}
