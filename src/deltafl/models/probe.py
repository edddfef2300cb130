"""A linear probe: logistic regression on frozen features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltafl.models.fit import HEADS, accuracy_of, features_of, rows_of
from deltafl.models.head import Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.net import Net
from deltafl.tasks.images import ImageTask

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse L2 penalties that are tried, for standardised features."""


@HEADS.register("probe")
def _probe(net: Net, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
    rows = torch.cat(rows_of(task, fit)).sort().values
    features = features_of(net, task, "train", rows, fit.autocast)
    val = features_of(net, task, "val", autocast=fit.autocast)
    labels = task.groups("train")[rows]
    return probe_head(features, labels, val, task.groups("val"), task.class_names)


def probe_head(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    class_names: Sequence[str],
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
        weight = torch.zeros(len(class_names), features.shape[1])
        bias = torch.full((len(class_names),), -1e4)
        coefficients = torch.from_numpy(model.coef_).float()
        intercepts = torch.from_numpy(model.intercept_).float()
        if len(model.classes_) == 2:  # given is the second class's logit, relative to the first
            coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
            intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
        rows = torch.from_numpy(model.classes_)
        weight[rows] = coefficients / std
        bias[rows] = intercepts - weight[rows] @ mean
        return Head(weight, bias, class_names)

    heads = [fit(strength) for strength in STRENGTHS]
    return max(heads, key=lambda head: accuracy_of(head, val_features, val_labels))
