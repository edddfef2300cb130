"""Vision encoders of transformers: ViT, DeiT, DINO, DINOv2 and CLIP's image tower."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltafl.errors import shorten
from deltafl.models.classifier import Classifier, ClassifierNet
from deltafl.models.net import Net
from deltafl.models.pretrained import build_module, write_pretrained
from deltafl.tasks.inputs import ImageInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"

_KINDS = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
}


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

    family = config.model_type
    if family not in _KINDS:
        return None
    name, how = _KINDS[family], {"add_pooling_layer": False} if family in ("vit", "deit") else {}
    if family == "clip_vision_model" and "CLIPVisionModel" in (config.architectures or ()):
        name = "CLIPVisionModel"
    if family == "clip":
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    kind = getattr(transformers, name)
    module, rest = build_module(ref, kind, kind, config, generator, **how)
    if rest:
        logger.info('model "%s": left out %s', ref, shorten(rest))
    if generator and family == "vit":
        _draw(module, generator)
    found, write = {}, write_pretrained
    preprocessor = ref and transformers.utils.cached_file(
        ref,
        PREPROCESSOR,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if preprocessor:
        found = json.loads(Path(preprocessor).read_text())
        write = partial(write, beside=partial(shutil.copy, preprocessor))
    else:
        logger.info('model "%s" has no %s: mean 0.5 and std 0.5 are assumed', ref, PREPROCESSOR)
    size, half = config.image_size, [0.5] * config.num_channels
    inputs = ImageInput(
        size if isinstance(size, int) else size[0],
        config.num_channels,
        tuple(found.get("image_mean", half)),
        tuple(found.get("image_std", half)),
    )
    origin = "" if generator else ref
    return ClassifierNet(Classifier(module, inputs, origin), inputs, origin, write)


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name:
            parameter.fill_(1)
        else:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=generator)
