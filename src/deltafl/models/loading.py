"""From what a user names a model by to a `Net`."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltafl.checkpoints.adapter import CONFIG, read_adapter
from deltafl.checkpoints.layout import read_layout, split_ref
from deltafl.errors import DeltaflError
from deltafl.files import WEIGHTS
from deltafl.models.adapter import load_lora, lora_layers
from deltafl.models.causal import causal
from deltafl.models.net import MODEL_JSON, Net
from deltafl.models.pretrained import explained, new_config, read_config
from deltafl.models.user import load_user, user_net
from deltafl.models.vision import vision

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_USERS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

_FAMILIES: Mapping[str, Callable[[str, "PretrainedConfig", torch.Generator | None], Net | None]] = {
    "causal language models": causal,
    "vision (vit, deit, dinov2, clip)": vision,
}
"""From a folder or hub id and the configuration there to the model, None if it is of another kind.

With a generator the weights are random, a function of it alone, and the folder, "" for none, is
that of what belongs to the model beside its weights (tokenizer, normalisation).
"""


def load_net(ref: str | Path, kwargs: Mapping[str, Any] | None = None) -> Net:
    """A model from a folder (Hugging Face layout, or saved by `Net.save`), a hub id, an adapter's
    folder or `BASE+ADAPTER`, or `module:attr`, whose callable is given `kwargs`; or a new one from
    a config.json, or a folder with one and no weights, keyed by the `seed` in it. What the folder
    holds of heads comes with it, frozen.

    Raises:
        DeltaflError: what is wrong with the model, in one line.
    """
    ref, path = str(ref), Path(ref)
    if _USERS.fullmatch(ref):
        return user_net(ref, kwargs or {})
    if kwargs:
        raise DeltaflError(f'model "{ref}" takes no keyword arguments, only module:attr does')
    if split_ref(ref)[0] or (path / CONFIG).is_file():
        layout = read_layout(ref)
        if adapter := read_adapter(layout):
            net = load_net(adapter.base)
            load_lora(net, layout, adapter)
            return net
    if (path / MODEL_JSON).is_file():
        return load_user(path)
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        logger.warning('model "%s" has no weights: they are drawn at random', ref)
        path = path / "config.json"
    if path.suffix != ".json":
        return _build(ref, read_config(ref), None)
    settings = explained(str(path), lambda: json.loads(path.read_text()))
    seed = settings.get("seed", 0) if isinstance(settings, dict) else None
    if not isinstance(seed, int):
        raise DeltaflError(f'model "{path}": must be a JSON object, its seed a whole number')
    return new_net(settings, folder=path.parent, ref=str(path))


@torch.no_grad()
def without_lora(net: Net) -> Net:
    """The model with its LoRA added to its weights, which are read anew from the base's files."""
    plain, state = load_net(net.base), dict[str, torch.Tensor]()
    layers = lora_layers(net)
    for name, tensor in net.module.state_dict().items():
        module, base, own = name.rpartition(".base_layer.")
        if base:
            delta = layers[module].get_delta_weight("default") if own == "weight" else 0
            state[f"{module}.{own}"] = tensor + delta
        elif ".lora_" not in name:
            state[name] = tensor
    plain.module.to(net.device, next(iter(state.values())).dtype).load_state_dict(state)
    return plain


def new_net(
    settings: Mapping[str, Any],
    generator: torch.Generator | None = None,
    *,
    folder: str | Path = "",
    ref: str = "new",
) -> Net:
    """A model with random weights from the keys of a config.json, as transformers names them, a
    function of `generator` or of the `seed` among the keys (default 0).

    folder: of what belongs to the model beside its weights: a tokenizer, a preprocessor file. ref:
    what error messages call the model.

    Raises:
        DeltaflError: what is wrong with the settings, in one line.
    """
    rest = {key: value for key, value in settings.items() if key != "seed"}
    generator = generator or torch.Generator().manual_seed(settings.get("seed", 0))
    return explained(ref, _build, str(folder), new_config(ref, rest), generator)


def _build(ref: str, config: "PretrainedConfig", generator: torch.Generator | None) -> Net:
    """The model of the family that claims the configuration. Raises DeltaflError if none does."""
    for family in _FAMILIES.values():
        if net := family(ref, config, generator):
            return net
    raise DeltaflError(
        f'model "{ref}" is a "{config.model_type}"; known are {", ".join(_FAMILIES)}. '
        "Wrap it in a function of your own and give that as module:attr"
    )
