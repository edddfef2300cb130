"""`deltafl inspect`."""

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.command import recipe_command
from deltafl.cli.merge import read_merge
from deltafl.cli.progress import drawn_progress
from deltafl.files import check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import DeltaRecipe, MergeRecipe


@recipe_command(DeltaRecipe, "quiet", argument="config", read=read_merge)
def inspect_command(recipe: MergeRecipe) -> None:
    """How much fine-tunes of one base differ, and which rule that suggests.

    \b
    deltafl inspect --base B --models M1 M2 ... --out DIR
    """
    plan = plan_merge(recipe)
    if recipe.out is not None:
        plan.refuse_as_output(recipe.out)
        check_output(recipe.out, overwrite=recipe.overwrite)
    with reading_ahead(plan.files):
        from deltafl.merge.inputs import open_updates  # torch, while the files are read
        from deltafl.merge.inspect import inspect_models

        with drawn_progress() as show:
            result = inspect_models(plan, open_updates(plan), show)
        import pandas as pd

        from deltafl.cli.results import show_result
        from deltafl.report import Column, Page, Table, inspect_page

    def pairs(title: str, key: str) -> Table:
        columns = {"": Column(title)} | {name: Column(name, ".3f") for name in result["models"]}
        frame = pd.DataFrame(result[key]["matrix"], columns=result["models"], dtype=float)
        frame.insert(0, "", result["models"])
        return Table(frame.to_dict("records"), columns)

    shown = {"cosine": "cosine", "same sign": "sign_agreement", "overlap": "overlap"}
    tables = [pairs(*item) for item in shown.items()]
    page = Page("inspect", {**inspect_page(result).values, "tables": tables, "plan": plan})
    show_result(page, recipe.out, recipe.overwrite, "inspect.json")
