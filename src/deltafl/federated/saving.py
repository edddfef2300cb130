"""Models of a run as folders that `merge`, `inspect`, `evaluate` and transformers read."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from deltafl.algebra.deltas import Difference, Update
from deltafl.algebra.tensors import Tensors
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.federated.client import load_params
from deltafl.federated.setup import Setting
from deltafl.files import atomic_folder
from deltafl.models import save_encoder
from deltafl.models.heads import HEAD_FILE, save_head
from deltafl.training import TRAINING_JSON


def save_model(out: Path, setting: Setting, config: Mapping[str, Any], *, steps: int) -> None:
    """The working model as it is, its head and training.json, in the folder `out`, whole or not at all."""
    recipe, task = setting.recipe, setting.task
    facts = {
        "base": {"id": config["base"], "fingerprint": config["base_fingerprint"]},
        "task": task.name,
        "num_steps": steps,
        "num_examples": len(task.train),
        "lr": recipe.lr,
        "momentum": recipe.momentum,
        "seed": recipe.seed,
        "num_classes": len(task.class_names),
        "federated": asdict(recipe),
    }
    _save(out, setting, facts)


def save_update(folder: Path, client: int, update: Update, base: Tensors, setting: Setting) -> None:
    """A client's model after its local steps as `folder/client-K`, beside `folder/base`, what it started from.

    Merging these gives the round's new model. The working model is left with other values than before.
    """
    start = folder / "base"
    facts = {"task": setting.task.name, "seed": setting.recipe.seed}
    if not start.is_dir():
        load_params(setting.model, setting.head, base)
        _save(start, setting, facts)
    load_params(setting.model, setting.head, _after(update, base))
    known = {n: v for n, v in asdict(update.source).items() if n != "name" and v is not None}
    origin = {"id": str(start), "fingerprint": fingerprint(read_layout(start))}
    _save(folder / f"client-{client}", setting, {"base": origin, **facts, **known})


def _after(update: Update, base: Tensors) -> Mapping[str, Tensor]:
    """The client's own parameters: base + delta, which rounds, only where it did not say what they are."""
    if isinstance(update.delta, Difference):
        return update.delta.tuned
    return {n: base[n] + update.delta[n] for n in base}


def _save(out: Path, setting: Setting, facts: Mapping[str, Any]) -> None:
    with atomic_folder(out, overwrite=True) as folder:
        save_encoder(setting.model.encoder, folder)
        save_head(setting.head, folder / HEAD_FILE)
        (folder / TRAINING_JSON).write_text(json.dumps(facts, indent=2) + "\n")
