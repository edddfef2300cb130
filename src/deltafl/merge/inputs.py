"""The checkpoints of a planned merge, opened as lazy deltas, and what only their values can tell."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Update, Weights
from deltafl.algebra.tensors import Tensors, block_of, device_named, numel_of
from deltafl.checkpoints.checkpoint import (
    Checkpoint,
    Difference,
    Latest,
    entries_of,
    open_tensors,
    refuse_untied,
)
from deltafl.checkpoints.layout import Layout
from deltafl.merge.plan import Plan


@dataclass(frozen=True)
class Opened:
    """The lazy mappings of a merge: base, models and deltas, and the base's blocks in the precision `dtype`.

    tuned: each model whole, under the base's names: what it lacks (a projection, a text tower) is the base's.
    """

    base: Tensors
    working: Tensors
    dtype: torch.dtype
    updates: tuple[Update, ...]
    weights: Weights
    tuned: Mapping[str, Tensors]


class Completed(Mapping[str, Tensor]):
    """A fine-tuned model under the base's names, with the base's tensors where it has none. names: base name -> its."""

    def __init__(self, base: Tensors, tuned: Tensors, names: Mapping[str, str]) -> None:
        self._base, self._tuned, self._names = base, tuned, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, name: str) -> Tensor:
        own = self._names.get(name, name)
        return self._tuned[own] if own in self._tuned else self._base[name]


@contextmanager
def open_updates(plan: Plan, memory: int = 0) -> Iterator[Opened]:
    """Open all checkpoints of a plan; read them into memory if they fit into `memory` bytes together.

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

        base = opened(plan.base)
        tuned = {name: opened(layout) for name, layout in plan.layouts.items()}
        refuse_untied(plan.alignment, base, tuned)
        wide = recipe.exact or any(e.dtype == "F64" for e in entries_of(base).values())
        dtype = torch.float64 if wide else torch.float32
        working = Latest(base, dtype, device)
        names = {
            s.name: {n: plan.alignment.names[s.name][n] for n in plan.alignment.merged}
            for s in plan.sources
        }
        updates = tuple(
            Update(Difference(working, tuned[s.name], names[s.name], dtype), s)
            for s in plan.sources
        )
        whole = {
            name: Completed(base, tensors, plan.alignment.names[name])
            for name, tensors in tuned.items()
        }
        yield Opened(base, working, dtype, updates, recipe.model_weights, whole)


def large_deltas(opened: Opened, limit: float = 0.5) -> list[str]:
    """A warning for each model whose delta is about as large as the base, judged from a sample of the tensors."""
    names = list(opened.updates[0].delta)
    warnings = []
    for update in opened.updates:
        delta = base = 0.0
        for name in names[:: max(1, len(names) // 64)]:
            stop = min(numel_of(update.delta, name), 4096)
            delta += float(block_of(update.delta, name, 0, stop).double().square().sum())
            base += float(block_of(opened.working, name, 0, stop).double().square().sum())
        if base and (delta / base) ** 0.5 >= limit:
            warnings.append(
                f'model "{update.source.name}": its delta is {(delta / base) ** 0.5:.2g} times as large as the base; '
                "is it a fine-tune of this base?"
            )
    return warnings
