"""The checkpoints of a planned merge, opened as lazy deltas, and what only values tell."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from deltafl.algebra.deltas import CachedBlocks, Difference, Update
from deltafl.algebra.tensors import Joined, Tensors, device_named, lazy
from deltafl.checkpoints.checkpoint import (
    Checkpoint,
    entries_of,
    open_tensors,
    refuse_untied,
)
from deltafl.checkpoints.layout import Layout
from deltafl.merge.plan import Plan
from deltafl.rules.weights import Weights


@dataclass(frozen=True)
class Opened:
    """The lazy mappings of a merge: base, models and deltas, in the precision `dtype`.

    tuned: each model whole, under the base's names: what it lacks (a projection, a text tower) is
    the base's.
    """

    base: CachedBlocks
    dtype: torch.dtype
    updates: tuple[Update, ...]
    weights: Weights
    tuned: Mapping[str, Tensors]


@contextmanager
def open_updates(plan: Plan, memory: int = 0) -> Iterator[Opened]:
    """Open all checkpoints of a plan; read them into memory if they fit into `memory` bytes
    together.

    Raises DeltaflError if a tied tensor does not equal its twin.
    """
    recipe = plan.recipe
    device = device_named(recipe.device)
    in_memory = (
        plan.base.num_bytes + sum(layout.num_bytes for layout in plan.layouts.values()) <= memory
    )
    with ExitStack() as stack:

        def opened(layout: Layout) -> Tensors:
            tensors = open_tensors(layout)
            if isinstance(tensors, Checkpoint):
                stack.callback(tensors.close)
            return dict(tensors) if in_memory else tensors

        files = opened(plan.base)
        tuned = {name: opened(layout) for name, layout in plan.layouts.items()}
        refuse_untied(plan.alignment, files, tuned)
        wide = recipe.exact or any(e.dtype == "F64" for e in entries_of(files).values())
        dtype = torch.float64 if wide else torch.float32
        base = CachedBlocks(files, dtype, device)
        names = plan.alignment.names
        updates = []
        for source in plan.sources:
            model, pairs = tuned[source.name], names[source.name]
            merged = Joined({n: (model, pairs[n]) for n in plan.alignment.merged})
            updates.append(Update(Difference(base, merged, dtype), source))
        whole = {name: _completed(files, model, names[name]) for name, model in tuned.items()}
        yield Opened(base, dtype, tuple(updates), recipe.model_weights, whole)


def _completed(base: Tensors, tuned: Tensors, names: Mapping[str, str]) -> Joined:
    """A model under the base's names, with the base's tensors where it has none; names: here ->
    there.
    """
    there = {name: names.get(name, name) for name in base}
    return Joined({n: (tuned, own) if own in tuned else (base, n) for n, own in there.items()})


def large_deltas(opened: Opened, limit: float = 0.5) -> list[str]:
    """A warning for each model whose delta is about as large as the base, judged from a sample of
    the tensors.
    """
    names = list(opened.updates[0].delta)
    warnings = []
    for update in opened.updates:
        held = lazy(update.delta)
        delta = base = 0.0
        for name in names[:: max(1, len(names) // 64)]:
            stop = min(held.spec(name).numel, 4096)
            delta += float(held.block(name, 0, stop).double().square().sum())
            block = opened.base.block(name, 0, stop, opened.dtype)
            base += float(block.double().square().sum())
        if base and (delta / base) ** 0.5 >= limit:
            warnings.append(
                f'model "{update.source.name}": its delta is {(delta / base) ** 0.5:.2g} times as '
                "large as the base; "
                "is it a fine-tune of this base?"
            )
    return warnings
