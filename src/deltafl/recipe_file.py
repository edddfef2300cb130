"""The YAML files of recipes."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from deltafl.errors import DeltaflError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as in YAML 1.2, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for at, (key, _) in enumerate(node.value):
            if key.value in keys[:at]:
                raise yaml.constructor.ConstructorError(
                    problem=f'"{key.value}" is given twice', problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_documents(path: str | Path) -> list[dict[str, Any]]:
    """The documents of a YAML file, each a mapping. Raises DeltaflError."""
    try:
        found = [*yaml.load_all(Path(path).read_text(encoding="utf-8"), _Loader)]  # a SafeLoader
        json.dumps(found, default=str)  # an alias may hold itself
    except OSError as error:
        raise DeltaflError(f'"{path}": {error.strerror}') from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise DeltaflError(f'"{path}": is not YAML: {" ".join(str(error).split())}') from None
    found = [data for data in found if data is not None] or [None]
    if not all(isinstance(data, dict) for data in found):
        raise DeltaflError(f'"{path}": must be a mapping of keys to values')
    return found


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping. Raises DeltaflError."""
    first, *others = load_documents(path)
    if others:
        raise DeltaflError(f'"{path}": holds {1 + len(others)} documents; give one')
    return first
