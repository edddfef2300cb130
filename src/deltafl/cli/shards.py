"""`deltafl shards`."""

from typing import Any

import click

from deltafl.cli.command import recipe_command
from deltafl.cli.results import write_result
from deltafl.cli.text import table
from deltafl.errors import shorten
from deltafl.federated.sharding import ShardsRecipe, describe, shard
from deltafl.files import check_output
from deltafl.report import shards_page
from deltafl.report.inspection import span
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.loading import load_task


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
    sharding, clients = recipe.sharding.sharding, recipe.sharding.num_clients
    given = recipe.sharding.model_dump(exclude_defaults=True, exclude={"sharding", "num_clients"})
    result = {
        "task": task.name,
        "seed": recipe.seed,
        "sharding": {"name": sharding, **given},
        "how": f"{sharding}({', '.join(f'{key}={value}' for key, value in given.items())})",
        "num_clients": clients,
        "class_names": list(names),
        **{key: value.tolist() for key, value in found.items()},
        "positions": [rows.tolist() for rows in positions],
    }
    click.echo(_text(result))
    if recipe.out is not None:
        page = shards_page(result)
        write_result(recipe.out, recipe.overwrite, page, "shards.json", result)


def _text(result: dict[str, Any]) -> str:
    """A line in all, then every client; of more than 20 the first and last five."""
    sizes, classes, names = result["sizes"], result["classes"], result["class_names"]
    lines = [
        f"{result['task']}, {result['how']}: {len(sizes)} clients, {sum(sizes)} samples; "
        f"{span(sizes)} a client, of {span(classes)} classes"
    ]
    if missing := [name for name, count in zip(names, result["left_out"], strict=True) if count]:
        lines.append(f"left out: {sum(result['left_out'])} samples of {shorten(missing)}")
    few = [*range(5), None, *range(len(sizes) - 5, len(sizes))]
    held = [[n for n, count in zip(names, row, strict=True) if count] for row in result["counts"]]
    rows = [
        ["...", "", "", ""]
        if k is None
        else [str(k), str(sizes[k]), str(classes[k]), shorten(held[k], 4)]
        for k in (range(len(sizes)) if len(sizes) <= 20 else few)
    ]
    width = max(len(row[3]) for row in rows)
    rows = [[*row[:3], row[3].ljust(width)] for row in rows]
    columns = ["client", "samples", "classes", "held".ljust(width)]
    return "\n".join([*lines, "", table(columns, rows)])
