"""A user's own encoder: `module:attr`, a callable that returns an nn.Module."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltafl.errors import DeltaflError, shorten
from deltafl.models.encoder import Factory, InputSpec, LoadedEncoder, assemble
from deltafl.usercode import find_callable, importable

MODEL_JSON = "deltafl_model.json"
WEIGHTS = "model.safetensors"


def load_plugin(ref: str, kwargs: Mapping[str, Any] | None = None) -> LoadedEncoder:
    """Call `module:attr` (the working directory is importable) and read the module that it returns.

    Features are `module.embed(x)` where there is one, else `module(x)`. The input is read from attributes of the
    module or of the callable: `input_size` (default 224), `channels` (3), `mean` and `std` (one per channel, default
    0.5: x / 127.5 - 1).
    """
    factory = Factory(ref, dict(kwargs or {}))
    builder, module = _build(factory)

    def option(name: str, default: Any) -> Any:
        return getattr(module, name, getattr(builder, name, default))

    channels = int(option("channels", 3))
    half = (0.5,) * channels
    mean, std = (tuple(float(v) for v in option(name, half)) for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        raise DeltaflError(
            f'model "{ref}": mean and std need one value for each of its {channels} channels'
        )
    return assemble(
        module, _embed, InputSpec(int(option("input_size", 224)), channels, mean, std), ref, factory
    )


def load_saved_plugin(directory: Path) -> LoadedEncoder:
    """What `save_plugin` wrote, or a merged directory beside a copy of its `deltafl_model.json`.

    Raises:
        DeltaflError: unreadable files, a factory that is gone, or tensors that do not fit the module.
    """
    try:
        found = json.loads((directory / MODEL_JSON).read_text())
        factory = Factory(found["factory"], found["kwargs"])
        given = found["input"]
        spec = InputSpec(
            given["image_size"], given["channels"], tuple(given["mean"]), tuple(given["std"])
        )
        weights = load_file(directory / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DeltaflError(f'model "{directory}" cannot be loaded: {error}') from error
    _, module = _build(factory)
    module.float()
    own = module.state_dict()
    wrong = sorted(n for n in own.keys() | weights.keys() if n not in own or n not in weights)
    wrong += sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    if wrong:
        raise DeltaflError(
            f'model "{directory}": {shorten(wrong)} not in both the file and "{factory.ref}", or of another shape'
        )
    module.load_state_dict(weights)
    return assemble(module, _embed, spec, str(directory), factory)


def save_plugin(encoder: LoadedEncoder, directory: Path) -> None:
    """`model.safetensors` with the module's own names and `deltafl_model.json`, which says how to build it again.

    Tied tensors are written under each of their names.
    """
    assert encoder.factory is not None
    spec = encoder.input
    content = {
        "factory": encoder.factory.ref,
        "kwargs": dict(encoder.factory.kwargs),
        "input": {
            "image_size": spec.image_size,
            "channels": spec.channels,
            "mean": spec.mean,
            "std": spec.std,
        },
    }
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in encoder.module.state_dict().items()
    }
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / MODEL_JSON).write_text(json.dumps(content, indent=2) + "\n")


def _embed(module: nn.Module, images: Tensor) -> Tensor:
    embed = getattr(module, "embed", None)
    return module(images) if embed is None else embed(images)


def _build(factory: Factory) -> tuple[Any, nn.Module]:
    """The callable behind the name, and the module that it returns."""
    builder = find_callable(factory.ref, "model")
    with importable():
        try:
            module = builder(**factory.kwargs)
        except TypeError as error:
            raise DeltaflError(
                f'model "{factory.ref}" with {dict(factory.kwargs)}: {error}'
            ) from error
    if not isinstance(module, nn.Module):
        raise DeltaflError(
            f'model "{factory.ref}" returned a {type(module).__name__}, not a torch.nn.Module'
        )
    return builder, module
