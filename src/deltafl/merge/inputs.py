"""The checkpoints of a planned merge, opened as lazy deltas, and what only values tell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.algebra.deltas import CachedBlocks, Difference, Update
from deltafl.algebra.tensors import Joined, Lazy, Tensors, device_named, lazy
from deltafl.checkpoints.checkpoint import low_rank, open_tensors, refuse_untied
from deltafl.checkpoints.rows import Rows
from deltafl.merge.plan import Plan
from deltafl.progress import OnProgress, ignore
from deltafl.rules.rule import Rule
from deltafl.rules.weights import Weights


@dataclass(frozen=True)
class Opened:
    """A merge as lazy mappings: base, whose `dtype` is the precision, and deltas.

    tuned: each model whole, under the base's names: what it lacks (a projection, a text tower) is
    the base's.
    """

    base: CachedBlocks
    updates: Sequence[Update]
    weights: Weights
    tuned: Mapping[str, Tensors]
    threads: int = 1

    def aggregate(self, rule: Rule, on_progress: OnProgress = ignore) -> Aggregate:
        """The update that a rule makes of the deltas."""
        return Aggregate(
            rule,
            self.updates,
            self.weights,
            base=self.base,
            dtype=self.base.dtype,
            threads=self.threads,
            on_progress=on_progress,
        )


def open_updates(plan: Plan, memory: int = 0) -> Opened:
    """Open all checkpoints of a plan; read them into memory if they fit into `memory` bytes
    together. They are closed when nothing refers to them any more.

    Raises DeltaflError if a tied tensor does not equal its twin.
    """
    recipe, in_memory = plan.recipe, sum(layout.num_bytes for layout in plan.inputs) <= memory
    held = [open_tensors(layout) for layout in plan.inputs]
    files, *models = [dict(tensors) for tensors in held] if in_memory else held
    tuned = dict(zip(plan.layouts, models, strict=True))
    refuse_untied(plan.alignment, files, tuned)
    rows = dict[str, Tensors]()
    if matching := plan.matching:
        raw = {label: tuned.get(label, files) for label in matching.rows}
        places = matching.places(plan.alignment)
        rows = {label: Rows(label, raw, places, found) for label, found in matching.rows.items()}
        files = Joined({name: (rows[""] if name in places else files, name) for name in files})
    wide = recipe.exact or any(entry.dtype == "F64" for entry in plan.base.entries.values())
    dtype = torch.float64 if wide else torch.float32
    base, updates = CachedBlocks(files, dtype, device_named(recipe.device)), []
    specs = {name: base.spec(name)._replace(dtype=dtype) for name in plan.alignment.merged}
    for source in plan.sources:
        model, names = tuned[source.name], plan.alignment.names[source.name]
        if adapter := plan.adapters.get(source.name):
            delta = low_rank(adapter, model, names, specs)
            updates.append(Update(delta, source))
            tuned[source.name] = Stepped(files, delta, 1.0, dtype=dtype)
            continue
        own = rows.get(source.name, {})
        here = {n: (own, n) if n in own else (model, names.get(n, n)) for n in files}
        merged = Joined({name: here[name] for name in plan.alignment.merged})
        updates.append(Update(Difference(base, merged, dtype), source))
        tuned[source.name] = Joined(
            {n: (held, there) if there in held else (files, n) for n, (held, there) in here.items()}
        )
    return Opened(base, updates, recipe.model_weights, tuned, plan.threads)


def large_deltas(opened: Opened, limit: float = 0.5) -> list[str]:
    """A warning for each model whose delta is about as large as the base, judged from a sample of
    the tensors.
    """
    if not opened.updates:
        return []
    held = lazy(opened.updates[0].delta)
    names = list(held)[:: max(1, len(held) // 64)]
    pieces = [(name, 0, min(held.spec(name).numel, 4096)) for name in names]

    def size(tensors: Lazy) -> float:
        return sum(float(tensors.block(*p).double().square().sum()) for p in pieces) ** 0.5

    base = size(opened.base) or math.inf
    ratios = {update.source.name: size(lazy(update.delta)) / base for update in opened.updates}
    return [
        f'model "{name}": its delta is {ratio:.2g} times as large as the base; is it a fine-tune '
        "of this base?"
        for name, ratio in ratios.items()
        if ratio >= limit
    ]
