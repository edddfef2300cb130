"""Closed-form heads (Fed3R, arXiv 2406.01116): ridge regression from additive statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.models.fit import HEADS, accuracy_of, features_of, rows_of
from deltafl.models.head import Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.net import Net
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask

STRENGTHS = tuple(10.0**e for e in range(-5, 3))
"""The ridge strengths that are tried, relative to the mean variance of a feature."""

TEMPERATURES = tuple(2.0 ** (e / 4) for e in range(41))
"""The factors on the logits that are tried: 1 to 1024 in steps of 2^(1/4)."""


@HEADS.register("ridge")
def _ridge(net: Net, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
    """Statistics of each client (or of `few_shot` examples a class), added; strength and
    temperature chosen on validation: the closed form of the union, however it is sharded.
    """
    labels, shards = task.groups("train"), rows_of(task, fit)
    if recipe.few_shot is not None:
        few = few_per_class(labels, recipe.few_shot, keyed_generator(fit.seed, "few-shot"))
        shards = [rows[torch.isin(rows, few)] for rows in shards]
    rows = torch.cat(shards).sort().values
    features = features_of(net, task, "train", rows, fit.autocast)
    places = (torch.searchsorted(rows, shard) for shard in shards)
    parts = (
        RidgeStatistics.of(features[at], labels[shard], len(task.class_names))
        for at, shard in zip(places, shards, strict=True)
    )
    val = features_of(net, task, "val", autocast=fit.autocast)
    return ridge_head(reduce(add, parts), val, task.groups("val"), task.class_names)


def few_per_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sorted positions, int64, of `count` random examples of each class in `labels` (N,); all where
    there are fewer.

    A head fitted on them knows little, so that training the encoder has something left to learn.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = [shuffled[labels[shuffled] == c][:count] for c in labels.unique()]
    return torch.cat(chosen).sort().values


@dataclass(frozen=True)
class RidgeStatistics:
    """Sums over examples, float64, with z = (phi, 1) and y one-hot: A = sum z z^T (D+1, D+1) and
    b = sum z y^T (D+1, K).

    `a + b` equals the statistics of the union of the data, so clients can compute them apart and a
    server add them; the constant feature carries the means and the count along, from which the
    unpenalised bias follows. Deviation from Fed3R, which has no bias.
    """

    A: Tensor
    b: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> "RidgeStatistics":
        """Statistics of features (N, D), any float dtype, and labels int64 (N,).

        Raises:
            DeltaflError: a label outside 0 .. num_classes - 1, or other lengths.
        """
        if len(features) != len(labels):
            raise DeltaflError(f"{len(features)} rows of features and {len(labels)} labels")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise DeltaflError(
                f"labels run from {labels.min()} to {labels.max()}, there are {num_classes} classes"
            )
        ones = features.new_ones(len(features), 1, dtype=torch.float64)
        z = torch.cat([features.double(), ones], dim=1)
        onehot = torch.nn.functional.one_hot(labels, num_classes).double()
        return cls(z.T @ z, z.T @ onehot)

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return RidgeStatistics(self.A + other.A, self.b + other.b)


def solve(statistics: RidgeStatistics, strength: float, class_names: Sequence[str]) -> Head:
    """The minimiser of sum |W^T phi + bias - y|^2 + alpha |W|^2.

    W = (C + alpha I)^-1 G and bias = mean(y) - W^T mean(phi), where C = sum (phi - m)(phi - m)^T
    and G = sum (phi - m) y^T are the centred A and b; alpha = strength * trace(C) / D, so that a
    strength means the same for every scale of features and every number of examples. Solved in
    float64.

    Raises:
        DeltaflError: no examples, or a strength that is not positive.
    """
    count = float(statistics.A[-1, -1])
    if count == 0:
        raise DeltaflError("a ridge head needs examples, the training data has none")
    if not strength > 0:
        raise DeltaflError(f"a ridge strength must be positive, not {strength}")
    mean_phi, mean_y = statistics.A[:-1, -1] / count, statistics.b[-1] / count
    C = statistics.A[:-1, :-1] - count * torch.outer(mean_phi, mean_phi)
    G = statistics.b[:-1] - count * torch.outer(mean_phi, mean_y)
    alpha = strength * max(float(C.diagonal().mean()), torch.finfo(torch.float64).tiny)
    system = C + alpha * torch.eye(len(C), dtype=C.dtype, device=C.device)
    W = torch.linalg.solve(system, G)
    return Head(W.T.float().contiguous(), (mean_y - mean_phi @ W).float(), class_names)


def ridge_head(
    statistics: RidgeStatistics,
    val_features: Tensor,
    val_labels: Tensor,
    class_names: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
) -> Head:
    """The ridge head whose strength has the best validation accuracy, times the temperature with
    the best likelihood.

    Ties between strengths go to the larger one. The temperature T multiplies weight and bias: ridge
    logits lie near 0 and 1, too flat for cross-entropy; T, from TEMPERATURES, minimises the mean of
    -log softmax(T * logits)[label] on validation and does not change which class wins.

    Raises:
        DeltaflError: no validation examples, or what `solve` raises.
    """
    if len(val_labels) == 0:
        raise DeltaflError(
            "a ridge head chooses its strength on validation data, and there is none"
        )
    heads = [solve(statistics, s, class_names) for s in sorted(strengths, reverse=True)]
    best = max(heads, key=lambda head: accuracy_of(head, val_features, val_labels))
    logits, entropy = best(val_features).double(), torch.nn.functional.cross_entropy
    T = min(TEMPERATURES, key=lambda t: entropy(t * logits, val_labels).item())
    return Head(best.weight * T, best.bias * T, class_names)
