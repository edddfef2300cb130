"""Step 0: shards, head and mask, all that is made before the first round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.federated.client import Client, ClientUpdate, LocalTraining, state_of
from deltafl.federated.lora import Factors, factors_of
from deltafl.federated.recipe import ClientsRecipe, FederatedRecipe
from deltafl.federated.server import ServerState
from deltafl.federated.sharding import shard
from deltafl.files import atomic_folder, write_atomically
from deltafl.models import HEAD_FILE, HeadFit, Net
from deltafl.models.adapter import add_lora, lora_layers
from deltafl.models.pretrained import recompute_activations
from deltafl.seeding import keyed_generator
from deltafl.sparse.eligible import eligible
from deltafl.sparse.fisher import FisherScorer
from deltafl.sparse.masks import Mask, calibrate, completed, load_mask, model_hash, save_mask
from deltafl.tasks.task import Task
from deltafl.training.record import Row, RunRecord
from deltafl.usercode import find_callable

MASK_FILE = "mask.safetensors"


@dataclass(frozen=True)
class Controls:
    """SCAFFOLD's c_i of each client, in files, for K vectors of the model's size need not fit into
    memory: one for each (client, round), so that a round never overwrites what a resumed run starts
    from.
    """

    folder: Path

    def _files(self, client: int, number: int) -> list[Path]:
        """Of a client, from before a round, the oldest first."""
        past = self.folder / f"{client}-{number:06}"
        return [file for file in sorted(self.folder.glob(f"{client}-*")) if file < past]

    def read(self, client: int, number: int, like: Tensor) -> Tensor:
        """c_i (k,) with which a client begins a round, memory-mapped; 0 where it never took
        part.
        """
        for last in self._files(client, number)[-1:]:
            with safe_open(last, "pt") as file:
                return file.get_tensor("control").to(like.device)
        return torch.zeros_like(like)

    def write(self, client: int, number: int, control: Tensor) -> None:
        """Keep what a client made in a round."""
        data = save({"control": control.cpu().contiguous()})
        write_atomically(self.folder / f"{client}-{number:06}.safetensors", data)

    def prune(self, number: int, num_clients: int) -> None:
        """Delete the files that no round from `number` on, the last on disk, reads."""
        for client in range(num_clients):
            for old in self._files(client, number)[:-1]:
                old.unlink()

    def step(
        self, state: ServerState, updates: Mapping[int, ClientUpdate], num_clients: int
    ) -> ServerState:
        """c <- c + sum_i (c_i+ - c_i) / K, and every c_i+ kept for its client's next round; `state`
        as it is where there is no c.

        Raises:
            DeltaflError: an update without a new control.
        """
        control = state.control
        if control is None:
            return state
        for k, update in updates.items():
            if update.control is None:
                raise DeltaflError(
                    "scaffold needs clients that return their new control; this one's updates "
                    "have none"
                )
            change = update.control - self.read(k, state.round, control)
            control = control + change / num_clients
            self.write(k, state.round, update.control)
        return replace(state, control=control)


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round.

    net: the one working net, whose values are those of whoever used it last. shards: ids of each
    client's training examples. mask None: all coordinates train. loras: of which products count.
    """

    recipe: FederatedRecipe
    net: Net
    task: Task
    shards: Sequence[Tensor]
    mask: Mask | None
    client: Client
    controls: Controls
    loras: Mapping[str, Factors]

    @cached_property
    def trained(self) -> set[str]:
        """Names of the server's parameters that train; the others are float buffers."""
        return {*list(state_of(self.net))[: len(self.net.slices)]}

    @cached_property
    def kept(self) -> int:
        """How many coordinates train."""
        mask = self.mask
        return len(self.net.flat) if mask is None else sum(int(m.sum()) for m in mask.values())

    def initial_state(self) -> ServerState:
        """The model as it is before the first round, which the working net holds."""
        params = {n: t.clone() for n, t in state_of(self.net).items()}
        has_control = self.recipe.local.algorithm.has_control
        control = self.net.flat.new_zeros(self.kept) if has_control else None
        return ServerState(0, params, control=control)


def begin(
    net: Net, task: Task, recipe: FederatedRecipe, shards: Sequence[Tensor], begun: bool
) -> Federation:
    """Net, in float32, mask and client; of a run that has begun those that its folder keeps."""
    net.module.float()
    out, own = recipe.output, recipe.local.client
    loras = dict[str, Factors]()
    if recipe.lora_rank:
        loras = _add_lora(net, recipe)
    mask = prepare(net, task, recipe, shards, out if begun else None)
    client = (LocalTraining if own is None else find_callable(own, "client"))(net, task, recipe)
    controls = Controls(out / "state" / "controls")
    return Federation(recipe, net, task, tuple(shards), mask, client, controls, loras)


def _add_lora(net: Net, recipe: FederatedRecipe) -> dict[str, Factors]:
    """Give the net a LoRA; the factors of which the server combines products."""
    add_lora(net, recipe, recipe.seed)
    names, down = [*lora_layers(net)], recipe.lora_down
    if down == "residual":
        net.moved = tuple(f"{name}.base_layer.weight" for name in names)
    if down != "frozen_a":
        return factors_of(net)
    for name in names:
        net.module.get_parameter(f"{name}.lora_A.default.weight").requires_grad_(False)
    return {}


def new_record(federation: Federation, config: Row) -> None:
    """A folder with an empty record, the mask and the head, in place of an older one, whole or not
    at all.
    """
    recipe, net = federation.recipe, federation.net
    with atomic_folder(recipe.output, overwrite=recipe.overwrite) as folder:
        RunRecord.create(folder, config)
        (folder / "state").mkdir()
        net.save_head(folder / "state")
        if federation.mask is not None:
            file, strategy = recipe.sparse.mask_file, recipe.sparse.mask_strategy
            about = {"strategy": strategy if file is None else None, "file": file}
            save_mask(federation.mask, folder / MASK_FILE, model_hash(net), about)


def make_shards(task: Task, recipe: ClientsRecipe) -> tuple[Tensor, ...]:
    """Ids of the training examples of each client; a function of (seed, sharding), as `deltafl
    shards` shows them.
    """
    generator = keyed_generator(recipe.seed, "shards")
    return shard(task.groups("train"), recipe.sharding, generator)


def prepare(
    net: Net,
    task: Task,
    recipe: ClientsRecipe,
    shards: Sequence[Tensor],
    begun: Path | None = None,
) -> Mask | None:
    """Make the net ready for the task, with a head fitted on what clients hold, and the mask of a
    sparse run, from a file or calibrated: each round asks fresh clients for Fisher sums.

    In round r the server asks the r-th group of a permutation of all clients, as many as take part
    in a training round, each for up to `calibration_examples` of its examples, drawn anew; sums
    are added, not averaged over clients. A trained head is never frozen. begun: the folder of a
    run, whose head and mask these are.

    Raises:
        DeltaflError: no such head, a file of another model.
    """
    head, sparse, seed = recipe.head, recipe.sparse, recipe.seed
    if begun is not None and (file := begun / "state" / HEAD_FILE).is_file():
        head = head.replace(head=str(file), few_shot=None, templates=None)
    net.prepare(task, head, HeadFit(seed, shards, recipe.autocast))
    if recipe.gradient_checkpointing:
        recompute_activations(net.module)
    if not sparse.is_sparse:
        return None
    found = sparse.mask_file if begun is None else begun / MASK_FILE
    if found is not None:
        return load_mask(found, net)[0]
    groups = calibration_clients(recipe)
    scorer = FisherScorer(net, task, sparse.fisher_labels, sparse.fisher_draws)

    def score(number: int) -> Tensors:
        sums, count = [], 0
        for k in groups[number]:
            key = (seed, "calibration", number, k)
            order = torch.randperm(len(shards[k]), generator=keyed_generator(*key, "examples"))
            ids = shards[k][order[: sparse.calibration_examples]]
            sums.append(scorer(ids, keyed_generator(*key, "labels")))
            count += len(ids)
        return {name: reduce(torch.add, (part[name] for part in sums)) / count for name in sums[0]}

    generator = keyed_generator(seed, "mask")
    return completed(calibrate(sparse, score, net.trained, eligible(net), generator), net)


def calibration_clients(recipe: ClientsRecipe) -> list[list[int]]:
    """The clients of each calibration round: no client is asked twice; no rounds where no scores
    are needed.
    """
    if not recipe.sparse.is_calibrated:
        return []
    size, drawn = recipe.clients_per_round, keyed_generator(recipe.seed, "calibration clients")
    order = torch.randperm(recipe.sharding.num_clients, generator=drawn).tolist()
    rounds = range(recipe.sparse.calibration_rounds)
    return [sorted(order[r * size : (r + 1) * size]) for r in rounds]
