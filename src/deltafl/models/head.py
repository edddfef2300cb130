"""The linear head of a classifier, its file and its settings."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.recipes import Recipe

HEAD_FILE = "head.safetensors"


class HeadRecipe(Recipe):
    """The head of a classifier: what is on top of its features, and whether it trains."""

    head: str = Field(
        "ridge",
        description="ridge (closed form, from sums of statistics), probe (logistic regression), "
        "linear (random weights), zero-shot (CLIP's text tower) or a head.safetensors file",
    )
    few_shot: int | None = Field(
        None, ge=1, description="fit the ridge head on so many examples of each class, not on all"
    )
    templates: str | None = Field(
        None,
        description="prompts for the zero-shot head: a file, one on each line, {} for the class",
    )
    train_head: bool = Field(False, description="train the head together with the encoder")

    def problems(self) -> Iterator[str]:
        if self.few_shot is not None and self.head != "ridge":
            yield "few_shot is about the ridge head"
        if self.templates is not None and self.head != "zero-shot":
            yield "templates are about the zero-shot head; give --head zero-shot too"


@dataclass(frozen=True)
class HeadFit:
    """What a head is fitted with. shards: the rows of the training split that each client holds,
    whose statistics are summed; None: all in one place. autocast: dtype of the encoder's
    arithmetic.
    """

    seed: int = 0
    shards: Sequence[Tensor] | None = None
    autocast: torch.dtype | None = None


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
        # in one layout, for another one rounds otherwise than what is read from a file
        rows = weight.detach().clone(memory_format=torch.contiguous_format)
        self.weight = nn.Parameter(rows, requires_grad=False)
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
        own, names, features = self.class_names, tuple(class_names), self.weight.shape[1]
        if features != feature_dim or own != names:
            other = next(
                (f', "{a}" for "{b}"' for a, b in zip(own, names, strict=False) if a != b), ""
            )
            raise DeltaflError(
                f'head "{where}" takes {features} features for {len(own)} classes, the model gives '
                f"{feature_dim} and the task has {len(names)}{other}; was it made for others?"
            )


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
