"""Which layers of which models a mergekit configuration names, and where each tensor is in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deltafl.checkpoints.stack import FIRST, LAYER, depth_of, split_stack
from deltafl.merge.mergekit_file import Mergekit, SliceSource
from deltafl.merge.reading import read_model

Member: TypeAlias = tuple[str, int]
"""A model, and how many of the same name come before it in a slice."""


@dataclass(frozen=True)
class Stacks:
    """The base and the models of a configuration, and of each slice what its parameters are in.

    sources: of each slice the member -> its entry; what a slice does not have is the base there.
    """

    base: str
    models: Mapping[Member, str]
    sources: Sequence[Mapping[Member, SliceSource]]


def stacks_of(config: Mergekit) -> Stacks:
    """Which layers of which models there are in each slice. Reads the models' headers."""
    base, models, sources = [], dict[Member, list[str]](), []
    for number, part in enumerate(config.parts):
        own = part.base_model or config.base_model or part.sources[0].model
        listed = [source for source in part.sources if source.model == own]
        first = listed[0] if listed else part.sources[0].model_copy(update={"model": own})
        merged = list(part.sources)
        if config.whole and config.base_model and not listed:
            merged.append(SliceSource(model=own, layer_range=first.layer_range))
        if not config.whole or config.merge_method == "passthrough":
            merged = [source for source in merged if source.model != own]
        found = dict[Member, SliceSource]()
        for source in merged:
            count = sum(name == source.model for name, _ in found)
            found[source.model, count] = source
        for key in found:
            models.setdefault(key, [*base])
        base.append(first.part())
        for key, stack in models.items():
            stack.append(found[key].part() if key in found else base[number])
        sources.append(found)
    whole, joined = _joined(base), {key: _joined(stack) for key, stack in models.items()}
    if config.merge_method == "linear":  # where a delta of 0 adds nothing
        joined = {key: ref for key, ref in joined.items() if ref != whole}
    return Stacks(whole, joined, sources)


def _joined(parts: Sequence[str]) -> str:
    """A stack, or the model that it is."""
    ref, end = ",".join(parts), 0
    ranges = split_stack(ref)
    for _, start, stop in ranges:
        if start != end:
            return ref
        end = stop
    own = {model for model, _, _ in ranges}
    whole = len(own) == 1 and end == depth_of(read_model(*own).entries)
    return own.pop() if whole else ref


def places_of(names: Sequence[str], config: Mergekit) -> dict[str, tuple[int, float]]:
    """Tensor -> the number of its slice, and t."""
    parts, depths = config.parts, dict[str, int]()
    found = {name: match.groups() for name in names if (match := LAYER.match(name))}
    for stack, layer in found.values():
        depths[stack] = max(depths.get(stack, 0), int(layer) + 1)
    places = {name: (0 if FIRST.search(name) else len(parts) - 1, 0.0) for name in names}
    for name, (stack, layer) in found.items():
        begin = 0
        for number, part in enumerate(parts):
            start, stop = part.sources[0].layer_range
            length = stop - start or depths[stack]
            if int(layer) < begin + length:
                t = (int(layer) - begin) / (length - 1) if length > 1 else 1.0
                places[name] = number, t
                break
            begin += length
    return places
