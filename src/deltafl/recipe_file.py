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


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises DeltaflError."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
        json.dumps(data, default=str)  # an alias may hold itself
    except OSError as error:
        raise DeltaflError(f'"{path}": {error.strerror}') from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        several = "holds several documents; give each a file of its own"
        why = several if "expected a single document" in text else f"is not YAML: {text}"
        raise DeltaflError(f'"{path}": {why}') from None
    if not isinstance(data, dict):
        raise DeltaflError(f'"{path}": must be a mapping of keys to values')
    return data
