"""`deltafl evaluate`."""

import json
from pathlib import Path

import click

from deltafl.checkpoints.layout import split_ref
from deltafl.cli.command import recipe_command
from deltafl.cli.results import table_text
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.models import HeadRecipe, load_net
from deltafl.report import Column, Table
from deltafl.report.tables import score_format
from deltafl.tasks import load_task
from deltafl.training import TRAINING_JSON, EvaluationRecipe, evaluate


@recipe_command(EvaluationRecipe, "quiet")
def evaluate_command(recipe: EvaluationRecipe) -> None:
    """Scores of models on a task.

    \b
    deltafl evaluate --models M1 M2 --data digits --split test
    """
    rows, columns = [], {"model": Column("model")}
    about = {"data": recipe.data.data, "split": recipe.split}
    for model in recipe.models:
        net = load_net(model)
        seed = _trained_seed(model) if recipe.seed is None else recipe.seed
        task = load_task(recipe.data, net.inputs, seed)
        if recipe.head is not None:
            net.prepare(task, HeadRecipe.of(head=recipe.head, templates=recipe.templates))
        how = recipe.model_dump(include={"batch_size", "device", "mixed_precision"})
        found = evaluate(net, task, recipe.split, **how)
        scores = found.scores.tolist()
        row = {"model": model, "score": found.score, "examples": len(scores), "scores": scores}
        rows.append(row)
        title = f"{recipe.split} {task.metric}"
        columns["score"] = Column(title, score_format(task.metric))
        about["metric"] = task.metric
    columns["examples"] = Column("examples", "d")
    if recipe.json_file:
        write_atomically(recipe.json_file, (json.dumps({**about, "results": rows}) + "\n").encode())
    click.echo(table_text(Table(rows, columns)))


def _trained_seed(model: str) -> int:
    """The seed in a model's training.json, which chose its validation split; 0 without one."""
    file = Path(split_ref(model)[1]) / TRAINING_JSON
    try:
        return int(json.loads(file.read_text())["seed"]) if file.is_file() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaflError(f'"{file}" holds no seed ({error}); give one with --seed') from error
