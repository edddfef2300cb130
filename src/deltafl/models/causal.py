"""Causal language models of transformers, with their tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltafl.models.net import Net
from deltafl.models.pretrained import build_module, read_tokenizer, write_pretrained
from deltafl.tasks.inputs import TextInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_TOKENS = 2048
"""Tokens in one example where the tokenizer and the configuration name no limit below it."""


def causal(ref: str, config: "PretrainedConfig", generator: torch.Generator | None) -> Net | None:
    """What `AutoModelForCausalLM` and `AutoTokenizer` read, in the files' own dtype."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    kind = transformers.AutoModelForCausalLM
    module, _ = build_module(ref, kind, kind.from_config, config, generator)
    tokenizer = read_tokenizer(ref)
    limit = config.to_dict().get("max_position_embeddings") or MOST_TOKENS
    inputs = TextInput(tokenizer, min(limit, tokenizer.model_max_length, MOST_TOKENS))
    origin = "" if generator else ref
    cached = bool(config.to_dict().get("use_cache"))

    def write(module: nn.Module, folder: Path) -> None:
        """As the files say, with the cache of keys and values that only generation needs."""
        assert isinstance(module, transformers.PreTrainedModel)
        module.config.use_cache = cached
        write_pretrained(module, folder, beside=tokenizer.save_pretrained)
        module.config.use_cache = False

    module.config.use_cache = False
    return Net(module.eval(), inputs, origin, write)
