"""`deltafl extract`."""

from deltafl.cli.command import recipe_command
from deltafl.cli.merge import merge_and_show
from deltafl.merge.recipe import ExtractRecipe


@recipe_command(ExtractRecipe, "dry_run", "quiet", argument="config")
def extract_command(recipe: ExtractRecipe) -> None:
    """Make a LoRA of a fine-tuned model: of each matrix of its delta the nearest of a rank.

    \b
    deltafl extract --base B --model M --rank 16 --out DIR
    deltafl extract --base B --model M --energy 0.95 --out DIR
    """
    merge_and_show(recipe.merge())
