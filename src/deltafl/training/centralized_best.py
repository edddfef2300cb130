"""What a centralised run carries along, and what it leaves."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltafl.files import atomic_folder
from deltafl.models import save_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import HEAD_FILE, LinearHead, save_head
from deltafl.tasks.arrays import Task
from deltafl.training import TRAINING_JSON
from deltafl.training.centralized_recipe import CentralizedRecipe
from deltafl.training.legacy import predict_correct
from deltafl.training.recipe import PRECISIONS
from deltafl.training.record import RunRecord, write_json


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps done, the sum of losses over this epoch's examples so far, and the best epoch yet.

    best: the module's state dict at that epoch, and its head as (weight, bias).
    """

    step: int
    loss: Tensor
    best: Mapping[str, Any]
    best_epoch: int
    best_score: float
    waited: int


def write_best(
    progress: Progress,
    model: FlatModel,
    task: Task,
    recipe: CentralizedRecipe,
    record: RunRecord,
    config: Mapping[str, Any],
) -> None:
    """Test the best model once, write it as `model/`, which merge and evaluate read, and then result.json.

    The working model is left with the best weights.
    """
    out = record.folder
    model.module.load_state_dict(progress.best["module"])
    weight, bias = (t.to(model.device) for t in progress.best["head"])
    head = LinearHead(weight, bias, task.class_names, progress.best.get("normalised", False))
    correct = predict_correct(model, head, task.test, autocast=PRECISIONS[recipe.mixed_precision])
    rows = [row for row in record.rows() if row["event"] == "epoch"]
    result = {
        "title": f"{task.name}: centralised training",
        "metric": "accuracy",
        "test_score": correct.double().mean().item(),
        "test_examples": len(correct),
        "val_score": progress.best_score,
        "val_examples": len(task.val),
        "best_epoch": progress.best_epoch,
        "epochs": len(rows),
        "steps": progress.step,
        "stopped_early": len(rows) < recipe.epochs,
        "seconds": sum(row["seconds"] for row in rows),
        "config": dict(config),
    }
    facts = {
        **asdict(recipe),
        "base": {"id": config["base"], "fingerprint": config["base_fingerprint"]},
        "task": task.name,
        "num_steps": progress.best_epoch * math.ceil(len(task.train) / recipe.batch_size),
        "num_examples": len(task.train),
        "num_classes": len(task.class_names),
        "epochs": progress.best_epoch,
        "val_score": progress.best_score,
        "config": dict(config),
    }
    with atomic_folder(out / "model", overwrite=True) as folder:
        save_encoder(model.encoder, folder)
        save_head(head, folder / HEAD_FILE)
        (folder / TRAINING_JSON).write_text(json.dumps(facts, indent=2) + "\n")
    write_json(out / "result.json", result)
