"""The kinds of model that transformers has and we train: each is a function in its own file."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from deltafl.errors import DeltaflError, shorten
from deltafl.models.net import Net
from deltafl.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")

Family: TypeAlias = Callable[[str, "PretrainedConfig", torch.Generator | None], Net | None]
"""From a folder or hub id and the configuration there to the model, None if it is of another kind.

With a generator the weights are random, a function of it alone, and the folder, "" for none, is
that of what belongs to the model beside its weights (tokenizer, normalisation).
"""

FAMILIES: Registry[Family] = Registry("family of models")


def build_net(
    ref: str, config: "PretrainedConfig", generator: torch.Generator | None = None
) -> Net:
    """The model of the family that claims the configuration. Raises DeltaflError if none does."""
    for name in FAMILIES:
        if net := FAMILIES[name](ref, config, generator):
            return net
    raise DeltaflError(
        f'model "{ref}" is a "{config.model_type}"; known are {", ".join(FAMILIES)}. '
        "Wrap it in a function of your own and give that as module:attr"
    )


def read_config(ref: str) -> "PretrainedConfig":
    """The configuration in a folder or of a hub id. Raises DeltaflError."""
    import transformers

    return explained(ref, transformers.AutoConfig.from_pretrained, ref)


def new_config(ref: str, settings: Mapping[str, object]) -> "PretrainedConfig":
    """A configuration from the keys of a config.json; `ref` is what error messages call it.

    Raises:
        DeltaflError: no or an unknown model_type, a value that is none, a key that looks misspelt.
    """
    import transformers

    rest = dict(settings)
    kind, make = rest.pop("model_type", None), transformers.AutoConfig.for_model
    known = explained(ref, make, kind).to_dict()
    for key in rest.keys() - known.keys():
        if close := difflib.get_close_matches(key, known, 1, 0.8):
            raise DeltaflError(f'model "{ref}": unknown key "{key}"; did you mean "{close[0]}"?')
    return explained(ref, make, kind, **rest)


def build_module(
    ref: str,
    kind: Any,
    draw: Callable[..., "PreTrainedModel"],
    config: "PretrainedConfig",
    generator: torch.Generator | None,
    **how: object,
) -> "tuple[PreTrainedModel, list[str]]":
    """A module of the class `kind` with all of its tensors from the files of `ref`, in their dtype,
    and the names that are left over; with a generator what `draw` makes of the configuration.

    Raises:
        DeltaflError: unreadable, tensors missing or of another shape.
    """
    if generator is not None:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(generator.initial_seed())
            return explained(ref, draw, config, **how), []
    how |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    module, info = explained(ref, kind.from_pretrained, ref, dtype="auto", **how)
    broken = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if broken:
        raise DeltaflError(
            f'model "{ref}": {shorten(broken)} missing or misshapen in the file; is it complete?'
        )
    return module, sorted(info["unexpected_keys"])


def explained(ref: str, call: Callable[..., T], *args: object, **kwargs: object) -> T:
    """`call(...)`, quietly, its complaints as one line of ours."""
    known = OSError, ValueError, LookupError, RuntimeError, SafetensorError, StrictDataclassError
    complaints = *known, TypeError, ArithmeticError, AttributeError
    try:
        with quiet():
            return call(*args, **kwargs)
    except complaints as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DeltaflError(f'model "{ref}" cannot be loaded: {reason}') from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars and reports: what matters of them is raised or logged here."""
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
