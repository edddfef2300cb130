"""LoRA of language models, through peft and in its files."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn

from deltafl.checkpoints.adapter import PREFIX, Adapter
from deltafl.checkpoints.layout import ADAPTER, Layout, lasting_ref, read_layout
from deltafl.errors import DeltaflError, shorten
from deltafl.models.net import Net
from deltafl.models.pretrained import explained
from deltafl.recipes import Recipe
from deltafl.seeding import keyed_generator
from deltafl.tasks.inputs import TextInput

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear


class LoraRecipe(Recipe):
    """A LoRA (arXiv 2106.09685) that trains in place of the model."""

    lora_rank: int | None = Field(
        None, ge=1, description="rank of a LoRA adapter, which trains in place of the model"
    )
    lora_alpha: int | None = Field(
        None, ge=1, description="the adapter is scaled by alpha / rank (default: alpha = 2 rank)"
    )
    lora_targets: tuple[str, ...] = Field(
        (), description="names of its modules, as q_proj (default: all linear layers of the blocks)"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="of what the adapter is given")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.lora_rank is None and (self.lora_alpha or self.lora_targets or self.lora_dropout):
            yield "lora_alpha, lora_targets and lora_dropout need a lora_rank"


def add_lora(net: Net, recipe: LoraRecipe, seed: int) -> None:
    """Put a new LoRA of the recipe's rank into `net`: A is a function of `seed`, B is 0.

    Raises:
        DeltaflError: no language model from files, one with a LoRA, no such targets.
    """
    import peft

    if not isinstance(net.inputs, TextInput) or net.base or not net.origin:
        what = "has a LoRA, which trains" if net.base else "is no language model with weights"
        raise DeltaflError(f'model "{net.origin}" {what}; leave out --lora-rank')
    rank = recipe.lora_rank or 0
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=lasting_ref(net.origin),
        r=rank,
        lora_alpha=recipe.lora_alpha or 2 * rank,
        target_modules=list(recipe.lora_targets) or "all-linear",
        lora_dropout=recipe.lora_dropout,
    )
    with torch.random.fork_rng(devices=[]):
        key = keyed_generator(seed, "lora").initial_seed()
        torch.random.default_generator.manual_seed(key)
        explained(net.origin, _inject, net, config)


def lora_layers(net: Net) -> "dict[str, Linear]":
    """Name of each linear module with a LoRA -> peft's layer."""
    from peft.tuners.lora import Linear

    named = net.module.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, Linear)}


def load_lora(net: Net, layout: Layout, adapter: Adapter) -> None:
    """Put the LoRA of a folder into `net`, its base; it trains, and the base does not.

    Raises:
        DeltaflError: it is of another base, or does not fit.
    """
    import peft

    if (
        net.base
        or not isinstance(net.inputs, TextInput)
        or not adapter.fits(read_layout(net.origin))
    ):
        raise DeltaflError(
            f'adapter "{layout.ref}": "{net.origin}" is not the language model that it was made '
            "for; name that one, as BASE+ADAPTER"
        )
    config = explained(layout.ref, peft.LoraConfig.from_pretrained, str(layout.folder))
    config.inference_mode = False
    config.base_model_name_or_path = adapter.base
    explained(layout.ref, _inject, net, config)
    held = {n.removeprefix(PREFIX): t for n, t in load_file(layout.files[0]).items()}
    put = explained(layout.ref, peft.set_peft_model_state_dict, net.module, held)
    if put.unexpected_keys:
        lost = shorten(put.unexpected_keys)
        raise DeltaflError(f'adapter "{layout.ref}": {lost} match nothing in "{net.origin}"')
    net.origin = layout.ref


def _inject(net: Net, config: "LoraConfig") -> None:
    import peft

    assert isinstance(net.inputs, TextInput)
    peft.inject_adapter_in_model(config, net.module)
    config.target_modules = sorted(config.target_modules or ())
    for parameter in net.module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    net.base, net.store = config.base_model_name_or_path or "", partial(_write, net.inputs, config)


def _write(inputs: TextInput, config: "LoraConfig", module: nn.Module, folder: Path) -> None:
    import peft

    held = peft.get_peft_model_state_dict(module, save_embedding_layers=False)
    named = {PREFIX + name: tensor.contiguous() for name, tensor in held.items()}
    save_file(named, folder / ADAPTER, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    inputs.tokenizer.save_pretrained(folder)
