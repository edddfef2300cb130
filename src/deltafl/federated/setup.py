"""Step 0: shards, head and mask, all that is made before the first round."""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.federated.client import LocalTraining, state_of
from deltafl.federated.recipe import ClientsRecipe, FederatedRecipe
from deltafl.federated.rounds import Federation
from deltafl.federated.scaffold import Controls
from deltafl.federated.server import ServerState
from deltafl.federated.sharding import shard
from deltafl.files import atomic_folder
from deltafl.models import HEAD_FILE, HeadFit, HeadRecipe, Net
from deltafl.seeding import keyed_generator
from deltafl.sparse.calibration import calibrate
from deltafl.sparse.eligible import eligible
from deltafl.sparse.fisher import FisherScorer
from deltafl.sparse.masks import Mask, completed, load_mask, model_hash, save_mask
from deltafl.tasks.task import Task
from deltafl.training.recipe import PRECISIONS
from deltafl.training.record import RunRecord
from deltafl.usercode import find_callable

MASK_FILE = "mask.safetensors"


def make_shards(task: Task, recipe: ClientsRecipe) -> tuple[Tensor, ...]:
    """Ids of the training examples of each client; a function of (seed, sharding), as `deltafl
    shards` shows them.
    """
    generator = keyed_generator(recipe.seed, "shards")
    return shard(task.groups("train"), recipe.sharding, generator)


def fit_head(
    net: Net,
    task: Task,
    shards: Sequence[Tensor],
    recipe: ClientsRecipe,
    head: HeadRecipe | None = None,
) -> None:
    """Make the net ready for the task: the head that the recipe names, or another, fitted on what
    clients hold.
    """
    fit = HeadFit(recipe.seed, shards, PRECISIONS[recipe.mixed_precision])
    net.prepare(task, head or recipe.head, fit)


def begin(
    net: Net, task: Task, recipe: FederatedRecipe, shards: Sequence[Tensor], begun: bool
) -> Federation:
    """Net, mask and client; of a run that has begun those that it keeps in its folder."""
    out = Path(recipe.out or "")
    head, file = recipe.head, out / "state" / HEAD_FILE
    if begun and file.is_file():
        head = head.replace(head=str(file), few_shot=None, templates=None)
    fit_head(net, task, shards, recipe, head)
    mask = make_mask(net, task, shards, recipe, out / MASK_FILE if begun else None)
    own = recipe.local.client
    client = (LocalTraining if own is None else find_callable(own, "client"))(net, task, recipe)
    controls = Controls(out / "state" / "controls")
    return Federation(recipe, net, task, tuple(shards), mask, client, controls)


def new_record(federation: Federation, config: dict[str, Any]) -> None:
    """A folder with an empty record, the mask and the head, in place of an older one, whole or not
    at all.
    """
    recipe = federation.recipe
    with atomic_folder(recipe.out or "", overwrite=recipe.overwrite) as folder:
        RunRecord.create(folder, config)
        (folder / "state").mkdir()
        federation.net.save_head(folder / "state")
        if federation.mask is not None:
            sparse = recipe.sparse
            about = {
                "strategy": sparse.mask_strategy if sparse.mask_file is None else None,
                "file": sparse.mask_file,
            }
            hashed = model_hash(federation.net)
            save_mask(federation.mask, folder / MASK_FILE, hashed, about)


def initial_state(federation: Federation) -> ServerState:
    """The model as it is before the first round."""
    net = federation.net
    has_control = federation.recipe.local.algorithm.has_control
    params = {n: t.clone() for n, t in state_of(net).items()}
    control = torch.zeros_like(net.flat.detach()) if has_control else None
    return ServerState(0, params, control=control)


def make_mask(
    net: Net,
    task: Task,
    shards: Sequence[Tensor],
    recipe: ClientsRecipe,
    file: Path | None = None,
) -> Mask | None:
    """The mask of a sparse run, from a file or calibrated: each round asks fresh clients for
    Fisher sums.

    In round r the server asks the r-th group of a permutation of all clients, as many as take part
    in a training round, each for up to `calibration_examples` of its examples, drawn anew; sums
    are added, not averaged over clients. A trained head is never frozen. file: goes before the
    recipe's.

    Raises:
        DeltaflError: a file of another model.
    """
    sparse = recipe.sparse
    if not sparse.is_sparse:
        return None
    found = file or sparse.mask_file
    if found is not None:
        return load_mask(found, net)[0]
    groups = calibration_clients(recipe)
    scorer = FisherScorer(net, task, sparse.fisher_labels, sparse.fisher_draws)

    def score(number: int) -> Tensors:
        sums, count = [], 0
        for k in groups[number]:
            key = (recipe.seed, "calibration", number, k)
            order = torch.randperm(len(shards[k]), generator=keyed_generator(*key, "examples"))
            ids = shards[k][order[: sparse.calibration_examples]]
            sums.append(scorer(ids, keyed_generator(*key, "labels")))
            count += len(ids)
        return {name: reduce(torch.add, (part[name] for part in sums)) / count for name in sums[0]}

    generator = keyed_generator(recipe.seed, "mask")
    return completed(calibrate(sparse, score, net.trained, eligible(net), generator), net)


def calibration_clients(recipe: ClientsRecipe) -> list[list[int]]:
    """The clients of each calibration round: no client is asked twice; no rounds where no scores
    are needed.
    """
    if not recipe.sparse.is_calibrated:
        return []
    size = recipe.clients_per_round
    order = torch.randperm(
        recipe.sharding.num_clients, generator=keyed_generator(recipe.seed, "calibration clients")
    ).tolist()
    rounds = range(recipe.sparse.calibration_rounds)
    return [sorted(order[r * size : (r + 1) * size]) for r in rounds]
