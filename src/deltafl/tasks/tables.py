"""What the `datasets` library reads, tables in files, sets of the hub and lists of images, as raw
splits.

To be imported where data are opened: `datasets` takes a second.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    disable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetsError
from pydantic import TypeAdapter

from deltafl.errors import DeltaflError, did_you_mean, shorten
from deltafl.tasks.catalogue import NamedTask
from deltafl.tasks.find import SPLIT_NAMES, TEXT_SUFFIXES, Found
from deltafl.tasks.images import check_labels
from deltafl.tasks.inputs import ImageInput

log = logging.getLogger(__name__)

disable_progress_bars()
logging.getLogger("datasets").setLevel(logging.CRITICAL)  # our errors say what is wrong

BATCH = 512
"""Images decoded between two writes."""


class RawSplit(NamedTuple):
    """Images before they are decoded: labels int64 (N,), cells of `datasets` (see `decode`), and
    the place in errors.
    """

    labels: np.ndarray
    images: Any
    where: str


def read_tables(path: str, where: str, **options: Any) -> DatasetDict:
    """`load_dataset(path, **options)`, tables by split; `where` names the place in errors.

    Raises:
        DeltaflError: nothing there, or not all of it; no network and nothing downloaded before.
    """
    try:
        tables = load_dataset(path, **options)
    except (DatasetsError, pyarrow.ArrowException, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DeltaflError(
            f"{where} cannot be read: {reason} Is the name right and the download complete? Where "
            "the hub is not reached, name a folder of copies: --data-dir (data_dir)."
        ) from error
    assert isinstance(tables, DatasetDict)
    return tables


def open_source(
    source: Found, columns: Mapping[str, Sequence[str]], scratch: Path
) -> tuple[Mapping[str, RawSplit], Sequence[str]]:
    """The raw splits of a source, by our names, and the names of its classes.

    columns: names for that of images ("image") and of labels ("label"); the first that a table has
    counts.
    Class names come from the sidecar, else from the label column's `ClassLabel`, else they are the
    numbers up to the largest label, or the catalogue's.

    Raises:
        DeltaflError: a column is missing, labels are not integers or not below the number of
            classes, there are too many or too few names of classes, or a split is missing or empty.
    """
    tables, splits = open_tables(source, scratch), {}
    names = _class_names(source.sidecar) if source.sidecar else ()
    for key in filter(tables.__contains__, SPLIT_NAMES):
        table, where = tables[key], f'split "{key}" of {source.where}'
        image, label = (
            present(table, f"{kind}_column", own, where) for kind, own in columns.items()
        )
        if isinstance(feature := table.features[label], ClassLabel):
            names = names or feature.names
        labels = np.asarray(table.with_format("numpy")[label][:])
        if len(labels) and (labels.ndim != 1 or labels.dtype.kind not in "iub"):
            raise DeltaflError(
                f'{where}: column "{label}" holds {labels.dtype}, not one integer a row. '
                "Name the column of class numbers with --label-column (label_column)."
            )
        images = table.cast_column(image, Image(decode=False))[image]
        splits[SPLIT_NAMES[key]] = RawSplit(labels.astype(np.int64), images, where)
    if not names:
        most = max((split.labels.max(initial=0) for split in splits.values()), default=0)
        names = [*map(str, range(most + 1))]
    if isinstance(source.named, NamedTask):
        splits, names = source.named.of(source.name, splits, names)
    if missing := sorted({"train", "test"} - splits.keys()):
        raise DeltaflError(
            f'data "{source.name}" has no {" and no ".join(missing)} split (it has: '
            f"{', '.join(sorted(splits)) or 'none'}). A task trains on train and is judged "
            "on test; divide the data first."
        )
    for own in splits.values():
        check_labels(torch.from_numpy(own.labels), len(names), own.where)
    trained = set(splits["train"].labels.tolist())
    if empty := [own for label, own in enumerate(names) if label not in trained]:
        log.warning("%s: no training example of %s", source.name, shorten(empty))
    return splits, names


def open_tables(source: Found, scratch: Path) -> DatasetDict:
    """Tables by the splits' own names: files from a copy that `datasets` makes under `scratch`, for
    what stays on disk are pixels and tokens. Images by their paths: `load_dataset("imagefolder")`
    takes 0.4 ms a file, more than a small image's decoding.
    """
    if source.tables:
        return source.tables
    every = [*chain(*source.files.values())]
    if (suffix := every[0].suffix) in TEXT_SUFFIXES:
        paths = {split: [*map(str, own)] for split, own in source.files.items()}
        kind = "parquet" if suffix == ".parquet" else "json"
        return read_tables(kind, source.where, data_files=paths, cache_dir=str(scratch))
    classes = ClassLabel(names=sorted({path.parent.name for path in every}))
    features, tables = Features({"image": Image(decode=False), "label": classes}), DatasetDict()
    for split, images in source.files.items():
        labels = [path.parent.name for path in images]
        columns = {"image": [*map(str, images)], "label": labels}
        tables[split] = Dataset.from_dict(columns, features)
    return tables


def _class_names(sidecar: Path) -> list[str]:
    """A JSON list of names, or an object with such a list under "classes"."""
    try:
        names = json.loads(sidecar.read_text())
        return TypeAdapter(list[str]).validate_python(
            names["classes"] if isinstance(names, dict) else names
        )
    except (ValueError, KeyError) as error:
        raise DeltaflError(
            f'"{sidecar}" must hold a JSON list of class names, or an object with one under '
            '"classes".'
        ) from error


def present(table: Dataset, setting: str, wanted: Sequence[str], where: str) -> str:
    """The first of the columns `wanted` that a table has; `setting` names another.

    Raises:
        DeltaflError: there is none.
    """
    if found := [column for column in wanted if column in table.column_names]:
        return found[0]
    raise DeltaflError(
        f'{where} has no column "{wanted[0]}"; {did_you_mean(wanted[0], table.column_names)} '
        f"Name it with --{setting.replace('_', '-')} ({setting})."
    )


def decoded(split: RawSplit, rows: np.ndarray, inputs: ImageInput) -> Iterator[np.ndarray]:
    """The images of `rows` in order, as batches uint8 (n, C, H, W).

    Raises:
        DeltaflError: an image cannot be decoded; its row and file are named.
    """

    def one(row: int, cell: dict) -> np.ndarray:
        try:
            return inputs.decode(cell)
        except Exception as error:  # Pillow's readers raise many kinds
            place = f" ({cell['path']})" if cell and cell["bytes"] is None else ""
            raise DeltaflError(
                f"row {row} of {split.where}{place} is not an 8-bit image that can be read: "
                f"{error}. Repair the row or remove it."
            ) from error

    with ThreadPool() as pool:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH].tolist()
            yield np.stack(pool.starmap(one, zip(batch, split.images[batch], strict=True)))
