"""How a classifier gets its head: each way is a function in `HEADS`, under the name of a recipe."""

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from deltafl.models.classifier import HEADS, ClassifierNet
from deltafl.models.head import Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.task import Split, Task

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse L2 penalties of a probe that are tried, for standardised features."""

STRENGTHS = tuple(10.0**e for e in range(-5, 3))
"""The ridge strengths that are tried, relative to the mean variance of a feature."""

TEMPERATURES = tuple(2.0 ** (e / 4) for e in range(41))
"""The factors on the logits that are tried: 1 to 1024 in steps of 2^(1/4)."""


@torch.inference_mode()
def features_of(
    net: ClassifierNet, task: Task, split: Split, ids: Tensor, autocast: torch.dtype | None
) -> Tensor:
    """Features float32 (n, D), on the CPU, of the examples at `ids`, in eval mode."""
    was_training = net.module.training
    net.module.eval()
    parts = [torch.empty(0, net.module.feature_dim)]
    for part in ids.split(256) if len(ids) else ():
        images = task.batch(split, part, net.device)["images"]
        with torch.autocast(net.device.type, autocast, enabled=autocast is not None):
            parts.append(net.module.features(images).float().cpu())
    net.module.train(was_training)
    return torch.cat(parts)


def _best(heads: Iterable[Head], features: Tensor, labels: Tensor) -> Head:
    """The head of the best accuracy, of equal ones the first."""
    return max(heads, key=lambda head: (head(features).argmax(1) == labels).double().mean().item())


@HEADS.register("linear")
def _linear(net: ClassifierNet, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
    generator = keyed_generator(fit.seed, "head")
    return random_head(net.module.feature_dim, task.class_names, generator)


def random_head(feature_dim: int, class_names: Sequence[str], generator: torch.Generator) -> Head:
    """Weights uniform in +-1/sqrt(D), as torch.nn.Linear draws them, bias 0."""
    bound = feature_dim**-0.5
    weight = torch.empty(len(class_names), feature_dim).uniform_(-bound, bound, generator=generator)
    return Head(weight, torch.zeros(len(class_names)), class_names)


@HEADS.register("probe")
@HEADS.register("ridge")
def _closed(net: ClassifierNet, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
    """For ridge statistics of each client (or of `few_shot` examples a class), added; strength and
    temperature chosen on validation: the closed form of the union, however it is sharded.
    """
    labels = task.groups("train")
    shards = [torch.arange(len(labels))] if fit.shards is None else fit.shards
    if recipe.few_shot is not None:
        few = few_per_class(labels, recipe.few_shot, keyed_generator(fit.seed, "few-shot"))
        shards = [rows[torch.isin(rows, few)] for rows in shards]
    rows = torch.cat([*shards]).sort().values
    features = features_of(net, task, "train", rows, fit.autocast)
    every = torch.arange(task.size("val"))
    val = features_of(net, task, "val", every, fit.autocast), task.groups("val")
    if recipe.head == "probe":
        return probe_head(features, labels[rows], val, task.class_names)
    parts = (
        statistics(features[torch.searchsorted(rows, own)], labels[own], len(task.class_names))
        for own in shards
    )
    return ridge_head(reduce(torch.add, parts), val, task.class_names)


def few_per_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sorted positions, int64, of `count` random examples of each class in `labels` (N,); all where
    there are fewer.

    A head fitted on them knows little, so that training the encoder has something left to learn.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = [shuffled[labels[shuffled] == c][:count] for c in labels.unique()]
    return torch.cat(chosen).sort().values


def probe_head(
    features: Tensor, labels: Tensor, val: tuple[Tensor, Tensor], class_names: Sequence[str]
) -> Head:
    """scikit-learn's multinomial logistic regression (L-BFGS) on features (N, D), its penalty
    chosen on validation.

    Features are standardised for the fit, and the head takes them as they are. Classes without an
    example get the logit -1e4 and zero weights. Of equal accuracies the stronger penalty wins.
    """
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0).clamp_min(1e-8)

    def fit(strength: float) -> Head:
        model = LogisticRegression(C=strength, max_iter=500)
        model.fit(((features - mean) / std).numpy(), labels.numpy())
        fitted = torch.from_numpy(np.column_stack([model.coef_, model.intercept_])).float()
        if len(model.classes_) == 2:  # given is the second class's logit, relative to the first
            fitted = torch.cat([torch.zeros_like(fitted), fitted])
        rows = torch.from_numpy(model.classes_)
        weight = torch.zeros(len(class_names), features.shape[1])
        weight[rows] = fitted[:, :-1] / std
        bias = torch.full((len(class_names),), -1e4)
        bias[rows] = fitted[:, -1] - weight[rows] @ mean
        return Head(weight, bias, class_names)

    return _best(map(fit, PENALTIES), *val)


def statistics(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Of features (N, D), any float dtype, and labels int64 (N,) what a ridge head needs (Fed3R,
    arXiv 2406.01116), float64 (D+1, D+1+K): with z = (phi, 1) and y one-hot A = sum z z^T and
    beside it b = sum z y^T.

    A sum of them is that of the union of the data, so clients can compute them apart and a server
    add them; the constant feature carries the means and the count along, from which the unpenalised
    bias follows. Deviation from Fed3R, which has no bias.
    """
    z = nn.functional.pad(features.double(), (0, 1), value=1.0)
    return torch.cat([z.T @ z, z.T @ nn.functional.one_hot(labels, num_classes).double()], 1)


def solve(statistics: Tensor, strength: float, class_names: Sequence[str]) -> Head:
    """The minimiser of sum |W^T phi + bias - y|^2 + alpha |W|^2.

    W = (C + alpha I)^-1 G and bias = mean(y) - W^T mean(phi), where C = sum (phi - m)(phi - m)^T
    and G = sum (phi - m) y^T are the centred A and b; alpha = strength * trace(C) / D, so that a
    strength means the same for every scale of features and every number of examples. Solved in
    float64.
    """
    D = len(statistics) - 1
    count = statistics[D, D].item()
    mean_phi, means = statistics[:D, D] / count, statistics[D] / count
    centred = statistics[:D] - count * torch.outer(mean_phi, means)
    C, G, mean_y = centred[:, :D], centred[:, D + 1 :], means[D + 1 :]
    alpha = strength * max(float(C.diagonal().mean()), torch.finfo(torch.float64).tiny)
    W = torch.linalg.solve(C + alpha * torch.eye(D, dtype=C.dtype), G)
    return Head(W.T.float().contiguous(), (mean_y - mean_phi @ W).float(), class_names)


def ridge_head(
    statistics: Tensor,
    val: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
) -> Head:
    """The ridge head whose strength has the best validation accuracy, times the temperature with
    the best likelihood.

    Ties between strengths go to the larger one. The temperature T multiplies weight and bias: ridge
    logits lie near 0 and 1, too flat for cross-entropy; T, from TEMPERATURES, minimises the mean of
    -log softmax(T * logits)[label] on validation and does not change which class wins.
    """
    heads = (solve(statistics, s, class_names) for s in sorted(strengths, reverse=True))
    best = _best(heads, *val)
    logits, entropy = best(val[0]).double(), nn.functional.cross_entropy
    T = min(TEMPERATURES, key=lambda t: entropy(t * logits, val[1]).item())
    return Head(best.weight * T, best.bias * T, class_names)
