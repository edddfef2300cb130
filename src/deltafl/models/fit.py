"""Heads drawn at random or fitted on features."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deltafl.models.head import Head, HeadFit, HeadRecipe
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.task import Device, Split

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse L2 penalties of a probe that are tried, for standardised features."""

STRENGTHS = tuple(10.0**e for e in range(2, -6, -1))
"""The ridge strengths that are tried, relative to the mean variance of a feature."""

TEMPERATURES = tuple(2.0 ** (e / 4) for e in range(41))
"""The factors on the logits that are tried: 1 to 1024 in steps of 2^(1/4)."""


def _best(heads: Iterable[Head], features: Tensor, labels: Tensor) -> Head:
    """The head of the best accuracy, of equal ones the first."""
    return max(heads, key=lambda head: (head(features).argmax(1) == labels).double().mean().item())


def random_head(feature_dim: int, class_names: Sequence[str], generator: torch.Generator) -> Head:
    """Weights uniform in +-1/sqrt(D), as torch.nn.Linear draws them, bias 0."""
    bound = feature_dim**-0.5
    weight = torch.empty(len(class_names), feature_dim).uniform_(-bound, bound, generator=generator)
    return Head(weight, torch.zeros(len(class_names)), class_names)


@torch.no_grad()
def fitted_head(
    embed: Callable[[Tensor], Tensor],
    task: ImageTask,
    recipe: HeadRecipe,
    fit: HeadFit,
    device: Device,
) -> Head:
    """The probe, or the ridge head, on features `embed(images)` of all that the shards hold, or of
    `few_shot` examples a class. `embed` works on `device`.

    The statistics of a ridge head are those of the union of the shards, to which clients' own would
    add up: one head, to the last bit, however the data are sharded.
    """

    def features(split: Split, ids: Tensor) -> Tensor:
        parts = []
        for part in ids.split(256):
            images = task.batch(split, part, device)["images"]
            with torch.autocast(images.device.type, fit.autocast, fit.autocast is not None):
                parts.append(embed(images).float().cpu())
        return torch.cat(parts)

    labels, val_labels = task.groups("train"), task.groups("val")
    rows = torch.arange(len(labels)) if fit.shards is None else torch.cat([*fit.shards])
    rows = rows.sort().values
    if recipe.few_shot is not None:
        few = few_per_class(labels, recipe.few_shot, keyed_generator(fit.seed, "few-shot"))
        rows = rows[torch.isin(rows, few)]
    train, val = (
        features("train", rows),
        (features("val", torch.arange(len(val_labels))), val_labels),
    )
    make = probe_head if recipe.head == "probe" else ridge_head
    return make(train, labels[rows], val, task.class_names)


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


def ridge_head(
    features: Tensor, labels: Tensor, val: tuple[Tensor, Tensor], class_names: Sequence[str]
) -> Head:
    """scikit-learn's ridge regression on one-hot classes: the strength with the best validation
    accuracy, times the temperature with the best likelihood.

    Minimised is sum |W^T phi + bias - y|^2 + alpha |W|^2 in float64, with alpha = strength * N *
    the mean variance of a feature, so that a strength means the same for every scale of features
    and every number of examples. It is what the clients' sums of z z^T and z y^T, z = (phi, 1),
    added by a server, determine (Fed3R, arXiv 2406.01116; deviation: Fed3R has no bias).

    Ties between strengths go to the larger one. The temperature T multiplies weight and bias: ridge
    logits lie near 0 and 1, too flat for cross-entropy; T, from TEMPERATURES, minimises the mean of
    -log softmax(T * logits)[label] on validation and does not change which class wins.
    """
    from sklearn.linear_model import Ridge

    phi, y = features.double().numpy(), nn.functional.one_hot(labels, len(class_names)).numpy()
    scale = max(len(phi) * float(phi.var(0).mean()), np.finfo(float).tiny)

    def fit(strength: float) -> Head:
        model = Ridge(strength * scale).fit(phi, y)
        fitted = torch.from_numpy(np.column_stack([model.coef_, model.intercept_])).float()
        return Head(fitted[:, :-1], fitted[:, -1], class_names)

    best = _best(map(fit, STRENGTHS), *val)
    logits, entropy = best(val[0]).double(), nn.functional.cross_entropy
    T = min(TEMPERATURES, key=lambda t: entropy(t * logits, val[1]).item())
    return Head(best.weight * T, best.bias * T, class_names)
