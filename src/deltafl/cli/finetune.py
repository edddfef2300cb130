"""`deltafl finetune` and `deltafl centralized`."""

import click
from accelerate import PartialState

from deltafl.cli.command import dry_run, quiet, recipe_command, resume, tensorboard
from deltafl.cli.progress import drawn_progress
from deltafl.cli.run import finish, is_main, prepared
from deltafl.cli.text import as_score
from deltafl.progress import Progress
from deltafl.training import CentralizedRecipe, TrainingRecipe, centralize, finetune


@recipe_command(TrainingRecipe)
@resume
@dry_run
@quiet
def finetune_command(recipe: TrainingRecipe, resume: bool, dry_run: bool, quiet: bool) -> None:
    """Fine-tune a model on a task. On several devices: accelerate launch -m deltafl finetune ...

    \b
    deltafl finetune --base B --data digits --epochs 5 --lr 1e-4 --out DIR
    """
    net, task = prepared(recipe, resume=resume, dry_run=dry_run)
    quiet = quiet or not is_main
    with drawn_progress(quiet=quiet) as show:
        done = finetune(net, task, recipe, resume=resume, on_progress=show).training
    if not quiet:
        score = as_score(task.ratio_scaled, done["val_score"])
        click.echo(
            f"{recipe.out}: {done['num_steps']} steps, {done['metric']} {score} "
            f"of {done['val_examples']} validation examples"
        )
    _leave_processes()


@recipe_command(CentralizedRecipe)
@tensorboard
@resume
@dry_run
@quiet
def centralized_command(
    recipe: CentralizedRecipe, tensorboard: bool, resume: bool, dry_run: bool, quiet: bool
) -> None:
    """Train on all samples in one place: SGDM, the best epoch on validation, tested once.

    \b
    deltafl centralized --model M --data cifar100 --epochs 50 --lr 0.001 --out DIR
    """
    net, task = prepared(recipe, resume=resume, dry_run=dry_run, tensorboard=tensorboard)
    quiet = quiet or not is_main
    with drawn_progress(quiet=quiet) as show:

        def tell(progress: Progress) -> None:
            show(progress)
            if progress.name == "epochs" and not quiet:
                click.echo(_line(progress, task.ratio_scaled))

        done = centralize(net, task, recipe, resume=resume, on_progress=tell)
    if is_main:
        finish(done, quiet=quiet, tensorboard=tensorboard)
    _leave_processes()


def _line(progress: Progress, ratio_scaled: bool) -> str:
    numbers = {name: float(value) for name, value in progress.numbers.items()}
    said = [f"loss {numbers['train_loss']:.4f}"] if "train_loss" in numbers else []
    if "val_score" in numbers:
        said.append(f"validation {as_score(ratio_scaled, numbers['val_score'])}")
    return f"epoch {progress.done}/{progress.total}: {', '.join(said)}"


def _leave_processes() -> None:
    """Part from the other processes of an `accelerate launch`."""
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
