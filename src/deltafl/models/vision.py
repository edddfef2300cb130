"""Vision encoders of transformers: ViT, DeiT, DINO, DINOv2 and CLIP's image tower."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltafl.errors import shorten
from deltafl.models.classifier import Classifier, ClassifierNet
from deltafl.models.families import FAMILIES, build_module, quiet
from deltafl.models.net import Net
from deltafl.tasks.inputs import ImageInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"


def _cls(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).last_hidden_state[:, 0]


def _projected(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).image_embeds


def _pooled(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).pooler_output


_NO_POOLER = {"add_pooling_layer": False}
_KINDS = {
    "vit": ("ViTModel", _cls, _NO_POOLER),
    "deit": ("DeiTModel", _cls, _NO_POOLER),
    "dinov2": ("Dinov2Model", _cls, {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", _cls, {}),
    "clip": ("CLIPVisionModelWithProjection", _projected, {}),
    "clip_vision_model": ("CLIPVisionModelWithProjection", _projected, {}),
}


@FAMILIES.register("vision (vit, deit, dinov2, clip)")
def vision(ref: str, config: "PretrainedConfig", generator: torch.Generator | None) -> Net | None:
    """An encoder in float32 whatever the file's dtype, and the head that is beside it, if any.

    Features: ViT, DeiT, DINO, DINOv2: the class token of `last_hidden_state` (after the final layer
    norm, no pooler). CLIP: the projected image embedding; the pooled one where the file is a
    `CLIPVisionModel`, which has no projection. What the file holds beyond the encoder (pooler,
    classifier, text tower) is left out and logged.

    Of a new ViT the linear and patch weights and the embeddings are normal(0, 0.02), truncated at 2
    deviations, biases 0, layer norms (1, 0); others are drawn as transformers does. Size and
    channels are the configuration's; mean and std those of the preprocessor file, 0.5 (ViT's own)
    without one.
    """
    import transformers

    if config.model_type not in _KINDS:
        return None
    name, embed, how = _KINDS[config.model_type]
    if config.model_type == "clip_vision_model" and "CLIPVisionModel" in (
        config.architectures or ()
    ):
        name, embed = "CLIPVisionModel", _pooled
    if config.model_type == "clip":
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    kind = getattr(transformers, name)
    module, rest = build_module(ref, kind, kind, config, generator, **how)
    if rest:
        logger.info('model "%s": left out %s', ref, shorten(rest))
    if generator and config.model_type == "vit":
        _draw(module, generator)
    preprocessor = _preprocessor(ref) if ref else None
    found = json.loads(preprocessor.read_text()) if preprocessor else {}
    if not preprocessor:
        logger.info('model "%s" has no %s: mean 0.5 and std 0.5 are assumed', ref, PREPROCESSOR)
    size, half = config.image_size, [0.5] * config.num_channels
    inputs = ImageInput(
        size if isinstance(size, int) else size[0],
        config.num_channels,
        tuple(found.get("image_mean", half)),
        tuple(found.get("image_std", half)),
    )
    origin = "" if generator else ref
    classifier = Classifier(module, embed, inputs, origin)
    return ClassifierNet(classifier, inputs, origin, partial(_write, preprocessor=preprocessor))


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name:
            parameter.fill_(1)
        else:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=generator)


def _write(encoder: nn.Module, folder: Path, preprocessor: Path | None) -> None:
    """config.json, model.safetensors and, where the origin has one, its preprocessor file."""
    with quiet():
        encoder.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    if preprocessor is not None:
        shutil.copyfile(preprocessor, folder / PREPROCESSOR)


def _preprocessor(ref: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        ref,
        PREPROCESSOR,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
