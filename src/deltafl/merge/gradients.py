"""Merging by gradients of the tasks: Fisher weights, and coefficients learnt on labels."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltafl.algebra.tensors import Tensors
from deltafl.merge.layerwise import Evidence, Examples, Start, Statistics
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.rules.fisher import Fisher
from deltafl.rules.learned import Learned
from deltafl.seeding import keyed_generator
from deltafl.sparse.fisher import FisherScorer
from deltafl.training.step import batches

FLOOR = 1e-9
"""Of the mean Fisher information of a tensor, added to that of each coordinate."""


def fisher_information(rule: Fisher, start: Start, one: Evidence) -> dict[str, Tensor]:
    """Sums over the examples for each tensor that trains, by its name in the base."""
    if isinstance(one, Statistics):
        return {m.weight: one.read(m) for m in one.files}
    one.net.load(one.tuned)
    generator = keyed_generator(rule.seed, "fisher", one.task.name)
    scorer = FisherScorer(one.net, one.task)
    found = scorer(one.drawn(rule.examples, rule.seed), generator)
    names = one.net.names_in(start.base)
    return {names[name]: scores.cpu() for name, scores in found.items() if name in names}


def merge_fisher(
    rule: Fisher, start: Start, evidence: Sequence[Evidence], on_progress: OnProgress = ignore
) -> dict[str, Tensor]:
    """The merged tensors that train, in the base's names, float64 (see `Fisher`)."""
    total: dict[str, Tensor] = {}
    weighed: dict[str, Tensor] = {}
    for done, one in enumerate(evidence, 1):
        for name, found in fisher_information(rule, start, one).items():
            scores = found.double()
            weight = one.weight * (scores + FLOOR * scores.mean() + 1e-30)
            total[name] = total.get(name, 0) + weight
            weighed[name] = weighed.get(name, 0) + weight * one.tuned[name].double()
        on_progress(Progress("fisher", done, len(evidence)))
    return {name: weighed[name] / total[name] for name in total}


def learn(
    rule: Learned, start: Start, all_examples: Sequence[Examples], on_progress: OnProgress = ignore
) -> tuple[dict[str, Tensor], Tensor]:
    """The merged tensors of which the loss has a gradient, and l, (tensors, n) (see `Learned`)."""
    net = all_examples[0].net
    names = net.names_in(start.base)
    places = {
        module_name: names[module_name]
        for module_name, tensor in net.module.named_parameters()
        if names.get(module_name) in start.mean and tensor.is_floating_point()
    }
    read = [
        start.read(tensors, net.device)
        for tensors in (start.base, *(e.tuned for e in all_examples))
    ]
    base = {name: read[0](name) for name in places.values()}
    deltas = {n: torch.stack([r(n) - base[n] for r in read[1:]]) for n in base}
    n = len(all_examples)
    begin = torch.full((len(base), n), 1 / n, dtype=start.dtype, device=net.device)
    factors = begin.requires_grad_()
    adam = torch.optim.Adam([factors], rule.adam_lr)

    def merged() -> dict[str, Tensor]:
        rows = zip(base, factors, strict=True)
        return {name: base[name] + torch.tensordot(row, deltas[name], 1) for name, row in rows}

    streams = [
        batches(
            one.drawn(rule.examples, rule.seed, "val"), rule.adam_batch, rule.seed, rule.adam_steps
        )
        for one in all_examples
    ]
    for done, drawn in enumerate(zip(*streams, strict=True), 1):
        tensors = merged()
        state = {module_name: tensors[name] for module_name, name in places.items()}
        adam.zero_grad()
        loss = torch.zeros((), device=net.device)
        for one, ids in zip(all_examples, drawn, strict=True):
            model = partial(_call, one.net.module, state)
            sums, weights = one.task.loss(model, one.task.batch("val", ids, net.device))
            loss = loss + one.weight * sums.sum() / weights.sum()
        loss.backward()
        adam.step()
        on_progress(Progress("learning", done, rule.adam_steps, {"loss": loss.detach()}))
    with torch.no_grad():
        return merged(), factors.detach()


def _call(module: nn.Module, state: Tensors, *args: object, **kwargs: object) -> object:
    """What the module gives with other parameters."""
    return functional_call(module, dict(state), args, kwargs)
