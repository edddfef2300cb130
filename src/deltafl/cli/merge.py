"""`deltafl merge`."""

from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.options import ManyValues, as_bytes, progress_by_bytes, rule_options
from deltafl.errors import DeltaflError
from deltafl.files import check_output
from deltafl.merge.plan import Plan, plan_merge

SCALES = {"server_lr", "scaling_coef"}
"""Two ways to say one thing: an option replaces whichever of them a recipe holds."""


def merge_options(command: Any) -> Any:
    """Decorator: the options that say what is merged, shared by merge and search."""
    options = [
        click.option(
            "--base", help="The model that all were fine-tuned from: folder, file or hub id."
        ),
        click.option(
            "--models", multiple=True, help="The fine-tuned models: folders, files or hub ids."
        ),
        click.option(
            "--weights",
            multiple=True,
            type=float,
            help="One weight for each model. Default: equal.",
        ),
        click.option(
            "--num-steps",
            multiple=True,
            type=int,
            help="Local steps of each model (else training.json).",
        ),
        click.option(
            "--num-examples",
            multiple=True,
            type=int,
            help="Examples of each model (else training.json).",
        ),
        click.option(
            "--scope",
            default=None,
            help="Only tensors of the base under this prefix, e.g. vision_model.",
        ),
        click.option(
            "--include", multiple=True, help="Only tensors of the base that match a pattern."
        ),
        click.option(
            "--exclude", multiple=True, help="Copy tensors that match a pattern from the base."
        ),
        click.option("--device", default=None, help="Where to compute: cpu (default) or cuda."),
        click.option(
            "--threads", type=int, default=None, help="Default: one for each core, at most 8."
        ),
        click.option(
            "--allow-other-base",
            is_flag=True,
            default=None,
            help="Accept fine-tunes of another base.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=ManyValues)
@click.argument("recipe", required=False)
@merge_options
@click.option(
    "--method", default=None, help="The rule (see deltafl rules). Default: task_arithmetic."
)
@click.option(
    "--scaling-coef", type=float, default=None, help="lambda: multiplies the sum of the deltas."
)
@click.option(
    "--server-lr", type=float, default=None, help="Multiplies the mean of the deltas. Default: 1."
)
@click.option("--out", default=None, help="The folder to write.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace an existing output.")
@click.option(
    "--dtype", default=None, help="float32, float16, bfloat16 or float64. Default: the base's."
)
@click.option(
    "--exact", is_flag=True, default=None, help="Compute in float64 with one correct rounding."
)
@click.option("--max-shard-size", default=None, help="Default: 5GB.")
@click.option("--hash", is_flag=True, default=None, help="Record the sha256 of every input file.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@rule_options()
def merge(recipe: str | None, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Merge fine-tuned models of one base: theta = theta0 + server_lr * rule(deltas).

    \b
    deltafl merge --base B --models M1 M2 --method fedgma --rho 0.6 --scaling-coef 0.3 --out DIR
    deltafl merge RECIPE.yaml              ours, or mergekit's
    """
    held = read_recipe(recipe, options)
    out, overwrite = held.out, held.overwrite
    plan = plan_merge(held.spec())
    if dry_run:
        click.echo(describe_plan(plan))
        return
    if out is None:
        raise DeltaflError("no output; name a folder with --out")
    check_output(out, overwrite=overwrite)
    total = plan.num_elements * len(plan.sources) * plan.passes
    with reading_ahead([f for layout in (plan.base, *plan.layouts.values()) for f in layout.files]):
        from deltafl.merge.run import run_merge

        with progress_by_bytes("merging", plan.bytes_read, quiet=quiet) as advance:
            share = plan.bytes_read / max(total, 1)
            record = run_merge(
                plan, out, overwrite=overwrite, on_elements=lambda count: advance(count * share)
            )
    for warning in record["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if not quiet:
        click.echo(summary(plan, record, out))


def read_recipe(recipe: str | None, options: dict[str, Any]) -> Any:
    """The recipe file, ours or mergekit's, with the options on top, checked as one."""
    from deltafl.merge.recipe import MergeRecipe, load_yaml, parse

    held = load_yaml(recipe) if recipe else {}
    if "merge_method" in held:
        from deltafl.merge.mergekit import translate

        held, notes = translate(held)
        for note in notes:
            click.echo(f"note: {note}", err=True)
    given = {
        k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v not in (None, ())
    }
    if given.keys() & SCALES:
        held = {k: v for k, v in held.items() if k not in (*SCALES, "scale_patterns")}
    held |= given
    if "base" not in held or "models" not in held:
        raise DeltaflError(
            "name the base with --base and the fine-tuned models with --models, or give a recipe"
        )
    return parse(MergeRecipe, held)


def describe_plan(plan: Plan) -> str:
    """What a merge would read, write and need."""
    n, merged = len(plan.sources), plan.alignment.merged
    lines = [
        f"merge {n} models into {plan.base.ref} by {plan.spec.method}",
        f"  tensors: {len(merged)} merged ({plan.num_elements:,} elements)",
        f"  read: {as_bytes(plan.bytes_read)} in {plan.passes} pass{'es' * (plan.passes > 1)} over {n + 1} checkpoints",
        f"  write: {as_bytes(plan.bytes_written)}",
        f"  memory: about {as_bytes(plan.working_memory)} of blocks in {plan.threads} threads, beside torch itself",
    ]
    return "\n".join([*lines, *outside(plan), *(f"  note: {note}" for note in plan.notes)])


def outside(plan: Plan) -> list[str]:
    """Lines that say what is not merged."""
    lines = [
        f"  copied from the base: {len(names)} tensors ({why})"
        for why, names in plan.alignment.copied.items()
    ]
    for model, reasons in plan.alignment.ignored.items():
        lines += [
            f'  not used of "{model}": {len(names)} tensors ({why})'
            for why, names in reasons.items()
        ]
    return lines


def summary(plan: Plan, record: dict[str, Any], out: str) -> str:
    """What was done, in a few lines."""
    scale = (
        f"server_lr {record['server_lr']:g} = scaling_coef {record['scaling_coef']:g} on the sum"
    )
    lines = [f"merged {len(plan.sources)} models by {plan.spec.method} at {scale}: {out}"]
    lines += outside(plan)
    return "\n".join([*lines, *(f"  note: {note}" for note in record["notes"])])
