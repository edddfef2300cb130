"""`deltafl mask`."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from deltafl.cli.federate import HELP, load_model_and_task, recipe_of, task_options
from deltafl.cli.results import as_text
from deltafl.cli.settings import read_settings, recipe_options
from deltafl.errors import DeltaflError
from deltafl.federated.recipe import FederatedRecipe

if TYPE_CHECKING:
    from deltafl.sparse.eligible import Eligible
    from deltafl.sparse.masks import Mask

SETTINGS = (
    "sparsity_ratio", "mask_strategy", "mask_scope", "calibration", "calibration_rounds", "calibration_examples",
    "attenuate", "fisher_labels", "fisher_draws", "num_clients", "participation_rate", "sharding", "nc",
    "allow_missing_classes", "alpha", "head", "few_shot", "mixed_precision", "seed",
)  # fmt: skip
"""What of a federated recipe decides its mask."""

MASK_FILE = "mask.safetensors"


@click.command()
@task_options
@recipe_options(
    FederatedRecipe, HELP, skip=[f.name for f in fields(FederatedRecipe) if f.name not in SETTINGS]
)
@click.option(
    "--out", help="The folder to write: mask.safetensors, mask.json, figure.png and report.html."
)
@click.option(
    "--describe",
    help="A saved mask to describe, instead of making one; --base tells q, k and v apart.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def mask(
    config: str | None, out: str | None, describe: str | None, overwrite: bool, **options: Any
) -> None:
    """Make the mask that a federated run with these settings would make, or describe one.

    \b
    deltafl mask --base MODEL --data TASK --sparsity-ratio 0.9 --mask-strategy least_sensitive --out DIR
    deltafl federate ... --mask-file DIR/mask.safetensors
    deltafl mask --describe DIR/mask.safetensors --base MODEL
    """
    from deltafl.files import check_output

    if describe is not None:
        given = [
            name
            for name, value in options.items()
            if value is not None and name not in ("model", "device")
        ]
        if given or config is not None:
            names: list[str] = sorted([*given, *(["config"] if config else [])])
            wrong = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise DeltaflError(
                f"--describe makes no mask and takes --base, --device and --out only; leave {wrong} out"
            )
        if out is not None:
            check_output(out, overwrite=overwrite)
        made, result = None, described(describe, options["model"], options["device"])
    else:
        if out is None:
            raise DeltaflError("out is missing; name it with --out")
        held = read_settings(FederatedRecipe, config, options, EXTRA)
        recipe = recipe_of(held)
        _check(recipe)
        check_output(out, overwrite=overwrite)
        made, result = make(held, recipe)
    click.echo(text(result))
    if out is not None:
        write(made, result, out, overwrite)
        if made is not None:
            click.echo(f"mask: {Path(out) / MASK_FILE}")
        click.echo(f"report: {Path(out) / 'report.html'}")


EXTRA: dict[str, tuple[Any, Any]] = {
    "model": (str, ...),
    "data": (str, ...),
    "data_dir": (str | None, None),
    "out": (str | None, None),
    "limit": (int | None, None),
    "device": (str | None, None),
}


def _check(recipe: FederatedRecipe) -> None:
    if recipe.mask_file is not None:
        raise DeltaflError(
            f'mask_file "{recipe.mask_file}" is a finished mask; see it with --describe'
        )
    if recipe.sparsity_ratio == 0:
        raise DeltaflError(
            "sparsity_ratio 0 freezes nothing; give the share to freeze, as in --sparsity-ratio 0.9"
        )


def make(held: dict[str, Any], recipe: FederatedRecipe) -> tuple["Mask", dict[str, Any]]:
    """The mask, by the very steps of a federated run, and what there is to tell of it."""
    from deltafl.federated.setup import make_head, make_mask, make_shards
    from deltafl.models.flat import FlatModel
    from deltafl.sparse.eligible import eligible
    from deltafl.sparse.masks import model_hash

    encoder, task = load_model_and_task(held, recipe.seed)
    shards = make_shards(task, recipe)
    model = FlatModel(encoder.copy_to(_device(held["device"])))
    made = make_mask(model, make_head(model, task, shards, recipe), task, shards, recipe)
    assert made is not None
    settings = {"base": held["model"], "task": task.name, "limit": held["limit"]}
    settings |= {name: getattr(recipe, name) for name in SETTINGS}
    told = {
        name: value for name, value in settings.items() if value is not None and value is not False
    }
    return made, _result(made, eligible(model), model_hash(model), told)


def described(path: str, base: str | None, device: str | None) -> dict[str, Any]:
    """What there is to tell of a saved mask; without its model all coordinates count as eligible.

    Raises:
        DeltaflError: not a mask, or made for another model than `base`.
    """
    from deltafl.sparse.masks import load_mask, mask_meta

    if base is None:
        return _result(load_mask(path, None), None, None, mask_meta(path))
    from deltafl.models import load_encoder
    from deltafl.models.flat import FlatModel
    from deltafl.sparse.eligible import eligible
    from deltafl.sparse.masks import model_hash

    model = FlatModel(load_encoder(base).copy_to(_device(device)))
    own = model_hash(model)
    return _result(load_mask(path, own), eligible(model), own, mask_meta(path))


def _device(name: str | None) -> str:
    import torch

    from deltafl.algebra.tensors import device_named

    return str(device_named(name or ("cuda" if torch.cuda.is_available() else "cpu")))


def _result(
    mask: "Mask", able: "Eligible | None", model: str | None, made: Mapping[str, Any]
) -> dict[str, Any]:
    from deltafl.sparse.eligible import Eligible
    from deltafl.sparse.masks import describe_mask

    known = able or Eligible(
        {name: tuple(kept.shape) for name, kept in mask.items()}, {}, {}, frozenset()
    )
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
    from deltafl.report import kinds_table

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


def write(made: "Mask | None", result: Mapping[str, Any], out: str, overwrite: bool) -> None:
    """mask.json, figure.png, report.html, and mask.safetensors where one was made; whole or not at all."""
    from deltafl.files import atomic_folder, write_files
    from deltafl.report import mask_page, page_files
    from deltafl.sparse.masks import save_mask
    from deltafl.training.record import write_json

    with atomic_folder(out, overwrite=overwrite) as folder:
        if made is not None:
            save_mask(made, folder / MASK_FILE, result["model_hash"], result["made"])
        write_json(folder / "mask.json", result)
        write_files(folder, page_files(mask_page(result)))
