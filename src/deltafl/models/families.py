"""The kinds of model that transformers has and we train: each is a class in a file of its own."""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from deltafl.errors import DeltaflError, shorten
from deltafl.models.net import Format, Net
from deltafl.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")


class Family(Format):
    """One kind of model: recognises its configuration, reads its files, and draws new ones."""

    @classmethod
    @abstractmethod
    def claims(cls, config: "PretrainedConfig") -> bool:
        """Whether the configuration is of this kind."""

    @classmethod
    @abstractmethod
    def load(cls, ref: str, config: "PretrainedConfig") -> Net:
        """The model in a folder or of a hub id.

        Raises:
            DeltaflError: unreadable, tensors missing or of another shape.
        """

    @classmethod
    @abstractmethod
    def new(cls, folder: str, config: "PretrainedConfig", generator: torch.Generator) -> Net:
        """A model with random weights, a function of `generator` alone; what belongs to it beside
        its weights (tokenizer, normalisation) is in `folder`, "" for none.
        """


FAMILIES: Registry[type[Family]] = Registry("family of models")


def family_of(ref: str, config: "PretrainedConfig") -> type[Family]:
    """The family that claims a configuration. Raises DeltaflError if none does."""
    for name in FAMILIES:
        if FAMILIES[name].claims(config):
            return FAMILIES[name]
    raise DeltaflError(
        f'model "{ref}" is a "{config.model_type}"; known are {", ".join(FAMILIES)}. '
        "Wrap it in a function of your own and give that as module:attr"
    )


def read_config(ref: str) -> "PretrainedConfig":
    """The configuration in a folder or of a hub id. Raises DeltaflError."""
    import transformers

    with quiet():
        return attempt(ref, transformers.AutoConfig.from_pretrained, ref)


def new_config(ref: str, settings: Mapping[str, Any]) -> "PretrainedConfig":
    """A configuration from the keys of a config.json; `ref` is what error messages call it.

    Raises:
        DeltaflError: no or an unknown model_type, a value that is none, a key that looks misspelt.
    """
    import transformers

    rest, kind = dict(settings), settings.get("model_type")
    rest.pop("model_type", None)
    with quiet():
        known = attempt(ref, transformers.AutoConfig.for_model, kind).to_dict()
        for key in rest.keys() - known.keys():
            if close := difflib.get_close_matches(key, known, 1, 0.8):
                raise DeltaflError(
                    f'model "{ref}": unknown key "{key}"; did you mean "{close[0]}"?'
                )
        return attempt(ref, transformers.AutoConfig.for_model, kind, **rest)


def read_weights(
    ref: str, kind: Any, config: "PretrainedConfig", **how: Any
) -> "tuple[PreTrainedModel, list[str]]":
    """A module of the class `kind` with all of its tensors from the files of `ref`, and the names
    that are left over.

    Raises:
        DeltaflError: unreadable, tensors missing or of another shape.
    """
    how |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        module, info = attempt(ref, kind.from_pretrained, ref, **how)
    broken = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if broken:
        raise DeltaflError(
            f'model "{ref}": {shorten(broken)} missing or misshapen in the file; is it complete?'
        )
    return module, sorted(info["unexpected_keys"])


def attempt(ref: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`call(...)`, its complaints as one line of ours."""
    complaints = OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError
    try:
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
