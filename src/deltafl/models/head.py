"""The linear head of a classifier and its file."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltafl.errors import DeltaflError

HEAD_FILE = "head.safetensors"


class Head(nn.Module):
    """`logits = features @ weight^T + bias`; weight float32 (K, D), bias float32 (K,), a name a
    row.

    normalised: each feature vector is divided by its L2 norm first, as CLIP's zero-shot head wants.
    It is frozen until `requires_grad_()` releases it.

    Raises:
        DeltaflError: the shapes and the number of names do not fit together.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, class_names: Sequence[str], normalised: bool = False
    ) -> None:
        super().__init__()
        classes = len(class_names)
        if weight.ndim != 2 or len(weight) != classes or tuple(bias.shape) != (classes,):
            raise DeltaflError(
                f"a head of {classes} classes has weight {tuple(weight.shape)} and bias "
                f"{tuple(bias.shape)}; they must be ({classes}, features) and ({classes},)"
            )
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.class_names = tuple(class_names)
        self.normalised = normalised

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        if self.normalised:
            features = nn.functional.normalize(features, dim=-1)
        return nn.functional.linear(features, self.weight, self.bias)

    def check(self, feature_dim: int, class_names: Sequence[str], where: str) -> None:
        """Refuse a head that was made for another model or task; `where` names it in the message.

        Raises:
            DeltaflError: other feature dimension, number of classes, or names of classes.
        """
        own, problem = self.class_names, None
        if self.weight.shape[1] != feature_dim:
            problem = (
                f"takes {self.weight.shape[1]} features, the model gives {feature_dim}; "
                "was it made with another model?"
            )
        elif len(own) != len(class_names):
            problem = (
                f"has {len(own)} classes, the task has {len(class_names)}; is it another task's?"
            )
        elif own != tuple(class_names):
            pairs = zip(own, class_names, strict=True)
            ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
            problem = f'has a class "{ours}" where the task has "{theirs}"; is it another task\'s?'
        if problem:
            raise DeltaflError(f'head "{where}" {problem}')


def save_head(head: Head, path: Path) -> None:
    """One safetensors file: `weight`, `bias`, `normalised` where that is so, and the class names
    (JSON) as metadata.

    The names are all of the metadata: safetensors writes several keys in random order, and equal
    heads should be equal files.
    """
    tensors = {n: t.detach().contiguous().cpu() for n, t in head.named_parameters()}
    if head.normalised:
        tensors["normalised"] = torch.ones(1, dtype=torch.uint8)
    save_file(tensors, path, metadata={"class_names": json.dumps(head.class_names)})


def load_head(path: Path) -> Head:
    """What `save_head` wrote.

    Raises:
        DeltaflError: no such file, or not one that `save_head` wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["class_names"])
            weight, bias = (file.get_tensor(name).float() for name in ("weight", "bias"))
            return Head(weight, bias, names, "normalised" in set(file.keys()))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DeltaflError(
            f'head "{path}" cannot be read: {error}; `deltafl finetune` writes such files'
        ) from error
