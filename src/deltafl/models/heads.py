"""Heads as rooms that do not use `Net` yet see them; goes with the last of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.models.head import HEAD_FILE, Head

__all__ = ["HEAD_FILE"]

ZERO_SHOT = "zero-shot"
"""What a recipe calls the head of zero_shot.py."""


@dataclass(frozen=True)
class LinearHead:
    """`logits = features @ weight^T + bias`; weight float32 (K, D), bias float32 (K,), one class name per row.

    normalised: each feature vector is divided by its L2 norm first, as CLIP's zero-shot head wants it.

    Raises:
        DeltaflError: the shapes and the number of names do not fit together.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...]
    normalised: bool = False

    @classmethod
    def of(cls, head: Head) -> "LinearHead":
        """The same head, frozen."""
        weight, bias = head.weight.detach(), head.bias.detach()
        return cls(weight, bias, head.class_names, head.normalised)

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        if (
            self.weight.ndim != 2
            or len(self.weight) != classes
            or tuple(self.bias.shape) != (classes,)
        ):
            raise DeltaflError(
                f"a head of {classes} classes has weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)}; "
                f"they must be ({classes}, features) and ({classes},)"
            )

    @property
    def feature_dim(self) -> int:
        """D, what the encoder must give."""
        return self.weight.shape[1]

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        if self.normalised:
            features = nn.functional.normalize(features, dim=-1)
        return nn.functional.linear(features, self.weight, self.bias)

    def to(self, device: torch.device | str) -> "LinearHead":
        """The same head on another device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def trainable(self) -> "LinearHead":
        """A copy whose weight and bias are parameters with gradients, for training it together with the encoder."""
        return replace(
            self, weight=nn.Parameter(self.weight.clone()), bias=nn.Parameter(self.bias.clone())
        )

    def frozen(self) -> "LinearHead":
        """The same values without gradients."""
        return replace(self, weight=self.weight.detach(), bias=self.bias.detach())

    def parameters(self) -> list[Tensor]:
        """What an optimiser moves: weight and bias of a trainable head, nothing of a frozen one."""
        return [t for t in (self.weight, self.bias) if t.requires_grad]


def random_head(
    feature_dim: int, class_names: Sequence[str], generator: torch.Generator
) -> LinearHead:
    """Weights uniform in +-1/sqrt(D), as torch.nn.Linear draws them, bias 0."""
    bound = feature_dim**-0.5
    weight = torch.empty(len(class_names), feature_dim).uniform_(-bound, bound, generator=generator)
    return LinearHead(weight, torch.zeros(len(class_names)), tuple(class_names))


def few_per_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sorted positions, int64, of `count` random examples of each class in `labels` (N,); all where there are fewer.

    A head fitted on them knows little, so that fine-tuning the encoder has something left to learn.

    Raises:
        DeltaflError: count < 1.
    """
    if count < 1:
        raise DeltaflError(f"few-shot needs at least 1 example per class, not {count}")
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = [shuffled[labels[shuffled] == c][:count] for c in labels.unique()]
    return torch.cat(chosen).sort().values


def save_head(head: LinearHead, path: Path) -> None:
    """One safetensors file: `weight`, `bias`, `normalised` where that is so, and the class names (JSON) as metadata.

    The names are all of the metadata: safetensors writes several keys in random order, and equal heads should be
    equal files.
    """
    tensors = {
        "weight": head.weight.detach().contiguous().cpu(),
        "bias": head.bias.detach().contiguous().cpu(),
    }
    if head.normalised:
        tensors["normalised"] = torch.ones(1, dtype=torch.uint8)
    save_file(tensors, path, metadata={"class_names": json.dumps(head.class_names)})


def load_head(path: Path) -> LinearHead:
    """What `save_head` wrote.

    Raises:
        DeltaflError: no such file, or not one that `save_head` wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["class_names"])
            weight, bias = (file.get_tensor(name).float() for name in ("weight", "bias"))
            return LinearHead(weight, bias, tuple(names), "normalised" in set(file.keys()))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DeltaflError(
            f'head "{path}" cannot be read: {error}; `deltafl finetune` writes such files'
        ) from error


def check_head(head: LinearHead, feature_dim: int, class_names: Sequence[str], where: str) -> None:
    """Refuse a head that was made for another model or another task; `where` names it in the message.

    Raises:
        DeltaflError: other feature dimension, number of classes, or names of classes.
    """
    problems = []
    if head.feature_dim != feature_dim:
        problems.append(
            f'head "{where}" takes {head.feature_dim} features, the model gives {feature_dim}; '
            "was it made with another model?"
        )
    if len(head.class_names) != len(class_names):
        counts = f"{len(head.class_names)} classes, the task has {len(class_names)}"
        problems.append(f'head "{where}" has {counts}; is it another task\'s?')
    elif head.class_names != tuple(class_names):
        ours, theirs = next(
            (a, b) for a, b in zip(head.class_names, class_names, strict=True) if a != b
        )
        problems.append(
            f'head "{where}" has a class "{ours}" where the task has "{theirs}"; is it another task\'s?'
        )
    if problems:
        raise DeltaflError(*problems)
