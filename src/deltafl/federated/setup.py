"""Step 0: shards, head and mask, all that is made before the first round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.federated.client import moving
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.server import ServerState
from deltafl.federated.sharding import shard
from deltafl.federated.state import decode
from deltafl.models.flat import FlatModel
from deltafl.models.heads import (
    ZERO_SHOT,
    LinearHead,
    check_head,
    few_per_class,
    load_head,
    random_head,
)
from deltafl.models.ridge import RidgeStatistics, ridge_head
from deltafl.seeding import keyed_generator
from deltafl.sparse.calibration import calibrate
from deltafl.sparse.eligible import eligible
from deltafl.sparse.fisher import FisherSum, diagonal_fisher
from deltafl.sparse.masks import Mask, load_mask, model_hash
from deltafl.tasks.arrays import Task
from deltafl.training.legacy import extract_features, zero_shot_for
from deltafl.training.recipe import PRECISIONS

MASK_FILE = "mask.safetensors"
STATE_FILE = "state/state.safetensors"
HEADS = ("ridge", "probe", "linear")


@dataclass(frozen=True)
class Setting:
    """What step 0 makes and the rounds keep.

    model: the one working model, whose values are those of whoever used it last. head: frozen, or trainable with
    values that come and go likewise. mask None: all coordinates train. shards: rows of `task.train` of each client.
    """

    recipe: FederatedRecipe
    task: Task
    model: FlatModel
    head: LinearHead
    mask: Mask | None
    shards: tuple[Tensor, ...]


def set_up(
    model: FlatModel,
    task: Task,
    recipe: FederatedRecipe,
    shards: tuple[Tensor, ...],
    begun: Path | None,
) -> tuple[Setting, ServerState]:
    """Head and mask, and the state to begin with: the last one that a run `begun` wrote, or the model as it is."""
    if begun is None or not (begun / STATE_FILE).is_file():
        head = make_head(model, task, shards, recipe)
        mask = make_mask(model, head, task, shards, recipe)
        return Setting(recipe, task, model, head, mask, shards), _initial(model, head, recipe)
    head = _head_like(
        model, task, recipe
    )  # must exist before the state that holds a trained one can be read
    state, tensors = decode(begun / STATE_FILE, _initial(model, head, recipe))
    head = replace(head, **{n: t.to(model.device) for n, t in tensors.items()})
    mask = load_mask(begun / MASK_FILE, model_hash(model)) if recipe.sparse else None
    return Setting(recipe, task, model, head, mask, shards), state


def _head_like(model: FlatModel, task: Task, recipe: FederatedRecipe) -> LinearHead:
    count = len(task.class_names)
    weight = torch.zeros(count, model.encoder.feature_dim, device=model.device)
    normalised = recipe.head not in HEADS and (
        recipe.head == ZERO_SHOT or load_head(Path(recipe.head)).normalised
    )
    head = LinearHead(weight, torch.zeros(count, device=model.device), task.class_names, normalised)
    return head.trainable() if recipe.train_head else head


def _initial(model: FlatModel, head: LinearHead, recipe: FederatedRecipe) -> ServerState:
    params = {n: t.detach().clone() for n, t in moving(model, head).items()}
    control = None
    if recipe.local_algorithm == "scaffold":
        control = torch.zeros(
            model.flat.numel() + sum(p.numel() for p in head.parameters()), device=model.device
        )
    return ServerState(0, params, control=control)


def make_shards(task: Task, recipe: FederatedRecipe) -> tuple[Tensor, ...]:
    """Rows of the training split for each client; a function of (seed, sharding), as `deltafl shards` shows them."""
    generator = keyed_generator(recipe.seed, "shards")
    return shard(task.train.labels.cpu(), recipe.shards(), generator)


def make_head(
    model: FlatModel, task: Task, shards: Sequence[Tensor], recipe: FederatedRecipe
) -> LinearHead:
    """The head of step 0, on the model's device, frozen or trainable as the recipe says.

    ridge: every client's (A, b) of its own samples, added by the server: the closed form of the union, strength and
    temperature chosen on validation. probe: logistic regression on all features, its strength chosen on validation.
    zero-shot: CLIP's text tower, with the catalogue's prompts or those of `templates`.

    Raises:
        DeltaflError: a head from a file that does not fit.
    """
    dim, names = model.encoder.feature_dim, task.class_names
    if recipe.head == "linear":
        head = random_head(dim, names, keyed_generator(recipe.seed, "head"))
    elif recipe.head in HEADS:
        autocast = PRECISIONS[recipe.mixed_precision]
        features = extract_features(model, task.train, autocast=autocast).cpu()
        val, val_labels = (
            extract_features(model, task.val, autocast=autocast).cpu(),
            task.val.labels.cpu(),
        )
        labels = task.train.labels.cpu()
        if recipe.head == "probe":
            from deltafl.models.probe import probe_head

            rows = torch.cat(list(shards)).sort().values
            head = LinearHead.of(probe_head(features[rows], labels[rows], val, val_labels, names))
        else:
            total = None
            for rows in _known(shards, labels, recipe):
                own = RidgeStatistics.of(features[rows], labels[rows], len(names))
                total = own if total is None else total + own
            assert total is not None
            head = LinearHead.of(ridge_head(total, val, val_labels, names))
    elif recipe.head == ZERO_SHOT:
        head = zero_shot_for(model.encoder, task, recipe.templates)
    else:
        head = load_head(Path(recipe.head))
        check_head(head, dim, names, recipe.head)
    head = head.to(model.device)
    return head.trainable() if recipe.train_head else head


def _known(shards: Sequence[Tensor], labels: Tensor, recipe: FederatedRecipe) -> list[Tensor]:
    """Each client's rows; with few_shot only those among so many examples of each class."""
    if recipe.few_shot is None:
        return list(shards)
    few = few_per_class(labels, recipe.few_shot, keyed_generator(recipe.seed, "few-shot"))
    return [rows[torch.isin(rows, few)] for rows in shards]


def make_mask(
    model: FlatModel,
    head: LinearHead,
    task: Task,
    shards: Sequence[Tensor],
    recipe: FederatedRecipe,
) -> Mask | None:
    """The mask of a sparse run, from a file or calibrated: each round asks fresh clients for Fisher sums.

    In round r the server asks the r-th group of a permutation of all clients, as many as take part in a training
    round, each for up to `calibration_examples` of its samples, drawn anew; sums are added, not averaged over clients.

    Raises:
        DeltaflError: a file of another model.
    """
    if not recipe.sparse:
        return None
    if recipe.mask_file is not None:
        return load_mask(recipe.mask_file, model_hash(model))
    frozen = head.frozen()
    groups = calibration_clients(recipe)

    def score(number: int, survivors: Mask | None) -> Tensors:
        total: FisherSum | None = None
        for k in groups[number]:
            key = (recipe.seed, "calibration", number, k)
            order = torch.randperm(len(shards[k]), generator=keyed_generator(*key, "examples"))
            own = diagonal_fisher(
                model,
                frozen,
                task.train,
                shards[k][order[: recipe.calibration_examples]],
                labels=recipe.fisher_labels,  # type: ignore[arg-type]
                draws=recipe.fisher_draws,
                generator=keyed_generator(*key, "labels"),
            )
            total = own if total is None else total + own
        assert total is not None
        return total.mean()

    return calibrate(
        recipe.calibration,
        recipe.calibration_rounds,
        score,
        strategy=recipe.mask_strategy,
        sparsity=recipe.sparsity_ratio,
        scope=recipe.mask_scope,  # type: ignore[arg-type]
        eligible=eligible(model),
        weights=model.tensors(),
        generator=keyed_generator(recipe.seed, "mask"),
        attenuate=recipe.attenuate,
        model=model,
    )


def calibration_clients(recipe: FederatedRecipe) -> list[list[int]]:
    """The clients of each calibration round: no client is asked twice; no rounds where no scores are needed."""
    if not recipe.calibrated:
        return []
    size = recipe.clients_per_round
    order = torch.randperm(
        recipe.num_clients, generator=keyed_generator(recipe.seed, "calibration clients")
    ).tolist()
    return [sorted(order[r * size : (r + 1) * size]) for r in range(recipe.calibration_rounds)]
