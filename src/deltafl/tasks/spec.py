"""What a user writes to name a data set, and where it leads."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.arrays import Task
from deltafl.tasks.catalogue import CATALOGUE
from deltafl.tasks.hub import hub_source
from deltafl.tasks.local import local_source
from deltafl.tasks.named import named_source
from deltafl.tasks.source import FAMILIES, Source
from deltafl.tasks.user import user_builder

OPTIONS = ("image", "label", "revision", "data_dir")

MODULE_ATTR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def find(
    spec: str, columns: Mapping[str, str | None], data_dir: str | Path | None = None
) -> Source | Callable[..., Task]:
    """The source that `spec` names, or a user's own function; `load_task` documents the syntax.

    `columns` holds the names of the columns "image" and "label" that hold where `spec` gives no others; None: those
    names, or the catalogue's. `data_dir` is where tasks by name are looked for, where `spec` says nothing else.

    Raises:
        DeltaflError: nothing of that name, an unknown option after "?", a `data_dir` for what is not a name.
    """
    location, _, query = spec.partition("?")
    options = dict(columns) | dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in OPTIONS:
            raise DeltaflError(
                f'data set "{spec}": unknown option "{option}"; {did_you_mean(option, OPTIONS)}'
            )
    image, label = options["image"] or "image", options["label"] or "label"
    revision, folder = options.get("revision"), options.get("data_dir", data_dir)
    kind, colon, target = location.partition(":")
    by_name = not colon and "/" not in location and kind not in FAMILIES
    if folder is not None:
        if not by_name or revision is not None:
            raise DeltaflError(
                f'data set "{spec}": data_dir "{folder}" is for a task by its name (cifar100), without a revision; '
                f"{did_you_mean(location, CATALOGUE)}"
            )
        return named_source(location, Path(folder).expanduser(), options["image"], options["label"])
    if kind == "hub" and colon:
        return hub_source(target, image, label, revision)
    if location in CATALOGUE and by_name and not Path(location).exists():
        return named_source(location, None, options["image"], options["label"], revision)
    if revision is not None:
        raise DeltaflError(f'data set "{spec}": only a hub data set has a revision.')
    if kind in ("parquet", "folder") and colon:
        return local_source(Path(target).expanduser(), image, label)
    path = Path(location).expanduser()
    if kind not in FAMILIES and (path.exists() or "/" in location):
        return local_source(path, image, label)
    if query:
        raise DeltaflError(
            f'data set "{spec}": only folders and hub data sets take options after "?".'
        )
    if kind in FAMILIES:
        return FAMILIES[kind](target)
    if MODULE_ATTR.fullmatch(location):
        return user_builder(location)
    raise DeltaflError(
        f'no data set "{spec}": neither a folder here, a registered family nor a task by name; '
        f"{did_you_mean(kind, {*FAMILIES, *CATALOGUE})}"
    )
