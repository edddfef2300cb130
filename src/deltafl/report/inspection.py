"""The pages of what is looked at before a run: models, masks and shards."""

import re
from collections import Counter
from collections.abc import Sequence
from math import inf, nan

import numpy as np
import pandas as pd

from deltafl.errors import shorten
from deltafl.report.figures import Figure, heat_map
from deltafl.report.page import Page
from deltafl.report.run import settings_table
from deltafl.report.tables import Column, Record, Table

MOST = 100
"""Clients, and kinds of tensors, in a figure; more would not be read."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def inspect_page(result: Record) -> Page:
    """How different several fine-tuned models are: advice, and the numbers it follows from."""
    profiles = {model: dict(profile) for model, profile in result["layers"].items()}
    layers, title = pd.DataFrame(profiles), "Length of the delta in every layer"
    signs = "Share of weights that two deltas move the same way; 0.5 is what chance gives."
    longer = "A model whose column is strong dominates a plain mean there."
    values = {
        "result": result,
        "differences": differences(result["training"]),
        "training": training_table(result["training"]),
        "cosine": cosine_map(result["cosine"], file="figure"),
        "signs": _pairs(result["sign_agreement"], "Sign agreement", signs, 0.5),
        "layers": heat_map(layers, title, show=".2g", caption=longer, file="figure"),
    }
    return Page("inspect", values)


def cosine_map(cosine: Record, file: str = "") -> Figure:
    """The heat map of the deltas' cosines, with what it means."""
    caption = "Cosine of every two deltas: 1 is the same direction, 0 unrelated, below 0 opposed."
    return _pairs(cosine, "Cosine of the deltas", caption, file=file)


def _pairs(matrix: Record, title: str, caption: str, neutral: float = 0, file: str = "") -> Figure:
    """A symmetric matrix; its diagonal says nothing and stays blank."""
    values = np.nan_to_num(np.array(matrix["matrix"], dtype=float), nan=inf)
    np.fill_diagonal(values, nan)
    frame = pd.DataFrame(values, matrix["names"], matrix["names"])
    caption += " Colour is relative to the strongest pair."
    return heat_map(frame, title, neutral=neutral, caption=caption, file=file)


def training_table(training: Sequence[Record]) -> Table:
    """What is known of each model's training."""
    columns = {
        "model": Column("model"),
        "task": Column("task"),
        "lr": Column("learning rate", ".3g"),
        "num_steps": Column("steps", ",.0f"),
        "num_examples": Column("examples", ",.0f"),
        "norm": Column("length of the delta", ".4g"),
    }
    caption = "How each model was fine-tuned, and how far that moved it: the L2 norm of its delta."
    return Table(training, columns, caption)


def differences(training: Sequence[Record]) -> list[str]:
    """How far trainings are apart: ratios of largest to smallest that are at least 1.05."""
    found = []
    for key, column in training_table(training).shown.items():
        values = [row[key] for row in training if column.show and row.get(key)]
        if values and max(values) >= 1.05 * min(values):
            found.append(f"{column.title} {max(values) / min(values):.2g}-fold")
    return found


def mask_page(result: Record) -> Page:
    """Which coordinates train: in numbers, by layer and kind, what is excluded, every tensor."""
    tensors = _by_kind(result)
    shares = tensors.assign(share=tensors["share"].fillna(inf)).pivot(
        index="kind", columns="layer", values="share"
    )
    kinds = tensors["kind"].unique()
    caption = (
        "Percent of each tensor's eligible coordinates that are kept. A dash: none is eligible."
    )
    if len(kinds) > MOST:
        caption += f" The first {MOST} of {len(kinds)} kinds of tensors are shown."
    title = "Share kept, %, by layer (the * in a name)"
    names = ["" if layer < 0 else str(layer) for layer in shares]
    reasons = [(_NUMBER.sub("*", name, count=1), why) for name, why in result["excluded"].items()]
    values = {
        "result": result,
        "shares": heat_map(
            shares.loc[kinds[:MOST]].set_axis(names, axis=1),
            title,
            show=".0%",
            caption=caption,
            file="figure",
        ),
        "excluded": Counter(reasons),
        "kinds": kinds_table(result),
        "tensors": _mask_table(tensors, "Every tensor, in the model's order."),
        "settings": settings_table(result["made"]),
    }
    return Page("mask", values)


def kinds_table(result: Record) -> Table:
    """Kept and eligible coordinates of each kind of tensor over all its layers."""
    kinds = _by_kind(result).groupby("kind", sort=False)
    sums = kinds.agg(tensors=("kept", "size"), kept=("kept", "sum"), eligible=("eligible", "sum"))
    sums["share"] = sums["kept"] / sums["eligible"]
    caption = "Coordinates that train, for each kind of tensor over all its layers."
    return _mask_table(sums.reset_index(names="name"), caption)


def _by_kind(result: Record) -> pd.DataFrame:
    """The tensors; the first number of a name is its layer, or -1; with * for it, its kind."""
    frame = pd.DataFrame(result["tensors"])
    numbers = [_NUMBER.search(name) for name in frame["name"]]
    kinds = [_NUMBER.sub("*", name, count=1) for name in frame["name"]]
    layers = [int(number[0]) if number else -1 for number in numbers]
    return frame.assign(layer=layers, kind=kinds, share=frame["kept"] / frame["eligible"])


def _mask_table(frame: pd.DataFrame, caption: str) -> Table:
    columns = {"name": Column("tensor")}
    columns |= {key: Column(key, ",.0f") for key in ("tensors", "kept", "eligible")}
    columns["share"] = Column("share kept", ".2%")
    return Table(frame.to_dict("records"), columns, caption)


def shards_page(result: Record) -> Page:
    """Which client has which classes: in numbers, client by class, and every client's size."""
    names = result["class_names"]
    held = [[n for n, count in zip(names, row, strict=True) if count] for row in result["counts"]]
    clients = pd.DataFrame({"size": result["sizes"], "classes": result["classes"]})
    clients["held"] = [shorten(few, 4) for few in held]
    counts = pd.DataFrame(result["counts"], columns=names if len(names) <= 20 else None)[:MOST]
    caption = f"The darker, the more, up to {counts.max(axis=None)}; a blank cell is none."
    if len(clients) > MOST:
        caption += f" The first {MOST} of {len(clients)} clients are shown."
    title = "Examples of each class (across) at each client"
    columns = {
        "index": Column("client", "d"),
        "size": Column("examples", ",d"),
        "classes": Column("classes", "d"),
        "held": Column("held"),
    }
    rows = clients.reset_index().to_dict("records")
    values = {
        "result": result,
        "missing": [name for name, count in zip(names, result["left_out"], strict=True) if count],
        "counts": heat_map(
            pd.DataFrame(counts.mask(counts == 0)),
            title,
            show=".0f",
            caption=caption,
            file="figure",
        ),
        "clients": Table(rows, columns, "Examples and classes of every client."),
        "span": span,
    }
    return Page("shards", values)


def span(values: Sequence[int]) -> str:
    """450 where all values are that, else "280 to 752"."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
