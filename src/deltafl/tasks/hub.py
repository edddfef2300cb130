"""`hub:owner/name[:config]`: an image data set of the Hugging Face hub."""

from pathlib import Path

from deltafl.errors import DeltaflError
from deltafl.tasks.huggingface import Columns, quiet, raw_task
from deltafl.tasks.source import RawTask, Source


def hub_source(
    target: str, image_column: Columns, label_column: Columns, revision: str | None = None
) -> Source:
    """Find `owner/name[:config]` with the `datasets` library, which downloads it once into its own cache.

    Raises:
        DeltaflError: no such set or configuration, or no network and nothing downloaded before.
    """
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    repo, _, config = target.partition(":")
    try:
        with quiet():
            tables = load_dataset(repo, config or None, revision=revision)
    except ConnectionError as error:
        raise DeltaflError(
            f'data set "hub:{target}": the hub cannot be reached and nothing is downloaded yet ({error}). '
            "Connect once, or download it elsewhere and give the folder of its Parquet files."
        ) from error
    except (DatasetNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeltaflError(
            f'data set "hub:{target}" cannot be loaded: {reason} Check owner/name and the configuration.'
        ) from error
    if not isinstance(tables, DatasetDict):
        raise DeltaflError(
            f'data set "hub:{target}" has no named splits; a task needs "train" and "test".'
        )
    places = {str(split): f'split "{split}" of hub:{target}' for split in tables}
    fingerprint = " ".join(
        [str(image_column), str(label_column), *(table._fingerprint for table in tables.values())]
    )

    def opened(scratch: Path) -> RawTask:
        return raw_task(tables, places, image_column, label_column)

    return Source(target.split("/")[-1].replace(":", "_"), opened, fingerprint=fingerprint)
