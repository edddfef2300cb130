"""Fisher weights and learnt coefficients, against their formulas."""

import pytest
import torch
from torch import Tensor, nn

from deltafl.merge.gradients import FLOOR, learn, merge_fisher
from deltafl.merge.layerwise import Examples, Start
from deltafl.models import Net
from deltafl.rules.fisher import Fisher
from deltafl.rules.learned import Learned
from deltafl.seeding import keyed_generator
from deltafl.sparse.fisher import FisherScorer
from deltafl.tasks import ImageInput
from tiny_models import tiny_images


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1).to(self.last.weight.dtype) / 255).tanh())


def world(weights=(0.5, 0.5)) -> tuple[Start, list[Examples]]:
    torch.manual_seed(0)
    base = Small().double()
    net = Net(base, ImageInput(8, 1))
    start = {n: t.clone() for n, t in base.state_dict().items()}
    tuned = [{n: t + 0.3 * torch.randn_like(t) for n, t in start.items()} for _ in weights]
    mean = {
        n: sum(w * (t[n] - start[n]) for w, t in zip(weights, tuned, strict=True)) for n in start
    }
    examples = [
        Examples(net, tiny_images(train=30 + i), t, w)
        for i, (t, w) in enumerate(zip(tuned, weights, strict=True))
    ]
    return Start(start, mean, torch.float64), examples


def test_fisher_is_the_weighted_mean_of_each_coordinate() -> None:
    start, examples = world((0.7, 0.3))
    found = merge_fisher(Fisher(examples=16, seed=3), start, examples)
    scores = []
    for one in examples:
        one.net.load(one.tuned)
        scorer = FisherScorer(one.net, one.task)
        generator = keyed_generator(3, "fisher", one.task.name)
        scores.append(scorer(one.drawn(16, 3), generator))
    for name in start.base:
        pairs = [
            (e.weight * (f[name] + FLOOR * f[name].mean()), e.tuned[name])
            for e, f in zip(examples, scores, strict=True)
        ]
        wanted = sum(w * t for w, t in pairs) / sum(w for w, _ in pairs)
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)


def test_one_step_of_learning_goes_down_the_gradient_of_the_mean_loss() -> None:
    start, examples = world()
    rule = Learned(examples=20, adam_steps=1, adam_lr=0.01, adam_batch=20)
    tensors, factors = learn(rule, start, examples)
    names = list(start.base)

    def loss(coefficients: Tensor) -> float:
        state = {
            n: start.base[n]
            + sum(c * (e.tuned[n] - start.base[n]) for c, e in zip(row, examples, strict=True))
            for n, row in zip(names, coefficients, strict=True)
        }
        total = 0.0
        for one in examples:
            one.net.module.load_state_dict(state)
            sums, _ = one.task.loss(one.net, one.task.batch("val", torch.arange(20)))
            total += one.weight * float(sums.detach().mean())
        return total

    begin = torch.full((len(names), 2), 0.5, dtype=torch.float64)
    for at in range(begin.numel()):
        nudge = torch.zeros_like(begin).view(-1)
        nudge[at] = 0.01
        slope = (loss(begin + nudge.view_as(begin)) - loss(begin - nudge.view_as(begin))) / 0.02
        moved = float(factors.view(-1)[at]) - 0.5
        assert moved == pytest.approx(-0.01 * (1 if slope > 0 else -1), abs=1e-5)
    for name, row in zip(names, factors.double(), strict=True):
        deltas = [e.tuned[name] - start.base[name] for e in examples]
        wanted = start.base[name] + sum(c * d for c, d in zip(row, deltas, strict=True))
        torch.testing.assert_close(tensors[name], wanted, rtol=1e-6, atol=1e-7)


def test_learning_lowers_the_loss() -> None:
    start, examples = world()
    losses = []
    learn(
        Learned(examples=20, adam_steps=60, adam_lr=0.05, adam_batch=20),
        start,
        examples,
        lambda progress: losses.append(float(progress.numbers["loss"])),
    )
    assert losses[-1] < 0.9 * losses[0]
