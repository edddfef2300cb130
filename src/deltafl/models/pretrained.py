"""What transformers reads: configurations, modules and tokenizers, its complaints in our words."""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from deltafl.errors import DeltaflError, shorten

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


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


def read_tokenizer(ref: str) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder or of a hub id.

    Raises:
        DeltaflError: there is none; transformers would make one that knows nothing.
    """
    import transformers

    tokenizer = explained(ref, transformers.AutoTokenizer.from_pretrained, ref)
    if not {*tokenizer("a b", add_special_tokens=False).input_ids} - {tokenizer.unk_token_id}:
        raise DeltaflError(f'model "{ref}" has no tokenizer; copy it from the model\'s origin')
    return tokenizer


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
    try:
        with quiet():
            return call(*args, **kwargs)
    except DeltaflError:
        raise
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DeltaflError(f'model "{ref}" cannot be loaded: {reason}') from error


def write_pretrained(
    module: nn.Module, folder: Path, beside: Callable[[Path], object] = Path
) -> None:
    """Write a module of transformers, and `beside(folder)` what belongs to it."""
    with quiet():
        module.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        beside(folder)


def recompute_activations(module: nn.Module) -> None:
    """Let a module of transformers, or the one in it, keep no activations between the layers while
    it trains: a third more work for a fraction of the memory.

    Raises:
        DeltaflError: it cannot.
    """
    from transformers import PreTrainedModel

    parts = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    if not parts or not parts[0].supports_gradient_checkpointing:
        raise DeltaflError(
            f"{type(module).__name__} has no gradient checkpointing; leave gradient_checkpointing "
            "out, or lower micro_batch_size"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in 5.17
        parts[0].gradient_checkpointing_enable({"use_reentrant": False})


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
