"""Causal language models of transformers, with their tokenizer."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltafl.errors import DeltaflError
from deltafl.models.families import FAMILIES, build_module, explained, quiet
from deltafl.models.net import Net
from deltafl.tasks.inputs import TextInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MOST_TOKENS = 2048
"""Tokens in one example where the tokenizer and the configuration name no limit below it."""


@FAMILIES.register("causal language models")
def causal(ref: str, config: "PretrainedConfig", generator: torch.Generator | None) -> Net | None:
    """What `AutoModelForCausalLM` and `AutoTokenizer` read, in the files' own dtype."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    kind = transformers.AutoModelForCausalLM
    module, _ = build_module(ref, kind, kind.from_config, config, generator)
    tokenizer = explained(ref, transformers.AutoTokenizer.from_pretrained, ref)
    if not tokenizer("a b", add_special_tokens=False).input_ids:
        raise DeltaflError(f'model "{ref}" has no tokenizer; copy it from the model\'s origin')
    limit = config.to_dict().get("max_position_embeddings") or MOST_TOKENS
    inputs = TextInput(tokenizer, min(limit, tokenizer.model_max_length, MOST_TOKENS))
    origin = "" if generator else ref
    return Net(module.eval(), inputs, origin, partial(_write, tokenizer=tokenizer))


def _write(module: nn.Module, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    with quiet():
        module.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        tokenizer.save_pretrained(folder)
