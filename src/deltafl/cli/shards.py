"""`deltafl shards`."""

import json
from pathlib import Path
from typing import Any

import click

from deltafl.cli.options import table
from deltafl.errors import shorten


@click.command()
@click.argument("task")
@click.option(
    "--data-dir", help="The folder that holds tasks by name; without it they come from the hub."
)
@click.option(
    "--num-clients",
    type=int,
    default=100,
    show_default=True,
    help="Clients to divide the samples among.",
)
@click.option("--sharding", default="iid", show_default=True, help="iid, non_iid or dirichlet.")
@click.option("--nc", type=int, help="For non_iid: classes per client.")
@click.option(
    "--allow-missing-classes",
    is_flag=True,
    default=None,
    help="For non_iid: leave classes out if need be.",
)
@click.option("--alpha", type=float, help="For dirichlet: small is uneven, large is even.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the validation split and of the shards.",
)
@click.option(
    "--image-size", type=int, default=8, show_default=True, help="Shards do not depend on it."
)
@click.option(
    "--channels", type=int, default=3, show_default=True, help="Shards do not depend on it."
)
@click.option("--out", help="A folder for report.html, figure.png and shards.json.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def shards(
    task: str,
    data_dir: str | None,
    num_clients: int,
    sharding: str,
    seed: int,
    image_size: int,
    channels: int,
    out: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Which client would hold which training samples of TASK: digits, a folder, a name, hub:owner/name, module:attr.

    \b
    deltafl shards digits --num-clients 10 --sharding non_iid --nc 2 --out DIR
    """
    from deltafl.federated.sharding import ShardingRecipe, describe, shard
    from deltafl.files import check_output
    from deltafl.seeding import keyed_generator
    from deltafl.tasks.arrays import load_arrays

    given = {key: value for key, value in options.items() if value is not None}
    chosen = ShardingRecipe.of(num_clients=num_clients, sharding=sharding, **given)
    if out is not None:
        check_output(out, overwrite=overwrite)
    loaded = load_arrays(
        task, image_size=image_size, channels=channels, seed=seed, data_dir=data_dir
    )
    labels = loaded.train.labels
    positions = shard(labels, chosen, keyed_generator(seed, "shards"))
    told = describe(positions, labels, len(loaded.class_names))
    result = {
        "task": loaded.name,
        "seed": seed,
        "sharding": {"name": sharding, **given},
        "how": f"{sharding}({', '.join(f'{key}={value}' for key, value in given.items())})",
        "num_clients": num_clients,
        "class_names": list(loaded.class_names),
        "sizes": told.sizes.tolist(),
        "classes": told.classes.tolist(),
        "left_out": told.left_out.tolist(),
        "duplicates": told.duplicates,
        "counts": told.counts.tolist(),
        "positions": [rows.tolist() for rows in positions],
    }
    click.echo(text(result))
    if out is not None:
        write(result, out, overwrite)
        click.echo(f"report: {Path(out) / 'report.html'}")


def text(result: dict[str, Any]) -> str:
    """A line in all, then every client; of more than 20 the first and last five."""
    from deltafl.report.shards import span

    sizes, classes, names = result["sizes"], result["classes"], result["class_names"]
    lines = [
        f"{result['task']}, {result['how']}: {len(sizes)} clients, {sum(sizes)} samples; "
        f"{span(sizes)} a client, of {span(classes)} classes"
    ]
    if missing := [name for name, count in zip(names, result["left_out"], strict=True) if count]:
        lines.append(f"left out: {sum(result['left_out'])} samples of {shorten(missing)}")
    shown = (
        range(len(sizes)) if len(sizes) <= 20 else [*range(5), *range(len(sizes) - 5, len(sizes))]
    )
    held = {
        k: shorten([name for name, n in zip(names, result["counts"][k], strict=True) if n], 4)
        for k in shown
    }
    width = max(map(len, held.values()))
    rows = [[str(k), str(sizes[k]), str(classes[k]), held[k].ljust(width)] for k in shown]
    if len(sizes) > len(shown):
        rows.insert(5, ["...", "", "", ""])
    return "\n".join(
        [*lines, "", table(["client", "samples", "classes", "held".ljust(width)], rows)]
    )


def write(result: dict[str, Any], out: str, overwrite: bool) -> None:
    """report.html, figure.png, shards.json, whole or not at all."""
    from deltafl.files import atomic_folder
    from deltafl.report import render
    from deltafl.report.shards import shards_figure, shards_page

    with atomic_folder(out, overwrite=overwrite) as folder:
        (folder / "report.html").write_text(render(shards_page(result)), encoding="utf-8")
        (folder / "figure.png").write_bytes(shards_figure(result, "png"))
        (folder / "shards.json").write_text(
            json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8"
        )
