"""A linear probe: logistic regression on frozen features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltafl.models.heads import LinearHead

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse L2 penalties that are tried, for standardised features."""


def probe_head(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    class_names: Sequence[str],
) -> LinearHead:
    """scikit-learn's multinomial logistic regression (L-BFGS) on features (N, D), its penalty chosen on validation.

    Features are standardised for the fit, and the head takes them as they are. Classes without an example get the
    logit -1e4 and zero weights. Of equal accuracies the stronger penalty wins.
    """
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0).clamp_min(1e-8)

    def fit(strength: float) -> LinearHead:
        model = LogisticRegression(C=strength, max_iter=500).fit(
            ((features - mean) / std).numpy(), labels.numpy()
        )
        weight = torch.zeros(len(class_names), features.shape[1])
        bias = torch.full((len(class_names),), -1e4)
        coefficients = torch.from_numpy(model.coef_).float()
        intercepts = torch.from_numpy(model.intercept_).float()
        if (
            len(model.classes_) == 2
        ):  # scikit-learn gives the second class's logit, relative to the first
            coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
            intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
        rows = torch.from_numpy(model.classes_)
        weight[rows] = coefficients / std
        bias[rows] = intercepts - weight[rows] @ mean
        return LinearHead(weight, bias, tuple(class_names))

    heads = [fit(strength) for strength in STRENGTHS]
    return max(
        heads, key=lambda h: (h.logits(val_features).argmax(1) == val_labels).double().mean().item()
    )
