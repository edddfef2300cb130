"""Closed-form linear heads (Fed3R, arXiv 2406.01116): ridge regression on one-hot labels from additive statistics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.models.heads import LinearHead

STRENGTHS = tuple(10.0**e for e in range(-5, 3))
"""The ridge strengths that are tried, relative to the mean variance of a feature."""

TEMPERATURES = tuple(2.0 ** (e / 4) for e in range(41))
"""The factors on the logits that are tried: 1 to 1024 in steps of 2^(1/4)."""


@dataclass(frozen=True)
class RidgeStatistics:
    """Sums over examples, float64: with z = (phi, 1), A = sum z z^T (D+1, D+1) and b = sum z y^T (D+1, K), y one-hot.

    `a + b` equals the statistics of the union of the data, so clients can compute them apart and a server add them;
    the constant feature carries the means and the count along, from which the unpenalised bias follows.
    Deviation from Fed3R, which has no bias.
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
        z = torch.cat(
            [features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], dim=1
        )
        onehot = torch.nn.functional.one_hot(labels, num_classes).double()
        return cls(z.T @ z, z.T @ onehot)

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return RidgeStatistics(self.A + other.A, self.b + other.b)


def solve(statistics: RidgeStatistics, strength: float, class_names: Sequence[str]) -> LinearHead:
    """The minimiser of sum |W^T phi + bias - y|^2 + alpha |W|^2.

    W = (C + alpha I)^-1 G and bias = mean(y) - W^T mean(phi), where
    C = sum (phi - m)(phi - m)^T and G = sum (phi - m) y^T are the centred A and b; alpha = strength * trace(C) / D, so
    that a strength means the same for every scale of features and every number of examples. Solved in float64.

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
    return LinearHead(W.T.float().contiguous(), (mean_y - mean_phi @ W).float(), tuple(class_names))


def ridge_head(
    statistics: RidgeStatistics,
    val_features: Tensor,
    val_labels: Tensor,
    class_names: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
) -> LinearHead:
    """The ridge head whose strength has the best validation accuracy, times the temperature with the best likelihood.

    Ties between strengths go to the larger one. The temperature T multiplies weight and bias: ridge logits lie near 0
    and 1, too flat for cross-entropy; T, from TEMPERATURES, minimises the mean of -log softmax(T * logits)[label] on
    validation and does not change which class wins.

    Raises:
        DeltaflError: no validation examples, or what `solve` raises.
    """
    if len(val_labels) == 0:
        raise DeltaflError(
            "a ridge head chooses its strength on validation data, and there is none"
        )

    def accuracy(head: LinearHead) -> float:
        return (head.logits(val_features).argmax(1) == val_labels).double().mean().item()

    heads = [solve(statistics, s, class_names) for s in sorted(strengths, reverse=True)]
    best = max(heads, key=accuracy)
    logits = best.logits(val_features).double()
    T = min(
        TEMPERATURES, key=lambda t: torch.nn.functional.cross_entropy(t * logits, val_labels).item()
    )
    return LinearHead(best.weight * T, best.bias * T, best.class_names)
