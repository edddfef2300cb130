"""Vision encoders of transformers: ViT, DeiT, DINO, DINOv2 and CLIP's image tower; transformers is imported late."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError, did_you_mean, shorten
from deltafl.models.encoder import Embed, InputSpec, LoadedEncoder, assemble

logger = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"


def _cls(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).last_hidden_state[:, 0]


def _projected(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).image_embeds


def _pooled(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).pooler_output


_NO_POOLER = {"add_pooling_layer": False}
_FAMILIES: dict[str, tuple[str, Embed, dict[str, Any]]] = {
    "vit": ("ViTModel", _cls, _NO_POOLER),
    "deit": ("DeiTModel", _cls, _NO_POOLER),
    "dinov2": ("Dinov2Model", _cls, {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", _cls, {}),
    "clip": ("CLIPVisionModelWithProjection", _projected, {}),
    "clip_vision_model": ("CLIPVisionModelWithProjection", _projected, {}),
}


def load_pretrained(ref: str) -> LoadedEncoder:
    """An encoder from a directory in Hugging Face layout or a hub id, in float32 whatever the file's dtype.

    Features: ViT, DeiT, DINO, DINOv2: the class token of `last_hidden_state` (after the final layer norm, no pooler).
    CLIP: the projected image embedding; the pooled one where the file is a `CLIPVisionModel`, which has no projection.
    What the file holds beyond the encoder (pooler, classifier, text tower) is left out and logged.

    Raises:
        DeltaflError: unknown or unreadable model, a family without a rule for its features, missing or misshapen
            tensors.
    """
    import transformers

    with quiet():
        config = attempt(ref, transformers.AutoConfig.from_pretrained, ref)
        if config.model_type not in _FAMILIES:
            raise DeltaflError(
                f'model "{ref}" is a "{config.model_type}", known are {", ".join(_FAMILIES)}; '
                "wrap it in a function of your own and give that as module:attr"
            )
        class_name, embed, kwargs = _FAMILIES[config.model_type]
        if config.model_type == "clip_vision_model" and "CLIPVisionModel" in (
            config.architectures or ()
        ):
            class_name, embed = "CLIPVisionModel", _pooled
        if config.model_type == "clip":
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        module, info = attempt(
            ref,
            getattr(transformers, class_name).from_pretrained,
            ref,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    broken = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if broken:
        raise DeltaflError(
            f'model "{ref}": {shorten(broken)} missing or misshapen in the file; is it complete?'
        )
    if info["unexpected_keys"]:
        logger.info('model "%s": left out %s', ref, shorten(sorted(info["unexpected_keys"])))
    return assemble(module, embed, _input_spec(ref, config), ref)


def new_vit(
    *,
    hidden: int,
    layers: int,
    heads: int,
    patch: int,
    image_size: int,
    channels: int = 3,
    generator: torch.Generator,
) -> LoadedEncoder:
    """A ViT with random weights: transformers' own architecture (so that the result loads in it), 4 * hidden wide MLP.

    Linear and patch weights and the embeddings are normal(0, 0.02), truncated at 2 deviations; biases 0, layer norms
    (1, 0). transformers' own initialisation reads the global generator; this one reads `generator` alone.
    """
    import transformers

    if image_size % patch or hidden % heads:
        raise DeltaflError(
            f"image_size {image_size} must be a multiple of patch {patch}, hidden {hidden} of {heads}"
        )
    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        patch_size=patch,
        image_size=image_size,
        num_channels=channels,
    )
    with torch.random.fork_rng(devices=[]):
        module = transformers.ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "layernorm" in name:
                parameter.fill_(1)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=generator)
    return assemble(
        module, _cls, InputSpec(image_size, channels, (0.5,) * channels, (0.5,) * channels), ""
    )


def new_vit_from(text: str) -> LoadedEncoder:
    """`new_vit` from `hidden=64,layers=3,...`, all whole numbers; `seed` (default 0) keys the generator.

    Raises:
        DeltaflError: a misspelt, missing or unreadable value.
    """
    required, known = {"hidden", "layers", "heads", "patch", "image_size"}, {"channels", "seed"}
    values: dict[str, int] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in required | known:
            raise DeltaflError(
                f'model "vit:{text}": unknown "{key}"; {did_you_mean(key, required | known)}'
            )
        if not value.isdigit():
            raise DeltaflError(f'model "vit:{text}": {key} must be a whole number, not "{value}"')
        values[key] = int(value)
    if missing := required - values.keys():
        raise DeltaflError(f'model "vit:{text}": lacks {", ".join(sorted(missing))}')
    return new_vit(generator=torch.Generator().manual_seed(values.pop("seed", 0)), **values)


def save_pretrained(encoder: LoadedEncoder, directory: Path) -> None:
    """config.json, model.safetensors and, where the origin has one, its preprocessor file, copied."""
    with quiet():
        encoder.module.save_pretrained(directory)  # pyright: ignore[reportCallIssue]
    preprocessor = _preprocessor(encoder.origin) if encoder.origin else None
    if preprocessor is not None:
        shutil.copyfile(preprocessor, directory / PREPROCESSOR)


def _input_spec(ref: str, config: Any) -> InputSpec:
    """Size and channels from the config; mean and std from the preprocessor file, 0.5 (ViT's own) without one."""
    size = config.image_size
    size = size if isinstance(size, int) else size[0]
    path = _preprocessor(ref)
    found = json.loads(path.read_text()) if path is not None else {}
    if path is None:
        logger.info('model "%s" has no %s: mean 0.5 and std 0.5 are assumed', ref, PREPROCESSOR)
    half = [0.5] * config.num_channels
    mean, std = found.get("image_mean", half), found.get("image_std", half)
    return InputSpec(size, config.num_channels, tuple(mean), tuple(std))


def _preprocessor(ref: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        ref,
        PREPROCESSOR,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def attempt(ref: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call(...)`, its complaints as one line of ours."""
    from safetensors import SafetensorError

    try:
        return call(*args, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeltaflError(f'model "{ref}" cannot be loaded: {reason}') from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and reports: what matters of them is raised or logged here."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
