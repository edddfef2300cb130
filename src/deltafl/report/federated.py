"""The page and the figure of `deltafl federate`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltafl.report.lines import draw_lines, rounds_curve
from deltafl.report.page import Column, Facts, Item, Page, Section, Table
from deltafl.report.svg import WIDE, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Rows = Sequence[Mapping[str, Any]]
SHOWN = 40
"""Rows of the table of rounds; of longer runs an even choice is shown, and the last."""


def federated_page(result: Mapping[str, Any], rows: Rows) -> Page:
    """What came out, accuracy by round and by bytes, the rounds, the settings."""
    start = next((row for row in rows if row["event"] == "start"), {})
    facts = Facts(
        [
            ("test accuracy, once", f"{100 * result['test_score']:.1f} %"),
            (
                f"validation, best (round {result['best_round']})",
                f"{100 * result['val_score']:.1f} %",
            ),
            ("before the first round", f"{100 * start['val_score']:.1f} %" if start else "–"),
            ("sent by clients", _bytes(result["bytes_up_total"])),
            ("sent before that, in step 0", _bytes(result.get("setup_bytes_up", 0))),
            (
                "peak memory",
                _bytes(max((row.get("peak_memory_bytes", 0) for row in rows), default=0)),
            ),
        ]
    )
    sections = [
        Section("What came out", _told(result, start), [facts]),
        Section("How it learned", "", curves({"run": rows})),
        Section("The rounds", "", [rounds_table(rows)]),
        Section("Settings", "", [settings_table(result["config"])]),
    ]
    lead = "Federated training: in each round some clients train on their own samples, and the server takes one step."
    return Page(result["title"], lead, sections)


def _told(result: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    config = result["config"]
    share = "" if start.get("kept") in (None, start.get("parameters")) else (
        f" Of {start['parameters']:,} parameters {start['kept']:,} were trained and sent; a dense run would have sent "
        f"{_bytes(result['dense_bytes_up_total'])}."
    )  # fmt: skip
    failed = result["failed_updates"]
    left_out = (
        f" Updates left out, being NaN or Inf: {failed}." if failed else " No update was left out."
    )
    before = f" Before the first round the server sent {_bytes(result.get('setup_bytes_down', 0))}."
    return (
        f"{config['sharding']['num_clients']} clients, {100 * config['participation_rate']:g} % of them in each of "
        f"{result['rounds']} rounds, about {config['local']['local_steps']} local steps each. The round was chosen on "
        f"validation data; the test images were used once, for that round's model.{before}{share}{left_out}"
    )


def curves(runs: Mapping[str, Rows]) -> list[Item]:
    """Accuracy by round and by bytes sent by the clients, one line for each run."""
    by_round = {name: _points(rows, "round", 1) for name, rows in runs.items()}
    by_bytes = {name: _points(rows, "bytes_up_total", 1e-6) for name, rows in runs.items()}
    what = "Validation accuracy"
    return [
        rounds_curve(by_round, score_name=what, caption="Validation accuracy after each round."),
        rounds_curve(
            by_bytes,
            "MB sent by clients",
            score_name=what,
            caption="The same, by what the clients sent.",
        ),
    ]


def _points(rows: Rows, key: str, factor: float) -> list[tuple[float, float]]:
    return [
        (factor * row.get(key, 0), row["val_score"]) for row in rows if row["val_score"] is not None
    ]


def federated_figure(rows: Rows) -> bytes:
    """Validation accuracy by round, PNG."""

    def draw(width: int) -> "Drawing":
        return draw_lines(
            {"run": _points(rows, "round", 1)},
            width,
            "Validation accuracy, %",
            "round",
            markers=False,
        )

    return to_png(draw, WIDE)


def rounds_table(rows: Rows) -> Table:
    """Step 0 with its own bytes, then one row for each round, or for an even choice of them."""
    zero = [row for row in rows if row["event"] == "start"]
    rounds = [row for row in rows if row["event"] == "round"]
    step = -(-len(rounds) // SHOWN) or 1
    chosen = [row for i, row in enumerate(rounds) if i % step == 0 or row is rounds[-1]]
    cells: list[list[Any]] = [
        [
            "0", row["val_score"], None, None, None,
            row.get("setup_bytes_up", 0) / 1e6, row.get("setup_bytes_down", 0) / 1e6, None, None,
        ]
        for row in zero
    ]  # fmt: skip
    cells += [
        [
            str(row["round"]),
            row["val_score"],
            row["loss"],
            row["num_steps"],
            len(row["failed"]),
            row["bytes_up"] / 1e6,
            row["bytes_down"] / 1e6,
            row["client_seconds"],
            row["server_seconds"],
        ]
        for row in chosen
    ]
    columns = [
        Column("round"),
        Column("validation", "percent", 1, "max"),
        Column("loss", "number", 3),
        Column("steps", "number", 0),
        Column("left out", "number", 0),
        Column("MB up", "number", 2),
        Column("MB down", "number", 2),
        Column("client s", "number", 2),
        Column("server s", "number", 3),
    ]
    caption = "Rounds" if step == 1 else f"Every {step}th of {len(rounds)} rounds, and the last"
    return Table(
        columns, cells, f"{caption}. Bytes are all clients' together; seconds are of this machine."
    )


def settings_table(config: Mapping[str, Any]) -> Table:
    """Every setting that decides the result."""
    shown = {k: v for k, v in config.items() if k != "class_names"}
    return Table(
        [Column("setting"), Column("value")],
        [[k, str(v)] for k, v in shown.items()],
        "All settings.",
    )


def _bytes(count: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.2f} {name}"
