"""An encoder and its head apart, as rooms that do not use `Net` yet see a model; goes with the last of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltafl.models.classifier import Classifier, Embed
from deltafl.models.fit import ClassifierFormat, classifier_of
from deltafl.models.loading import load_net
from deltafl.models.net import Format, Net
from deltafl.tasks.inputs import ImageInput

InputSpec = ImageInput


@dataclass(frozen=True)
class LoadedEncoder:
    """The parts of a `Classifier` but its head, and of its `Net`."""

    module: nn.Module
    embed: Embed
    input: InputSpec
    feature_dim: int
    origin: str
    format: Format | None = None

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) on the module's device -> features (B, D)."""
        return self.embed(self.module, self.input.normalise(images))

    def copy_to(self, device: torch.device | str) -> "LoadedEncoder":
        """The same encoder around a copy of the module on `device`."""
        return replace(self, module=copy.deepcopy(self.module).to(device))


def encoder_of(net: Net) -> LoadedEncoder:
    """The encoder inside a classifier, not a copy."""
    made = classifier_of(net)
    return LoadedEncoder(
        made.encoder, made.embed, made.inputs, made.feature_dim, net.origin, net.format
    )


def load_encoder(ref: str | Path, kwargs: Mapping[str, Any] | None = None) -> LoadedEncoder:
    """The encoder of `load_net(ref, kwargs)`."""
    return encoder_of(load_net(ref, kwargs))


def save_encoder(encoder: LoadedEncoder, directory: Path) -> None:
    """Write `encoder` into the existing `directory`, so that `load_encoder(directory)` gives it back."""
    assert isinstance(encoder.format, ClassifierFormat)
    encoder.format.save_encoder(encoder.module, directory)


def assemble(module: nn.Module, embed: Embed, spec: InputSpec, origin: str) -> LoadedEncoder:
    """The encoder of a `Classifier` around `module`, which is changed in place."""
    made = Classifier(module, embed, spec, origin)
    return LoadedEncoder(module, embed, spec, made.feature_dim, origin, ClassifierFormat())
