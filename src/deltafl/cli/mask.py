"""`deltafl mask`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import click
import torch
from pydantic import Field

from deltafl.algebra.tensors import device_named
from deltafl.cli.command import recipe_options
from deltafl.cli.results import as_text
from deltafl.errors import DeltaflError
from deltafl.federated.recipe import ClientsRecipe
from deltafl.federated.setup import MASK_FILE, fit_head, make_mask, make_shards
from deltafl.files import atomic_folder, check_output, write_files
from deltafl.models import load_net
from deltafl.recipes import Incidental, read_recipe
from deltafl.report import kinds_table, mask_page, page_files
from deltafl.sparse.eligible import Eligible, eligible
from deltafl.sparse.masks import (
    Mask,
    describe_mask,
    load_mask,
    mask_meta,
    model_hash,
    save_mask,
)
from deltafl.tasks import load_task
from deltafl.training.record import write_json


class MaskRecipe(ClientsRecipe):
    """The mask that a federated run with these settings would make."""

    out: Annotated[str | None, Incidental] = Field(
        None,
        description="the folder to write: mask.safetensors, mask.json, figure.png and report.html",
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


@click.command()
@recipe_options(MaskRecipe, skip=("train_head", "augment", "label_smoothing"))
@click.option(
    "--describe",
    help="A saved mask to describe, instead of making one; --base tells q, k and v apart.",
)
def mask(config: str | None, describe: str | None, **options: Any) -> None:
    """Make the mask that a federated run with these settings would make, or describe one.

    \b
    deltafl mask --base MODEL --data TASK --sparsity-ratio 0.9 --mask-strategy least_sensitive --out DIR
    deltafl federate ... --mask-file DIR/mask.safetensors
    deltafl mask --describe DIR/mask.safetensors --base MODEL
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    out, overwrite = given.get("out"), given.get("overwrite", False)
    if describe is not None:
        odd = given.keys() - {"model", "device", "out", "overwrite"}
        if odd or config is not None:
            names = sorted([*odd, *(["config"] if config else [])])
            wrong = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise DeltaflError(
                "--describe makes no mask and takes --base, --device and --out only; "
                f"leave {wrong} out"
            )
        if out is not None:
            check_output(out, overwrite=overwrite)
        made, result = None, described(describe, given.get("model"), given.get("device"))
    else:
        recipe = read_recipe(MaskRecipe, config, given)
        out, overwrite = recipe.out, recipe.overwrite
        if out is None:
            raise DeltaflError("out is missing; name it with --out")
        check_output(out, overwrite=overwrite)
        made, result = make(recipe)
    click.echo(text(result))
    if out is not None:
        write(made, result, out, overwrite)
        if made is not None:
            click.echo(f"mask: {Path(out) / MASK_FILE}")
        click.echo(f"report: {Path(out) / 'report.html'}")


def make(recipe: MaskRecipe) -> tuple[Mask, dict[str, Any]]:
    """The mask, by the very steps of a federated run, and what there is to tell of it."""
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, recipe.seed)
    shards = make_shards(task, recipe)
    net = net.copy_to(_device(recipe.device))
    fit_head(net, task, shards, recipe)
    made = make_mask(net, task, shards, recipe)
    assert made is not None
    settings = {"base": recipe.model, "task": task.name, "limit": recipe.data.limit}
    for section in (recipe.sparse, recipe.sharding, recipe.head):
        settings |= section.resolved()
    settings |= {
        name: getattr(recipe, name) for name in ("participation_rate", "mixed_precision", "seed")
    }
    told = {n: value for n, value in settings.items() if value is not None and value is not False}
    return made, _result(made, eligible(net), model_hash(net), told)


def described(path: str, base: str | None, device: str | None) -> dict[str, Any]:
    """What there is to tell of a saved mask; without its model all coordinates count as eligible.

    Raises:
        DeltaflError: not a mask, or made for another model than `base`.
    """

    if base is None:
        return _result(load_mask(path, None), None, None, mask_meta(path))
    net = load_net(base).copy_to(_device(device))
    return _result(load_mask(path, net), eligible(net), model_hash(net), mask_meta(path))


def _device(name: str | None) -> str:

    return str(device_named(name or ("cuda" if torch.cuda.is_available() else "cpu")))


def _result(
    mask: Mask, able: Eligible | None, model: str | None, made: Mapping[str, Any]
) -> dict[str, Any]:

    known = able or Eligible({name: tuple(kept.shape) for name, kept in mask.items()})
    rows = describe_mask(mask, known)
    return {
        "made": dict(made),
        "model_hash": model,
        "parameters": sum(kept.numel() for kept in mask.values()),
        "eligible": sum(row.eligible for row in rows.values()),
        "kept": sum(row.kept for row in rows.values()),
        "excluded": dict(known.excluded),
        "tensors": [
            {"name": n, "kept": r.kept, "eligible": r.eligible, "share": r.fraction}
            for n, r in rows.items()
        ],
    }


def text(result: Mapping[str, Any]) -> str:
    """A line in all, how it was made, then every kind of tensor."""

    kept, eligible = result["kept"], result["eligible"]
    of = (
        "eligible coordinates"
        if result["model_hash"]
        else "coordinates (name --base to leave ineligible ones out)"
    )
    lines = [
        f"{kept:,} of {eligible:,} {of} kept, {kept / eligible:.2%}; {1 - kept / eligible:.2%} frozen"
    ]
    if result["made"]:
        made = ", ".join(
            f"{key} {value}" for key, value in result["made"].items() if value is not None
        )
        lines.append(fill(made, 100, break_long_words=False))
    reasons: dict[str, int] = {}
    for why in result["excluded"].values():
        reasons[why] = reasons.get(why, 0) + 1
    if reasons:
        excluded = "; ".join(f"{count} tensors, {why}" for why, count in reasons.items())
        lines.append(f"excluded: {result['parameters'] - eligible:,} coordinates ({excluded})")
    return "\n".join([*lines, "", as_text(kinds_table(result))])


def write(made: Mask | None, result: Mapping[str, Any], out: str, overwrite: bool) -> None:
    """mask.json, figure.png, report.html, and mask.safetensors where one was made; whole or not at all."""

    with atomic_folder(out, overwrite=overwrite) as folder:
        if made is not None:
            save_mask(made, folder / MASK_FILE, result["model_hash"], result["made"])
        write_json(folder / "mask.json", result)
        write_files(folder, page_files(mask_page(result)))
