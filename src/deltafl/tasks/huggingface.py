"""What the `datasets` library reads, as raw splits: Parquet files, image folders and sets of the hub."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.source import Encoded, RawSplit, RawTask

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLIT_NAMES = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}
"""Names of splits in the wild -> ours."""

Columns: TypeAlias = str | tuple[str, ...]
"""The name of a column, or names of which the first that a table has counts."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the `datasets` library: the library logs, the command line shows."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def raw_task(
    tables: "DatasetDict",
    where: Mapping[str, str],
    image_column: Columns,
    label_column: Columns,
    class_names: Sequence[str] | None = None,
) -> RawTask:
    """Raw splits of a `DatasetDict`, whose keys are any of `SPLIT_NAMES`; `where` names each split's place.

    Class names come from `class_names` (a sidecar file), else from the label column's `ClassLabel`, else they are
    the numbers up to the largest label.

    Raises:
        DeltaflError: a column is missing, labels are not integers, or two lists of class names differ in length.
    """
    splits: dict[str, RawSplit] = {}
    names = tuple(class_names) if class_names is not None else None
    for key, table in tables.items():
        if (split := str(key)) not in SPLIT_NAMES:
            continue
        image = _present(table, image_column, "image", where[split])
        label = _present(table, label_column, "label", where[split])
        own = getattr(table.features[label], "names", None)
        if own is not None:
            if names is not None and len(own) != len(names):
                raise DeltaflError(
                    f'{where[split]}: column "{label}" declares {len(own)} classes, but there are '
                    f"{len(names)} class names. Correct the list of class names."
                )
            names = names or tuple(own)
        splits[SPLIT_NAMES[split]] = _raw_split(table, where[split], image, label)
    if names is None:
        largest = max((int(split.labels.max(initial=0)) for split in splits.values()), default=0)
        names = tuple(str(label) for label in range(largest + 1))
    return RawTask(splits, names)


def _present(table: "Dataset", columns: Columns, option: str, where: str) -> str:
    wanted = (columns,) if isinstance(columns, str) else columns
    for column in wanted:
        if column in table.column_names:
            return column
    raise DeltaflError(
        f'{where} has no column "{wanted[0]}"; {did_you_mean(wanted[0], table.column_names)} '
        f'Name it with "?{option}=COLUMN".'
    )


def _raw_split(table: "Dataset", where: str, image_column: str, label_column: str) -> RawSplit:
    from datasets import Image

    labels = np.asarray(table.select_columns([label_column]).with_format("numpy")[:][label_column])
    if (
        not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == np.bool_)
        or labels.ndim != 1
    ):
        raise DeltaflError(
            f'{where}: column "{label_column}" holds {labels.dtype}, not one integer a row. '
            'Name the column of class numbers with "?label=COLUMN".'
        )
    images = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))

    def read(rows: Sequence[int]) -> list[Encoded]:
        return [_encoded(image) for image in images[list(rows)][image_column]]

    return RawSplit(labels.astype(np.int64), read, where)


def _encoded(image: Mapping[str, bytes | str | None] | None) -> Encoded:
    """Bytes where the file holds them, else the path; an empty image for a null, which fails to decode by its row."""
    if image is None:
        return b""
    content, path = image["bytes"], image["path"]
    if isinstance(content, bytes):
        return content
    return Path(str(path)) if path else b""
