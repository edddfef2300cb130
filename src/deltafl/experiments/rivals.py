"""Merges by examples against training on the same examples: what does it take to train instead?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from deltafl.checkpoints.checkpoint import open_tensors
from deltafl.experiments.merges import REFERENCE, Merging, Search
from deltafl.experiments.study import Data, Study, base_net, judged
from deltafl.experiments.sweep import Cell, Found, Result, Store, Sweep, points_of, tabulate
from deltafl.merge.examples import nets_for
from deltafl.merge.layerwise import Examples
from deltafl.models import Net
from deltafl.rules.building import delta_rules, load_rules
from deltafl.rules.rule import ExampleRule
from deltafl.tasks.task import Batch, Split, Task
from deltafl.training.step import batches, scores

LRS = 3e-4, 1e-3
"""Learning rates of AdamW that a training is tried with; validation chooses."""

AVERAGE, DISTILLED, LABELLED = "average", "distillation", "training on labels"
"""The mean of the models as it is, and what it is trained on; names of rows."""


@dataclass(frozen=True)
class Rival(Merging):
    """The mean of the models, trained on with one batch of every task in each step.

    way: `AVERAGE`, not at all; `DISTILLED`, to what each model says of its examples; `LABELLED`.
    examples: of each task, those that merges are given; None: all.
    """

    way: str
    examples: int | None = None
    kind: ClassVar[str] = "rivals"

    def content(self) -> Mapping[str, object]:
        return {**super().content(), "steps": self.study.recipe.rival_steps}

    def run(self, folder: Path, store: Store) -> Result:
        base, count = base_net(self.study.base), len(self.models)
        tasks = [judged(self.study, model.data) for model in self.models]
        heads = [model.head.recipe(store) for model in self.models]
        nets = nets_for(base.copy_to(self.study.device), tasks, heads)
        tuned = [dict(open_tensors(store.place(model))) for model in self.models]
        parts = [
            Examples(net, task, tensors, 1 / count)
            for task, net, tensors in zip(tasks, nets, tuned, strict=True)
        ]
        single, teachers = list[float](), list[Net]()
        zero = [
            0.0 if t.ratio_scaled else _mean_score(net, t, "test")
            for net, t in zip(nets, tasks, strict=True)
        ]
        for one, head in zip(parts, heads, strict=True):
            teachers += nets_for(base.copy_to(self.study.device), [one.task], [head])
            teachers[-1].load(one.tuned)
            single.append(_mean_score(teachers[-1], one.task, "test"))
        mean = {n: torch.stack([t[n] for t in tuned]).double().mean(0) for n in tuned[0]}
        tried = []
        for lr in LRS if self.way != AVERAGE else (0.0,):
            nets[0].load(mean)
            self._train(parts, teachers if self.way == DISTILLED else [None] * count, lr)
            val = [_mean_score(one.net, one.task, "val") for one in parts]
            tried.append((sum(val), lr, nets[0].flat.detach().clone()))
        _, lr, best = max(tried, key=lambda one: one[0])
        nets[0].flat.data.copy_(best)
        test = pd.Series([_mean_score(one.net, one.task, "test") for one in parts])
        shares = (test - zero) / (pd.Series(single) - zero)
        point = {"normalized": shares.mean(), "accuracy": test.mean(), "worst": test.min()}
        return {"points": [{"rule": self.way, "seed": self.study.seed, "lr": lr, **point}]}

    def _train(self, parts: Sequence[Examples], teachers: Sequence[Net | None], lr: float) -> None:
        """Train the tensors that all nets share."""
        flat, seed = parts[0].net.flat, self.study.seed
        steps = self.study.recipe.rival_steps if lr else 0
        assert flat.grad is not None
        optimiser = torch.optim.AdamW([flat], lr)
        size = self.study.training.batch_size
        streams = [
            batches(one.drawn(self.examples or one.task.size("train"), seed), size, seed, steps)
            for one in parts
        ]
        for drawn in zip(*streams, strict=True):
            flat.grad.zero_()
            for one, teacher, ids in zip(parts, teachers, drawn, strict=True):
                batch = one.task.batch("train", ids, one.net.device)
                if teacher is None:
                    sums, weights = one.task.loss(one.net, batch)
                    loss = sums.sum() / weights.sum()
                else:
                    with torch.no_grad():
                        target = _said(teacher, one.task, batch).log_softmax(-1)
                    said = _said(one.net, one.task, batch).log_softmax(-1)
                    loss = nn.functional.kl_div(said, target, reduction="none", log_target=True)
                    loss = loss.sum(-1).mean()
                loss.backward()
            optimiser.step()


def _mean_score(net: Net, task: Task, split: Split) -> float:
    return scores(net, task, split).double().mean().item()


def _said(net: Net, task: Task, batch: Batch) -> Tensor:
    """The logits that the loss of the batch rests on."""
    said: list[Tensor] = []

    def model(*args: object, **kwargs: object) -> object:
        out = net(*args, **kwargs)
        said.append(out if isinstance(out, Tensor) else out.logits)
        return out

    task.loss(model, batch)
    return said[-1]


def examples(study: Study, sweep: Sweep) -> list[Cell]:
    """All tasks merged by rules of deltas; by rules that need examples, with more and more of
    them (`learned` with no more than there are for validation); and trained on the same, and on
    all.
    """
    recipe = study.recipe
    models = tuple(study.tuned(Data(spec)) for spec in recipe.tasks)
    deltas = tuple(name for name in recipe.compared if name in delta_rules())
    rules = load_rules()
    others = (REFERENCE, *(name for name in rules if issubclass(rules[name], ExampleRule)))
    labelled = min(judged(study, model.data).size("val") for model in models)
    merges = Rival(models, AVERAGE), Search(models, recipe.search_strategy, deltas)
    cells = [Cell({"examples": ""}, work) for work in merges]
    for count in recipe.examples_values:
        labels = {"examples": count}
        rules = tuple(name for name in others if name != "learned" or count <= labelled)
        cells.append(Cell(labels, Search(models, recipe.search_strategy, rules, count)))
        cells += [Cell(labels, Rival(models, way, count)) for way in (DISTILLED, LABELLED)]
    return [*cells, Cell({"examples": "all"}, Rival(models, LABELLED))]


def examples_rows(found: Found) -> Result:
    """Normalised test score of every rule and number of examples, the worst task, and the gain
    over task arithmetic on the same models; curves by the number of examples.
    """
    points = points_of(found)
    first = points[points["rule"] == REFERENCE].groupby("seed")["normalized"].first()
    by_examples = [name for name in load_rules() if issubclass(load_rules()[name], ExampleRule)]
    given = points["rule"].isin([*by_examples, DISTILLED, LABELLED])
    points = points.loc[given == (points["examples"] != "")]
    gain = points["normalized"] - points["seed"].map(first.to_dict())
    points = points.assign(gain=gain.where(points["rule"] != REFERENCE))
    counted = points[~points["examples"].isin(["", "all"])]
    means = counted.groupby(["rule", "examples"], sort=False)["normalized"].mean()
    return {
        "rows": tabulate(points, ["rule", "examples"], "normalized", "accuracy", "worst"),
        "by_examples": {
            rule: [[x, y] for (_, x), y in own.items()] for rule, own in means.groupby(level=0)
        },
    }
