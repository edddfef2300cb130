"""`deltafl finetune` and `deltafl centralized`."""

import click
from accelerate import PartialState

from deltafl.cli.command import IS_MAIN, flag, recipe_command
from deltafl.cli.progress import drawn_progress, progress_text
from deltafl.cli.run import finish, prepared
from deltafl.progress import Progress
from deltafl.report.tables import score_format
from deltafl.training import CentralizedRecipe, TrainingRecipe, centralize, finetune


@recipe_command(TrainingRecipe, "resume", "dry_run", "quiet")
def finetune_command(recipe: TrainingRecipe) -> None:
    """Fine-tune a model on a task. On several devices: accelerate launch -m deltafl finetune ...

    \b
    deltafl finetune --base B --data digits --epochs 5 --lr 1e-4 --out DIR
    """
    net, task = prepared(recipe)
    with drawn_progress() as show:
        done = finetune(net, task, recipe, resume=flag("resume"), on_progress=show).training
    score = format(done["val_score"], score_format(task.metric))
    click.echo(
        f"{recipe.out}: {done['num_steps']} steps, {done['metric']} {score} "
        f"of {done['val_examples']} validation examples"
    )
    _leave_processes()


@recipe_command(CentralizedRecipe, "tensorboard", "resume", "dry_run", "quiet")
def centralized_command(recipe: CentralizedRecipe) -> None:
    """Train on all samples in one place: SGDM, the best epoch on validation, tested once.

    \b
    deltafl centralized --model M --data cifar100 --epochs 50 --lr 0.001 --out DIR
    """
    net, task = prepared(recipe)
    with drawn_progress() as show:

        def tell(progress: Progress) -> None:
            show(progress)
            if progress.name == "epochs":
                click.echo(f"epoch {progress_text(progress)}")

        done = centralize(net, task, recipe, resume=flag("resume"), on_progress=tell)
    if IS_MAIN:
        finish(done)
    _leave_processes()


def _leave_processes() -> None:
    """Part from the other processes of an `accelerate launch`."""
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
