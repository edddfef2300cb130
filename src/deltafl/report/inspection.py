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
from deltafl.report.tables import Record, Table, columns_of

MOST = 100
"""Clients, and kinds of tensors, in a figure; more would not be read."""

_NUMBER = r"((?<=\.)\d+(?=\.)|^\d+(?=\.))"


def inspect_page(result: Record) -> Page:
    """How different several fine-tuned models are: advice, and the numbers it follows from."""
    layers = pd.DataFrame({model: dict(profile) for model, profile in result["layers"].items()})
    signs = "Share of weights that two deltas move the same way; 0.5 is what chance gives."
    longer = "A model whose column is strong dominates a plain mean there."
    title = "Length of the delta in every layer"
    known = pd.DataFrame(result["overlap_layers"], ["two deltas", "by chance"])
    shared = known.T.reindex(layers.index, fill_value=inf)
    spaces = (
        "Of the leading input directions of each matrix, what two deltas share, and what random "
        "ones would: the more above that, the more sums interfere. A dash: no matrix."
    )
    values = {
        "result": result,
        "differences": differences(result["training"]),
        "training": training_table(result["training"]),
        "cosine": cosine_map(result["cosine"], file="figure"),
        "signs": _pairs(result["sign_agreement"], "Sign agreement", signs, 0.5),
        "layers": heat_map(layers, title, show=".2g", caption=longer, file="figure"),
        "shared": result["overlap_layers"]
        and heat_map(shared, "Directions shared, %", show=".0%", caption=spaces, file="figure"),
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
    caption = "How each model was fine-tuned, and how far that moved it: the L2 norm of its delta."
    return Table(training, columns_of("training"), caption)


def differences(training: Sequence[Record]) -> list[str]:
    """How far trainings are apart: ratios of largest to smallest that are at least 1.05."""
    found = []
    for key, column in training_table(training).columns.items():
        values = [row[key] for row in training if column.show and row.get(key)]
        if values and max(values) >= 1.05 * min(values):
            found.append(f"{column.title} {max(values) / min(values):.2g}-fold")
    return found


def mask_page(result: Record) -> Page:
    """Which coordinates train: in numbers, by layer and kind, what is excluded, every tensor."""
    tensors = _by_kind(result["tensors"])
    shares = tensors.fillna({"share": inf}).pivot(index="kind", columns="layer", values="share")
    kinds = tensors["kind"].unique()
    caption = (
        "Percent of each tensor's eligible coordinates that are kept. A dash: none is eligible."
    )
    if len(kinds) > MOST:
        caption += f" The first {MOST} of {len(kinds)} kinds of tensors are shown."
    title, every = (
        "Share kept, %, by layer (the * in a name)",
        "Every tensor, in the model's order.",
    )
    shown = shares.loc[kinds[:MOST]].rename(columns={-1: ""})
    reasons = [
        (re.sub(_NUMBER, "*", name, count=1), why) for name, why in result["excluded"].items()
    ]
    values = {
        "result": result,
        "shares": heat_map(shown, title, show=".0%", caption=caption, file="figure"),
        "excluded": Counter(reasons),
        "kinds": kinds_table(result),
        "tensors": Table(tensors.to_dict("records"), columns_of("mask"), every),
        "settings": settings_table(result["made"]),
    }
    return Page("mask", values)


def kinds_table(result: Record) -> Table:
    """Kept and eligible coordinates of each kind of tensor over all its layers."""
    kinds = _by_kind(result["tensors"]).groupby("kind", sort=False)
    sums = kinds.agg(tensors=("kept", "size"), kept=("kept", "sum"), eligible=("eligible", "sum"))
    sums["share"] = sums["kept"] / sums["eligible"]
    caption = "Coordinates that train, for each kind of tensor over all its layers."
    return Table(sums.reset_index(names="name").to_dict("records"), columns_of("mask"), caption)


def _by_kind(tensors: Sequence[Record]) -> pd.DataFrame:
    """The tensors; the first number of a name is its layer, or -1; with * for it, its kind."""
    frame = pd.DataFrame(tensors)
    layer = frame["name"].str.extract(_NUMBER, expand=False).fillna("-1").astype(int)
    kind = frame["name"].str.replace(_NUMBER, "*", n=1, regex=True)
    return frame.assign(layer=layer, kind=kind, share=frame["kept"] / frame["eligible"])


def shards_page(result: Record) -> Page:
    """Which client has which classes: in numbers, client by class, and every client's size."""
    names, clients = result["class_names"], len(result["sizes"])
    held = [[n for n, count in zip(names, row, strict=True) if count] for row in result["counts"]]
    counts = pd.DataFrame(result["counts"], columns=names if len(names) <= 20 else None)[:MOST]
    caption = f"The darker, the more, up to {counts.max(axis=None)}; a blank cell is none."
    if clients > MOST:
        caption += f" The first {MOST} of {clients} clients are shown."
    title = "Examples of each class (across) at each client"
    told = {key: result[key] for key in ("sizes", "classes")}
    rows = pd.DataFrame({**told, "held": [shorten(few, 4) for few in held]}).reset_index()
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
        "clients": Table(
            rows.to_dict("records"), columns_of("shards"), "Examples and classes of every client."
        ),
        "span": span,
    }
    return Page("shards", values)


def span(values: Sequence[int]) -> str:
    """450 where all values are that, else "280 to 752"."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
