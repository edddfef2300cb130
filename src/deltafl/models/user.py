"""A user's own model: `module:attr`, a callable that returns an image encoder or a whole `Net`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deltafl.errors import DeltaflError, shorten
from deltafl.models.classifier import Classifier
from deltafl.models.fit import ClassifierFormat
from deltafl.models.net import MODEL_JSON, WEIGHTS, Net
from deltafl.tasks.inputs import ImageInput
from deltafl.usercode import find_callable, importable


@dataclass(frozen=True)
class Factory:
    """`ref` is `module:attr`, called with `kwargs` (values that JSON can hold)."""

    ref: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def net(self, inputs: ImageInput | None = None, origin: str = "") -> Net:
        """What the callable gives: a `Net` as it is, a module as an encoder of images.

        Features are `module.embed(x)` where there is one, else `module(x)`. `inputs` None: read
        from attributes of the module or of the callable: `input_size` (default 224), `channels`
        (3), `mean` and `std` (one per channel, default 0.5: x / 127.5 - 1).
        """
        builder = find_callable(self.ref, "model")
        with importable():
            try:
                made = builder(**self.kwargs)
            except TypeError as error:
                raise DeltaflError(
                    f'model "{self.ref}" with {dict(self.kwargs)}: {error}'
                ) from error
        if not isinstance(made, Net | nn.Module):
            raise DeltaflError(
                f'model "{self.ref}" returned a {type(made).__name__}, '
                "not a torch.nn.Module or a deltafl Net"
            )
        about = {"factory": self.ref, "kwargs": dict(self.kwargs)}
        if isinstance(made, nn.Module):
            inputs = inputs or self._inputs(builder, made)
            about["input"] = asdict(inputs)
            classifier = Classifier(made, _embed, inputs, origin or self.ref)
            made = Net(classifier, inputs, ClassifierFormat())
        made.origin, made.format.about = origin or self.ref, about
        return made

    def _inputs(self, builder: object, module: nn.Module) -> ImageInput:
        def option(name: str, default: Any) -> Any:
            return getattr(module, name, getattr(builder, name, default))

        channels = int(option("channels", 3))
        half = (0.5,) * channels
        mean, std = (tuple(float(v) for v in option(name, half)) for name in ("mean", "std"))
        if len(mean) != channels or len(std) != channels:
            raise DeltaflError(
                f'model "{self.ref}": mean and std need one value for each of its '
                f"{channels} channels"
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
        factory = Factory(found["factory"], found["kwargs"])
        inputs = None
        if given := found.get("input"):
            mean, std = tuple(given["mean"]), tuple(given["std"])
            inputs = ImageInput(given["image_size"], given["channels"], mean, std)
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DeltaflError(f'model "{folder}" cannot be loaded: {error}') from error
    net = factory.net(inputs, str(folder))
    module = net.module.encoder if isinstance(net.module, Classifier) else net.module
    state = module.state_dict()
    wrong = sorted(n for n in state.keys() | weights.keys() if n not in state or n not in weights)
    wrong += sorted(n for n in state.keys() & weights if state[n].shape != weights[n].shape)
    if wrong:
        raise DeltaflError(
            f'model "{folder}": {shorten(wrong)} not in both the file and "{factory.ref}", '
            "or of another shape"
        )
    module.load_state_dict(weights)
    return net


def _embed(module: nn.Module, images: Tensor) -> Tensor:
    embed = getattr(module, "embed", None)
    return module(images) if embed is None else embed(images)
