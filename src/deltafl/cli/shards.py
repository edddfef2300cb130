"""`deltafl shards`."""

from deltafl.cli.command import recipe_command
from deltafl.cli.results import show_result
from deltafl.federated.sharding import ShardsRecipe, shard, shard_counts
from deltafl.files import check_output
from deltafl.report import shards_page
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.loading import load_task


@recipe_command(ShardsRecipe, argument="data")
def shards_command(recipe: ShardsRecipe) -> None:
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
    found = shard_counts(positions, groups, len(names))
    given = recipe.sharding.model_dump(exclude_defaults=True, exclude={"sharding", "num_clients"})
    sharding = recipe.sharding.sharding
    result = {
        "task": task.name,
        "seed": recipe.seed,
        "sharding": {"name": sharding, **given},
        "how": f"{sharding}({', '.join(f'{key}={value}' for key, value in given.items())})",
        "num_clients": len(positions),
        "class_names": list(names),
        **{key: value.tolist() for key, value in found.items()},
        "positions": [rows.tolist() for rows in positions],
    }
    show_result(shards_page(result), recipe.out, recipe.overwrite, "shards.json")
