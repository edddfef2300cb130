"""What the `datasets` library reads: Parquet files and sets of the hub, as raw splits.

To be imported where data are opened: `datasets` takes a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.raw import SPLIT_NAMES, Columns, Encoded, RawSplit, RawTask


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the library's own."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def read_parquet(files: Mapping[str, Sequence[Path]], scratch: Path) -> DatasetDict:
    """The tables by split, from a copy under `scratch`: what stays on disk is the pixels.

    Raises:
        DeltaflError: a file is no Parquet, or not all of it.
    """
    paths = {split: [str(path) for path in some] for split, some in files.items()}
    try:
        with _quiet():
            return load_dataset("parquet", data_files=paths, cache_dir=str(scratch))
    except (DatasetGenerationError, pyarrow.ArrowException, ValueError) as error:
        names = ", ".join(f'"{path}"' for some in files.values() for path in some)
        raise DeltaflError(
            f"{names} cannot be read: {error.__cause__ or error}. Is the download complete?"
        ) from error


def read_hub(target: str, revision: str | None) -> tuple[DatasetDict, str]:
    """The tables of `owner/name[:config]`, downloaded once into the library's own cache, and a
    fingerprint of their content.

    Raises:
        DeltaflError: no such set or configuration, or no network and nothing downloaded before.
    """
    repo, _, config = target.partition(":")
    try:
        with _quiet():
            tables = load_dataset(repo, config or None, revision=revision)
    except ConnectionError as error:
        raise DeltaflError(
            f'data "hub:{target}": the hub cannot be reached and nothing is downloaded yet '
            f"({error}). Connect once, or download it elsewhere and name its folder."
        ) from error
    except (DatasetNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeltaflError(
            f'data "hub:{target}" cannot be loaded: {reason} Check owner/name and configuration.'
        ) from error
    if not isinstance(tables, DatasetDict):
        raise DeltaflError(
            f'data "hub:{target}" has no named splits; a task needs "train" and "test".'
        )
    return tables, " ".join(table._fingerprint for table in tables.values())


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
    names = tuple(class_names) if class_names is not None else None
    for key in (key for key in SPLIT_NAMES if key in tables):
        table, place = tables[key], where[key]
        image = _present(table, columns.image, "image", place)
        label = _present(table, columns.label, "label", place)
        feature = table.features[label]
        if isinstance(feature, ClassLabel):
            if names is not None and len(feature.names) != len(names):
                raise DeltaflError(
                    f'{place}: column "{label}" declares {len(feature.names)} classes, but there '
                    f"are {len(names)} class names. Correct the list of class names."
                )
            names = names or tuple(feature.names)
        splits[SPLIT_NAMES[key]] = _raw_split(table, place, image, label)
    if names is None:
        largest = max((int(split.labels.max(initial=0)) for split in splits.values()), default=0)
        names = tuple(map(str, range(largest + 1)))
    return RawTask(splits, names)


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


def _encoded(cell: Mapping[str, bytes | str | None] | None) -> Encoded:
    """Bytes where the file holds them, else the path; empty for a null, which then fails to decode."""
    content, path = (cell["bytes"], cell["path"]) if cell else (b"", None)
    if isinstance(content, bytes):
        return content
    return Path(str(path)) if path else b""
