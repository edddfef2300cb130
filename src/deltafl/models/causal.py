"""Causal language models of transformers, with their tokenizer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltafl.errors import DeltaflError, shorten
from deltafl.models.net import Format, Net
from deltafl.models.pretrained import attempt, quiet
from deltafl.tasks.inputs import TextInput

MOST_TOKENS = 2048
"""Tokens in one example where the tokenizer and the configuration name no limit below it."""


class CausalFormat(Format):
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` read."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def save(self, module: nn.Module, folder: Path) -> None:
        with quiet():
            module.save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)


def load_causal(ref: str, config: Any) -> Net:
    """A causal language model and its tokenizer from a folder or hub id, in the files' own dtype.

    Raises:
        DeltaflError: unreadable, no tokenizer, tensors missing or of another shape.
    """
    import transformers

    with quiet():
        tokenizer = attempt(ref, transformers.AutoTokenizer.from_pretrained, ref)
        module, info = attempt(
            ref,
            transformers.AutoModelForCausalLM.from_pretrained,
            ref,
            config=config,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    broken = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if broken:
        raise DeltaflError(
            f'model "{ref}": {shorten(broken)} missing or misshapen in the file; is it complete?'
        )
    return _net(module, tokenizer, ref)


def new_causal(ref: str, config: Any, seed: int) -> Net:
    """A causal language model with random weights, keyed by `seed`, from a folder that holds config.json
    and a tokenizer.
    """
    import transformers

    with quiet(), torch.random.fork_rng(devices=[]):
        tokenizer = attempt(ref, transformers.AutoTokenizer.from_pretrained, ref)
        torch.random.default_generator.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(config)
    return _net(module, tokenizer, "")


def _net(module: Any, tokenizer: Any, origin: str) -> Net:
    limit = getattr(module.config, "max_position_embeddings", None) or MOST_TOKENS
    inputs = TextInput(tokenizer, min(limit, tokenizer.model_max_length, MOST_TOKENS))
    return Net(module.eval(), inputs, CausalFormat(tokenizer), origin)
