"""`deltafl shards`."""

from collections.abc import Mapping
from typing import Any

import click
import torch

from deltafl.cli.command import recipe_command
from deltafl.cli.results import as_text, write_result
from deltafl.errors import shorten
from deltafl.federated.sharding import describe, shard
from deltafl.federated.sharding.recipe import ShardsRecipe
from deltafl.files import check_output
from deltafl.report import Column, Table, shards_page
from deltafl.report.inspection import span
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.loading import load_task

COLUMNS = {key: Column(key, str) for key in ("client", "samples", "classes")}
COLUMNS["held"] = Column("held")


@recipe_command(ShardsRecipe, argument="data")
def shards(recipe: ShardsRecipe) -> None:
    """Which client would hold which training samples of a task: digits, a folder, a name,
    hub:owner/name, module:attr.

    \b
    deltafl shards digits --num-clients 10 --sharding non_iid --nc 2 --out DIR
    """
    if recipe.out is not None:
        check_output(recipe.out, overwrite=recipe.overwrite)
    task = load_task(recipe.data, ImageInput(recipe.image_size, recipe.channels), recipe.seed)
    groups = task.groups("train")
    names = task.class_names if isinstance(task, ImageTask) else [str(i) for i in groups.unique()]
    positions = shard(groups, recipe.sharding, keyed_generator(recipe.seed, "shards"))
    found = describe(positions, groups, len(names))
    given = recipe.sharding.model_dump(exclude_defaults=True, exclude={"sharding", "num_clients"})
    sharding = recipe.sharding.sharding
    result = {
        "task": task.name,
        "seed": recipe.seed,
        "sharding": {"name": sharding, **given},
        "how": f"{sharding}({', '.join(f'{key}={value}' for key, value in given.items())})",
        "num_clients": len(positions),
        "class_names": list(names),
        **{key: torch.as_tensor(value).tolist() for key, value in vars(found).items()},
        "positions": [rows.tolist() for rows in positions],
    }
    click.echo(_text(result))
    write_result(recipe.out, recipe.overwrite, shards_page(result), "shards.json", result)


def _text(result: Mapping[str, Any]) -> str:
    """A line in all, then every client; of more than 20 the first and last five."""
    sizes, classes, names = result["sizes"], result["classes"], result["class_names"]
    lines = [
        f"{result['task']}, {result['how']}: {len(sizes)} clients, {sum(sizes)} samples; "
        f"{span(sizes)} a client, of {span(classes)} classes"
    ]
    if missing := [name for name, count in zip(names, result["left_out"], strict=True) if count]:
        lines.append(f"left out: {sum(result['left_out'])} samples of {shorten(missing)}")
    held = [[n for n, count in zip(names, row, strict=True) if count] for row in result["counts"]]
    cells = zip(range(len(sizes)), sizes, classes, (shorten(few, 4) for few in held), strict=True)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells]
    if len(rows) > 20:
        rows[5:-5] = [dict.fromkeys(COLUMNS, "") | {"client": "..."}]
    return "\n".join([*lines, "", as_text(Table(rows, COLUMNS))])
