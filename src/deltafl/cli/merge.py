"""`deltafl merge`."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.command import flag, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.push import push_merged, show_push
from deltafl.errors import DeltaflError
from deltafl.files import check_output
from deltafl.merge.documents import documents_of, resolved
from deltafl.merge.mergekit import translate
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.recipe_file import load_documents
from deltafl.recipes import read_recipe
from deltafl.rendering import render
from deltafl.rules.rule import ExampleRule


class Merges:
    """The merges of a recipe file, ours or mergekit's; settings change the last one."""

    def __init__(self, config: str | None, settings: Mapping[str, Any]) -> None:
        self.documents = documents_of(load_documents(config) if config else [{}])
        self.settings = settings

    def recipe(self, number: int, made: Mapping[str, Path]) -> MergeRecipe:
        """That of a document, whose names of models, and its own, are the folders in `made`. Of
        mergekit's, what makes no difference is noted on stderr.
        """
        data, last = dict(self.documents[number]), number == len(self.documents) - 1
        name = data.pop("name", "")
        data = resolved(data, {key: made[key] for key in made if key != name})
        if "merge_method" in data:
            data, notes = translate(data)
            for note in notes:
                click.echo(f"note: {note}", err=True)
        return read_recipe(MergeRecipe, data, self.settings if last else {"out": str(made[name])})


def read_merge(config: str | None, settings: Mapping[str, Any]) -> MergeRecipe:
    """The recipe of a file that is a single document."""
    merges = Merges(config, settings)
    if len(merges.documents) > 1:
        raise DeltaflError(f'"{config}": holds several merges; run it with deltafl merge')
    return merges.recipe(0, {})


@recipe_command(MergeRecipe, "dry_run", "quiet", argument="config", read=Merges)
def merge_command(merges: Merges) -> None:
    """Merge fine-tuned models of one base: theta = theta0 + server_lr * rule(deltas).

    \b
    deltafl merge --base B --models M1 M2 --method fedgma --rho 0.6 --scaling-coef 0.3 --out DIR
    deltafl merge RECIPE.yaml              ours, or mergekit's
    """
    *before, _ = merges.documents
    out = Path(merges.settings.get("out") or "")
    scratch = nullcontext("")
    if before and not flag("dry_run"):
        free(merges.settings.get("out"), bool(merges.settings.get("overwrite")))
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(prefix=".deltafl-", dir=out.parent)
    with scratch as at:
        made = dict[str, Path]()
        for number in range(len(merges.documents)):
            if number and flag("dry_run"):
                click.echo(f"then {merges.documents[number].get('name', out)}, of what that makes")
                continue
            name = merges.documents[number].get("name", "")
            made[name] = Path(at) / str(number) / Path(name).name
            merge_and_show(merges.recipe(number, made))


def merge_and_show(recipe: MergeRecipe) -> None:
    """Plan a merge, and do it unless this is a dry run."""
    plan = plan_merge(recipe)
    if flag("dry_run"):
        click.echo(render("plan.txt", plan=plan))
        show_push(plan, recipe.push)
        return
    out = free(recipe.out, recipe.overwrite)
    with reading_ahead(plan.files):
        if isinstance(plan.rule.core, ExampleRule):
            from deltafl.merge.examples import merge_by_examples as run_merge
        else:
            from deltafl.merge.run import run_merge  # torch, while the files are read

        with drawn_progress() as show:
            record = run_merge(plan, out, overwrite=recipe.overwrite, on_progress=show)
    for warning in record["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(render("merge.txt", plan=plan, record=record))
    push_merged(out, recipe.push)


def free(out: str | None, overwrite: bool) -> Path:
    """The folder to write. Raises DeltaflError if there is none, or it is in the way."""
    if not out:
        raise DeltaflError("no output; name a folder with --out")
    check_output(out, overwrite=overwrite)
    return Path(out)
