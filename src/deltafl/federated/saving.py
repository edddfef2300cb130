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
from deltafl.federated.client import load_state
from deltafl.federated.rounds import Federation
from deltafl.files import atomic_folder
from deltafl.models.net import Net
from deltafl.training import TRAINING_JSON


def save_update(
    folder: Path, client: int, update: Update, base: Mapping[str, Tensor], federation: Federation
) -> None:
    """A client's model after its local steps as `folder/client-K`, beside `folder/base`, what it
    started from.

    Merging these gives the round's new model. The working net is left with other values than
    before.
    """
    start, net = folder / "base", federation.net
    facts = {"task": federation.task.name, "seed": federation.recipe.seed}
    if not start.is_dir():
        load_state(net, base)
        save_net(start, net, facts)
    load_state(net, _after(update, base))
    known = {n: v for n, v in asdict(update.source).items() if n != "name" and v is not None}
    origin = {"id": str(start), "fingerprint": fingerprint(read_layout(start))}
    save_net(folder / f"client-{client}", net, {"base": origin, **facts, **known})


def _after(update: Update, base: Mapping[str, Tensor]) -> Tensors:
    """The client's own parameters: base + delta, which rounds, only where it did not say what they
    are.
    """
    if isinstance(update.delta, Difference):
        return update.delta.tuned
    return {n: base[n] + update.delta[n] for n in base}


def save_net(out: Path, net: Net, facts: Mapping[str, Any]) -> None:
    """The working net as it is and training.json, in the folder `out`, whole or not at all."""
    with atomic_folder(out, overwrite=True) as folder:
        net.save(folder)
        (folder / TRAINING_JSON).write_text(json.dumps(facts, indent=2) + "\n")
