"""`deltafl shards`."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltafl.cli.options import table
from deltafl.errors import DeltaflError, shorten

if TYPE_CHECKING:
    from deltafl.federated.sharding import Sharding


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
@click.option("--form", help="For dirichlet: hsu (default, equal sizes) or label (sizes differ).")
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
    chosen = _sharding(
        sharding, {key: value for key, value in options.items() if value is not None}
    )
    from deltafl.federated.sharding import describe, shard
    from deltafl.files import check_output
    from deltafl.seeding import keyed_generator
    from deltafl.tasks import load_task

    if out is not None:
        check_output(out, overwrite=overwrite)
    loaded = load_task(task, image_size=image_size, channels=channels, seed=seed, data_dir=data_dir)
    labels = loaded.train.labels
    positions = shard(labels, num_clients, chosen, keyed_generator(seed, "shards"))
    told = describe(positions, labels, len(loaded.class_names))
    result = {
        "task": loaded.name,
        "seed": seed,
        "sharding": {"name": sharding, **{f.name: getattr(chosen, f.name) for f in fields(chosen)}},  # type: ignore[arg-type]
        "how": _how(sharding, chosen),
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


def _sharding(name: str, given: dict[str, Any]) -> "Sharding":
    """The sharding of that name with the given parameters.

    Raises:
        DeltaflError: one line for each parameter that it does not take, or needs.
    """
    from deltafl.federated.sharding import SHARDINGS

    kind: Any = SHARDINGS[name]
    known = {f.name: f for f in fields(kind)}
    problems = [
        f"--{key.replace('_', '-')} is not for --sharding {name}; leave it out"
        for key in given
        if key not in known
    ]
    lacking = [key for key, f in known.items() if key not in given and f.default is MISSING]
    problems += [f"--sharding {name} needs --{key.replace('_', '-')}; give it" for key in lacking]
    if problems:
        raise DeltaflError(*problems)
    return kind(**given)


def _how(name: str, chosen: Any) -> str:
    """non_iid(nc=5, allow_missing_classes=False)"""
    return f"{name}({', '.join(f'{f.name}={getattr(chosen, f.name)}' for f in fields(chosen))})"


def text(result: dict[str, Any]) -> str:
    """A line in all, then every client; of more than 20 the first and last five."""
    from deltafl.report.inspection import span

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
    from deltafl.files import atomic_folder, write_files
    from deltafl.report import page_files, shards_page

    with atomic_folder(out, overwrite=overwrite) as folder:
        write_files(folder, page_files(shards_page(result)))
        (folder / "shards.json").write_text(
            json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8"
        )
