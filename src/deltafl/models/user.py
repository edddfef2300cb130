"""A user's own model: `module:attr`, a callable that returns an image encoder or a whole `Net`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deltafl.errors import DeltaflError, shorten
from deltafl.models.classifier import Classifier, ClassifierNet
from deltafl.models.net import MODEL_JSON, WEIGHTS, Net, write_module
from deltafl.tasks.inputs import ImageInput
from deltafl.usercode import find_callable, importable


def user_net(
    ref: str, kwargs: Mapping[str, Any], inputs: ImageInput | None = None, origin: str = ""
) -> Net:
    """What the callable `module:attr`, given `kwargs` (values that JSON can hold), returns: a `Net`
    as it is, a module as an encoder of images.

    Features are `module.embed(x)` where there is one, else `module(x)`. `inputs` None: read
    from attributes of the module or of the callable: `input_size` (default 224), `channels`
    (3), `mean` and `std` (one per channel, default 0.5: x / 127.5 - 1).
    """
    builder, origin = find_callable(ref, "model"), origin or ref
    with importable():
        try:
            made = builder(**kwargs)
        except TypeError as error:
            raise DeltaflError(f'model "{ref}" with {kwargs}: {error}') from error
    if not isinstance(made, Net | nn.Module):
        raise DeltaflError(
            f'model "{ref}" returned a {type(made).__name__}, '
            "not a torch.nn.Module or a deltafl Net"
        )
    about = {"factory": ref, "kwargs": kwargs}
    if isinstance(made, nn.Module):
        inputs = inputs or _inputs(ref, builder, made)
        about["input"] = asdict(inputs)
        made = ClassifierNet(Classifier(made, _embed, inputs, origin), inputs)
    made.origin, made.write = origin, partial(write_module, about=about)
    return made


def _inputs(ref: str, builder: object, module: nn.Module) -> ImageInput:
    def option(name: str, default: Any) -> Any:
        return getattr(module, name, getattr(builder, name, default))

    channels = int(option("channels", 3))
    half = (0.5,) * channels
    mean, std = (tuple(map(float, option(name, half))) for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        raise DeltaflError(
            f'model "{ref}": mean and std need one value for each of its {channels} channels'
        )
    return ImageInput(int(option("input_size", 224)), channels, mean, std)


def load_user(folder: Path) -> Net:
    """What `Net.save` wrote, or a merged directory beside a copy of its `deltafl_model.json`.

    Raises:
        DeltaflError: unreadable files, a factory that is gone, or tensors that do not fit the
        module.
    """
    try:
        found = json.loads((folder / MODEL_JSON).read_text())
        ref, kwargs = found["factory"], found["kwargs"]
        inputs = TypeAdapter(ImageInput | None).validate_python(found.get("input"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DeltaflError(f'model "{folder}" cannot be loaded: {error}') from error
    net = user_net(ref, kwargs, inputs, str(folder))
    module = net.module.encoder if isinstance(net, ClassifierNet) else net.module
    state = module.state_dict()
    wrong = state.keys() ^ weights.keys()
    wrong |= {n for n in state.keys() & weights if state[n].shape != weights[n].shape}
    if wrong:
        raise DeltaflError(
            f'model "{folder}": {shorten(sorted(wrong))} not in both the file and "{ref}", '
            "or of another shape"
        )
    module.load_state_dict(weights)
    return net


def _embed(module: nn.Module, images: Tensor) -> Tensor:
    return getattr(module, "embed", module)(images)
