"""The page of one run: training in rounds or epochs."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from deltafl.report.figures import Figure, chart
from deltafl.report.page import Page
from deltafl.report.tables import Record, Table, columns_of, score_format

SHOWN = 40
"""Rows of the table of rounds; of longer runs an even choice is shown, and the last."""


def run_page(result: Record, rows: Sequence[Record]) -> Page:
    """What came out, how it learned, every round or epoch, the settings.

    result: what result.json holds: title, metric, test_score, val_score, best_round or best_epoch,
    config, and what else is known of bytes and time. rows: of record.jsonl, the first of them the
    model before training.
    """
    unit = "round" if "best_round" in result else "epoch"
    values = {
        "result": result,
        "unit": unit,
        "config": result["config"],
        "start": rows[0],
        "memory": max(row.get("peak_memory_bytes", 0) for row in rows),
        "curves": list(_curves(result, rows, unit)),
        "steps": _steps(result, rows, unit),
        "settings": settings_table(result["config"]),
    }
    return Page("run", values)


def settings_table(config: Mapping[str, object]) -> Table:
    """Every setting that decides the result, nested ones by their path."""
    shown = {key: value for key, value in config.items() if key != "class_names"}
    settings = pd.json_normalize(shown).astype(str).T.reset_index(names="key")
    rows = settings.rename(columns={0: "value"}).to_dict("records")
    return Table(rows, columns_of("settings"))


def _curves(result: Record, rows: Sequence[Record], unit: str) -> Iterator[Figure]:
    def points(x: str, y: str, scale: float = 1) -> dict[str, list[tuple[float, float]]]:
        return {"run": [(row.get(x, 0) * scale, row[y]) for row in rows if row.get(y) is not None]}

    title, score = f"Validation {result['metric']}", score_format(result["metric"])
    caption = f"After each {unit} that was validated; the ring marks the one that was chosen."
    best, line = {"run": result[f"best_{unit}"]}, points(unit, "val_score")
    yield chart(line, title, unit, show=score, rings=best, caption=caption, file="figure")
    for key in ("loss", "train_loss"):
        caption = f"Mean over the examples of each {unit}."
        if (line := points(unit, key))["run"]:
            yield chart(line, "Training loss", unit, caption=caption, file="figure")
    if "bytes_up_total" in result:
        line, caption = points("bytes_up_total", "val_score", 1e-6), "By what the clients sent."
        yield chart(line, title, "MB sent by clients", show=score, caption=caption)


def _steps(result: Record, rows: Sequence[Record], unit: str) -> Table:
    setup = {f"bytes_{way}": rows[0].get(f"setup_bytes_{way}") for way in ("up", "down")}
    step = -(-len(rows) // SHOWN)
    few = [{**rows[0], **setup}, *rows[step:-1:step], *rows[1:][-1:]]
    caption = f"{unit.capitalize()} 0 is the model before training, with its head."
    if step > 1:
        caption += f" Every {step}th of {len(rows) - 1} {unit}s, and the last."
    return Table(few, columns_of("run", result["metric"]), caption)
