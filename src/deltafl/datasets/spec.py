"""What a user writes to name a data set, and where it leads."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from deltafl.datasets.hub import hub_source
from deltafl.datasets.local import local_source
from deltafl.datasets.source import FAMILIES, Source
from deltafl.datasets.task import Task
from deltafl.datasets.user import user_builder
from deltafl.errors import DeltaflError, did_you_mean

OPTIONS = ("image", "label", "revision")

MODULE_ATTR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def find(spec: str, columns: Mapping[str, str]) -> Source | Callable[..., Task]:
    """The source that `spec` names, or a user's own function; `load_task` documents the syntax.

    `columns` holds the names of the columns "image" and "label" that hold where `spec` gives no others.

    Raises:
        DeltaflError: nothing of that name, or an unknown option after "?".
    """
    location, _, query = spec.partition("?")
    options = dict(columns) | dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in OPTIONS:
            raise DeltaflError(f'data set "{spec}": unknown option "{option}"; {did_you_mean(option, OPTIONS)}')
    image, label, revision = options["image"], options["label"], options.get("revision")
    kind, colon, target = location.partition(":")
    if kind == "hub" and colon:
        return hub_source(target, image, label, revision)
    if revision is not None:
        raise DeltaflError(f'data set "{spec}": only a hub data set has a revision.')
    if kind in ("parquet", "folder") and colon:
        return local_source(Path(target).expanduser(), image, label)
    path = Path(location).expanduser()
    if kind not in FAMILIES and (path.exists() or "/" in location):
        return local_source(path, image, label)
    if query:
        raise DeltaflError(f'data set "{spec}": only folders and hub data sets take options after "?".')
    if kind in FAMILIES:
        return FAMILIES[kind](target)
    if MODULE_ATTR.fullmatch(location):
        return user_builder(location)
    raise DeltaflError(
        f'no data set "{spec}": neither a folder here nor a registered family; {did_you_mean(kind, FAMILIES)}'
    )
