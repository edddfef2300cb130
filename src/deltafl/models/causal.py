"""Causal language models of transformers, with their tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltafl.models.families import FAMILIES, Family, attempt, quiet, read_weights
from deltafl.models.net import Net
from deltafl.tasks.inputs import TextInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MOST_TOKENS = 2048
"""Tokens in one example where the tokenizer and the configuration name no limit below it."""


@FAMILIES.register("causal language models")
class Causal(Family):
    """What `AutoModelForCausalLM` and `AutoTokenizer` read, in the files' own dtype."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    @classmethod
    def claims(cls, config: "PretrainedConfig") -> bool:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    @classmethod
    def load(cls, ref: str, config: "PretrainedConfig") -> Net:
        import transformers

        module, _ = read_weights(ref, transformers.AutoModelForCausalLM, config, dtype="auto")
        return cls._net(module, ref, ref)

    @classmethod
    def new(cls, folder: str, config: "PretrainedConfig", generator: torch.Generator) -> Net:
        import transformers

        with torch.random.fork_rng(devices=[]), quiet():
            torch.random.default_generator.manual_seed(generator.initial_seed())
            module = attempt(folder, transformers.AutoModelForCausalLM.from_config, config)
        return cls._net(module, folder, "")

    @classmethod
    def _net(cls, module: Any, folder: str, origin: str) -> Net:
        import transformers

        with quiet():
            tokenizer = attempt(folder, transformers.AutoTokenizer.from_pretrained, folder)
        limit = module.config.to_dict().get("max_position_embeddings") or MOST_TOKENS
        inputs = TextInput(tokenizer, min(limit, tokenizer.model_max_length, MOST_TOKENS))
        return Net(module.eval(), inputs, cls(tokenizer), origin)

    def save(self, module: nn.Module, folder: Path) -> None:
        with quiet():
            module.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
            self.tokenizer.save_pretrained(folder)
