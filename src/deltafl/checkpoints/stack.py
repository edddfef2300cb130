"""Layers of several checkpoints as one: which tensors of which files, and the configuration."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deltafl.checkpoints.layout import Entry, Layout
from deltafl.errors import DeltaflError

LAYER = re.compile(r"(.*?\b(?:layers?|(?:res)?blocks?|h))\.(\d+)\.")
"""The beginning of a tensor's name: its stack of layers, and its layer's number."""

FIRST = re.compile("embed|wte|wpe")
"""In the names of what comes before the layers."""

DEPTHS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
"""Keys of config.json that say how many layers there are."""

_PART = re.compile(r"(.+?)\[(\d+):(\d+)\](?:,|$)")


def split_stack(ref: str) -> list[tuple[str, int, int]]:
    """Model, first layer and last + 1 of each part of `A[0:24],B[8:32]`; of anything else []."""
    parts = [(own, int(start), int(stop)) for own, start, stop in _PART.findall(ref)]
    whole = ",".join(f"{own}[{start}:{stop}]" for own, start, stop in parts)
    return parts if whole == ref and not Path(ref).exists() else []


def depth_of(names: Iterable[str]) -> int:
    """How many layers a model has; 0: none."""
    return max((int(found[2]) + 1 for name in names if (found := LAYER.match(name))), default=0)


def stacked(ref: str, parts: Sequence[tuple[Layout, int, int]]) -> Layout:
    """The layers [start, stop) of each part, one after the other; what comes before the layers is
    the first part's, what comes after them the last one's, as in mergekit.

    Raises:
        DeltaflError: layers that are not there, layers of different shapes, a pickled checkpoint.
    """
    entries, problems, offset = dict[str, Entry](), list[str](), 0
    shapes = dict[tuple[str, str], tuple[int, ...]]()
    for number, (layout, start, stop) in enumerate(parts):
        depth = depth_of(layout.entries)
        if layout.pickled:
            problems.append(f'"{layout.ref}": only of .safetensors can layers be taken')
        if not start < stop <= depth:
            problems.append(f'"{ref}": "{layout.ref}" has no layers {start} to {stop}, but {depth}')
        for name, entry in layout.entries.items():
            found = LAYER.match(name)
            if not found:
                if number == (0 if FIRST.search(name) else len(parts) - 1):
                    entries[name] = entry
            elif start <= int(found[2]) < stop:
                kind = found[1], name[found.end() :]
                entries[f"{kind[0]}.{offset + int(found[2]) - start}.{kind[1]}"] = entry
                if shapes.setdefault(kind, entry.shape) != entry.shape:
                    there = f"{entry.shape} in {layout.ref}, {shapes[kind]} before"
                    problems.append(f'"{ref}": the layers differ: "{kind[1]}" is {there}')
        offset += stop - start
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    files = tuple(dict.fromkeys(entry.file for entry in entries.values()))
    ranges = tuple((start, stop) for _, start, stop in parts)
    return Layout(ref, parts[0][0].folder, files, entries, ranges=ranges)


def write_depth(file: Path, ranges: Sequence[tuple[int, int]]) -> None:
    """Make a config.json that of the layers in these ranges: their number, and its lists with an
    item for each layer.
    """

    def changed(config: Mapping[str, object]) -> dict[str, object]:
        depth = next((config[key] for key in DEPTHS if key in config), None)
        found = dict(config)
        for key, value in config.items():
            if key in DEPTHS:
                found[key] = sum(stop - start for start, stop in ranges)
            elif isinstance(value, dict):
                found[key] = changed(value)
            elif isinstance(value, list) and len(value) == depth:
                found[key] = [item for start, stop in ranges for item in value[start:stop]]
        return found

    file.write_text(json.dumps(changed(json.loads(file.read_text())), indent=2) + "\n")
