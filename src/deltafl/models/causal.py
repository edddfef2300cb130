"""Causal language models of transformers, with their tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from deltafl.models.net import Net
from deltafl.models.pretrained import build_module, read_tokenizer, write_pretrained
from deltafl.tasks.inputs import TextInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_TOKENS = 2048
"""Tokens in one example where the tokenizer and the configuration name no limit below it."""


class CausalNet(Net):
    """A net of a causal language model of transformers, which writes."""

    @torch.no_grad()
    def write(self, prompts: Sequence[Tensor], most: int) -> list[Tensor]:
        """What follows each prompt, token ids int64 (T_i,), greedily, at most `most` tokens and
        none after an EOS of the tokenizer or of the generation config, which is left out; int64
        (L_i,) on the CPU. The module is left in eval mode.
        """
        from transformers import GenerationConfig

        module, inputs = self.core.eval(), self.inputs
        assert isinstance(inputs, TextInput)
        generate = cast(Callable[..., Tensor], module.generate)
        known = cast(GenerationConfig, module.generation_config).eos_token_id
        ends = *(known if isinstance(known, list) else [known]), inputs.tokenizer.eos_token_id
        stops = [end for end in ends if isinstance(end, int)]
        pad = nn.utils.rnn.pad_sequence([*prompts], True, -1, "left").to(self.device)
        how = GenerationConfig(max_new_tokens=most, do_sample=False, use_cache=True)
        how.eos_token_id, how.pad_token_id = stops or None, min(stops, default=0)
        mask = pad >= 0
        rows = generate(pad * mask, attention_mask=mask.long(), generation_config=how)
        rows = rows[:, pad.shape[1] :].cpu()
        over = torch.isin(rows, torch.tensor(stops, dtype=torch.int64)).cumsum(1)
        return [row[own == 0] for row, own in zip(rows, over, strict=True)]


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

    def store(module: nn.Module, folder: Path) -> None:
        """As the files say, with the cache of keys and values that only generation needs."""
        assert isinstance(module, transformers.PreTrainedModel)
        module.config.use_cache = cached
        write_pretrained(module, folder, beside=tokenizer.save_pretrained)
        module.config.use_cache = False

    module.config.use_cache = False
    return CausalNet(module.eval(), inputs, origin, store)
