"""`deltafl mask`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import torch
from pydantic import Field

from deltafl.algebra.tensors import device_named
from deltafl.cli.command import recipe_command
from deltafl.cli.results import show_result
from deltafl.cli.run import prepared
from deltafl.federated.recipe import ClientsRecipe
from deltafl.federated.setup import MASK_FILE, make_shards, prepare
from deltafl.files import check_output
from deltafl.models import Net, load_net
from deltafl.recipes import Flags, Incidental, Recipe, read_recipe
from deltafl.report import mask_page
from deltafl.sparse.eligible import eligible, excluded
from deltafl.sparse.masks import Mask, describe_mask, load_mask, model_hash, save_mask


class DescribeRecipe(Recipe):
    """A saved mask to describe."""

    describe: Annotated[str, Incidental] = Field(
        description="a saved mask to describe, instead of making one; "
        "--base leaves out what was not eligible"
    )
    model: Annotated[str | None, Flags(("--model", "--base"))] = None
    device: str | None = None
    out: str | None = None
    overwrite: bool = False


class MaskRecipe(ClientsRecipe):
    """The mask that a federated run with these settings would make."""

    out: Annotated[str | None, Incidental] = Field(
        None,
        description="the folder to write: mask.safetensors, mask.json, figure.png and report.html",
    )
    describe: Annotated[str | None, Incidental] = Field(
        None, description=DescribeRecipe.model_fields["describe"].description
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.sparse.mask_file is not None:
            yield f'mask_file "{self.sparse.mask_file}" is a finished mask; see it with --describe'
        elif not self.sparse.sparsity_ratio:
            yield (
                "sparsity_ratio 0 freezes nothing; give the share to freeze, as in "
                "--sparsity-ratio 0.9"
            )


def read_mask(config: str | None, settings: Mapping[str, Any]) -> MaskRecipe | DescribeRecipe:
    """The recipe of the mask to make, or to describe. Raises DeltaflError."""
    kind = DescribeRecipe if "describe" in settings else MaskRecipe
    return read_recipe(kind, config, settings)


@recipe_command(MaskRecipe, "dry_run", read=read_mask)
def mask_command(recipe: MaskRecipe | DescribeRecipe) -> None:
    """Make the mask that a federated run with these settings would make, or describe one.

    \b
    deltafl mask --base MODEL --data TASK --sparsity-ratio 0.9 --out DIR
    deltafl federate ... --mask-file DIR/mask.safetensors
    deltafl mask --describe DIR/mask.safetensors --base MODEL
    """
    if recipe.out is not None:
        check_output(recipe.out, overwrite=recipe.overwrite)
    if isinstance(recipe, MaskRecipe):
        mask, net, about = _made(recipe)
    else:
        net = load_net(recipe.model).copy_to(device_named(recipe.device)) if recipe.model else None
        mask, about = load_mask(recipe.describe, net)
    result = _facts(mask, net, about)

    def save(folder: Path) -> None:
        if isinstance(recipe, MaskRecipe):
            save_mask(mask, folder / MASK_FILE, result["model_hash"], about)

    show_result(mask_page(result), recipe.out, recipe.overwrite, "mask.json", save)
    if recipe.out is not None and isinstance(recipe, MaskRecipe):
        click.echo(f"mask: {Path(recipe.out) / MASK_FILE}")


def _made(recipe: MaskRecipe) -> tuple[Mask, Net, dict[str, Any]]:
    """The mask, by the very steps of a federated run, its model, and what decided it."""
    net, task = prepared(recipe)
    net = net.copy_to(device_named(recipe.device))
    mask = prepare(net, task, recipe, make_shards(task, recipe))
    assert mask is not None
    shown = {"base": recipe.model, "task": task.name, "limit": recipe.data.limit}
    for section in (recipe.sparse, recipe.sharding, recipe.head):
        shown |= section.resolved()
    shown |= recipe.model_dump(include={"participation_rate", "mixed_precision", "seed"})
    shown = {n: value for n, value in shown.items() if value is not None and value is not False}
    return mask, net, shown


def _facts(mask: Mask, net: Net | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell of a mask; without its model all coordinates count as eligible."""
    able = eligible(net) if net else {n: torch.ones_like(kept) for n, kept in mask.items()}
    return {
        "made": dict(about),
        "model_hash": model_hash(net) if net else None,
        "parameters": sum(kept.numel() for kept in mask.values()),
        "eligible": sum(int(part.sum()) for part in able.values()),
        "kept": sum(int(mask[name].sum()) for name in able),
        "excluded": excluded(able),
        "tensors": describe_mask(mask, able),
    }
