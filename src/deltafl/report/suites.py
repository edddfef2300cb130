"""Tables, figures and the page of `deltafl suite`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltafl.report.lines import draw_lines, rounds_curve
from deltafl.report.page import Column, Item, Page, Section, Table
from deltafl.report.studies import study_section
from deltafl.report.svg import WIDE, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Summaries = Sequence[Mapping[str, Any]]
SPREAD = 4
"""Runs whose bytes differ by this factor are drawn over a logarithmic axis."""

LINES = 8
"""Most lines in one figure; of more cells the best are drawn."""

QUESTIONS = {
    "heterogeneity": "How much does accuracy fall when every client holds fewer classes?",
    "local-steps": "Is it better to talk often, or to train longer between rounds? The work is the same in every row, "
    "as nearly as whole rounds allow.",
    "sparsity": "How many coordinates can be frozen, and how many bytes does that save?",
    "calibration-rounds": "Do more rounds of scoring, with fresh clients, choose better masks?",
    "mask-strategies": "Which coordinates should be trained?",
    "aggregators": "Which rule should the server use, and does that depend on heterogeneity and unequal local steps?",
}


def suite_table(name: str, summaries: Summaries) -> Table:
    """One row for each cell: test accuracy with its spread over seeds, bytes, number of runs."""
    keys = list(summaries[0]["labels"])
    columns = [
        *(Column(key) for key in keys),
        Column("test %", "percent", 1, "max"),
        Column("± %", "percent", 1),
        Column("runs", "number", 0),
        Column("validation %", "percent", 1),
        Column("best round", "number", 0),
        Column("MB up", "number", 2),
    ]
    rows = [
        [
            *(str(s["labels"][key]) for key in keys),
            *(
                s.get(key)
                for key in ("test", "spread", "runs", "val", "best_round", "megabytes_up")
            ),
        ]
        for s in summaries
    ]
    caption = "Test accuracy once per run, at the round chosen on validation; ± is the standard deviation over runs."
    if any(s.get("best_round") == 0 for s in summaries):
        caption += " Best round 0: no round was better than the model before training."
    return Table(columns, rows, caption)


def suite_section(name: str, summaries: Summaries) -> Section:
    """The question, the table, accuracy by round and by bytes."""
    notes = [f"{s['name']}: {s['failed']}" for s in summaries if s.get("failed")]
    text = "\n\n".join([QUESTIONS.get(name, ""), *notes])
    drawn = best(summaries)
    more = (
        ""
        if len(drawn) == len(summaries)
        else f" The {len(drawn)} best of {len(summaries)} are drawn."
    )
    by_round = {s["name"]: s["by_round"] for s in drawn}
    by_bytes = {s["name"]: [(x / 1e6, y) for x, y in s["by_bytes"]] for s in drawn}
    what = "Validation accuracy"
    items: list[Item] = [suite_table(name, summaries)]
    if drawn:
        items.append(
            rounds_curve(
                by_round, score_name=what, caption=f"Mean over seeds, after each round.{more}"
            )
        )
        caption = f"By what the clients sent.{more}"
        items.append(
            rounds_curve(
                by_bytes,
                "MB sent by clients",
                score_name=what,
                caption=caption,
                log_x=apart(by_bytes),
            )
        )
    return Section(name.capitalize().replace("-", " "), text, items)


def apart(lines: Mapping[str, Sequence[Sequence[float]]]) -> bool:
    """Whether the lines' last bytes differ so much that the short ones would be lost at the left of a plain axis."""
    ends = [points[-1][0] for points in lines.values() if points]
    return len(ends) > 1 and 0 < SPREAD * min(ends) <= max(ends)


def best(summaries: Summaries) -> list[Mapping[str, Any]]:
    """The cells that a figure shows, in the order of the table."""
    able = [s for s in summaries if s["runs"]]
    chosen = sorted(able, key=lambda s: -s["test"])[:LINES]
    return [s for s in able if s in chosen]


def suites_page(result: Mapping[str, Any]) -> Page:
    """All suites of one run of the command."""
    runs = "one run" if result["num_runs"] == 1 else f"{result['num_runs']} runs"
    lead = (
        f"{result['model']} on {result['task']}; {runs} of every row. Every choice was made "
        "on validation data, and every row touched the test images once."
    )
    sections = [suite_section(name, summaries) for name, summaries in result["suites"].items()]
    sections += [study_section(name, study) for name, study in result["studies"].items()]
    title = "Federated learning under the lens of task arithmetic"
    return Page(
        title if result["suites"] else "Task arithmetic as one-shot federated learning",
        lead,
        sections,
    )


def suite_figure(summaries: Summaries, key: str) -> bytes:
    """PNG of the mean curves, `key` "by_round" or "by_bytes"."""
    factor, label = (1, "round") if key == "by_round" else (1e-6, "MB sent by clients")
    lines = {s["name"]: [(factor * x, y) for x, y in s[key]] for s in best(summaries)}

    def draw(width: int) -> "Drawing":
        log_x = key == "by_bytes" and apart(lines)
        return draw_lines(lines, width, "Validation accuracy, %", label, markers=False, log_x=log_x)

    return to_png(draw, WIDE)
