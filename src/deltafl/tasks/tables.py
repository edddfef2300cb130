"""What the `datasets` library reads: Parquet files and sets of the hub, as raw splits.

To be imported where data are opened: `datasets` takes a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Image, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.raw import SPLIT_NAMES, Columns, Encoded, RawSplit, RawTask

disable_progress_bars()


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
    if not isinstance(tables, DatasetDict):
        raise DeltaflError(f'{where} has no named splits; a task needs "train" and "test".')
    return tables


def raw_task(
    tables: DatasetDict,
    where: Mapping[str, str],
    columns: Columns,
    class_names: Sequence[str] | None = None,
) -> RawTask:
    """Raw splits of tables whose keys are any of `SPLIT_NAMES`; `where` names each one's place.

    Class names come from `class_names` (a sidecar file), else from the label column's `ClassLabel`,
    else they are the numbers up to the largest label.

    Raises:
        DeltaflError: a column is missing, labels are not integers, or two lists of class names
            differ in length.
    """
    splits: dict[str, RawSplit] = {}
    for key in (key for key in SPLIT_NAMES if key in tables):
        table, place = tables[key], where[key]
        image = _present(table, columns.image, "image", place)
        label = _present(table, columns.label, "label", place)
        if isinstance(feature := table.features[label], ClassLabel):
            class_names = class_names or feature.names
            if len(feature.names) != len(class_names):
                raise DeltaflError(
                    f'{place}: column "{label}" declares {len(feature.names)} classes, but there '
                    f"are {len(class_names)} class names. Correct the list of class names."
                )
        splits[SPLIT_NAMES[key]] = _raw_split(table, place, image, label)
    if class_names is None:
        most = max((split.labels.max(initial=0) for split in splits.values()), default=0)
        class_names = [str(label) for label in range(most + 1)]
    return RawTask(splits, tuple(class_names))


def _present(table: Dataset, wanted: Sequence[str], kind: str, where: str) -> str:
    for column in wanted:
        if column in table.column_names:
            return column
    raise DeltaflError(
        f'{where} has no column "{wanted[0]}"; {did_you_mean(wanted[0], table.column_names)} '
        f"Name it with --{kind}-column ({kind}_column)."
    )


def _raw_split(table: Dataset, where: str, image: str, label: str) -> RawSplit:
    labels = np.asarray(table.select_columns([label]).with_format("numpy")[:][label])
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise DeltaflError(
            f'{where}: column "{label}" holds {labels.dtype}, not one integer a row. '
            "Name the column of class numbers with --label-column (label_column)."
        )
    images = table.select_columns([image]).cast_column(image, Image(decode=False))

    def read(rows: Sequence[int]) -> list[Encoded]:
        return [_encoded(cell) for cell in images[list(rows)][image]]

    return RawSplit(labels.astype(np.int64), read, where)


def _encoded(cell: Mapping[str, Any] | None) -> Encoded:
    """Bytes where the file holds them, else the path; empty for a null, which then fails to decode."""
    if cell and cell["bytes"] is None and cell["path"]:
        return Path(cell["path"])
    return (cell["bytes"] if cell else None) or b""
