"""`deltafl finetune` and `deltafl evaluate`."""

import json
import os
from pathlib import Path

import click
from accelerate import PartialState

from deltafl.cli.command import quiet, recipe_command, resume
from deltafl.cli.progress import drawn_progress
from deltafl.cli.text import as_score, table
from deltafl.errors import DeltaflError
from deltafl.files import check_output, write_atomically
from deltafl.models import HeadRecipe, load_net
from deltafl.tasks import load_task
from deltafl.training import TRAINING_JSON, EvaluationRecipe, TrainingRecipe
from deltafl.training import evaluate as run_evaluation
from deltafl.training import finetune as run_finetuning
from deltafl.training.finetune import output_of


@recipe_command(TrainingRecipe)
@resume
@quiet
def finetune(recipe: TrainingRecipe, resume: bool, quiet: bool) -> None:
    """Fine-tune a model on a task. On several devices: accelerate launch -m deltafl finetune ...

    \b
    deltafl finetune --base B --data digits --epochs 5 --lr 1e-4 --out DIR
    """
    out = output_of(recipe)
    if not resume:
        check_output(out, overwrite=recipe.overwrite)
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, recipe.seed)
    quiet = quiet or int(os.environ.get("RANK", 0)) > 0
    with drawn_progress(quiet=quiet) as show:
        done = run_finetuning(net, task, recipe, resume=resume, on_progress=show).training
    if not quiet:
        score = as_score(done["val_score"], task.ratio_scaled)
        click.echo(
            f"{out}: {done['num_steps']} steps, {done['metric']} {score} "
            f"of {done['val_examples']} validation examples"
        )
    leave_processes()


@recipe_command(EvaluationRecipe)
@quiet
def evaluate(recipe: EvaluationRecipe, quiet: bool) -> None:
    """Scores of models on a task.

    \b
    deltafl evaluate --models M1 M2 --data digits --split test
    """
    rows, cells, title = [], [], "score"
    for model in recipe.models:
        net = load_net(model)
        seed = _trained_seed(model) if recipe.seed is None else recipe.seed
        task = load_task(recipe.data, net.inputs, seed)
        if recipe.head is not None:
            net.prepare(task, HeadRecipe.of(head=recipe.head, templates=recipe.templates))
        found = run_evaluation(
            net,
            task,
            recipe.split,
            batch_size=recipe.batch_size,
            device=recipe.device,
            mixed_precision=recipe.mixed_precision,
        )
        scores = found.scores.tolist()
        rows.append(
            {"model": model, "score": found.score, "examples": len(scores), "scores": scores}
        )
        cells.append([model, as_score(found.score, task.ratio_scaled), str(len(scores))])
        title = task.metric
    if recipe.json_file:
        about = {"data": recipe.data.data, "split": recipe.split, "metric": title}
        write_atomically(recipe.json_file, (json.dumps({**about, "results": rows}) + "\n").encode())
    if not quiet:
        click.echo(table(["model", f"{recipe.split} {title}", "examples"], cells))


def _trained_seed(model: str) -> int:
    """The seed in a model's training.json, which chose its validation split; 0 without one."""
    file = Path(model) / TRAINING_JSON
    try:
        return int(json.loads(file.read_text())["seed"]) if file.is_file() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaflError(f'"{file}" holds no seed ({error}); give one with --seed') from error


def leave_processes() -> None:
    """Part from the other processes of an `accelerate launch`."""
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
