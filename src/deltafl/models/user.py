"""A user's own model: `module:attr`, a callable that returns an image encoder or a whole `Net`."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors.torch import load_file
from torch import nn

from deltafl.errors import DeltaflError
from deltafl.models.classifier import Classifier, ClassifierNet
from deltafl.models.net import MODEL_JSON, WEIGHTS, Net, write_module
from deltafl.models.pretrained import explained
from deltafl.tasks.inputs import ImageInput
from deltafl.usercode import find_callable, importable


class _About(BaseModel):
    """What `deltafl_model.json` holds: how the user's code builds the model again."""

    factory: str
    kwargs: dict[str, Any]
    input: ImageInput | None = None


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
    about = {"factory": ref, "kwargs": dict(kwargs)}
    if isinstance(made, nn.Module):
        inputs = inputs or _inputs(builder, made)
        about["input"] = asdict(inputs)
        made = ClassifierNet(Classifier(made, inputs, origin), inputs)
    if not isinstance(made, Net):
        raise DeltaflError(
            f'model "{ref}" returned a {type(made).__name__}, '
            "not a torch.nn.Module or a deltafl Net"
        )
    made.origin, made.store = origin, partial(write_module, about=about)
    return made


def _inputs(builder: object, module: nn.Module) -> ImageInput:
    def option(name: str, default: Any) -> Any:
        return getattr(module, name, getattr(builder, name, default))

    mean, std = (tuple(map(float, option(name, (0.5,)))) for name in ("mean", "std"))
    return ImageInput(int(option("input_size", 224)), int(option("channels", 3)), mean, std)


def load_user(folder: Path) -> Net:
    """What `Net.save` wrote, or a merged directory beside a copy of its `deltafl_model.json`.

    Raises:
        DeltaflError: unreadable files, a factory that is gone, or tensors that do not fit the
        module.
    """
    written = (folder / MODEL_JSON).read_bytes()
    about = explained(str(folder), _About.model_validate_json, written)
    weights = explained(str(folder), load_file, folder / WEIGHTS)
    net = user_net(about.factory, about.kwargs, about.input, str(folder))
    explained(str(folder), net.core.load_state_dict, weights)
    return net
