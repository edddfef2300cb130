"""Encoders and heads: load a model by name, save it so that it loads again."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltafl.errors import DeltaflError
from deltafl.models.encoder import InputSpec, LoadedEncoder

__all__ = ["InputSpec", "LoadedEncoder", "load_encoder", "save_encoder"]

_NEW_VIT = "vit:"
_PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_encoder(ref: str | Path, kwargs: Mapping[str, Any] | None = None) -> LoadedEncoder:
    """An encoder from a directory (Hugging Face layout, or saved by `save_encoder`), a hub id or `module:attr`.

    `kwargs` go to the callable behind `module:attr`. `vit:hidden=64,layers=3,heads=4,patch=4,image_size=32` is a new
    ViT with random weights; `channels=3` and `seed=0` may be given too.

    Raises:
        DeltaflError: what is wrong with the model, in one line.
    """
    from deltafl.models import plugin, pretrained

    directory = Path(ref)
    if _PLUGIN.fullmatch(str(ref)):
        return plugin.load_plugin(str(ref), kwargs)
    if kwargs:
        raise DeltaflError(f'model "{ref}" takes no keyword arguments, only module:attr does')
    if str(ref).startswith(_NEW_VIT):
        return pretrained.new_vit_from(str(ref).removeprefix(_NEW_VIT))
    if (directory / plugin.MODEL_JSON).is_file():
        return plugin.load_saved_plugin(directory)
    return pretrained.load_pretrained(str(ref))


def save_encoder(encoder: LoadedEncoder, directory: Path) -> None:
    """Write `encoder` into the existing `directory`, so that `load_encoder(directory)` gives the same weights.

    Models of transformers are written by its `save_pretrained` and load in it; a user's own as `model.safetensors`
    and `deltafl_model.json`.
    """
    from deltafl.models import plugin, pretrained

    if encoder.factory is not None:
        plugin.save_plugin(encoder, directory)
    else:
        pretrained.save_pretrained(encoder, directory)
